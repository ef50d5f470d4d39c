"""The hospital's last word: a study is agreed to or refused, never quietly altered."""

import logging
import math
from collections.abc import Iterator
from typing import NamedTuple

from client.features.precision import can_compute, choose_device
from client.privacy.plan import PrivacyPlan
from client.site import Policy, Site
from common.config.study import DpSgd, Study
from common.errors import RefusedError

log = logging.getLogger(__name__)


def check_policy(
    site: Site, study: Study, privacy_plan: PrivacyPlan | None, patients: int, images: int
) -> None:
    """Return if this site takes part in a study; raise `RefusedError` otherwise.

    Args:
      site: Whose policy decides.
      study: The request.
      privacy_plan: Of its private training here, if it is private and this site trains.
      patients: That would train here; 0 at a site that only evaluates.
      images: Of these patients.
    """
    if not can_compute(study.model.precision, device := choose_device(site.device)):
        where, expected = f"{site.source}: device", f"one that computes in {study.model.precision}"
        remedy = "Write device: cpu, or ask the coordinator for model.precision: float32."
        raise RefusedError(where, expected=expected, got=device.type, remedy=remedy)
    if isinstance(study.privacy, DpSgd) and study.privacy.delta * 10 * patients > 1:
        few, delta = f"{patients} training patients", f"δ = {study.privacy.delta:g}"
        log.warning("%s is more than a tenth of 1 / %s: it protects few of them", delta, few)
    # Numbers as coarse as they are told, so that yes and no tell nothing finer.
    base = site.policy.disclose.resolved(private=study.private).base
    fewest, most = max(patients // base * base, min(patients, 1)), -(-images // base) * base
    length = _private_length(privacy_plan) if privacy_plan else _length(study, most)
    for kept, expected, got in _rules(site, study, length, fewest):
        if not kept:
            where = f"{site.source}: policy"
            raise RefusedError(where, expected=expected, got=got)


Rule = tuple[bool, str, object]
"""Whether it is kept, what was expected, and what the study has."""


class Length(NamedTuple):
    """Of one round, however the study asks for it."""

    steps: int
    epochs: float
    batch: float


def _length(study: Study, images: int) -> Length:
    plan = study.train
    epoch = max(math.ceil(images / plan.batch_size), 1)
    steps = plan.local_steps or (plan.local_epochs or 1) * epoch
    return Length(steps, steps / epoch, plan.batch_size)


def _private_length(privacy_plan: PrivacyPlan) -> Length:
    """From constants alone, so that a refusal tells nothing of who trains."""
    one = privacy_plan.round
    return Length(one.steps, one.steps * one.sample_rate, privacy_plan.batch)


def _rules(site: Site, study: Study, length: Length, patients: int) -> Iterator[Rule]:
    policy, model = site.policy, study.model
    yield from _privacy(site, study)
    if policy.backbones is not None:
        allowed = f"backbone to be one of {', '.join(policy.backbones)} (backbones)"
        yield model.backbone in policy.backbones, allowed, model.backbone
    if policy.unfreeze is not None:
        allowed = f"unfreeze to be one of {', '.join(policy.unfreeze)}"
        yield model.unfreeze in policy.unfreeze, allowed, model.unfreeze
    if site.role == "train":
        least = f"at least {policy.min_patients} training patients (min_patients)"
        yield patients >= policy.min_patients, least, patients
        yield from _caps(policy, length)


def _privacy(site: Site, study: Study) -> Iterator[Rule]:
    policy, privacy = site.policy, study.privacy
    if isinstance(privacy, DpSgd):
        epsilon, delta = policy.max_epsilon or math.inf, policy.delta or 1.0
        yield privacy.epsilon <= epsilon, f"ε within {epsilon:g} (max_epsilon)", privacy.epsilon
        yield privacy.delta <= delta, f"δ within {delta:g} (delta)", privacy.delta
    else:
        key = "require_privacy" if policy.require_privacy else "max_epsilon"
        private = f"a study with differential privacy ({key})"
        yield not (policy.require_privacy or policy.max_epsilon), private, "privacy: none"


def _caps(policy: Policy, round_: Length) -> Iterator[Rule]:
    asked = f"{round_.steps} steps, {round_.epochs:g} epochs"
    if (most := policy.max_local_epochs) is not None:
        allowed = f"rounds of at most {most} epochs (max_local_epochs)"
        yield round_.epochs <= most, allowed, asked
    if (most := policy.max_local_steps) is not None:
        yield round_.steps <= most, f"rounds of at most {most} steps (max_local_steps)", asked
    if (most := policy.max_batch_size) is not None:
        allowed = f"batches of at most {most} (max_batch_size)"
        yield round_.batch <= most, allowed, f"{round_.batch:g}"
