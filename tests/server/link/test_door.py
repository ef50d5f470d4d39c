"""Stamps: none counts twice, however many come, in bounded memory."""

import time

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


def test_a_stamp_of_an_earlier_process_does_not_count() -> None:
    text = sign_request(keys.new(), "POST", "/path", "host", b"body")
    assert not Stamps().use(Signature.read(text))
