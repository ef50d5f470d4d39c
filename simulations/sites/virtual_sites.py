"""Virtual hospitals: the same files a real one has, written into the run folder.

Each gets `sites/<name>/site.yaml` and a state folder of its own, so that the client runs exactly as
it would beside real data. The one difference: the secret that keys the holdout comes from the
study's seed, so that a simulation can be repeated.
"""

import hashlib
import logging
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from client.consent.cohort import PARTS, count_patients
from client.consent.exclusions import drop_excluded, exclude_patient
from client.consent.proposals import keep_proposal
from client.data.records import Record
from client.data.registry import Data, guess_format
from client.data.splits import Parts, split_records
from client.ledger.ledger import read_ledger
from client.ledger.spending import Spending
from client.runtime import Runtime
from client.site import Policy, Site
from common.config.study import NAME, NAMED, Study
from common.config.yaml import dump
from common.errors import DataError, RefusedError, RunError, SiteError
from common.protocol.disclosure import Disclosure
from common.support import files
from common.support.seeds import derive
from server.rounds.strategies import count_least_replies
from simulations.sites import partition

log = logging.getLogger(__name__)

OPEN = Policy(
    approve="policy",
    min_images=1,
    max_holdout=1,
    max_studies=None,
    disclose=Disclosure(counts="exact", sums=1, adapted=True),
)
"""A virtual hospital keeps nothing from the researcher, whose data it is."""


@dataclass(frozen=True, kw_only=True)
class VirtualSite:
    """A virtual hospital, as a simulation knows it before it has files."""

    name: str
    data: Data
    patients: tuple[str, ...] | None = None
    """The hospital's patients, where a data set is cut into hospitals."""
    site: Site | None = None
    """The folder's own site file, if it has one: its role, policy and ways to compute count."""
    evaluates_only: bool = False
    listed: Sequence[Record] | None = field(default=None, repr=False, compare=False)
    """The records of the whole data set, where they are listed already."""

    @property
    def trains(self) -> bool:
        """Whether it takes part in rounds."""
        return not self.evaluates_only and (self.site is None or self.site.role == "train")


@dataclass(frozen=True, kw_only=True)
class PlannedSite:
    """A virtual hospital whose patients have their parts.

    Attributes:
      hospital: The virtual hospital.
      secret: The secret that keys its holdout, from the study's seed.
      forgotten: The patients whom the real hospital leaves out, and the virtual one does, too.
      images: The number of images of each class, by part.
      training: The number of patients that train.
    """

    hospital: VirtualSite
    secret: bytes
    forgotten: tuple[str, ...]
    images: Mapping[str, list[int]]
    training: int


def find_site(path: Path, *, evaluates_only: bool = False) -> VirtualSite:
    """Find the hospital in a folder of images, or in a folder that holds a `site.yaml`."""
    own = path / "site.yaml" if path.is_dir() else path
    if own.suffix == ".yaml" and own.is_file():
        site = Site.read(own)
        return VirtualSite(name=site.name, data=site.data, site=site, evaluates_only=evaluates_only)
    place = path.resolve()
    name = place.stem if place.is_file() else place.name
    data = guess_format(place)
    if not re.fullmatch(NAME, name):
        expected = f"a folder whose name can name the site ({NAMED})"
        remedy = "Rename it, or put a site.yaml with a name into it."
        raise SiteError(f"--site {path}", expected=expected, got=name, remedy=remedy)
    return VirtualSite(name=name, data=data, evaluates_only=evaluates_only)


def cut_pool(path: Path, study: Study, *, spec: str, sites: int) -> list[VirtualSite]:
    """Cut one data set into `sites` hospitals by patient; see `simulations.sites.partition`."""
    data = guess_format(path.resolve())
    records = data.records(study.classes)
    labels = partition.label_patients(records)
    groups = partition.cut_patients(labels, sites=sites, spec=spec, seed=study.seed)
    width = len(str(sites))
    return [
        VirtualSite(name=f"site-{i:0{width}}", data=data, patients=tuple(group), listed=records)
        for i, group in enumerate(groups, start=1)
    ]


def describe_sites(hospitals: Sequence[VirtualSite]) -> dict[str, Any]:
    """Describe the hospitals by name, as far as it decides the results of a run."""
    return {
        hospital.name: {
            "data": hospital.data.model_dump(mode="json", exclude_none=True),
            "patients": hospital.patients and list(hospital.patients),
            "trains": hospital.trains,
        }
        for hospital in hospitals
    }


def plan_sites(hospitals: Sequence[VirtualSite], study: Study) -> list[PlannedSite]:
    """Plan who trains, validates and tests at each hospital, before any file is written.

    The records of each data set are listed once, unless they are listed already.

    Returns:
      The plans, sorted by name.

    Raises:
      SiteError: two hospitals of one name, or that are to compute in different ways.
      DataError: the data of a hospital cannot be used.
    """
    check_names(hospitals)
    _check_alike(hospitals)
    return [_plan(hospital, study) for hospital in sorted(hospitals, key=lambda each: each.name)]


def check_names(hospitals: Sequence[VirtualSite]) -> None:
    """Return if no two hospitals have one name; raises `SiteError` otherwise."""
    for name, times in Counter(hospital.name for hospital in hospitals).items():
        if times > 1:
            remedy = "Rename one of the folders."
            raise SiteError("--site", expected="distinct names", got=name, remedy=remedy)


