"""How much a coordinator may send: what the studies that this site joined can need."""

import json
import math
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from threading import Lock
from typing import Any

import httpx

from common.errors import ContractError, LinkError
from common.flower.messages import MessageLimit, limit_message
from common.protocol.backbone import BACKBONE, PIECE
from common.protocol.noised import NOISED
from common.protocol.sums import CANDIDATES, MOST_CANDIDATES, size_sums
from common.protocol.tensors import Shapes
from common.protocol.validate import VALIDATE
from common.support import files

_LARGEST = {
    "/v1/fleet/pull-messages": 2**20,  # an envelope, and the names of up to ten thousand parts
    "/v1/fleet/push-messages": 2**20,
    "/v1/fleet/pull-object": 6 * 2**20,  # an object travels in parts of 5 MiB
}
_SMALL = 64 * 2**10
"""Bytes of an answer, by what was asked, and of any other."""
_STUDIES = 32
"""The last ones joined, whose tensors are expected."""


class CappedStream(httpx.SyncByteStream):
    """The body of an answer, which ends in an error where it goes beyond its limit.

    Args:
      response: Whose body it is, not read yet.
      server: That answers.
    """

    def __init__(self, response: httpx.Response, server: str) -> None:
        self._stream: Any = response.stream
        self._most, self._server = _LARGEST.get(response.request.url.path, _SMALL), server

    def __iter__(self) -> Iterator[bytes]:
        taken = 0
        for data in self._stream:
            taken += len(data)
            if taken > self._most:
                expected, got = f"an answer of at most {self._most} bytes", "a larger one"
                raise LinkError(self._server, expected=expected, got=got)
            yield data

    def close(self) -> None:
        """Hang up on the rest."""
        self._stream.close()


class Meter:
    """Counts the bytes of one message as its parts come; threads may share it.

    Args:
      limit: Of the message.
      parts: That it is said to have.

    Raises:
      ContractError: it is larger, by what is said or what came.
    """

    def __init__(self, limit: MessageLimit, parts: int) -> None:
        self._left, self._lock = limit.size, Lock()
        if parts > limit.parts:
            raise ContractError(f"a message of {parts} parts, where {limit.parts} are plenty")

    def count(self, size: int) -> None:
        """Count a part; raises `ContractError` once there are too many bytes."""
        with self._lock:
            self._left -= size
        self.check()

    def check(self) -> None:
        """Raise `ContractError` if too many bytes have come."""
        if self._left < 0:
            raise ContractError("a message larger than the studies of this site can need")


class MessageLimits:
    """The size of the largest message of each kind, also in the next process.

    Args:
      path: Of the file that remembers the tensors of the studies joined.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        try:
            kept = json.loads(path.read_text("ascii"))
            self._known = {
                study: tuple(MessageLimit(*map(int, two)) for two in both)
                for study, both in kept.items()
            }
        except (OSError, ValueError, TypeError, AttributeError):
            self._known = {}

    def expect(self, studies: Mapping[str, Shapes]) -> None:
        """Expect the tensors of studies that this site takes part in."""
        new = {study: _limit(shapes) for study, shapes in studies.items()}
        both = {**self._known, **new}
        if both != self._known:
            self._known = dict(list(both.items())[-_STUDIES:])
            with suppress(OSError):  # a node that starts anew then refuses rounds until it joins
                files.write(self._path, json.dumps(self._known), mode=0o600, durable=False)

    def get(self, kind: str) -> MessageLimit:
        """The limit of a message of this type; without a study joined, no tensors are expected."""
        small = limit_message([PIECE] if kind == BACKBONE else [])
        asked = kind in ("train", "evaluate", CANDIDATES, VALIDATE, *NOISED)
        known = [both[kind == "evaluate"] for both in self._known.values() if asked]
        if kind == CANDIDATES:  # so many heads, each no larger than the tensors of its study
            known = [MessageLimit(MOST_CANDIDATES * size, parts) for size, parts in known]
        sizes, parts = zip(small, *known, strict=True)
        return MessageLimit(max(sizes), max(parts))


def _limit(shapes: Shapes) -> tuple[MessageLimit, MessageLimit]:
    """Of the tensors of a study, and of them with the sums that its head was solved from."""
    tensors = [4 * math.prod(shape) + 256 for shape in shapes.values()]
    heads = [shape for name, shape in shapes.items() if name.endswith("linear.weight")]
    sums = [size for classes, width in heads for size in size_sums(classes, width)]
    return limit_message(tensors), limit_message([*tensors, *sums])
