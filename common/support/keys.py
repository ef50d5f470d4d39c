"""Keys and certificates that say who somebody is: files, and fingerprints to compare."""

import hashlib
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from common.errors import LinkError
from common.support import files

PrivateKey = ec.EllipticCurvePrivateKey
PublicKey = ec.EllipticCurvePublicKey


def new() -> PrivateKey:
    """A new key of the curve P-384, from the operating system's entropy."""
    return ec.generate_private_key(ec.SECP384R1())


def write_private(path: Path, key: PrivateKey) -> None:
    """A new file that only this user can read, PEM; raises `LinkError` if there is one already."""
    if path.exists():
        remedy = "Keep it: whoever knows its public half would have to be told again."
        raise LinkError(path, expected="no such file yet", got="a key", remedy=remedy)
    files.create(path, private_pem(key), mode=0o600)


def private_pem(key: PrivateKey) -> bytes:
    """A private key as text, for a file that only this user can read."""
    return key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )


def read_private(path: Path) -> PrivateKey:
    """The key in a PEM file; raises `LinkError` if it is none of ours, or others may read it."""
    try:
        key = serialization.load_pem_private_key(_read(path), password=None)
    except (ValueError, TypeError, UnsupportedAlgorithm):
        key = None
    if not isinstance(key, PrivateKey):
        raise LinkError(path, expected="a private key, PEM", got="something else")
    files.check_private(path, path, LinkError)
    return key


def read_public(path: Path) -> PublicKey:
    """The key in a PEM file; raises `LinkError` if it is none of ours."""
    try:
        return parse_public(_read(path))
    except ValueError:
        expected, got = "a public key, PEM", "something else"
        remedy = "Ask the hospital for the .pub file of consilium-client init."
    raise LinkError(path, expected=expected, got=got, remedy=remedy)


def parse_public(text: bytes) -> PublicKey:
    """What `pem` wrote; raises `ValueError` if it is none of ours."""
    try:
        key = serialization.load_pem_public_key(text)
    except (TypeError, UnsupportedAlgorithm):
        key = None
    if not isinstance(key, PublicKey):
        raise ValueError("no key of ours")
    return key


def read_certificate(
    path: Path, expected: str = "a certificate, PEM", remedy: str = ""
) -> x509.Certificate:
    """The certificate in a PEM file; raises `LinkError`, in these words, if there is none."""
    try:
        return x509.load_pem_x509_certificate(path.read_bytes())
    except OSError as ex:
        got: object = ex.strerror
    except ValueError:
        got = "something else"
    raise LinkError(path, expected=expected, got=got, remedy=remedy)


def pem(key: PublicKey) -> bytes:
    """A public key as text, which is also how Flower knows a site."""
    return key.public_bytes(
        serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
    )


def fingerprint(of: PublicKey | x509.Certificate) -> str:
    """SHA-256 of a public key or certificate, 64 hex digits in groups of four."""
    if isinstance(of, x509.Certificate):
        der = of.public_bytes(serialization.Encoding.DER)
    else:
        der = of.public_bytes(
            serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo
        )
    digits = hashlib.sha256(der).hexdigest()
    return " ".join(digits[i : i + 4] for i in range(0, 64, 4))


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as ex:
        expected = "a key that can be read"
        raise LinkError(path, expected=expected, got=ex.strerror) from None
