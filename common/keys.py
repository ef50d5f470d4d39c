"""Keys that say who somebody is: files, and short names to compare by eye or telephone."""

import hashlib
import os
from pathlib import Path

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from common import files
from common.errors import LinkError, complaint

PrivateKey = ec.EllipticCurvePrivateKey
PublicKey = ec.EllipticCurvePublicKey


def new() -> PrivateKey:
    """A new key of the curve P-384, from the operating system's entropy."""
    return ec.generate_private_key(ec.SECP384R1())


def write_private(path: Path, key: PrivateKey) -> None:
    """A new file that only this user can read, PEM; raises `LinkError` if there is one already."""
    if path.exists():
        remedy = "Keep it: whoever knows its public half would have to be told again."
        raise LinkError(complaint(path, expected="no such file yet", got="a key", remedy=remedy))
    content = key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )
    files.create(path, content, mode=0o600)


def read_private(path: Path) -> PrivateKey:
    """The key in a PEM file; raises `LinkError` if it is none of ours, or others may read it."""
    try:
        key = serialization.load_pem_private_key(_read(path), password=None)
    except (ValueError, TypeError, UnsupportedAlgorithm):
        key = None
    if not isinstance(key, PrivateKey):
        raise LinkError(complaint(path, expected="a private key, PEM", got="something else"))
    rights = path.stat().st_mode & 0o777
    if os.name == "posix" and rights & 0o077:
        expected, got = "a key that only this user can read", f"mode {rights:03o}"
        raise LinkError(complaint(path, expected=expected, got=got, remedy=f"chmod 600 {path}"))
    return key


def read_public(path: Path) -> PublicKey:
    """The key in a PEM file; raises `LinkError` if it is none of ours."""
    try:
        key = serialization.load_pem_public_key(_read(path))
    except (ValueError, TypeError, UnsupportedAlgorithm):
        key = None
    if not isinstance(key, PublicKey):
        remedy = "Ask the hospital for the .pub file of consilium-client init."
        got = "something else"
        raise LinkError(complaint(path, expected="a public key, PEM", got=got, remedy=remedy))
    return key


def pem(key: PublicKey) -> bytes:
    """A public key as text, which is also how Flower knows a site."""
    return key.public_bytes(
        serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
    )


def fingerprint(key: PublicKey) -> str:
    """SHA-256 of a public key, 64 hex digits in groups of four."""
    der = key.public_bytes(
        serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo
    )
    return grouped(der)


def grouped(der: bytes) -> str:
    """SHA-256 of a key or certificate, 64 hex digits in groups of four."""
    digits = hashlib.sha256(der).hexdigest()
    return " ".join(digits[i : i + 4] for i in range(0, 64, 4))


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as ex:
        expected = "a key that can be read"
        raise LinkError(complaint(path, expected=expected, got=ex.strerror)) from None
