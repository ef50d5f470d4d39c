"""Requests signed whole: who asks what of whom, when, and this once."""

import hashlib
import secrets
from base64 import b64decode, b64encode
from time import time_ns as read_clock
from typing import NamedTuple

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec

from common.support import keys

HEADER = "consilium-signature"
"""In which a request carries its signature."""
AHEAD, BEHIND = 5.0, 300.0
"""Seconds that the clock of who signs may be off the server's."""
_ALGORITHM = ec.ECDSA(hashes.SHA384())


class Signature(NamedTuple):
    """What a request's header says; nothing of it is to be believed before `check`."""

    public: bytes
    """The key that is said to have signed, as `keys.pem` writes it."""
    time: int
    """Microseconds since 1970 by the clock of who signed."""
    nonce: str
    """Never the same twice."""
    body: str
    """SHA-256 of the request's body."""
    proof: bytes

    @classmethod
    def read(cls, text: str) -> "Signature":
        """What `sign_request` gave; raises `ValueError` if it is none."""
        public, when, nonce, body, proof = text.split(" ")
        if not (when.isascii() and when.isdigit() and len(when) <= 18 and len(nonce) == 32):
            raise ValueError("no stamp")
        whole = b64decode(public, validate=True), b64decode(proof, validate=True)
        return cls(whole[0], int(when), nonce, body, whole[1])

    def check(self, method: str, path: str, host: str) -> keys.PublicKey:
        """The key that signed a request of this method and path to this host.

        Raises:
          ValueError: it did not sign it, or is none of ours.
        """
        key = keys.parse_public(self.public)
        if keys.pem(key) != self.public:  # what was signed does not cover how its key is written
            raise ValueError("a key that is written otherwise")
        text = _text(method, path, host, self.time, self.nonce, self.body)
        try:
            key.verify(self.proof, text, _ALGORITHM)
        except InvalidSignature:
            raise ValueError("another request, or another key") from None
        return key


def sign_request(key: keys.PrivateKey, method: str, path: str, host: str, body: bytes) -> str:
    """The value of `HEADER` for one request; no other request, nor the same again, may use it."""
    when, nonce = read_clock() // 1000, secrets.token_hex(16)
    digest = hashlib.sha256(body).hexdigest()
    proof = key.sign(_text(method, path, host, when, nonce, digest), _ALGORITHM)
    public = b64encode(keys.pem(key.public_key())).decode()
    return f"{public} {when} {nonce} {digest} {b64encode(proof).decode()}"


def _text(method: str, path: str, host: str, when: int, nonce: str, body: str) -> bytes:
    lines = ("consilium request", method, path, host, str(when), nonce, body)
    return "\n".join(lines).encode()
