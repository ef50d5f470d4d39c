"""The project's own authority, and the certificate by which hospitals know its server."""

import ipaddress
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from common.errors import LinkError
from common.support import files, keys

AUTHORITY, SERVER = "ca", "server"
"""Names of the two key pairs: `.key` stays here, `ca.crt` goes to hospitals."""

_CA_LASTS, _SERVER_LASTS = timedelta(days=3652), timedelta(days=730)
_SOON = timedelta(days=30)
_APART = timedelta(days=1)
"""Certificates begin to hold this long ago, for clocks that are behind."""

_LOCAL = ("localhost", "127.0.0.1")


def write_authority(folder: Path, name: str) -> None:
    """Make `ca.key` and `ca.crt`, valid for ten years; raises `LinkError` if there is a key.

    Args:
      folder: The project's folder.
      name: A host of the coordinator, for people to read.
    """
    keys.write_private(folder / f"{AUTHORITY}.key", key := keys.new())
    subject = _named(f"Consilium authority of {name}"[:64])
    usage = x509.KeyUsage(
        key_cert_sign=True,
        crl_sign=True,
        digital_signature=False,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )
    now = datetime.now(UTC)
    unsigned = (
        _begun(subject, subject, key.public_key(), now, now + _CA_LASTS)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(usage, critical=True)
    )
    _write(folder / f"{AUTHORITY}.crt", unsigned.sign(key, hashes.SHA384()))


def write_server(folder: Path, hosts: Sequence[str], now: datetime | None = None) -> None:
    """Make `server.crt`, valid for two years, and `server.key` unless there is one.

    Args:
      folder: The project's folder.
      hosts: Names and addresses by which hospitals reach this machine.
      now: The time at which it begins; by default the present.

    Raises:
      LinkError: the authority's key is not here, or the authority has expired.
    """
    now = now or datetime.now(UTC)
    authority, signing = _authority(folder)
    path = folder / f"{SERVER}.key"
    if not path.exists():
        keys.write_private(path, keys.new())
    subject = _named("Consilium coordinator")
    public = keys.read_private(path).public_key()
    until = min(now + _SERVER_LASTS, authority.not_valid_after_utc)
    issuer = authority.extensions.get_extension_for_class(x509.SubjectKeyIdentifier).value
    unsigned = (
        _begun(subject, authority.subject, public, now, until)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(
            x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(issuer), critical=False
        )
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .add_extension(
            x509.SubjectAlternativeName([_general(host) for host in _all(hosts)]), critical=False
        )
    )
    _write(folder / f"{SERVER}.crt", unsigned.sign(signing, hashes.SHA384()))


def _authority(folder: Path) -> tuple[x509.Certificate, keys.PrivateKey]:
    """The authority's certificate, and the key to sign with."""
    certificate = keys.read_certificate(folder / f"{AUTHORITY}.crt")
    path = folder / f"{AUTHORITY}.key"
    if not path.is_file():
        remedy = "Put it back from where you keep it."
        raise LinkError(path, expected="the authority's key", got="none", remedy=remedy)
    key = keys.read_private(path)
    if key.public_key() != certificate.public_key():
        expected = f"the key of {find_authority_file(folder)}"
        raise LinkError(path, expected=expected, got="another")
    _refuse_expired_authority(folder, certificate)
    return certificate, key


def find_authority_file(folder: Path) -> Path:
    """Find the certificate file that every hospital needs."""
    return folder / f"{AUTHORITY}.crt"


def check_certificate(folder: Path, hosts: Sequence[str]) -> list[str]:
    """List the defects of the server's certificate; the list is empty if all is well.

    Raises:
      LinkError: no hospital would accept it.
    """
    authority, path = keys.read_certificate(find_authority_file(folder)), folder / f"{SERVER}.crt"
    certificate, key = keys.read_certificate(path), keys.read_private(folder / f"{SERVER}.key")
    renew, now = f"consilium-server renew --project {folder}", datetime.now(UTC)
    _refuse_expired_authority(folder, authority)
    try:
        certificate.verify_directly_issued_by(authority)
        got = "" if certificate.public_key() == key.public_key() else "one for another key"
    except (ValueError, TypeError, InvalidSignature):
        got = "one by another"
    until = certificate.not_valid_after_utc
    if until < now:
        got = f"one that expired on {until:%Y-%m-%d}"
    if got:
        expected = "a certificate by this project's authority"
        raise LinkError(path, expected=expected, got=got, remedy=f"Run: {renew}")
    warnings = []
    if until - now < _SOON:
        warnings.append(f"The certificate expires on {until:%Y-%m-%d}. Run: {renew}")
    missing = [host for host in hosts if _general(host) not in _names(certificate)]
    if missing:
        warnings.append(f"The certificate is not for {', '.join(missing)}. Run: {renew}")
    return warnings


def read_expiry(folder: Path) -> datetime:
    """Read the time at which the server's certificate expires."""
    return keys.read_certificate(folder / f"{SERVER}.crt").not_valid_after_utc


def _refuse_expired_authority(folder: Path, authority: x509.Certificate) -> None:
    end = authority.not_valid_after_utc
    if end < datetime.now(UTC):
        expected, got = "an authority that is valid", f"one that expired on {end:%Y-%m-%d}"
        remedy = "Make a new project by consilium-server init; hospitals need its ca.crt."
        where = find_authority_file(folder)
        raise LinkError(where, expected=expected, got=got, remedy=remedy)


def _begun(
    subject: x509.Name, issuer: x509.Name, public: keys.PublicKey, now: datetime, until: datetime
) -> x509.CertificateBuilder:
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(public)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - _APART)
        .not_valid_after(until)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(public), critical=False)
    )


def _named(name: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])


def _all(hosts: Sequence[str]) -> list[str]:
    return list(dict.fromkeys((*hosts, *_LOCAL)))


def _general(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        return x509.DNSName(host)


def _names(certificate: x509.Certificate) -> list[x509.GeneralName]:
    return list(certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value)


def _write(path: Path, certificate: x509.Certificate) -> None:
    files.write(path, certificate.public_bytes(serialization.Encoding.PEM), mode=0o600)
