"""Stamps: none counts twice, however many come, in bounded memory."""

import time
from base64 import b64decode, b64encode

import pytest

from common.support import keys
from common.support.signing import Signature, sign_request
from server.link.door import _STAMPS, Stamps


def stamped(when: int, nonce: int, public: bytes = b"east") -> Signature:
    return Signature(public, when, f"{nonce:032x}", "", b"")


def test_a_stamp_counts_once_also_after_it_was_forgotten() -> None:
    stamps, now = Stamps(), time.time_ns() // 1000 + 10**6
    first = stamped(now, 0)
    assert stamps.use(first)
    assert not stamps.use(first)
    assert stamps.use(stamped(now, 1)), "two of one moment"
    assert stamps.use(stamped(now, 0, b"west")), "another site's"
    for i in range(3 * _STAMPS):
        assert stamps.use(stamped(now + 1 + i // 2, i + 2))
    assert not stamps.use(first)
    assert not stamps.use(stamped(now + 5, 10**6)), "older than all that are remembered"
    assert len(stamps._used[b"east"]) == _STAMPS


def test_a_stamp_counts_once_however_its_key_is_written() -> None:
    """PEM has many spellings, and no signature covers the one that is sent along."""
    stamps = Stamps()
    asked = "POST", "/path", "host"
    text = sign_request(keys.new(), *asked, b"body")
    public, *rest = text.split(" ")
    pem = b64decode(public)
    Signature.read(text).check(*asked)
    assert stamps.use(Signature.read(text))
    for other in (pem + b"\n", b"a word\n" + pem, pem.replace(b"\n", b"\r\n"), pem.rstrip()):
        again = Signature.read(" ".join([b64encode(other).decode(), *rest]))
        with pytest.raises(ValueError, match="written otherwise"):
            again.check(*asked)
    assert len(stamps._used) == 1


def test_a_stamp_of_an_earlier_process_does_not_count() -> None:
    text = sign_request(keys.new(), "POST", "/path", "host", b"body")
    assert not Stamps().use(Signature.read(text))
