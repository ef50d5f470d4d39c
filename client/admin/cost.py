"""What a study would cost at this site, before anything runs."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from client.consent.cohort import PARTS, count_by_class, count_patients, cut_records
from client.consent.holdout import check_holdout
from client.consent.policy import check_policy, check_sums, gives_sums
from client.ledger.budget import check_budget, check_studies
from client.ledger.entries import Entry, find_beginnings
from client.ledger.ledger import read_ledger
from client.ledger.spending import Spending
from client.privacy.accountant import DpEvent
from client.privacy.plan import PrivacyPlan, plan_privacy
from client.site import Site
from client.storage import keeps_secret
from common.config.study import Private, Study
from common.errors import BudgetError, DataError, RefusedError

_MOST_NOISE = 10.0
_MOST_NOISE_PER_BATCH = 0.1
_ROWS = 6
_USUAL_SIDE = 224


@dataclass(frozen=True)
class Noise:
    """How a private study is protected here, and what it costs.

    Attributes:
      privacy_plan: Of all queries.
      study: The id of the study.
      before: What the site has spent on all studies.
      unaffordable: Why the site cannot pay for it; None if it can.
    """

    privacy_plan: PrivacyPlan
    study: str
    before: Spending
    unaffordable: str | None

    @property
    def stops(self) -> Iterator[tuple[str, float]]:
        """ε of everything: now, and after each query; of many rounds, after a few of them.

        Raises:
          RefusedError: no finite bound was found.
        """
        yield "now", self.before.total((), self.study)
        done: list[DpEvent] = []
        for query in self.privacy_plan.queries:
            for times in sorted({1 + (query.times - 1) * k // (_ROWS - 1) for k in range(_ROWS)}):
                spent = self.before.total([*done, query.after(times)], self.study)
                yield (f"round {times}" if query.kind == "round" else query.kind), spent
            done.append(query.event)

    @property
    def warnings(self) -> Iterator[str]:
        """Why the model would hardly learn from this site, by which rule of thumb."""
        first = self.privacy_plan.queries[0].release
        noise, batch = first.noise_multiplier, self.privacy_plan.batch
        if noise > _MOST_NOISE:
            yield f"σ is above {_MOST_NOISE:g}: too much noise to learn from"
        if noise / batch > _MOST_NOISE_PER_BATCH:
            yield (
                f"σ over the expected batch is {noise / batch:.2g}, above "
                f"{_MOST_NOISE_PER_BATCH:g}: the noise in each number is more than a tenth of all "
                "that a batch can teach"
            )


@dataclass(frozen=True)
class Cost:
    """What a study means at this site.

    Attributes:
      training: Patients that would train.
      images: Of theirs.
      room: Bytes that prepared images may take.
      sums: Whether this site tells sums of features.
      refusal: Why this site's policy says no; None if it agrees.
      noise: None for a study without privacy, or at a site that only evaluates.
      drawn: Whether this site has drawn who is held out; if not, the numbers are of another draw.
    """

    training: int
    images: int
    room: int
    sums: bool
    refusal: str | None
    noise: Noise | None
    drawn: bool


def estimate_room(study: Study | None, images: int) -> int:
    """Bytes of so many prepared images, as pixels; of a usual side where no study names one."""
    side = (study.images.size if study else None) or _USUAL_SIDE
    return 3 * side * side * images * (study.images.augment.views if study else 1)


def estimate_cost(site: Site, study: Study) -> Cost:
    """Look, and change nothing: no image is decoded, no weights are needed.

    Raises:
      ConsiliumError: the site's data cannot be read, or its ledger is damaged.
    """
    if keeps_secret(site.state):
        return _estimate(site, study, drawn=True)
    with TemporaryDirectory() as folder:  # a secret for this look alone
        away = site.model_copy(update={"state": Path(folder)})
        return _estimate(away, study, drawn=False)


def _estimate(site: Site, study: Study, *, drawn: bool) -> Cost:
    cut, entries = cut_records(site, study), read_ledger(site.state)
    records, room = cut.train, estimate_room(study, sum(len(getattr(cut, p)) for p in PARTS))
    training, refusal, noise = count_patients(records), None, None
    by_class = count_by_class(records, study)
    if isinstance(study.privacy, Private) and site.role == "train":
        if not training:
            where, expected = f"{site.source}: data", "at least one training patient"
            raise DataError(where, expected=expected, got=0)
        noise = _noise(site, study, study.privacy, entries)
    try:
        check_studies(find_beginnings(entries), site, study)
        check_holdout(site, study)
        check_policy(site, study, noise.privacy_plan if noise else None, training, len(records))
        check_sums(site, study, by_class)
    except RefusedError as ex:
        refusal = str(ex)
    sums = gives_sums(site, study, by_class)
    return Cost(training, len(records), room, sums, refusal, noise, drawn)


def _noise(site: Site, study: Study, privacy: Private, entries: Sequence[Entry]) -> Noise:
    privacy_plan = plan_privacy(site, study, privacy)
    try:
        check_budget(entries, site, study, privacy, privacy_plan.whole)
        unaffordable = None
    except BudgetError as ex:
        unaffordable = str(ex)
    delta = site.policy.delta or privacy.delta
    before = Spending.of(entries, delta, site.policy.max_epsilon)
    return Noise(privacy_plan, study.id, before, unaffordable)
