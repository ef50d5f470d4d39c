"""The hospital's last word: a study is agreed to or refused, never quietly altered."""

import hashlib
import hmac
import logging
import math
from collections.abc import Iterator
from typing import Literal, Self

from client.data.records import Record
from client.disk import usable
from client.site import Site
from common import files
from common.contract import Dtype
from common.disclosure import Disclosure
from common.errors import RefusedError, SiteError, complaint
from common.study import DpSgd, Study
from common.wire import Parts
from common.yaml import Section

log = logging.getLogger(__name__)


class Agreement(Section):
    """What a site agreed to when it joined a study; everything after that obeys it."""

    study: str
    """Its id."""
    role: Literal["train", "evaluate"]
    disclosure: Disclosure
    privacy: DpSgd | None
    """None: trained without differential privacy."""
    prefix_dtype: Dtype
    """What the frozen prefix computes in."""
    suffix_dtype: Dtype
    """What the trained suffix computes in."""
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
            got = "something else"
            raise SiteError(
                complaint(path, expected="an agreement as written", got=got, remedy=remedy)
            ) from None

    def keep(self, site: Site) -> None:
        """Write it into the state folder; on disk before this returns."""
        path = site.private("studies") / f"{self.study}.agreement.json"
        with usable(path, SiteError):
            files.write(path, self.model_dump_json(indent=1), mode=0o600)


def identity(record: Record, part: str, site: Site, secret: bytes) -> str:
    """Names an image of a patient in a part, with its label, to nobody without the secret.

    Wherever the data is mounted; another label or part is another name.
    """
    name = record.image.name.removeprefix(str(site.data.root))
    text = "\0".join((part, record.patient, name, str(record.label)))
    return hmac.digest(secret, b"record:" + text.encode(), hashlib.sha256).hex()[:32]


def agree(site: Site, study: Study, patients: int, images: int) -> None:
    """Return if this site takes part in a study; raise `RefusedError` otherwise.

    Args:
      site: Whose policy decides.
      study: The request.
      patients: That would train here; 0 at a site that only evaluates.
      images: Of these patients.
    """
    if isinstance(study.privacy, DpSgd) and study.privacy.delta * 10 * patients > 1:
        few, delta = f"{patients} training patients", f"δ = {study.privacy.delta:g}"
        log.warning("%s is more than a tenth of 1 / %s: it protects few of them", delta, few)
    # Numbers as coarse as they are told, so that yes and no tell nothing finer.
    base = site.policy.disclose.resolved(private=study.private).base
    fewest, most = max(patients // base * base, min(patients, 1)), -(-images // base) * base
    for kept, expected, got in _rules(site, study, fewest, most):
        if not kept:
            where = f"{site.source}: policy"
            raise RefusedError(complaint(where, expected=expected, got=got))


Rule = tuple[bool, str, object]
"""Whether it is kept, what was expected, and what the study has."""


def _rules(site: Site, study: Study, patients: int, images: int) -> Iterator[Rule]:
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
        yield from _caps(site, study, images)
    # The one line to delete once there is a client/dp_sgd.py.
    yield not study.private, "a study without dp_sgd: this release has no dp_sgd yet", "dp_sgd"


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


def _caps(site: Site, study: Study, images: int) -> Iterator[Rule]:
    """A round's length in steps and in epochs of this site's images, however it is asked for."""
    policy, plan = site.policy, study.train
    epoch = math.ceil(images / plan.batch_size)
    steps = plan.local_steps or (plan.local_epochs or 1) * epoch
    asked = f"{steps} steps, {steps / max(epoch, 1):g} epochs"
    if (most := policy.max_local_epochs) is not None:
        yield steps <= most * epoch, f"rounds of at most {most} epochs (max_local_epochs)", asked
    if (most := policy.max_local_steps) is not None:
        yield steps <= most, f"rounds of at most {most} steps (max_local_steps)", asked
    if (most := policy.max_batch_size) is not None:
        size = plan.batch_size
        yield size <= most, f"batches of at most {most} (max_batch_size)", size
