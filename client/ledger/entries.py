"""What a line of the ledger says: what left the hospital, for whom, and how it was protected."""

import hashlib
import secrets
from collections.abc import Collection, Iterable
from typing import Annotated, Literal

from pydantic import Field

from client.privacy.accountant import DpEvent
from client.privacy.parameters import TRAINING, Count, PrivateRelease, TrainingRelease
from common.config.study import Name, Sha256
from common.config.yaml import Section

TIME = "%Y-%m-%dT%H:%M:%SZ"
"""How a line tells when it was written, in UTC: as text, later is larger."""


class Release(Section):
    """What is computed, for which study, from what, and how it is protected."""

    study: Annotated[str, Field(pattern=r"^[0-9a-f]{16}$")]
    name: Name
    """The study's name, for people."""
    kind: Literal["join", "means", "sums", "candidates", "validate", "final"] | TrainingRelease
    round: Count | None = None
    received: Sha256 | None = None
    """SHA-256 of the model received, with the backbone it was put on (`Network.digest`)."""
    privacy: PrivateRelease | None = None
    """None: released without differential privacy."""

    @property
    def key(self) -> str:
        """SHA-256 over all of the above: with the same key, the same reply may leave again."""
        return hashlib.sha256(self.model_dump_json().encode()).hexdigest()


class Contents(Section):
    """What leaves."""

    tensors: dict[str, tuple[int, ...]]
    """Name and shape of each."""
    metrics: tuple[str, ...]
    bytes: int
    sha256: Sha256
    """Of the reply, byte for byte."""


class _Line(Section):
    n: Count
    time: str
    nonce: Annotated[str, Field(pattern=r"^[0-9a-f]{32}$")] = Field(
        default_factory=lambda: secrets.token_hex(16)
    )
    """No two lines are alike: the hash of one can be told, and not tried out."""


class Created(_Line):
    """The first line of a ledger."""

    state: Literal["created"] = "created"


class Adopted(_Line):
    """What was spent, at least, by lines of an earlier ledger that are lost.

    It adds to the history's ε and δ by basic composition. Lines that were not lost stand before it.
    """

    state: Literal["adopted"] = "adopted"
    epsilon: Annotated[float, Field(ge=0)]
    delta: Annotated[float, Field(ge=0, lt=1)]
    studies: tuple[str, ...] = ()
    """Agreed to before: any of them may have spent it, so each must make do with the rest."""


class Reserved(_Line):
    """Written before the first private draw: these steps count as spent, whatever comes after."""

    state: Literal["reserved"] = "reserved"
    key: Sha256
    release: Release


class Sealed(_Line):
    """The exact reply of a private release is in the outbox; sending it costs nothing more."""

    state: Literal["sealed"] = "sealed"
    key: Sha256
    release: Release
    contents: Contents


class Sent(_Line):
    """Written just before a reply leaves, each time it does."""

    state: Literal["sent"] = "sent"
    key: Sha256
    release: Release
    contents: Contents


Entry = Annotated[Created | Adopted | Reserved | Sealed | Sent, Field(discriminator="state")]


def find_adopted(entries: Iterable[Entry]) -> Adopted | None:
    """What was adopted in place of lines that were lost, all added up; None if nothing was."""
    found = [entry for entry in entries if isinstance(entry, Adopted)]
    if not found:
        return None
    summed = {
        "epsilon": sum(entry.epsilon for entry in found),
        "delta": sum(entry.delta for entry in found),
        "studies": tuple(sorted({study for entry in found for study in entry.studies})),
    }
    return found[-1].model_copy(update=summed)


def find_beginnings(entries: Iterable[Entry]) -> dict[str, str]:
    """When a site first answered whether it takes part, by study, in order."""
    joins = (e for e in entries if isinstance(e, Sent) and e.release.kind == "join")
    began: dict[str, str] = {}
    for entry in joins:
        began.setdefault(entry.release.study, entry.time)
    return began


def list_events(
    entries: Iterable[Entry], study: str | None = None, kinds: Collection[str] = TRAINING
) -> tuple[DpEvent, ...]:
    """What was spent, in order: each reservation once, sealed or not; of one study, or of all.

    `Spending` composes over the site: only the history of all studies bounds a patient's ε. The
    kinds of `TRAINING` spend that of training patients, and `final` messages that of held-out ones.
    """
    releases = (entry.release for entry in entries if isinstance(entry, Reserved))
    return tuple(
        r.privacy.event
        for r in releases
        if r.privacy and r.kind in kinds and study in (None, r.study)
    )
