"""Virtual hospitals: the same files a real one has, written into the run folder.

Each gets `sites/<name>/site.yaml` and a state folder of its own, so that the client runs exactly as
it would beside real data. The one difference: the secret that keys the holdout comes from the
study's seed, so that a simulation can be repeated.
"""

import hashlib
import logging
import re
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from client.consent.cohort import count_patients, cut_records
from client.consent.proposals import keep_proposal
from client.data.registry import Data, guess
from client.ledger.ledger import read
from client.ledger.spending import Account
from client.runtime import Runtime
from client.site import Site
from common.config.study import NAME, Study
from common.config.yaml import dump
from common.errors import DataError, RefusedError, RunError, SiteError
from common.support import files
from common.support.seeds import derive
from server.rounds.strategies import least
from simulations.sites import partition

log = logging.getLogger(__name__)

Census = dict[str, dict[str, list[int]]]
"""Images per site, part and class."""

_RULE = "letters, digits, . _ -, starting with a letter or digit, at most 64"


@dataclass(frozen=True, kw_only=True)
class Hospital:
    """What a simulation knows of one virtual hospital before it has files."""

    name: str
    data: Data
    patients: tuple[str, ...] | None = None
    """Only these patients, where a data set is cut into hospitals."""
    site: Site | None = None
    """The folder's own site file, if it has one: its role, policy and ways to compute count."""
    evaluates_only: bool = False

    @property
    def trains(self) -> bool:
        """Whether it takes part in rounds."""
        return not self.evaluates_only and (self.site is None or self.site.role == "train")


def from_folder(path: Path, *, evaluates_only: bool = False) -> Hospital:
    """A hospital from a folder of images, or from a folder that holds a `site.yaml`."""
    own = path / "site.yaml" if path.is_dir() else path
    if own.suffix == ".yaml" and own.is_file():
        site = Site.read(own)
        return Hospital(name=site.name, data=site.data, site=site, evaluates_only=evaluates_only)
    place = path.resolve()
    name = place.stem if place.is_file() else place.name
    data = guess(place)
    if not re.fullmatch(NAME, name):
        expected = f"a folder whose name can name the site ({_RULE})"
        remedy = "Rename it, or put a site.yaml with a name into it."
        raise SiteError(f"--site {path}", expected=expected, got=name, remedy=remedy)
    return Hospital(name=name, data=data, evaluates_only=evaluates_only)


def from_pool(path: Path, study: Study, *, spec: str, sites: int) -> list[Hospital]:
    """One data set cut into `sites` hospitals by patient; see `simulations.sites.partition`."""
    data = guess(path.resolve())
    records = data.records(study.classes)
    labels = partition.patient_labels(records)
    groups = partition.partition(labels, sites=sites, spec=spec, seed=study.seed)
    width = len(str(sites))
    return [
        Hospital(name=f"site-{i:0{width}}", data=data, patients=tuple(group))
        for i, group in enumerate(groups, start=1)
    ]


def roster(hospitals: Sequence[Hospital]) -> dict[str, Any]:
    """Who takes part, by name, as far as it decides what a run gives: data, patients, role."""
    return {
        hospital.name: {
            "data": hospital.data.model_dump(mode="json", exclude_none=True),
            "patients": hospital.patients and list(hospital.patients),
            "trains": hospital.trains,
        }
        for hospital in hospitals
    }


def settle(hospitals: Sequence[Hospital], study: Study, run: Path, cache: Path) -> list[Path]:
    """Write the hospitals' files into the run folder; returns their site files, sorted by name.

    Raises:
      SiteError: two hospitals of one name, or that are to compute in different ways.
    """
    for name, times in Counter(hospital.name for hospital in hospitals).items():
        if times > 1:
            remedy = "Rename one of the folders."
            raise SiteError("--site", expected="distinct names", got=name, remedy=remedy)
    ways = {(h.site.keep, h.site.threads) if h.site else ("auto", 1) for h in hospitals}
    if len(ways) > 1:  # local and pooled training put their prepared images together
        expected = "the same keep and threads in every site.yaml, as one machine runs them all"
        got = " and ".join(sorted(f"{keep}/{threads}" for keep, threads in ways))
        raise SiteError("--site", expected=expected, got=got)
    ordered = sorted(hospitals, key=lambda hospital: hospital.name)
    return [_write(hospital, study, run / "sites" / hospital.name, cache) for hospital in ordered]


