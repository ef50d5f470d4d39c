"""One study at several settings: which does best on validation patients?"""

import hashlib
import itertools
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

from rich.table import Table

from common.config.study import Study
from common.config.yaml import alternatives
from common.errors import RunError, StudyError
from common.metrics.counts import Counts
from common.metrics.metrics import METRICS, better, value
from common.support import files
from common.support.terminal import console, table
from server.reports.tables import UNDEFINED
from server.reports.titles import count_validation, title_runs
from server.rounds.start import check_start
from server.runs.results import FEDERATED, READ_OUTS, read_results, unite_counts
from server.runs.run_folder import RunFolder
from simulations.engines.base import Engine
from simulations.sites import virtual_sites
from simulations.studies import plots, runner
from simulations.studies.over_seeds import (
    SIGNS,
    describe_seeds,
    format_metric,
    format_seeds,
    subtract_seeds,
)
from simulations.studies.pages import write_page
from simulations.studies.runner import Source

# With another value the validation patients, or the figure that compares, would be others.
_ONE_VALUE = ("classes", "holdout", "select", "aggregate.fraction")
_LONGEST_NAME = 200


@dataclass(frozen=True, eq=False)
class Setting:
    """One choice of values: the study on each seed, and the folder of its runs."""

    values: dict[str, str]
    """The values that differ between settings, by key, as they were given."""
    studies: tuple[Study, ...]
    folder: Path

    @property
    def label(self) -> str:
        """The values in a line."""
        return " · ".join(self.values.values())


@dataclass(frozen=True)
class Tried:
    """The figures of the released models of one setting, on each seed."""

    scores: list[float | None]
    """The study's `select` on validation patients; None where it was not disclosed."""
    test: list[Counts]

    @property
    def score(self) -> float | None:
        """The mean over seeds; None unless each has one, as others would have it easier."""
        known = [score for score in self.scores if score is not None]
        return mean(known) if len(known) == len(self.scores) else None


def run_sweep(
    study_file: Path,
    source: Source,
    folder: Path,
    *,
    changes: Sequence[str],
    seeds: Sequence[int],
    cache: Path,
    engine: Engine,
) -> None:
    """Run a study at every combination of values, on each seed; print and plot which does best.

    Runs that are there already are only read, so that the same command goes on, and more values or
    seeds add to it.

    Args:
      study_file: The study.
      source: The source of the hospitals.
      folder: One folder in it for each setting, and in that one for each seed.
      changes: `key=value` or `key=value,value,…`.
      seeds: Each draws another holdout.
      cache: The folder of prepared images.
      engine: The engine in which the hospitals compute.

    Raises:
      StudyError: a setting cannot be run, or there is only one; nothing has run yet.
      RunError: a run failed, is of another study or other hospitals, or lacks some of them.
    """
    settings = plan_settings(study_file, changes, seeds, folder)
    for setting in settings:
        _check(setting, source)
    tried: dict[Setting, Tried] = {}
    sites: list[set[str]] = []
    for setting in settings:
        place, title = setting.folder, ", ".join(map("=".join, setting.values.items()))
        runs = runner.run_series(
            setting.studies, source, place, cache, engine, title=title, results=False
        )
        joined = [set(RunFolder(run).read_facts()["sites"]) for run in runs]
        sites = sites or joined
        if joined != sites:
            expected, got = "the sites of the other settings", "a setting that some of them refuse"
            remedy = "Leave the setting out, or those sites."
            raise RunError(title, expected=expected, got=got, remedy=remedy)
        tried[setting] = _tried(setting.studies[0], runs)
    with console.keep() as shown:
        _report(tried, seeds, folder)
    name = next(iter(tried)).studies[0].name
    title = f"{name}: settings compared by validation patients"
    write_page(folder, title, shown, [("Validation by setting", "sweep.png")])
    console.print(f"run folder: {folder}, with sweep.json and sweep.png")


def plan_settings(
    study_file: Path, changes: Sequence[str], seeds: Sequence[int], folder: Path
) -> list[Setting]:
    """Plan every combination of values, those of equal meaning once; sorted if one number differs.

    Raises:
      StudyError: a change or seed is wrong, or nothing differs.
    """
    choices = [alternatives(change, StudyError) for change in changes]
    keys = [change.partition("=")[0] for change in changes]
    for key, values in zip(keys, choices, strict=True):
        _comparable(key, len(values), keys)
    differ = [key for key, values in zip(keys, choices, strict=True) if len(values) > 1]
    found: dict[str, Setting] = {}
    for choice in itertools.product(*choices):
        studies = tuple(Study.read(study_file, (*choice, f"seed={seed}")) for seed in seeds)
        given = dict(zip(keys, (change.partition("=")[2] for change in choice), strict=True))
        name = _name({key: _at(studies[0], key) for key in sorted(keys)})
        found.setdefault(name, Setting({k: given[k] for k in differ}, studies, folder / name))
    if len(found) < 2:
        expected, got = "a key with several values, such as train.lr=0.01,0.1", "one setting"
        remedy = "For one, use consilium-simulate run --seeds."
        raise StudyError("--set", expected=expected, got=got, remedy=remedy)
    settings = list(found.values())
    numbers = [_at(setting.studies[0], differ[0]) for setting in settings]
    if len(differ) == 1 and all(isinstance(number, int | float) for number in numbers):
        settings.sort(key=lambda setting: _at(setting.studies[0], differ[0]))
    return settings


def _comparable(key: str, values: int, keys: Sequence[str]) -> None:
    if keys.count(key) > 1:
        raise StudyError(f"--set {key}", expected="it once", got="it several times")
    if key == "seed":
        raise StudyError("--set seed", expected="seeds with --seeds", got="one here")
    if values > 1 and {key, key.split(".")[0]} & set(_ONE_VALUE):
        remedy = "Settings are compared by one figure on the same patients."
        got = f"{values} values"
        raise StudyError(f"--set {key}", expected="one value", got=got, remedy=remedy)


