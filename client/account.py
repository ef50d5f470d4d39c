"""What a ledger adds up to: ε by study and of the whole site, what was not accounted, what left."""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime

from client import accountant
from client.accountant import Segment
from client.entries import Adopted, Entry, Privacy, Reserved, Sent, adopted, history
from common.errors import BudgetError, complaint

MEANING = (
    "ε bounds, with δ, what all releases together tell of one training patient: whether that "
    "patient, with every image, was added or removed. Validation and test patients it does not "
    "cover."
)
UNACCOUNTED = "not accounted: trained without differential privacy"

_POINTS = 40
"""So many moments of a history are computed for a picture; each takes up to a second."""


@dataclass(frozen=True, kw_only=True)
class Spending:
    """What one study spent.

    Attributes:
      study: Its id.
      name: For people.
      private: The parameters of its private rounds, one entry for each time it drew.
      open: Rounds that left without differential privacy.
    """

    study: str
    name: str
    private: tuple[Privacy, ...]
    open: int

    def epsilon(self, delta: float) -> float:
        """What this study alone would cost; the costs of several do not just add up."""
        return accountant.epsilon([privacy.segment for privacy in self.private], delta)


@dataclass(frozen=True)
class Account:
    """Everything a site has spent.

    Attributes:
      entries: Of its ledger.
      delta: At which ε is told; what was adopted with the ledger takes its part of it.
    """

    entries: Sequence[Entry]
    delta: float

    @classmethod
    def of(cls, entries: Sequence[Entry], delta: float | None = None) -> "Account":
        """At `delta`, if what was adopted leaves any of it; else at the least δ of any release."""
        begun = adopted(entries)
        taken = begun.delta if begun else 0.0
        if delta is not None and delta > taken:
            return cls(entries, delta)
        used = [e.release.privacy.delta for e in _reserved(entries) if e.release.privacy]
        return cls(entries, taken + min(used, default=1e-5))

    @property
    def studies(self) -> list[Spending]:
        """In the order in which they first released something."""
        releases = [e.release for e in self.entries if isinstance(e, Reserved | Sent)]
        private = [(e.release.study, e.release.privacy) for e in _reserved(self.entries)]
        opened = [
            entry.release.study
            for entry in self.entries
            if isinstance(entry, Sent) and entry.release.kind == "round"
            if entry.release.privacy is None
        ]
        names = {release.study: release.name for release in releases}
        return [
            Spending(
                study=study,
                name=name,
                private=tuple(p for of, p in private if of == study and p),
                open=opened.count(study),
            )
            for study, name in names.items()
        ]

    @property
    def adopted(self) -> Adopted | None:
        """What the ledger began with, in place of one that was lost."""
        return adopted(self.entries)

    def epsilon(self, planned: Sequence[Segment] = (), study: str | None = None) -> float:
        """ε of all studies together, or of one, and of what is planned.

        What was adopted adds to it by basic composition; to one study's, if that had begun before.

        Raises:
          RefusedError: no finite bound was found.
          BudgetError: what was adopted has taken all of δ.
        """
        begun, spent = self.adopted, [*history(self.entries, study), *planned]
        if begun is None or (study and study not in begun.studies):
            return accountant.epsilon(spent, self.delta)
        if begun.delta >= self.delta:
            expected, got = f"less than δ = {self.delta:g} adopted with it", f"{begun.delta:g}"
            remedy = "Choose a larger δ (policy.delta, or privacy.delta of the study)."
            raise BudgetError(complaint("ledger", expected=expected, got=got, remedy=remedy))
        return begun.epsilon + accountant.epsilon(spent, self.delta - begun.delta)

    def over_time(self) -> list[tuple[datetime, float]]:
        """Moments, and ε of all that was spent by then; at most a few dozen, the last included."""
        at = [n for n, entry in enumerate(self.entries, 1) if isinstance(entry, Reserved)]
        chosen = {at[(len(at) - 1) * k // (_POINTS - 1)] for k in range(_POINTS)} if at else set()
        if self.adopted:
            chosen.add(1)
        return [
            (when(self.entries[n - 1]), Account(self.entries[:n], self.delta).epsilon())
            for n in sorted(chosen)
        ]


def when(entry: Entry) -> datetime:
    """The moment a line was written."""
    return datetime.fromisoformat(entry.time)


def sent(entries: Sequence[Entry], study: str | None = None) -> list[Sent]:
    """Every message that left, of one study by name or id, or of all."""
    left = [entry for entry in entries if isinstance(entry, Sent)]
    return [e for e in left if study in (None, e.release.name, e.release.study)]


def _reserved(entries: Sequence[Entry]) -> list[Reserved]:
    return [entry for entry in entries if isinstance(entry, Reserved)]