def settled(run: Path) -> list[Path]:
    """The site files of a run that began before."""
    found = sorted(run.glob("sites/*/site.yaml"), key=lambda path: path.parent.name)
    if not found:
        raise RunError(run, expected="a simulated run", got="no sites/ in it")
    return found


def spent(site_files: Sequence[Path]) -> dict[str, float]:
    """ε that the ledger of each site adds up to, by name."""
    sites = [Site.read(path) for path in site_files]
    return {site.name: Account.of(read(site.state)).total() for site in sites}


def _write(hospital: Hospital, study: Study, folder: Path, cache: Path) -> Path:
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
        content.update(kept)
    else:  # a virtual hospital keeps nothing from the researcher, whose data it is
        content["policy"] = {"disclose": {"counts": "exact"}}
    if hospital.evaluates_only:
        content["role"] = "evaluate"
    path = folder / "site.yaml"
    files.write(path, dump(content))
    secret = hashlib.sha256(f"{derive(study.seed, hospital.name, 'secret')}".encode()).digest()
    site = Site.read(path)
    files.write(site.private() / "secret", secret, 0o600)
    if study.private and site.data.enrolled_patients is None:  # a real hospital declares it
        training = count_patients(cut_records(site, study).train)
        files.write(path, dump(content | {"data": data | {"enrolled_patients": max(training, 1)}}))
    return path


def prepare(site_files: Sequence[Path], study: Study, runtime: Runtime) -> None:
    """Open every hospital's session, so that what is wrong with its data is said here and now.

    A hospital whose policy refuses the study is left to refuse it at join.
    """
    for path in site_files:
        site = Site.read(path)
        keep_proposal(site, study.proposal())
        log.info("%s", site.name)
        with suppress(RefusedError):
            runtime.open_session(path, study.id)


def census(site_files: Sequence[Path], study: Study) -> Census:
    """Images per site, part and class, before anything is decoded."""
    counts: Census = {}
    for path in site_files:
        site = Site.read(path)
        parts = cut_records(site, study)
        counts[site.name] = {
            part: [
                sum(r.label == k for r in getattr(parts, part)) for k in range(len(study.classes))
            ]
            for part in ("train", "validation", "test")
        }
    return counts


def able(hospitals: Sequence[Hospital], told: Census, study: Study) -> list[Hospital]:
    """The hospitals that can take part; one cut from a pool with nothing to train on is left out.

    Raises:
      DataError: another hospital has nothing to train on.
      StudyError: fewer hospitals train than the study's quorum.
    """
    kept: list[Hospital] = []
    for hospital in hospitals:
        if not hospital.trains or any(told[hospital.name]["train"]):
            kept.append(hospital)
        elif hospital.patients is not None:
            log.warning("%s is left out: none of its patients trains", hospital.name)
        else:
            expected, got = "at least one training patient", "none"
            remedy = "Add patients, lower holdout, or name it with --evaluate-site."
            raise DataError(hospital.name, expected=expected, got=got, remedy=remedy)
    training, quorum = sum(hospital.trains for hospital in kept), study.aggregate.quorum
    if training < quorum:
        expected = f"at most {training}, as many hospitals as train"
        other = f"--set aggregate.quorum={max(training, 1)}."
        if training < least(study):
            other = f"choose another strategy: {study.aggregate.strategy} needs {least(study)}."
        remedy = f"Add hospitals, or {other}"
        raise study.error("aggregate.quorum", expected=expected, got=quorum, remedy=remedy)
    return kept
