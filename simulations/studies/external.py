"""External validation: a released model on labelled images of hospitals that no round saw.

Decisions and the read-out of probabilities are the run's own.
"""

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from client.consent.exclusions import drop_excluded
from client.data.records import Part, Record
from client.models.evaluating import Evaluated, evaluate_model
from client.site import Site
from common.config.study import Study
from common.errors import ConsiliumError, DataError, RunError, SiteError
from common.metrics.by_patient import Evidence
from common.metrics.metrics import METRICS
from common.model.inference import ReleasedModel, load_model
from common.support import files
from common.support.seeds import derive
from common.support.terminal import console
from server.evidence.report import REPORT, write_report
from server.reports.tables import show_results
from server.runs.results import FEDERATED, make_facts, read_results, write_results
from server.runs.run_folder import RunFolder
from simulations.sites import virtual_sites
from simulations.sites.virtual_sites import VirtualSite

log = logging.getLogger(__name__)

NOT_FITTED = (
    "The run's own model and read-out, as they were released: nothing was fitted to these images."
)


@dataclass(frozen=True)
class _Trained:
    """A hospital that trained in the run: its records, and the SHA-256 of each image."""

    root: Path
    patients: frozenset[str]
    digests: frozenset[str]


def validate_model(
    run: Path, sites: Sequence[Path], out: Path | None, *, part: Part | None, cache: Path
) -> None:
    """Show and write how the model that a run released does at other hospitals.

    Args:
      run: The folder of a finished run.
      sites: The hospitals, as `virtual_sites.find_site` finds them.
      out: The folder for the report; by default one in the run's `external/`, named by the sites.
      part: Of data that brings its own split, the part that counts; None is all labelled images.
      cache: The folder of prepared images.

    Raises:
      SiteError: two hospitals of one name, or one that trained in the run.
      DataError: data that cannot be used, or a label that is none of the study's classes.
      RunError: no finished run, or a folder with other files.
    """
    model, study = load_model(run), RunFolder(run).study
    facts = read_results(run, len(study.classes))[1]
    found = [virtual_sites.find_site(path) for path in sites]
    virtual_sites.check_names(found)
    folder = out or run / "external" / "+".join(sorted(site.name for site in found))
    _check_folder(folder)
    listed = [(site, _list_records(site, study, part)) for site in found]
    trained = dict(_list_trained(run, study))
    shared = {site.name: _compare(site, records, trained) for site, records in listed}
    files.make_private(cache, "--cache", RunError)
    told = {site.name: _evaluate(model, site, records, cache) for site, records in listed}
    results = {FEDERATED: {name: each.count(model.read_out) for name, each in told.items()}}
    evidence = {
        name: each.estimate(
            model.read_out,
            FEDERATED,
            study.select,
            seed=derive(study.seed, name, "evidence"),
        )
        for name, each in told.items()
    }
    external = {
        "run": run.resolve().name,
        "note": NOT_FITTED,
        "part": part or "all",
        "patients": {name: each.patients for name, each in told.items()},
        "unreadable": {name: each.unreadable for name, each in told.items()},
        "shared": shared,
    }
    report = RunFolder(folder) if folder.exists() else RunFolder.create(folder)
    report.write_study(study)
    beside = {"released_round": facts["released_round"], **make_facts(evidence, {})}
    write_results(report, results, **beside, external=external)
    show_results(results, study.classes, {}, folder)
    _show_evidence(evidence)
    console.print(NOT_FITTED, style="dim")
    write_report(report)
    console.print(f"report: {folder / REPORT}")


def _show_evidence(evidence: Mapping[str, Evidence]) -> None:
    """Print a line for each hospital: figures with 95 % intervals by patient."""
    for name, found in evidence.items():
        told = ", ".join(
            f"{METRICS[metric].label} {estimate.value:.3f} "
            f"({estimate.low:.3f} to {estimate.high:.3f})"
            for metric, estimate in found.figures[FEDERATED].items()
            if estimate is not None
        )
        console.print(f"{name}, {found.patients} patients, 95 % intervals by patient: {told}")


def _evaluate(
    model: ReleasedModel, site: VirtualSite, records: Sequence[Record], cache: Path
) -> Evaluated:
    log.info("%s: %d labelled images", site.name, len(records))
    device = site.site.device if site.site else "auto"
    return evaluate_model(model, records, cache=cache, device=device)


def _check_folder(path: Path) -> None:
    """Return if a report may be written there: the folder is new, empty, or has an earlier one."""
    if path.exists() and not _is_report(path) and not (path.is_dir() and not any(path.iterdir())):
        expected, got = "a new or empty folder, or an earlier evaluation", "other files"
        raise RunError(path, expected=expected, got=got, remedy="Choose another with --out.")


def _is_report(path: Path) -> bool:
    with suppress(ConsiliumError):
        _, facts = read_results(path, len(RunFolder(path).study.classes))
        return "external" in facts
    return False


def _list_records(site: VirtualSite, study: Study, part: Part | None) -> list[Record]:
    records = site.data.records(study.classes)
    if site.site is not None:
        records = drop_excluded(site.site, records)
    if part is None:
        return records
    if kept := [record for record in records if record.split == part]:
        return kept
    expected = f"images that the data puts into its {part} part"
    raise DataError(f"{site.name}: --part", expected=expected, got="none")


def _list_trained(run: Path, study: Study) -> Iterator[tuple[str, _Trained]]:
    """The hospitals that trained in a simulated run, as far as their data is still there."""
    for path in sorted(run.glob("sites/*/site.yaml")):
        site = Site.read(path)
        if site.role != "train":
            continue
        try:
            records = site.data.records(study.classes)
        except DataError as ex:
            log.warning("%s of the run cannot be compared with: %s", site.name, ex)
            continue
        patients = frozenset(record.patient for record in records)
        digests = frozenset(_list_digests(records))
        yield site.name, _Trained(site.data.root.resolve(), patients, digests)


def _list_digests(records: Sequence[Record]) -> Iterator[str]:
    for record in records:
        with suppress(DataError):  # an image that cannot be read is no one's
            yield record.image.digest()


def _compare(
    site: VirtualSite, records: Sequence[Record], trained: Mapping[str, _Trained]
) -> dict[str, int]:
    """Count the images that are, byte for byte, also images of hospitals that trained; warns.

    Raises:
      SiteError: the hospital itself trained, under whatever name.
    """
    root, patients = site.data.root.resolve(), {record.patient for record in records}
    for name, known in trained.items():
        if known.root == root and known.patients & patients:
            expected, got = "a hospital that no round saw", f"{name} of the run, which trained"
            remedy = "Its test patients are in the run's own report.json."
            raise SiteError(f"--site {site.name}", expected=expected, got=got, remedy=remedy)
    digests = list(_list_digests(records)) if trained else []
    counted = {name: sum(d in known.digests for d in digests) for name, known in trained.items()}
    found = {name: count for name, count in counted.items() if count}
    for name, count in found.items():
        text = "%s: %d of %d images are also images of %s, which trained; figures may flatter"
        log.warning(text, site.name, count, len(records), name)
    return found
