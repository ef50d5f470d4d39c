"""A site made ready for one study: who takes part, and their images as the suffix reads them."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from client.consent.agreement import Agreement
from client.consent.cohort import PARTS, count_by_class, count_patients, list_cohort, name_record
from client.consent.holdout import check_holdout
from client.consent.policy import check_policy, check_sums, gives_sums
from client.data.records import Record
from client.features.cache import prune_stores
from client.features.extract import FeatureSpec, prepare_images
from client.features.precision import choose_device
from client.features.store import Stores
from client.privacy.held_out import choose_images, plan_end
from client.privacy.plan import PrivacyPlan, plan_privacy
from client.privacy.sampling import Patients
from client.site import Keep, Site
from client.training.dataset import Examples
from client.weights import find_weights
from common.config.study import Augment, Private, Study
from common.errors import DataError
from common.model.network import Network, assemble
from common.protocol.disclosure import Disclosure
from common.protocol.fields import ByPart

log = logging.getLogger(__name__)


class Workspace:
    """What the sites of one process share while they prepare: one network, specs, stores.

    The network is the one last asked for. Whoever uses it loads its own tensors first.
    """

    def __init__(self) -> None:
        self.stores = Stores()
        self._networks: dict[tuple[str, str], Network] = {}
        self._specs: dict[tuple[bool, Keep], FeatureSpec] = {}

    def network(self, study: Study, weights: str) -> Network:
        """The network of a study, assembled once as long as no other is asked for."""
        key = study.proposal(), weights
        if key not in self._networks:
            self._specs.clear()
            self._networks = {key: assemble(study, weights)}
        return self._networks[key]

    def spec(self, network: Network, study: Study, keep: Keep) -> FeatureSpec:
        """How rows are made for this network, the last that was asked for."""
        key = study.private, keep
        if key not in self._specs:
            precision = study.model.precision
            self._specs[key] = FeatureSpec.of(network, precision, keep, private=study.private)
        return self._specs[key]


@dataclass(frozen=True, kw_only=True, eq=False)
class PreparedSite:
    """A site with all that rounds of one study need; nothing of it changes, but the network.

    Attributes:
      site: As its file said when it was opened.
      study: The one it is prepared for.
      network: Shared with others: load tensors before each use.
      spec: How rows were made from images.
      examples: Prepared images with their labels, by part.
      readable: Which of the records that take part they are of, by position, by part.
      owners: Which training images are whose.
      tested: Which test images are whose.
      drawn: Of validation and test patients, the one image each that counts where noise is added.
      agreed: What the site agreed to when it joined before; None if it has not joined.
      offer: What the site would agree to as it is now, if nobody new is let in.
    """

    site: Site
    study: Study
    network: Network
    spec: FeatureSpec
    examples: Mapping[str, Examples]
    readable: Mapping[str, Sequence[int]]
    owners: Patients
    tested: Patients
    drawn: Mapping[str, Tensor]
    agreed: Agreement | None
    offer: Agreement

    @property
    def privacy_plan(self) -> PrivacyPlan | None:
        """How training patients are protected; None without privacy, or where none train."""
        return self.offer.privacy_plan

    def list_records(self, part: str) -> list[Record]:
        """List the records of the examples of a part, in their order.

        They are read anew each time: a site that is prepared keeps no image.
        """
        listed = list_cohort(self.site, self.study, self.agreed)[part]
        return [listed[i] for i in self.readable[part]]

    @property
    def disclosure(self) -> Disclosure:
        """What the site tells, as its policy says now."""
        return self.offer.disclosure


def prepare_site(site: Site, study: Study, workspace: Workspace) -> PreparedSite:
    """Read the data, cut it by patient, ask the policy, and prepare what the cache lacks.

    A site that joined the study before goes on with the patients it joined with: others that came
    later are left out.

    Args:
      site: The hospital.
      study: As it was proposed.
      workspace: Of this process.

    Raises:
      ConsiliumError: whatever keeps this site from taking part, with its remedy.
    """
    agreed = Agreement.kept(site, study.id)
    privacy_plan = agreed.privacy_plan if agreed else _privacy_plan(site, study)
    check_holdout(site, study)
    cohort = list_cohort(site, study, agreed)
    _check(site, study, privacy_plan, cohort["train"])
    network = workspace.network(study, find_weights(site, study))
    if network.frozen:
        log.info("not trained with privacy: %s", ", ".join(network.frozen))
    network.model.to(choose_device(site.device))
    spec = workspace.spec(network, study, site.keep)
    _make_room(site, spec)
    prepared = {
        part: _prepare(part, cohort[part], site, study, spec, workspace.stores) for part in PARTS
    }
    _make_room(site, spec)
    examples = {part: found for part, (found, _) in prepared.items()}
    kept = {part: [cohort[part][i] for i in at] for part, (_, at) in prepared.items()}
    _check(site, study, privacy_plan, kept["train"])  # again: unreadable images may be left out
    return PreparedSite(
        site=site,
        study=study,
        network=network,
        spec=spec,
        examples=examples,
        readable={part: at for part, (_, at) in prepared.items()},
        owners=Patients.of([record.patient for record in kept["train"]]),
        tested=Patients.of([record.patient for record in kept["test"]]),
        drawn={
            part: choose_images([record.patient for record in kept[part]], site.secret())
            for part in ("validation", "test")
        },
        agreed=agreed,
        offer=_offer(site, study, privacy_plan, kept, agreed),
    )


def _privacy_plan(site: Site, study: Study) -> PrivacyPlan | None:
    if not isinstance(study.privacy, Private) or site.role != "train":
        return None
    return plan_privacy(site, study, study.privacy)


def _check(
    site: Site, study: Study, privacy_plan: PrivacyPlan | None, training: Sequence[Record]
) -> None:
    """Return if the site takes part with these training records; raise otherwise."""
    patients = count_patients(training)
    if site.role == "train" and not patients:
        where, expected = f"{site.source}: data", "at least one training patient"
        remedy = "Add patients, lower holdout, or set role: evaluate."
        raise DataError(where, expected=expected, got=patients, remedy=remedy)
    check_policy(site, study, privacy_plan, patients, len(training))
    check_sums(site, study, count_by_class(training, study))


def _make_room(site: Site, spec: FeatureSpec) -> None:
    """Delete prepared images of other studies, as far as the site asks for it."""
    folder: Path = site.cache_folder
    prune_stores(folder, limit=site.cache.limit, days=site.cache.days, keep={folder / spec.key})


def _prepare(
    part: str,
    records: Sequence[Record],
    site: Site,
    study: Study,
    spec: FeatureSpec,
    stores: Stores,
) -> tuple[Examples, list[int]]:
    """The examples of one part, and the positions of their records; the images may go."""
    prepared, kept = prepare_images(
        [record.image for record in records],
        spec=spec,
        augment=study.images.augment if part == "train" else Augment(),
        cache=site.cache_folder,
        stores=stores,
        skip_unreadable=study.images.unreadable == "skip",
    )
    labels = torch.tensor([records[i].label for i in kept], dtype=torch.int64)
    return Examples(prepared, labels), kept


def _offer(
    site: Site,
    study: Study,
    privacy_plan: PrivacyPlan | None,
    kept: Mapping[str, Sequence[Record]],
    agreed: Agreement | None,
) -> Agreement:
    secret, classes = site.secret(), range(len(study.classes))
    names = [name_record(r, part, site, secret) for part, found in kept.items() for r in found]
    images = {
        part: tuple(sum(r.label == k for r in records) for k in classes)
        for part, records in kept.items()
    }
    disclosure, delta = site.policy.disclose.resolved(private=study.private), site.policy.delta
    if not gives_sums(site, study, count_by_class(kept["train"], study)):
        disclosure = disclosure.model_copy(update={"sums": "none"})
    if not (study.adapt and site.adapt and site.role == "train"):
        disclosure = disclosure.model_copy(update={"adapted": False})
    return Agreement(
        study=study.id,
        role=site.role,
        disclosure=disclosure,
        protection=privacy_plan,  # its name in the file
        end=plan_end(disclosure.epsilon, delta) if disclosure.epsilon and delta else None,
        patients=ByPart(**{part: count_patients(records) for part, records in kept.items()}),
        images=ByPart(**images),
        records=agreed.records if agreed else tuple(sorted(names)),
    )
