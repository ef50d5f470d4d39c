"""How a site's training patients are protected in a study; settled once, at join."""

import math
from functools import lru_cache

from client.privacy.accountant import DpEvent, find_noise_multiplier
from client.privacy.parameters import Count, PrivateRelease
from client.site import Site
from common.config.study import DpSgd, Study
from common.config.yaml import Section
from common.errors import RefusedError

_calibrated = lru_cache(maxsize=128)(find_noise_multiplier)


class PrivacyPlan(Section):
    """DP-SGD as a site runs it; no number of it depends on who trains there."""

    round: PrivateRelease
    """Of one round."""
    rounds: Count
    """So many at most, the spare ones among them."""
    enrolled: Count
    """About how many patients train, as the hospital declares."""

    @property
    def batch(self) -> float:
        """Patients expected in a step, which every step is divided by."""
        return self.round.sample_rate * self.enrolled

    @property
    def whole(self) -> DpEvent:
        """All steps of all rounds."""
        one = self.round
        return DpEvent(one.noise_multiplier, one.sample_rate, one.steps * self.rounds)


def plan_privacy(site: Site, study: Study, privacy: DpSgd) -> PrivacyPlan:
    """The least noise that keeps all rounds of a study, and the spare ones, within its ε.

    From constants alone: the study's, and `enrolled_patients`, which the hospital declares.

    Raises:
      RefusedError: the site declares no such number, or no noise is enough.
    """
    enrolled, train = site.data.enrolled_patients, study.train
    if enrolled is None:
        where, expected = f"{site.source}: data", "enrolled_patients"
        remedy = "Set it to about the number of patients who train here, and leave it so."
        raise RefusedError(where, expected=expected, got="nothing", remedy=remedy)
    batch = min(train.batch_size, enrolled)
    rate = batch / enrolled
    steps = train.local_steps or (train.local_epochs or 1) * math.ceil(enrolled / batch)
    rounds = train.rounds + privacy.spare_rounds
    sigma = _calibrated(
        epsilon=privacy.epsilon, delta=privacy.delta, sample_rate=rate, steps=steps * rounds
    )
    one = PrivateRelease(
        mechanism=privacy.mechanism,
        noise_multiplier=sigma,
        sample_rate=rate,
        steps=steps,
        delta=privacy.delta,
        clip_norm=privacy.clip_norm,
    )
    return PrivacyPlan(round=one, rounds=rounds, enrolled=enrolled)
