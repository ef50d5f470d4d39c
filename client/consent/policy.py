"""The hospital's last word: a study is agreed to or refused, never quietly altered."""

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from client.features.precision import can_compute, choose_device
from client.privacy.accountant import compute_epsilon
from client.privacy.plan import PrivacyPlan
from client.privacy.rounding import Rounding
from client.site import Policy, Site
from common.config.study import Privacy, Private, Study
from common.errors import RefusedError


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
    # Numbers as coarse as they are told, so that yes and no tell nothing finer.
    base = site.policy.disclose.resolved(private=study.private).base
    most = -(-images // base) * base
    length = _private_length(privacy_plan) if privacy_plan else _length(study, most)
    rules = [*_asked(site.policy, study)]
    if site.role == "train":
        fewest = Rounding(site.secret(), base).lower_number(patients, "patients")
        rules += _trained(site.policy, length, max(fewest, min(patients, 1)))
    if privacy_plan:
        rules += [_protected(study.privacy, privacy_plan), *_affordable(site.policy, privacy_plan)]
    elif site.role == "train" and not study.private:
        rules.append(_unprotected(site.policy, length, _fewest(images, base)))
    for rule in rules:
        if not rule.kept:
            where, remedy = f"{site.source}: policy", f"Ask the coordinator for {rule.instead}"
            if rule.key:
                where, remedy = f"{where}.{rule.key}", f"{remedy}, or change policy.{rule.key}"
            raise RefusedError(where, expected=rule.expected, got=rule.got, remedy=f"{remedy}.")


def gives_sums(site: Site, study: Study, patients: Sequence[int]) -> bool:
    """Whether this site tells sums of features to a study, for a head that is solved from them.

    Args:
      site: Whose policy decides.
      study: The request.
      patients: That would train here, of each class.
    """
    asked = study.model.solved_head is not None and not study.private  # these are noised
    least = _least(site, study)
    few = min((n for n in patients if n), default=0)
    return asked and site.role == "train" and least is not None and few >= least


def _least(site: Site, study: Study) -> int | None:
    """Patients of a class at least for sums; None where none are told."""
    sums = site.policy.disclose.resolved(private=study.private).sums
    return None if sums == "none" else sums


def check_sums(site: Site, study: Study, patients: Sequence[int]) -> None:
    """Return if this site can take part: without sums, it can where rounds follow.

    Raises:
      RefusedError: the study is of sums alone, and a class has too few patients, or none are told.
    """
    solved = study.model.head != "linear" and not study.private
    if not solved or site.role != "train" or gives_sums(site, study, patients):
        return
    least, few = _least(site, study), min((n for n in patients if n), default=0)
    expected = f"sums over {least} patients of a class or more" if least else "no sums"
    remedy = (
        "Ask the coordinator for head: linear, which this site can join without sums, for privacy, "
        "or for secure aggregation, which hides one site's sums; or change policy.disclose.sums."
    )
    where, got = f"{site.source}: policy.disclose.sums", f"sums over {few}"
    raise RefusedError(where, expected=expected, got=got, remedy=remedy)


def _fewest(number: int, base: int) -> int:
    """Rounded down, as coarsely as numbers are told, but for the step from none to one."""
    return max(number // base * base, min(number, 1))


class Rule(NamedTuple):
    """One thing that the policy asks of a study."""

    kept: bool
    key: str
    """Of the policy; empty for what no hospital can allow."""
    expected: str
    got: object
    instead: str
    """What to ask the coordinator for, where it is not kept."""


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
    one = privacy_plan.queries[0].release
    return Length(one.steps, one.steps * one.sample_rate, privacy_plan.batch)


def _asked(policy: Policy, study: Study) -> Iterator[Rule]:
    """What is of the study alone, whoever the patients are."""
    model, privacy = study.model, study.privacy
    if isinstance(privacy, Private):
        delta = policy.delta or 1.0
        allowed, less = f"δ within {delta:g}", "a smaller privacy.delta"
        yield Rule(privacy.delta <= delta, "delta", allowed, privacy.delta, less)
    else:
        key = "require_privacy" if policy.require_privacy else "max_epsilon"
        allowed = "a study with differential privacy"
        kept = not (policy.require_privacy or policy.max_epsilon)
        yield Rule(kept, key, allowed, "privacy: none", "privacy, such as preset: head")
    if policy.backbones is not None:
        allowed = f"one of {', '.join(policy.backbones)}"
        kept = model.backbone in policy.backbones
        yield Rule(kept, "backbones", allowed, model.backbone, "another model.backbone")
    if policy.unfreeze is not None:
        allowed = f"one of {', '.join(policy.unfreeze)}"
        kept = model.unfreeze in policy.unfreeze
        yield Rule(kept, "unfreeze", allowed, model.unfreeze, "another model.unfreeze")
    held = round(study.holdout.validation + study.holdout.test, 9)
    allowed = f"at most {policy.max_holdout:g} of the patients held out"
    yield Rule(held <= policy.max_holdout, "max_holdout", allowed, held, "a smaller holdout")


def _trained(policy: Policy, round_: Length, patients: int) -> Iterator[Rule]:
    least = f"at least {policy.min_patients} training patients"
    kept = patients >= policy.min_patients
    yield Rule(kept, "min_patients", least, patients, "a smaller holdout")
    asked, fewer = f"{round_.steps} steps, {round_.epochs:g} epochs", "shorter rounds"
    if (most := policy.max_local_epochs) is not None:
        allowed = f"rounds of at most {most} epochs"
        yield Rule(round_.epochs <= most, "max_local_epochs", allowed, asked, fewer)
    if (most := policy.max_local_steps) is not None:
        allowed = f"rounds of at most {most} steps"
        yield Rule(round_.steps <= most, "max_local_steps", allowed, asked, fewer)
    if (most := policy.max_batch_size) is not None:
        allowed, got = f"batches of at most {most}", f"{round_.batch:g}"
        kept = round_.batch <= most
        yield Rule(kept, "max_batch_size", allowed, got, "a smaller train.batch_size")


def _affordable(policy: Policy, privacy_plan: PrivacyPlan) -> Iterator[Rule]:
    """At the policy's δ, which every study here is counted at, not at the study's own."""
    if policy.max_epsilon is not None and policy.delta is not None:
        epsilon = compute_epsilon(privacy_plan.whole, policy.delta)
        allowed = f"ε within {policy.max_epsilon:g} at δ = {policy.delta:g}"
        kept, less = epsilon <= policy.max_epsilon, "a smaller privacy.epsilon"
        yield Rule(kept, "max_epsilon", allowed, f"{epsilon:.4g}", less)


def _protected(privacy: Privacy, privacy_plan: PrivacyPlan) -> Rule:
    """A mechanism that tells all of one patient in 1 / δ has that δ: it would protect nobody."""
    delta, enrolled = privacy.delta if isinstance(privacy, Private) else 0.0, privacy_plan.enrolled
    most = 1 / (10 * enrolled)
    allowed = f"δ of at most {most:g}, a tenth of 1 / enrolled_patients ({enrolled})"
    return Rule(delta <= most, "", allowed, delta, f"a privacy.delta of at most {most:g}")


def _unprotected(policy: Policy, round_: Length, images: int) -> Rule:
    """An update made of one image holds its activation and its label, as if they were sent."""
    least, in_round = policy.min_images, min(images, round(round_.steps * round_.batch))
    expected = f"rounds of at least {least} different images without privacy"
    more = "longer rounds, larger batches or privacy"
    return Rule(in_round >= least, "min_images", expected, in_round, more)
