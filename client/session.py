"""One site's part in one study: its images prepared, its network at hand."""

import logging
import re
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

import torch

from client import trainer
from client.cache import prune
from client.data.holdout import Parts, split
from client.data.records import Record
from client.disk import usable
from client.features import Keep, Recipe, prepare
from client.policy import agree
from client.precision import settle
from client.site import Site
from client.trainer import Examples
from common import files, wire
from common.contract import Dtype, Versions
from common.errors import (
    BackboneError,
    ContractError,
    DataError,
    SiteError,
    StudyError,
    complaint,
)
from common.metrics import Counts
from common.network import Network, assemble
from common.seeds import derive
from common.study import Augment, Study
from common.wire import JoinReply, Tensors

log = logging.getLogger(__name__)

PARTS = ("train", "validation", "test")


class Session:
    """A site in a study, ready for rounds.

    Opening it reads the data, cuts it by patient, asks the policy, and runs the frozen prefix over
    every image the cache does not have yet.

    Raises:
      ConsiliumError: whatever keeps this site from taking part, with its remedy.
    """

    def __init__(self, site: Site, study: Study) -> None:
        self.site, self.study = site, study
        self.classes = len(study.classes)
        parts = cut(site, study)
        self._agree(patients(parts.train))
        self.network = assemble(study, _weights(site, study))
        self.device = _device(site.device)
        self.network.model.to(self.device)
        self.precision = settle(
            site.precision,
            study.id,
            self.network.split,
            self.network.preprocess,
            self.device,
            memory=site.cache_folder / "precision.json",
        )
        self.recipe = _recipe(self.network, self.precision.prefix, site.keep)
        self.examples: dict[str, Examples] = {}
        self.patients: dict[str, int] = {}
        self._make_room()
        for part in PARTS:
            self._prepare(part, getattr(parts, part))
        self._make_room()
        self._agree(self.patients["train"])  # again: unreadable images may have been left out

    def _agree(self, trained: int) -> None:
        if self.site.role == "train" and not trained:
            where, expected = f"{self.site.source}: data", "at least one training patient"
            remedy = "Add patients, lower holdout, or set role: evaluate."
            raise DataError(complaint(where, expected=expected, got=trained, remedy=remedy))
        agree(self.site, self.study, trained)

    def _make_room(self) -> None:
        """Delete prepared images of other studies, as far as the site asks for it."""
        folder, cache = self.site.cache_folder, self.site.cache
        prune(folder, limit=cache.limit, days=cache.days, keep={folder / self.recipe.key})

    def _prepare(self, part: str, records: Sequence[Record]) -> None:
        """Keep what rounds need of these records; the images themselves may go."""
        prepared, kept = prepare(
            [record.image for record in records],
            recipe=self.recipe,
            augment=self.study.images.augment if part == "train" else Augment(),
            cache=self.site.cache_folder,
            skip_unreadable=self.study.images.unreadable == "skip",
        )
        labels = torch.tensor([records[i].label for i in kept], dtype=torch.int64)
        self.examples[part] = Examples(prepared, labels)
        self.patients[part] = patients([records[i] for i in kept])

    def joined(self) -> JoinReply:
        """What this site tells the server about itself."""
        counts = {p: e.labels.bincount(minlength=self.classes) for p, e in self.examples.items()}
        return JoinReply(
            name=self.site.name,
            role=self.site.role,
            contract=self.network.contract,
            patients=wire.Parts(**self.patients),
            images=wire.Parts(**{p: tuple(count.tolist()) for p, count in counts.items()}),
            prefix_dtype=self.precision.prefix,
            suffix_dtype=self.precision.suffix,
            versions=Versions.here(),
        )

    def train(self, tensors: Tensors, round_number: int, proximal_mu: float) -> float:
        """Train the received tensors on this site's training patients; returns the mean loss.

        The result is in `self.network.tensors`.
        """
        self.network.load(tensors)
        plan = self.study.train
        return trainer.train(
            self.network.split.suffix,
            self.examples["train"],
            plan,
            classes=self.classes,
            lr=trainer.learning_rate(plan, round_number),
            seed=derive(self.study.seed, self.site.name, round_number, "train"),
            proximal_mu=proximal_mu,
            dtype=self.precision.suffix,
        )

    def evaluate(self, tensors: Tensors, part: str) -> Counts:
        """Counts of the received tensors on one part of this site's patients."""
        self.network.load(tensors)
        return trainer.evaluate(self.network.split.suffix, self.examples[part], self.classes)


def cut(site: Site, study: Study) -> Parts:
    """The site's records, cut by patient; at a site that only evaluates, all are test patients."""
    records = site.data.records(study.classes)
    if site.role == "evaluate":
        return Parts(train=[], validation=[], test=records)
    return split(records, study.holdout, site.secret())


def patients(records: Sequence[Record]) -> int:
    """How many patients these records belong to."""
    return len({record.patient for record in records})


@lru_cache(maxsize=8)
def _recipe(network: Network, dtype: Dtype, keep: Keep) -> Recipe:
    return Recipe.of(network, dtype, keep)


def _weights(site: Site, study: Study) -> str:
    """Where this machine has the study's weights; the study names the file only."""
    name = study.model.weights
    if study.model.weights_file is None:
        return name
    path = site.weights / Path(name).name if site.weights else None
    if path is None or not path.is_file():
        where, expected = f"{site.source}: weights", f"a folder with {Path(name).name}"
        got, remedy = site.weights or "nothing", "Set it to the folder that holds the file."
        raise BackboneError(complaint(where, expected=expected, got=got, remedy=remedy))
    return str(path)


def _device(wanted: str) -> torch.device:
    if wanted != "auto":
        return torch.device(wanted)
    if torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def remember(site: Site, proposal: str) -> Study:
    """Keep an agreed proposal in the state folder, so that rounds need to name only its id.

    Raises:
      ContractError: the proposal is not a valid study.
    """
    study = _parse(proposal)
    folder = site.private("studies")
    with usable(f"{site.source}: state", SiteError):
        files.write(folder / f"{study.id}.json", proposal, mode=0o600)
    return study


def _parse(proposal: str) -> Study:
    try:
        return Study.model_validate_json(proposal)
    except (ValueError, StudyError) as ex:
        raise ContractError(f"the proposal is not a valid study: {ex}") from None


@lru_cache(maxsize=1024)
def open_session(site_file: Path, study_id: str) -> Session:
    """The session of a site in a study it has joined; loaded once per process.

    Raises:
      ContractError: this site never joined that study.
    """
    site = Site.read(site_file)
    path = site.state / "studies" / f"{study_id}.json"
    # The id is a name from the network: one spelling, no path, no second session.
    if not re.fullmatch(r"[0-9a-f]{16}", study_id) or not path.is_file():
        raise ContractError(f"this site has not joined study {study_id!r}")
    return Session(site, _parse(path.read_text(encoding="utf-8")))
