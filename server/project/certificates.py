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

_KEY, _AUTHORITY = "ca.key", "ca.crt"
"""The authority's key, which may lie elsewhere, and its certificate, which goes to hospitals."""
_SERVER = "server.pem"
"""The server's key and certificate, in one file so that they change together."""

_CA_LASTS, _SERVER_LASTS = timedelta(days=3652), timedelta(days=30)
_DUE, _SOON = timedelta(days=20), timedelta(days=15)
"""With so much left a certificate is renewed, or else warned of."""
_APART = timedelta(days=1)
"""Certificates begin to hold this long ago, for clocks that are behind."""

_LOCAL = ("localhost", "127.0.0.1")


def write_authority(folder: Path, name: str) -> None:
    """Make `ca.key` and `ca.crt`, valid for ten years; raises `LinkError` if there is a key.

    Args:
      folder: The project's folder.
      name: A host of the coordinator, for people to read.
    """
    keys.write_private(folder / _KEY, key := keys.new())
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
    files.write(folder / _AUTHORITY, _pem(unsigned.sign(key, hashes.SHA384())), mode=0o600)


def write_server(
    folder: Path,
    hosts: Sequence[str],
    now: datetime | None = None,
    authority_key: Path | None = None,
) -> None:
    """Make `server.pem`: a new key, and a certificate of it for a month.

    Args:
      folder: The project's folder.
      hosts: Names and addresses by which hospitals reach this machine.
      now: The time at which it begins; by default the present.
      authority_key: Where `ca.key` is; by default in the folder.

    Raises:
      LinkError: the authority's key is not there, or the authority has expired.
    """
    now = now or datetime.now(UTC)
    authority, signing = _authority(folder, authority_key or folder / _KEY)
    key = keys.new()
    subject = _named("Consilium coordinator")
    until = min(now + _SERVER_LASTS, authority.not_valid_after_utc)
    issuer = authority.extensions.get_extension_for_class(x509.SubjectKeyIdentifier).value
    unsigned = (
        _begun(subject, authority.subject, key.public_key(), now, until)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(
            x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(issuer), critical=False
        )
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .add_extension(
            x509.SubjectAlternativeName([_general(host) for host in _all(hosts)]), critical=False
        )
    )
    certificate = _pem(unsigned.sign(signing, hashes.SHA384()))
    files.write(find_server_file(folder), keys.private_pem(key) + certificate, mode=0o600)


def renew_in_time(folder: Path, hosts: Sequence[str]) -> bool:
    """Make a new `server.pem` if the old one will expire and `ca.key` is here; whether it did."""
    due = read_expiry(folder) - datetime.now(UTC) < _DUE and (folder / _KEY).is_file()
    if due:
        write_server(folder, hosts)
    return due


def _authority(folder: Path, path: Path) -> tuple[x509.Certificate, keys.PrivateKey]:
    """The authority's certificate, and the key to sign with."""
    certificate = keys.read_certificate(find_authority_file(folder))
    if not path.is_file():
        remedy = "Say where you keep it: renew --authority-key PATH."
        raise LinkError(path, expected="the authority's key", got="none", remedy=remedy)
    key = keys.read_private(path)
    if key.public_key() != certificate.public_key():
        expected = f"the key of {find_authority_file(folder)}"
        raise LinkError(path, expected=expected, got="another")
    _refuse_expired_authority(folder, certificate)
    return certificate, key


def find_authority_file(folder: Path) -> Path:
    """Find the certificate file that every hospital needs."""
    return folder / _AUTHORITY


def find_server_file(folder: Path) -> Path:
    """Find the file with the server's key and certificate."""
    return folder / _SERVER


def check_certificate(folder: Path, hosts: Sequence[str]) -> list[str]:
    """List the defects of the server's certificate; the list is empty if all is well.

    Raises:
      LinkError: no hospital would accept it.
    """
    authority, path = keys.read_certificate(find_authority_file(folder)), find_server_file(folder)
    renew, now = f"consilium-server renew --project {folder}", datetime.now(UTC)
    certificate = keys.read_certificate(path, remedy=f"Run: {renew}")
    key = keys.read_private(path)
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
        away = "" if (folder / _KEY).is_file() else " --authority-key PATH"
        warnings.append(f"The certificate expires on {until:%Y-%m-%d}. Run: {renew}{away}")
    missing = [host for host in hosts if _general(host) not in _names(certificate)]
    if missing:
        warnings.append(f"The certificate is not for {', '.join(missing)}. Run: {renew}")
    return warnings


def read_expiry(folder: Path) -> datetime:
    """Read the time at which the server's certificate expires."""
    return keys.read_certificate(find_server_file(folder)).not_valid_after_utc


def read_names(folder: Path) -> set[str]:
    """Read the names and addresses that the server's certificate is for, in small letters."""
    names = _names(keys.read_certificate(find_server_file(folder)))
    return {str(name.value).lower() for name in names}


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


def _pem(certificate: x509.Certificate) -> bytes:
    return certificate.public_bytes(serialization.Encoding.PEM)