def _check_alike(hospitals: Sequence[VirtualSite]) -> None:
    ways = {(h.site.keep, h.site.threads) if h.site else ("auto", 1) for h in hospitals}
    if len(ways) > 1:  # local and pooled training put their prepared images together
        expected = "the same keep and threads in every site.yaml, as one machine runs them all"
        got = " and ".join(sorted(f"{keep}/{threads}" for keep, threads in ways))
        raise SiteError("--site", expected=expected, got=got)


def _plan(hospital: VirtualSite, study: Study) -> PlannedSite:
    """The hospital's own records in their parts, as its client will cut them."""
    records = hospital.listed or hospital.data.records(study.classes)
    if hospital.patients is not None:
        used = set(hospital.patients)
        records = [record for record in records if record.patient in used]
    listed = {record.patient for record in records}
    if hospital.site is not None:
        records = drop_excluded(hospital.site, records)
    forgotten = listed - {record.patient for record in records}
    secret = hashlib.sha256(f"{derive(study.seed, hospital.name, 'secret')}".encode()).digest()
    parts = Parts(train=[], validation=[], test=list(records))
    if hospital.trains:
        parts = split_records(records, study.holdout, secret)
    images = {
        part: [sum(r.label == k for r in getattr(parts, part)) for k in range(len(study.classes))]
        for part in PARTS
    }
    return PlannedSite(
        hospital=hospital,
        secret=secret,
        forgotten=tuple(sorted(forgotten)),
        images=images,
        training=count_patients(parts.train),
    )


def write_sites(planned: Sequence[PlannedSite], study: Study, run: Path, cache: Path) -> list[Path]:
    """Write the hospitals' files into the run folder; returns their site files, sorted by name."""
    ordered = sorted(planned, key=lambda plan: plan.hospital.name)
    return [_write(plan, study, run / "sites" / plan.hospital.name, cache) for plan in ordered]


def find_site_files(run: Path) -> list[Path]:
    """Find the site files of a run that began before."""
    found = sorted(run.glob("sites/*/site.yaml"), key=lambda path: path.parent.name)
    if not found:
        raise RunError(run, expected="a simulated run", got="no sites/ in it")
    return found


def read_spending(site_files: Sequence[Path]) -> dict[str, float]:
    """Read the ε that the ledger of each site adds up to, by name."""
    sites = [Site.read(path) for path in site_files]
    return {site.name: Spending.of(read_ledger(site.state)).total() for site in sites}


def _write(plan: PlannedSite, study: Study, folder: Path, cache: Path) -> Path:
    hospital = plan.hospital
    folder.mkdir(parents=True, exist_ok=True)
    data = hospital.data.model_dump(mode="json", exclude_none=True)
    if hospital.patients is not None:
        files.write(folder / "patients.txt", "".join(f"{p}\n" for p in hospital.patients), 0o600)
        data["patients"] = "patients.txt"
    content: dict[str, Any] = {
        "name": hospital.name,
        "data": data,
        "state": "state",
        "cache": {"folder": str(cache.resolve())},
    }
    if study.model.weights_file:
        content["weights"] = str(study.model.weights_file.parent)
    if hospital.site:
        own = {"role", "policy", "device", "threads", "keep"}
        kept = hospital.site.model_dump(mode="json", include=own)
        kept["policy"]["approve"] = "policy"  # nobody is there to be asked
        content.update(kept)
    else:
        content["policy"] = OPEN.model_dump(mode="json")
    if hospital.evaluates_only:
        content["role"] = "evaluate"
    if study.private and hospital.data.enrolled_patients is None:  # a real hospital declares it
        data["enrolled_patients"] = max(plan.training, 1)
    path = folder / "site.yaml"
    files.write(path, dump(content))
    site = Site.read(path)
    files.write(site.private() / "secret", plan.secret, 0o600)
    for patient in plan.forgotten:
        exclude_patient(site, patient)
    return path


def prepare_sites(site_files: Sequence[Path], study: Study, runtime: Runtime) -> None:
    """Open every hospital's session, so that an error in its data is said here and now.

    A hospital whose policy refuses the study is left to refuse it at join.
    """
    for path in site_files:
        site = Site.read(path)
        keep_proposal(site, study)
        log.info("%s", site.name)
        with suppress(RefusedError):
            runtime.open_session(path, study.id)


def choose_sites(planned: Sequence[PlannedSite], study: Study) -> list[PlannedSite]:
    """Choose the hospitals that can take part.

    A hospital that was cut from a pool, and has nothing to train on, is left out.

    Raises:
      DataError: another hospital has nothing to train on.
      StudyError: fewer hospitals train than the study's quorum.
    """
    kept: list[PlannedSite] = []
    for plan in planned:
        hospital = plan.hospital
        if not hospital.trains or any(plan.images["train"]):
            kept.append(plan)
        elif hospital.patients is not None:
            log.warning("%s is left out: none of its patients trains", hospital.name)
        else:
            expected, got = "at least one training patient", "none"
            remedy = "Add patients, lower holdout, or name it with --evaluate-site."
            raise DataError(hospital.name, expected=expected, got=got, remedy=remedy)
    training = sum(plan.hospital.trains for plan in kept)
    quorum = study.aggregate.quorum
    if training < quorum:
        expected = f"at most {training}, as many hospitals as train"
        other = f"--set aggregate.quorum={max(training, 1)}."
        if training < (least := count_least_replies(study)):
            other = f"choose another strategy: {study.aggregate.strategy} needs {least}."
        remedy = f"Add hospitals, or {other}"
        raise study.error("aggregate.quorum", expected=expected, got=quorum, remedy=remedy)
    return kept
