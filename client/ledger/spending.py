"""What a ledger adds up to: ε by study and of the whole site, what was not accounted, what left."""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime

from client.ledger.entries import Adopted, Entry, Reserved, Sent, find_adopted, list_events
from client.privacy import accountant
from client.privacy.accountant import DpEvent
from client.privacy.parameters import TRAINING, PrivateRelease
from common.errors import BudgetError

MEANING = (
    "ε bounds, with δ, what all releases together tell of one training patient: whether that "
    "patient, with every image, was added or removed. Validation and test patients have an ε of "
    "their own, where policy.disclose.epsilon sets one, and none elsewhere."
)
UNACCOUNTED = "not accounted: trained without differential privacy"

_USUAL = 8.0
"""Where a site sets no budget: the one for which the order of its filter is chosen."""
_POINTS = 40
"""So many moments of a history are computed for a picture; each takes up to a second."""


@dataclass(frozen=True, kw_only=True)
class StudySpending:
    """What one study spent.

    Attributes:
      study: Its id.
      name: For people.
      private: The parameters of its private rounds, one entry for each time it drew.
      open: Rounds that left without differential privacy.
    """

    study: str
    name: str
    private: tuple[PrivateRelease, ...]
    open: int

    def epsilon(self, delta: float) -> float:
        """What this study alone would cost; the costs of several do not just add up."""
        return accountant.compute_epsilon([privacy.event for privacy in self.private], delta)


@dataclass(frozen=True)
class Spending:
    """Everything a site has spent.

    Attributes:
      entries: Of its ledger.
      delta: At which ε is told; what was adopted with the ledger takes its part of it.
      budget: Most that all studies together may spend, if the site says so.
    """

    entries: Sequence[Entry]
    delta: float
    budget: float | None = None

    @classmethod
    def of(
        cls, entries: Sequence[Entry], delta: float | None = None, budget: float | None = None
    ) -> "Spending":
        """At `delta`, if what was adopted leaves any of it; else at the least δ of any release."""
        begun = find_adopted(entries)
        taken = begun.delta if begun else 0.0
        if delta is not None and delta > taken:
            return cls(entries, delta, budget)
        used = [e.release.privacy.delta for e in _reserved(entries) if e.release.privacy]
        return cls(entries, taken + min(used, default=1e-5), budget)

    @property
    def studies(self) -> list[StudySpending]:
        """In the order in which they first released something."""
        releases = [e.release for e in self.entries if isinstance(e, Reserved | Sent)]
        private = [(e.release.study, e.release.privacy) for e in _reserved(self.entries)]
        opened = [
            entry.release.study
            for entry in self.entries
            if isinstance(entry, Sent) and entry.release.kind in ("means", "sums", *TRAINING)
            if entry.release.privacy is None and entry.contents.tensors
        ]
        names = {release.study: release.name for release in releases}
        return [
            StudySpending(
                study=study,
                name=name,
                private=tuple(p for of, p in private if of == study and p),
                open=opened.count(study),
            )
            for study, name in names.items()
        ]

    @property
    def adopted(self) -> Adopted | None:
        """What was adopted in place of lines that were lost."""
        return find_adopted(self.entries)

    def alone(self, study: str, planned: Sequence[DpEvent] = ()) -> float:
        """ε of one study and of what is planned in it, by PRV: its parameters are fixed at join.

        If it had begun when the ledger was lost, what was adopted adds to it.

        Raises:
          RefusedError: no finite bound was found.
          BudgetError: what was adopted has taken all of δ.
        """
        begun, spent = self.adopted, [*list_events(self.entries, study), *planned]
        if begun is None or study not in begun.studies:
            return accountant.compute_epsilon(spent, self.delta)
        return begun.epsilon + accountant.compute_epsilon(spent, self._left())

    def total(self, planned: Sequence[DpEvent] = (), study: str = "") -> float:
        """ε of all studies together, and of what is planned in `study`.

        By PRV while there is one study. From the second on, whose parameters a coordinator may have
        chosen in view of what the first released, by a Rényi filter. What was adopted adds to
        either by basic composition.

        Raises:
          RefusedError: no finite bound was found.
          BudgetError: what was adopted has taken all of δ.
        """
        spent, left = [*list_events(self.entries), *planned], self._left()
        before = self.adopted.epsilon if self.adopted else 0.0
        if self._several(study if planned else ""):
            return before + accountant.compute_filtered_epsilon(spent, left, self._order())
        return before + accountant.compute_epsilon(spent, left)

    @property
    def ends(self) -> int:
        """How many times counts of held-out patients were noised."""
        return len(list_events(self.entries, kinds=("final",)))

    def held_out(self) -> float:
        """ε of all that was told of one validation or test patient, by PRV."""
        return accountant.compute_epsilon(list_events(self.entries, kinds=("final",)), self._left())

    def bound(self, study: str = "") -> str:
        """What `total` is computed by, once `study` has begun."""
        return f"a Rényi filter of order {self._order()}" if self._several(study) else "PRV"

    def _several(self, study: str) -> bool:
        private = {e.release.study for e in _reserved(self.entries) if e.release.privacy}
        return len(private | {study} - {""}) > 1

    def _order(self) -> int:
        budget = self.budget or _USUAL
        left = budget - (self.adopted.epsilon if self.adopted else 0.0)
        return accountant.choose_filter_order(left if left > 0 else budget, self._left())

    def _left(self) -> float:
        """The part of δ that what was adopted leaves."""
        if self.adopted is None:
            return self.delta
        if self.adopted.delta >= self.delta:
            expected = f"less than δ = {self.delta:g} adopted with it"
            remedy = "Choose a larger δ (policy.delta, or privacy.delta of the study)."
            got = f"{self.adopted.delta:g}"
            raise BudgetError("ledger", expected=expected, got=got, remedy=remedy)
        return self.delta - self.adopted.delta

    def over_time(self) -> list[tuple[datetime, float]]:
        """Moments, and ε of all that was spent by then; at most a few dozen, the last included."""
        at = [n for n, entry in enumerate(self.entries, 1) if _reserved([entry])]
        chosen = {at[(len(at) - 1) * k // (_POINTS - 1)] for k in range(_POINTS)} if at else set()
        chosen |= {n for n, e in enumerate(self.entries, 1) if isinstance(e, Adopted)}
        return [
            (
                read_time(self.entries[n - 1]),
                Spending(self.entries[:n], self.delta, self.budget).total(),
            )
            for n in sorted(chosen)
        ]


def read_time(entry: Entry) -> datetime:
    """The moment a line was written."""
    return datetime.fromisoformat(entry.time)


def list_sent(entries: Sequence[Entry], study: str | None = None) -> list[Sent]:
    """Every message that left, of one study by name or id, or of all."""
    left = [entry for entry in entries if isinstance(entry, Sent)]
    return [e for e in left if study in (None, e.release.name, e.release.study)]


def _reserved(entries: Sequence[Entry]) -> list[Reserved]:
    """Of training patients; the ends of studies spend nothing of these."""
    return [e for e in entries if isinstance(e, Reserved) and e.release.kind in TRAINING]
