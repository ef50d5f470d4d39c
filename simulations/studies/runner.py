"""A study from the command line to the final table: one run, or one for each seed."""

import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from client.ledger.spending import MEANING
from client.models.kept import name_folder
from common.config.study import Study
from common.errors import RunError, StudyError
from common.metrics.by_patient import Evidence
from common.support.terminal import console, table
from server.evidence.report import REPORT, write_report
from server.reports.tables import show_results
from server.rounds.start import check_start
from server.runs.results import (
    FEDERATED,
    Results,
    read_evidence,
    read_results,
    sort_ways,
    write_results,
)
from server.runs.run_folder import RunFolder
from simulations.engines.attacks import ATTACKS
from simulations.engines.base import Engine
from simulations.sites import virtual_sites
from simulations.sites.virtual_sites import PlannedSite, VirtualSite
from simulations.studies import baselines, summary
from simulations.studies.comparison import Comparison
from simulations.studies.gains import PAIRS, show_verdicts

_MOST_SITES_SHOWN = 40
_ROSTER = "sites/hospitals.json"
"""The file of a run with the hospitals it began with, so that none is taken for another."""


@dataclass(frozen=True, kw_only=True)
class Source:
    """The source of virtual hospitals: folders, or one pool to cut."""

    folders: tuple[Path, ...] = ()
    evaluators: tuple[Path, ...] = ()
    pool: Path | None = None
    partition: str = "iid"
    sites: int = 4

    @property
    def named(self) -> bool:
        """Whether it names any."""
        return bool(self.folders or self.evaluators or self.pool)

    def list_hospitals(self, study: Study) -> list[VirtualSite]:
        """List the hospitals; raises `StudyError` where the options name none."""
        if bool(self.folders) == (self.pool is not None):
            expected, got = "--site folders or one --pool", "both" if self.folders else "neither"
            raise StudyError("hospitals", expected=expected, got=got)
        found = [virtual_sites.find_site(path) for path in self.folders]
        if self.pool is not None:
            found = virtual_sites.cut_pool(self.pool, study, spec=self.partition, sites=self.sites)
        extra = [virtual_sites.find_site(path, evaluates_only=True) for path in self.evaluators]
        return [*found, *extra]


def run_study(
    study_file: Path,
    source: Source,
    folder: Path,
    *,
    changes: tuple[str, ...],
    seeds: tuple[int, ...],
    compare: bool,
    cache: Path,
    engine: Engine,
) -> None:
    """Run a study in a new folder; with seeds, once for each in a folder of its own.

    A folder that already holds some of the seeds is completed.
    """
    if compare:
        _comparable(Study.read(study_file, changes))
    if not seeds:
        run = _new(Study.read(study_file, changes), source, folder, cache, engine)
        show_verdicts(_conclude(run, engine, compare=compare), run.study.select)
        return
    studies = [Study.read(study_file, (*changes, f"seed={seed}")) for seed in seeds]
    run_series(studies, source, folder, cache, engine, compare=compare)
    summary.summarise_seeds(folder, seeds)


def run_series(
    studies: Sequence[Study],
    source: Source,
    folder: Path,
    cache: Path,
    engine: Engine,
    *,
    title: str = "",
    compare: bool = False,
    results: bool = True,
) -> list[Path]:
    """One study on several seeds, a run in `folder` for each; what is there already goes on.

    Args:
      studies: Alike but for their seeds.
      source: The source of the hospitals.
      folder: One folder in it for each seed.
      cache: The folder of prepared images.
      engine: The engine in which the hospitals compute.
      title: The words that tell these runs from others.
      compare: Whether to train locally and pooled as well.
      results: Whether to show each run's test figures.

    Returns:
      The folders of the runs.

    Raises:
      RunError: a run cannot go on, or is of another study; says which.
    """
    paths = []
    for study in studies:
        name = f"{title}, seed {study.seed}" if title else f"seed {study.seed}"
        console.print(f"\n{name}", style="bold")
        paths.append(folder / f"seed-{study.seed}")
        try:
            run = _complete(study, source, paths[-1], cache, engine)
            if results:
                _conclude(run, engine, compare=compare)
        except RunError as ex:
            raise RunError(f"{name}: {ex}") from None
        engine.forget()
    return paths


