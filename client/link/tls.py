"""TLS that trusts one coordinator, and what its failures mean to a person."""

import socket
import ssl
from collections.abc import Mapping
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from threading import Lock
from typing import Any

import httpx
from cryptography import x509

from common.errors import LinkError
from common.support import files, keys

_CERTIFICATE = {
    9: "It is not valid yet: is this machine's clock right?",
    10: "The coordinator makes a new one: consilium-server renew. Is this machine's clock right?",
    62: "Is connect.server in site.yaml the name that the coordinator gave you?",
    64: "Is connect.server in site.yaml the name that the coordinator gave you?",
}
"""By OpenSSL's number of what is wrong with a certificate."""
_NEVER = datetime.min.replace(tzinfo=UTC)
_ANOTHER = "Ask the coordinator for ca.crt; compare fingerprints by telephone: this may be another."


def read_authority(ca: Path) -> x509.Certificate:
    """The coordinator's own, in the file he gave out; raises `LinkError` if it holds none."""
    remedy = "Ask the coordinator for ca.crt."
    return keys.read_certificate(ca, "the coordinator's certificate, PEM", remedy)


def make_context(ca: Path) -> ssl.SSLContext:
    """TLS that trusts one authority, and none of the system's; raises as `read_authority` does."""
    read_authority(ca)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.load_verify_locations(cafile=ca)
    return context


def read_expiry(response: httpx.Response) -> datetime:
    """When the certificate expires of the server that answers, while it does."""
    return _read_time(response.extensions["network_stream"], "notAfter")


def _read_time(stream: Any, which: str) -> datetime:
    certificate = stream.get_extra_info("ssl_object").getpeercert()
    return datetime.fromtimestamp(ssl.cert_time_to_seconds(certificate[which]), UTC)


class NewestCertificate:
    """The beginning of the newest certificate that the server has shown; none older is believed.

    Whoever stole the server's key has its certificate of that time, and cannot make another. It is
    of no more use here once the true server has shown a newer one.

    Args:
      path: Of the file that remembers it; without one, it is forgotten with the process.
    """

    def __init__(self, path: Path | None) -> None:
        self._path, self._lock = path, Lock()
        try:
            self._newest = datetime.fromisoformat(path.read_text("ascii")) if path else _NEVER
        except (OSError, ValueError):
            self._newest = _NEVER

    def check(self, event: str, info: Mapping[str, Any]) -> None:
        """Look at a connection before anything is sent over it, as httpx traces it.

        Raises:
          LinkError: the server shows an older certificate than before.
        """
        if not event.endswith("start_tls.complete"):
            return
        began = _read_time(info["return_value"], "notBefore")
        with self._lock:
            if began < self._newest:
                info["return_value"].close()
                expected = f"a certificate no older than the last, of {self._newest:%Y-%m-%d %H:%M}"
                got = f"one of {began:%Y-%m-%d %H:%M}"
                remedy = "Whoever answers may have stolen it: tell the coordinator, who can renew."
                raise LinkError("the server", expected=expected, got=got, remedy=remedy)
            if began > self._newest and self._path is not None:
                with suppress(OSError):
                    files.write(self._path, began.isoformat(), mode=0o600)
            self._newest = began


def explain_failure(failure: httpx.RequestError, server: str, ca: Path) -> LinkError:
    """What it means that there was no answer.

    Args:
      failure: What happened.
      server: That was asked.
      ca: The file of the authority that was trusted.
    """
    cause: BaseException | None = failure
    while cause is not None and not isinstance(cause, ssl.SSLError | socket.gaierror):
        cause = cause.__cause__ or cause.__context__
    if isinstance(cause, ssl.SSLCertVerificationError):
        expected, got = f"a certificate that {ca} vouches for", cause.verify_message
        remedy = _CERTIFICATE.get(cause.verify_code, _ANOTHER)
    elif isinstance(cause, ssl.SSLError):
        expected, got = "a coordinator, which speaks TLS", "something else"
        remedy = "Is connect.server in site.yaml the address that the coordinator gave you?"
    elif isinstance(cause, socket.gaierror):
        expected, got = "a name that this machine can look up", "an unknown one"
        remedy = "Is connect.server in site.yaml right, and does DNS work here?"
    else:
        expected, got = "an answer", "none"
        remedy = "Is the coordinator up, and may this machine connect to it?"
    return LinkError(server, expected=expected, got=got, remedy=remedy)
