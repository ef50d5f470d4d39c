"""How a site's training patients are protected in a study; settled once, at join."""

import math
from dataclasses import replace
from functools import lru_cache

from client.privacy.accountant import DpEvent, scale_noise
from client.privacy.parameters import Count, PrivateRelease, TrainingRelease
from client.site import Site
from common.config.study import DpSgd, Private, Study
from common.config.yaml import Section
from common.errors import RefusedError
from common.heads.whitening import MOMENTS_NORM, MOMENTS_SHARE, PROTOTYPES_NORM

_scaled = lru_cache(maxsize=128)(scale_noise)


class Query(Section):
    """What a private study asks of training patients, once or more often."""

    kind: TrainingRelease
    release: PrivateRelease
    """Of each answer."""
    times: Count = 1
    """So many at most, the spare ones among them."""

    @property
    def event(self) -> DpEvent:
        """All answers."""
        return self.after(self.times)

    def after(self, times: int) -> DpEvent:
        """So many answers."""
        one = self.release.event
        return replace(one, steps=one.steps * times)


class PrivacyPlan(Section):
    """All that a site answers about who trains there; no number of it depends on who does."""

    queries: tuple[Query, ...]
    """In the order in which they are asked."""
    enrolled: Count
    """About how many patients train, as the hospital declares."""

    def find(self, kind: str) -> Query:
        """The query of this kind, which must be planned."""
        return next(query for query in self.queries if query.kind == kind)

    @property
    def round(self) -> PrivateRelease:
        """A round of DP-SGD."""
        return self.find("round").release

    @property
    def batch(self) -> float:
        """Patients expected in a step, which every step of DP-SGD is divided by."""
        return self.queries[0].release.sample_rate * self.enrolled

    @property
    def whole(self) -> list[DpEvent]:
        """All answers to all queries."""
        return [query.event for query in self.queries]


def plan_privacy(site: Site, study: Study, privacy: Private) -> PrivacyPlan:
    """The least noise that keeps all queries of a study, and the spare rounds, within its ε.

    From constants alone: the study's, and `enrolled_patients`, which the hospital declares.

    Raises:
      RefusedError: the site declares no such number, or no noise is enough.
    """
    enrolled = site.data.enrolled_patients
    if enrolled is None:
        where, expected = f"{site.source}: data", "enrolled_patients"
        remedy = "Set it to about the number of patients who train here, and leave it so."
        raise RefusedError(where, expected=expected, got="nothing", remedy=remedy)
    queries = (
        _plan_rounds(study, privacy, enrolled)
        if isinstance(privacy, DpSgd)
        else _plan_sums(privacy.delta)
    )
    events = tuple(query.event for query in queries)
    factor = _scaled(events, privacy.epsilon, privacy.delta)
    return PrivacyPlan(queries=tuple(_scale(q, factor) for q in queries), enrolled=enrolled)


def _scale(query: Query, factor: float) -> Query:
    one = query.release
    update = {"noise_multiplier": factor * one.noise_multiplier}
    return query.model_copy(update={"release": one.model_copy(update=update)})


def _plan_sums(delta: float) -> list[Query]:
    """Two sums over all patients, each with its share of the budget."""

    def one(norm: float, share: float) -> PrivateRelease:
        return PrivateRelease(
            mechanism="gaussian",
            noise_multiplier=1 / math.sqrt(share),
            sample_rate=1.0,
            steps=1,
            delta=delta,
            clip_norm=norm,
        )

    return [
        Query(kind="moments", release=one(MOMENTS_NORM, MOMENTS_SHARE)),
        Query(kind="prototypes", release=one(PROTOTYPES_NORM, 1 - MOMENTS_SHARE)),
    ]


def _plan_rounds(study: Study, privacy: DpSgd, enrolled: int) -> list[Query]:
    """Rounds of equal steps, each on patients who are drawn for it."""
    train = study.train
    batch = min(train.batch_size, enrolled)
    one = PrivateRelease(
        mechanism=privacy.mechanism,
        noise_multiplier=1.0,
        sample_rate=batch / enrolled,
        steps=train.local_steps or (train.local_epochs or 1) * math.ceil(enrolled / batch),
        delta=privacy.delta,
        clip_norm=privacy.clip_norm,
    )
    return [Query(kind="round", release=one, times=train.rounds + privacy.spare_rounds)]