def _complete(study: Study, source: Source, path: Path, cache: Path, engine: Engine) -> RunFolder:
    """Bring a run to its end, from wherever it is."""
    if not (path / "study.yaml").exists():
        return _new(study, source, path, cache, engine)
    run = open_run(study, source, path)
    _go_on(run, engine)
    return run


def open_run(study: Study, source: Source, path: Path) -> RunFolder:
    """Open a run that is there; raises `RunError` if it is of another study or other hospitals."""
    run = RunFolder.resume(path, study)
    named, there = virtual_sites.describe_sites(source.list_hospitals(study)), path / _ROSTER
    known = json.loads(there.read_text(encoding="utf-8")) if there.exists() else {}
    told = {
        "without": known.keys() - named.keys(),
        "with": named.keys() - known.keys(),
        "with other data or role:": {n for n in named if n in known and named[n] != known[n]},
    }
    if differ := [f"{how} {', '.join(sorted(names))}" for how, names in told.items() if names]:
        expected, got = "the hospitals it began with", f"them {', '.join(differ)}"
        remedy = "Choose another folder with --out."
        raise RunError(path, expected=expected, got=got, remedy=remedy)
    return run


def _new(study: Study, source: Source, folder: Path, cache: Path, engine: Engine) -> RunFolder:
    check_start(study)
    named = source.list_hospitals(study)
    found = check_hospitals(study, named)
    if folder.is_dir() and {path.name for path in folder.iterdir()} == {"sites"}:
        shutil.rmtree(folder)  # a run that was killed before it began
    run = RunFolder.create(folder)
    try:
        site_files = virtual_sites.write_sites(found, study, folder, cache)
        engine.prepare(site_files, study)
        run.write(_ROSTER, json.dumps(virtual_sites.describe_sites(named)))
        run.write_study(study)
    except BaseException:
        shutil.rmtree(folder)  # nothing half-written; prepared images stay in the cache
        raise
    engine.run(site_files, run.path)
    return run


def _comparable(study: Study) -> None:
    if study.private:
        expected, got = "a study without privacy", study.privacy.mechanism
        remedy = "Its references would train without noise; see consilium-simulate utility."
        raise StudyError("--compare", expected=expected, got=got, remedy=remedy)


def resume_run(folder: Path, study: Study | None, engine: Engine, *, compare: bool) -> None:
    """Go on with an interrupted run; a finished one only shows its results again.

    Args:
      folder: The folder of the run.
      study: The study that it should be of, if anything was said about it.
      engine: The engine in which the hospitals compute.
      compare: Whether to train locally and pooled as well.
    """
    run = RunFolder.resume(folder, study)
    if (folder / ATTACKS).exists():
        expected, got = "a run whose hospitals are honest", "one of consilium-simulate poison"
        remedy = "Go on with that command, and its --out."
        raise RunError(folder, expected=expected, got=got, remedy=remedy)
    if compare:
        _comparable(run.study)
    _go_on(run, engine)
    show_verdicts(_conclude(run, engine, compare=compare), run.study.select)


def _go_on(run: RunFolder, engine: Engine) -> None:
    site_files = virtual_sites.find_site_files(run.path)
    if not (run.path / "report.json").exists():
        engine.run(site_files, run.path)


def check_study(study_file: Path, source: Source, changes: tuple[str, ...]) -> None:
    """Check everything that can be known without decoding an image."""
    study = Study.read(study_file, changes)
    check_start(study)
    if source.named:
        check_hospitals(study, source.list_hospitals(study))
    console.print(f"{study_file}: a valid study", style="green")


def check_hospitals(study: Study, found: Sequence[VirtualSite]) -> list[PlannedSite]:
    """Choose the hospitals that can take part, and check all that needs no image decoded.

    Args:
      study: The study to take part in; see `check_start`.
      found: All hospitals that were named; the number of images of each is printed.

    Raises:
      ConsiliumError: the hospitals' data cannot be used as they are.
    """
    planned = virtual_sites.plan_sites(found, study)
    _show_census(study, planned)
    return virtual_sites.choose_sites(planned, study)


