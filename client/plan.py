"""What a study would cost at this site, before anything runs."""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

from client.account import Account
from client.accountant import Segment, noise_multiplier
from client.budget import afford
from client.ledger import read
from client.policy import agree
from client.session import cut, patients
from client.site import Site
from common.errors import BudgetError, DataError, RefusedError, complaint
from common.study import DpSgd, Study

_MOST_NOISE = 10.0
_MOST_NOISE_PER_BATCH = 0.1
_ROWS = 6


@dataclass(frozen=True)
class Noise:
    """How a private study is protected here, and what it costs.

    Attributes:
      privacy: What the study asks for.
      plan: All its steps: of every round and every spare one.
      rounds: So many.
      batch: Patients expected in a step.
      before: What the site has spent on all studies.
      unaffordable: Why the site cannot pay for it; None if it can.
    """

    privacy: DpSgd
    plan: Segment
    rounds: int
    batch: float
    before: Account
    unaffordable: str | None

    def after(self, rounds: int) -> float:
        """ε of everything, so many rounds on.

        Raises:
          RefusedError: no finite bound was found.
        """
        steps = self.plan.steps // self.rounds * rounds
        return self.before.epsilon([replace(self.plan, steps=steps)] if steps else [])

    @property
    def shown(self) -> list[int]:
        """A few rounds to tell ε after, the first and the last among them."""
        stops = {1 + (self.rounds - 1) * k // (_ROWS - 1) for k in range(_ROWS)}
        return sorted(stops)

    @property
    def warnings(self) -> Iterator[str]:
        """Why the model would hardly learn from this site, by which rule of thumb."""
        noise = self.plan.noise_multiplier
        if noise > _MOST_NOISE:
            yield f"σ is above {_MOST_NOISE:g}: too much noise to learn from"
        if noise / self.batch > _MOST_NOISE_PER_BATCH:
            yield (
                f"σ over the expected batch is {noise / self.batch:.2g}, above "
                f"{_MOST_NOISE_PER_BATCH:g}: the noise in each number is more than a tenth of all "
                "that a batch can teach"
            )


@dataclass(frozen=True)
class Plan:
    """What a study means at this site.

    Attributes:
      training: Patients that would train.
      images: Of theirs.
      refusal: Why this site's policy says no; None if it agrees.
      noise: None for a study without privacy, or at a site that only evaluates.
    """

    training: int
    images: int
    refusal: str | None
    noise: Noise | None


def plan(site: Site, study: Study) -> Plan:
    """Look, and change nothing: no image is decoded, no weights are needed.

    Raises:
      ConsiliumError: the site's data cannot be read, or its ledger is damaged.
    """
    records = cut(site, study).train
    training, refusal, noise = patients(records), None, None
    try:
        agree(site, study, training, len(records))
    except RefusedError as ex:
        refusal = str(ex)
    if isinstance(study.privacy, DpSgd) and site.role == "train":
        if not training:
            where, expected = f"{site.source}: data", "at least one training patient"
            raise DataError(complaint(where, expected=expected, got=0))
        noise = _noise(site, study, study.privacy, training)
    return Plan(training, len(records), refusal, noise)


def _noise(site: Site, study: Study, privacy: DpSgd, training: int) -> Noise:
    """For all rounds: the study alone keeps to its ε, and all studies together to the site's."""
    train, batch = study.train, min(study.train.batch_size, training)
    each = train.local_steps or (train.local_epochs or 1) * math.ceil(training / batch)
    rounds, rate = train.rounds + privacy.spare_rounds, batch / training
    steps, delta = each * rounds, privacy.delta
    sigma = noise_multiplier(epsilon=privacy.epsilon, delta=delta, sample_rate=rate, steps=steps)
    entries, planned = read(site.state), Segment(sigma, rate, steps)
    try:
        afford(entries, site, study, privacy, planned)
        unaffordable = None
    except BudgetError as ex:
        unaffordable = str(ex)
    before = Account.of(entries, site.policy.delta or delta)
    return Noise(privacy, planned, rounds, batch, before, unaffordable)