def _at(study: Study, key: str) -> Any:
    """A key's value as the study understands it: 0.1 and 1e-1 are one."""
    place: Any = study.model_dump(mode="json")
    for part in key.split("."):
        place = place[part]
    return place


def _name(resolved: dict[str, Any]) -> str:
    """A folder's name, the same for values of the same meaning, in whatever order."""
    name = ",".join(f"{key}={_word(value)}" for key, value in resolved.items())
    return name if len(name) <= _LONGEST_NAME else f"{name[:_LONGEST_NAME]}-{_digest(name)}"


def _word(value: Any) -> str:
    """A value as part of a file name; by its hash as well, where that does not hold all of it."""
    text = value if isinstance(value, str) else json.dumps(value)
    if re.fullmatch(r"[\w.:+-]{1,40}", text, re.ASCII):
        return text.replace(":", "-")
    short = re.sub(r"[^\w.+-]+", "-", text.rpartition("/")[2], flags=re.ASCII).strip("-")
    return f"{short[:40]}-{_digest(text)}"


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:8]


def _check(setting: Setting, source: Source) -> None:
    """Find now what would stop the sweep later, of all that needs no image decoded."""
    study = setting.studies[0]
    check_start(study)
    planned = virtual_sites.plan_sites(source.list_hospitals(study), study)
    virtual_sites.choose_sites(planned, study)
    for study in setting.studies:
        path = setting.folder / f"seed-{study.seed}"
        if (path / "study.yaml").exists():
            runner.open_run(study, source, path)


def _tried(study: Study, runs: Sequence[Path]) -> Tried:
    scores, test = [], []
    for path in runs:
        results, _ = read_results(path, len(study.classes))
        overall = [line for line in RunFolder(path).read_history() if line["site"] is None]
        scores.append(overall[-1][study.select])  # the last line is about the released model
        test.append(unite_counts(results[FEDERATED].values(), len(study.classes)))
    return Tried(scores, test)


def _report(tried: dict[Setting, Tried], seeds: Sequence[int], folder: Path) -> None:
    first = next(iter(tried))
    select, keys = first.studies[0].select, list(first.values)
    chosen: Setting | None = None
    for setting, found in tried.items():
        if better(select, found.score, tried[chosen].score if chosen else None):
            chosen = setting
    console.print()
    console.print(_scores(tried, chosen, select))
    over = ", ".join(map(str, seeds))
    console.print(f"released models, seeds {over}: {describe_seeds(len(seeds))}", style="dim")
    if chosen:
        console.print(_lead(tried, chosen, select))
    told = {
        setting.folder.name: {
            "set": setting.values,
            "validation": found.scores,
            "mean": found.score,
            "test": {name: [value(counts, name) for counts in found.test] for name in METRICS},
        }
        for setting, found in tried.items()
    }
    name = chosen.folder.name if chosen else None
    content = {"select": select, "seeds": list(seeds), "chosen": name, "settings": told}
    files.write(folder / "sweep.json", json.dumps(content, indent=1))
    runs = [RunFolder(s.folder / f"seed-{seed}") for s in tried for seed in seeds]
    images = [count_validation(run) for run in runs]
    plots.plot_sweep(
        {setting.label: found.scores for setting, found in tried.items()},
        select,
        folder / "sweep.png",
        title_runs(runs, "settings, by validation", images, "validation images"),
        keys=" · ".join(keys),
        chosen=chosen.label if chosen else None,
    )
    _show_test(chosen, tried)


def _scores(tried: dict[Setting, Tried], chosen: Setting | None, select: str) -> Table:
    keys = list(next(iter(tried)).values)
    columns, left = (*keys, f"validation {METRICS[select].label}", ""), (*keys, "")
    shown = table(*columns, left=left, signs=SIGNS)
    for setting, found in tried.items():
        score = UNDEFINED if found.score is None else format_metric(found.scores, select)
        mark, style = ("chosen", "bold") if setting is chosen else ("", "")
        shown.add_row(*setting.values.values(), score, mark, style=style)
    return shown


def _lead(tried: dict[Setting, Tried], chosen: Setting, select: str) -> str:
    """Say how far the chosen setting is from the next best, on the same seeds."""
    next_best: Setting | None = None
    for setting, found in tried.items():
        score = tried[next_best].score if next_best else None
        if setting is not chosen and better(select, found.score, score):
            next_best = setting
    if not next_best:
        return f"chosen: {chosen.label}"
    gain = subtract_seeds(tried[chosen].scores, tried[next_best].scores)
    told = f"{format_seeds(gain, signed=True)}, paired by seed"
    return f"chosen: {chosen.label}; to the next best, {next_best.label}: {told}"


def _show_test(chosen: Setting | None, tried: dict[Setting, Tried]) -> None:
    """The test figures of the chosen setting only, so that nobody chooses by them."""
    if chosen is None:
        why = "Private studies, and sites that keep their figures, tell none."
        console.print(f"No setting has a validation figure on every seed: none is chosen. {why}")
        return
    keys = list(chosen.values)
    shown = table(*keys, *(metric.label for metric in METRICS.values()), left=keys)
    test = tried[chosen].test
    cells = (format_metric([value(counts, name) for counts in test], name) for name in METRICS)
    shown.add_row(*chosen.values.values(), *cells)
    console.print("\ntest images of all sites", style="bold")
    console.print(shown)
    console.print(READ_OUTS, style="dim")
    why = "Of the chosen setting alone: test patients never choose. All are in sweep.json."
    console.print(why, style="dim")
