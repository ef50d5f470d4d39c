"""The only way out for whatever is computed on patients: reserve, seal, send.

Errors, too, have a line before their public code leaves. Only messages that nothing of a patient is
in have none: how much of the backbone is here by now, a hash of the ledger, that a study is one too
many or not approved, and that a message breaks the protocol. That the backbone is lacking has one:
the policy and the patients would let the site take part.
"""

import hashlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass

from client.ledger.entries import Contents, Release
from client.ledger.ledger import Ledger
from client.ledger.outbox import Outbox
from common.errors import ConsiliumError, ContractError, SiteError, WaitingError


@dataclass(frozen=True)
class Reply:
    """What is about to leave: its exact bytes, and what they hold."""

    data: bytes
    tensors: Mapping[str, tuple[int, ...]]
    """Name and shape of each."""
    metrics: tuple[str, ...] = ()

    @property
    def contents(self) -> Contents:
        """As the ledger records it."""
        return Contents(
            tensors=dict(self.tensors),
            metrics=self.metrics,
            bytes=len(self.data),
            sha256=hashlib.sha256(self.data).hexdigest(),
        )


@contextmanager
def record_errors(ledger: Ledger, what: Release) -> Iterator[None]:
    """Write the line of any error inside before its public code leaves, as it may tell of patients.

    That a person has not decided tells nothing of them, nor that a message breaks the protocol.
    A disk that fails may be the ledger's own: then there is no line, and it tells of the disk.
    """
    try:
        yield
    except (ContractError, WaitingError):
        raise
    except Exception as ex:
        code = ex.code if isinstance(ex, ConsiliumError) else ConsiliumError.code
        told = Reply(code.encode(), {}, (code,)).contents
        with suppress(SiteError) if isinstance(ex, SiteError) else nullcontext():
            ledger.send(what.model_copy(update={"privacy": None}), told)
        raise


def release(
    ledger: Ledger,
    outbox: Outbox,
    what: Release,
    work: Callable[[], Reply],
    allow: Callable[[], None] = lambda: None,
) -> bytes:
    """The bytes that may leave for `what`, recorded; the only way out of the hospital.

    Args:
      ledger: Of the site.
      outbox: Of the site.
      what: The release.
      work: Computes the reply. If `what` is private, its steps are spent as soon as this is called.
      allow: Raises to refuse a private release before anything is spent; the place for the budget
        and for every check that needs no draw. Not asked when a sealed reply is sent again.

    Raises:
      SiteError: the disk refuses; nothing may leave.
    """
    if what.privacy is None:
        reply = work()
        ledger.send(what, reply.contents)
        return reply.data
    contents = ledger.sealed(what)
    data = outbox.read(what, contents) if contents else None
    if contents is None or data is None:
        allow()
        ledger.reserve(what)
        reply = work()
        data, contents = reply.data, reply.contents
        # A kill between these two leaves a file no line vouches for: never sent, but written over.
        outbox.write(what, data)
        ledger.seal(what, contents)
    ledger.send(what, contents)
    return data