def _show_census(study: Study, planned: Sequence[PlannedSite]) -> None:
    shown = table("site", "images", *study.classes, left=("site",))
    for one in planned[:_MOST_SITES_SHOWN]:
        columns = list(zip(*one.images.values(), strict=True))
        cells = ["/".join(map(str, column)) for column in columns]
        shown.add_row(one.hospital.name, str(sum(map(sum, columns))), *cells)
    console.print("images per class: training/validation/test", style="dim")
    console.print(shown)
    if (more := len(planned) - _MOST_SITES_SHOWN) > 0:
        console.print(f"and {more} more", style="dim")


def _conclude(run: RunFolder, engine: Engine, *, compare: bool) -> dict[str, Evidence]:
    """Show, and where asked complete, the results of a finished run; how ways compare by site."""
    study, site_files = run.study, virtual_sites.find_site_files(run.path)
    results, facts = read_results(run.path, len(study.classes))
    if compare and "pooled" not in results:
        comparison = _compare(run, results, site_files, engine)
        found = {way: sites for way, sites in comparison.results.items() if sites}
        results = sort_ways(results | found)
        facts |= comparison.facts(PAIRS)
        write_results(run, results, **facts)
    if study.private and "spent" not in facts:
        facts["spent"] = virtual_sites.read_spending(site_files)
        write_results(run, results, **facts)
    summary.plot_results(run, results, facts)
    show_results(results, study.classes, facts.get("withheld", {}), run.path)
    write_report(run)
    console.print(f"report: {run.path / REPORT}")
    if study.private:
        epsilons = list(facts["spent"].items())[:_MOST_SITES_SHOWN]
        told = ", ".join(f"{name} {epsilon:.2f}" for name, epsilon in epsilons)
        console.print(f"\nε spent, by each site's ledger: {told}")
        console.print(MEANING, style="dim")
    return read_evidence(facts)


def _compare(
    run: RunFolder, told: Results, site_files: Sequence[Path], engine: Engine
) -> Comparison:
    """What the study is compared with: local and pooled training, and parts of what it does."""
    study, runtime = run.study, engine.runtime
    comparison = baselines.train_baselines(study, site_files, runtime)
    sessions = baselines.open_sessions(study, site_files, runtime)
    comparison.add_told(FEDERATED, told[FEDERATED], dict.fromkeys(sessions, run.path))
    own = {s: name_folder(s.prepared.site, study) for s in sessions}
    comparison.add_told("adapted", told.get("adapted", {}), own)
    if study.model.init == "solved":
        if solved := baselines.find_solved(run, site_files, runtime):
            comparison.test("solved", solved)
        plain = _average_from_zero(run, site_files, engine)
        sessions = baselines.open_sessions(plain.study, site_files, runtime)
        averaged = read_results(plain.path, len(study.classes))[0][FEDERATED]
        comparison.add_told("fedavg", averaged, dict.fromkeys(sessions, plain.path))
    return comparison


def _average_from_zero(run: RunFolder, site_files: Sequence[Path], engine: Engine) -> RunFolder:
    """The same study without a solved head, all its rounds from zero, in a folder of its own."""
    study = run.study
    features = {"unit_features": False, "feature_mean": None}  # as they are: what FedAvg is used to
    model = study.model.model_copy(update={"init": "zero", **features})
    train = study.train.model_copy(update={"patience": None})
    plain = study.model_copy(update={"model": model, "train": train, "adapt": False})
    path = run.path / "fedavg"
    console.print("\nthe same from zero, without a solved head", style="bold")
    if (path / "study.yaml").exists():
        folder = RunFolder.resume(path, plain)
    else:
        folder = RunFolder.create(path)
        folder.write_study(plain)
    if not (path / "report.json").exists():
        engine.run(site_files, path)
    return folder
