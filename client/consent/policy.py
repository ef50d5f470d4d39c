"""The hospital's last word: a study is agreed to or refused, never quietly altered."""

import hashlib
import hmac
import logging
import math
from collections.abc import Iterator
from typing import Literal, NamedTuple, Self

from client.data.records import Record
from client.features.precision import chosen, computes
from client.privacy.plan import Protection
from client.site import Policy, Site
from client.storage import usable
from common.config.study import DpSgd, Study
from common.config.yaml import Section
from common.errors import RefusedError, SiteError
from common.protocol.disclosure import Disclosure
from common.protocol.wire import Parts
from common.support import files

log = logging.getLogger(__name__)


class Agreement(Section):
    """What a site agreed to when it joined a study; everything after that obeys it."""

    study: str
    """Its id."""
    role: Literal["train", "evaluate"]
    disclosure: Disclosure
    protection: Protection | None
    """None: it does not train, or trains without differential privacy."""
    patients: Parts[int]
    """How many take part, exactly; never told unless `disclosure` says so."""
    images: Parts[tuple[int, ...]]
    """How many of each class take part, exactly."""
    records: tuple[str, ...]
    """Who may take part: `identity` of all that did when this site first joined, sorted."""

    @classmethod
    def kept(cls, site: Site, study: str) -> Self | None:
        """What this site agreed to; None if it has not joined that study.

        Raises:
          SiteError: the file cannot be read, or is damaged.
        """
        path = site.state / "studies" / f"{study}.agreement.json"
        with usable(path, SiteError):
            text = path.read_bytes() if path.is_file() else None
        try:
            return None if text is None else cls.model_validate_json(text)
        except ValueError:
            remedy = "Restore it from a backup: it says who takes part in the study."
            expected, got = "an agreement as written", "something else"
            raise SiteError(path, expected=expected, got=got, remedy=remedy) from None

    def keep(self, site: Site) -> None:
        """Write it into the state folder; on disk before this returns."""
        path = site.private("studies") / f"{self.study}.agreement.json"
        with usable(path, SiteError):
            files.write(path, self.model_dump_json(indent=1), mode=0o600)


def same_holdout(site: Site, study: Study) -> None:
    """Return if a private study holds out the shares that every private one here does.

    With other shares, those told of validation and test would add up to who trains; and who trains
    in one would be a test patient of another, whom no noise protects.

    Raises:
      RefusedError: an earlier one held out others.
    """
    path = site.state / "holdout.json"
    with usable(path, SiteError):
        text = path.read_bytes() if path.is_file() else None
    if text is not None and study.private and text != _shares(study):
        where, got = "holdout", _shares(study).decode()
        expected = f"that of the private studies before, {text.decode()}"
        raise RefusedError(where, expected=expected, got=got)


def keep_holdout(site: Site, study: Study) -> None:
    """From its first private study on, a site holds out the same patients in all of them."""
    path = site.private() / "holdout.json"
    with usable(path, SiteError):
        if study.private and not path.exists():
            files.write(path, _shares(study), mode=0o600)


def _shares(study: Study) -> bytes:
    return study.holdout.model_dump_json().encode()


def identity(record: Record, part: str, site: Site, secret: bytes) -> str:
    """Names an image of a patient in a part, with its label, to nobody without the secret.

    Wherever the data is mounted; another label or part is another name.
    """
    name = record.image.name.removeprefix(str(site.data.root))
    text = "\0".join((part, record.patient, name, str(record.label)))
    return hmac.digest(secret, b"record:" + text.encode(), hashlib.sha256).hex()[:32]


def agree(
    site: Site, study: Study, protection: Protection | None, patients: int, images: int
) -> None:
    """Return if this site takes part in a study; raise `RefusedError` otherwise.

    Args:
      site: Whose policy decides.
      study: The request.
      protection: Of its private training here, if it is private and this site trains.
      patients: That would train here; 0 at a site that only evaluates.
      images: Of these patients.
    """
    if not computes(study.model.precision, device := chosen(site.device)):
        where, expected = f"{site.source}: device", f"one that computes in {study.model.precision}"
        remedy = "Write device: cpu, or ask the coordinator for model.precision: float32."
        raise RefusedError(where, expected=expected, got=device.type, remedy=remedy)
    if isinstance(study.privacy, DpSgd) and study.privacy.delta * 10 * patients > 1:
        few, delta = f"{patients} training patients", f"δ = {study.privacy.delta:g}"
        log.warning("%s is more than a tenth of 1 / %s: it protects few of them", delta, few)
    # Numbers as coarse as they are told, so that yes and no tell nothing finer.
    base = site.policy.disclose.resolved(private=study.private).base
    fewest, most = max(patients // base * base, min(patients, 1)), -(-images // base) * base
    length = _private_length(protection) if protection else _length(study, most)
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


def _private_length(protection: Protection) -> Length:
    """From constants alone, so that a refusal tells nothing of who trains."""
    one = protection.round
    return Length(one.steps, one.steps * one.sample_rate, protection.batch)


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
