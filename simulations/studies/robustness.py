"""The robustness of strategies when some hospitals attack: each with and without the attacks."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from common.config.study import Study
from common.errors import RunError, StudyError, did_you_mean
from common.metrics.counts import Counts
from common.metrics.metrics import METRICS, value
from common.support import files
from common.support.terminal import console, table
from server.reports.titles import title_runs
from server.rounds.start import check_start
from server.rounds.strategies import REGISTRY
from server.runs.results import FEDERATED, read_results, unite_counts
from server.runs.run_folder import RunFolder
from simulations.engines.attacks import ATTACKS, Attacked, Attacks
from simulations.studies import plots, runner
from simulations.studies.over_seeds import (
    SIGNS,
    Seeded,
    describe_seeds,
    format_change,
    join_seeds,
)
from simulations.studies.pages import write_page
from simulations.studies.runner import Source

HONEST = "no lies"

Found = dict[str, dict[str, list[float | None]]]
"""Strategy → attacks → the study's metric for each seed."""


def compare_strategies(
    study: Study,
    source: Source,
    folder: Path,
    *,
    attacks: Attacks,
    strategies: Sequence[str],
    seeds: Sequence[int],
    cache: Path,
) -> None:
    """Run the study by each strategy, with each attack; print and plot the results.

    Models are tested on the test patients of the hospitals that never attack, the same in all runs
    of a seed. Runs that are there already are only read, so that an interrupted series goes on.

    Args:
      study: Its strategy is replaced by each of those, in turn.
      source: The source of the hospitals.
      folder: One folder in it for each strategy, one in that for each attack, one in that a seed.
      attacks: The hospitals that attack, and their ways.
      strategies: The names of the strategies.
      seeds: Each draws another holdout, and other hospitals where a pool is cut.
      cache: The folder of prepared images.

    Raises:
      StudyError: no such strategy or hospital, or too small a quorum.
      RunError: the folder holds runs of other attacks or hospitals.
    """
    studies = {name: _by(study, name, len(attacks.attackers)) for name in strategies}
    _check(source, study, attacks)
    for changed in studies.values():
        check_start(changed)
    for known in folder.glob(f"*/*/seed-*/{ATTACKS}"):
        _check_same_attacks(known, attacks)
    ways = _ways(attacks)
    found: Found = {}
    done: dict[RunFolder, int] = {}
    for name, changed in studies.items():
        for way, told in ways.items():
            seeded = [changed.model_copy(update={"seed": seed}) for seed in seeds]
            place, title = folder / name / _name(way), f"{name}, {way}"
            runs = runner.run_series(
                seeded, source, place, cache, Attacked(told), title=title, results=False
            )
            honest = [_count_honest(run, study, attacks) for run in runs]
            figures = [value(counts, study.select) for counts in honest]
            found.setdefault(name, {})[way] = figures
            done |= {RunFolder(run): counts.n for run, counts in zip(runs, honest, strict=True)}
    with console.keep() as shown:
        _report(study, found, done, folder)
    title = f"{study.name}: hospitals that lie, and strategies against them"
    write_page(folder, title, shown, [("What lies cost, by strategy", "poison.png")])
    console.print(f"run folder: {folder}, with poison.json and poison.png")


def _by(study: Study, strategy: str, attackers: int) -> Study:
    """The study by this strategy, set to withstand so many hospitals that attack."""
    if strategy not in REGISTRY:
        expected, remedy = "strategies", did_you_mean(strategy, REGISTRY)
        got = repr(strategy)
        raise StudyError("--strategies", expected=expected, got=got, remedy=remedy)
    quorum = study.aggregate.quorum
    if quorum < 2 * attackers + 1:
        expected = (
            f"at least {2 * attackers + 1}: more honest replies than the {attackers} of attackers"
        )
        raise study.error("aggregate.quorum", expected=expected, got=quorum)
    settings = {
        "num_malicious_nodes": attackers,
        "num_nodes_to_select": max(1, quorum - attackers - 2),
        "beta": min((attackers + 0.5) / quorum, 0.499),
    }
    options = {key: settings[key] for key in REGISTRY[strategy].options if key in settings}
    if strategy == study.aggregate.strategy:
        options |= study.aggregate.options
    aggregate = study.aggregate.model_copy(update={"strategy": strategy, "options": options})
    return study.model_copy(update={"aggregate": aggregate})


def _check(source: Source, study: Study, attacks: Attacks) -> None:
    found = source.list_hospitals(study)
    training = [hospital.name for hospital in found if hospital.trains]
    where = "--mislabels, --scales"
    for name in sorted(attacks.attackers):
        if name not in training:
            expected, remedy = "hospitals that train", did_you_mean(name, training)
            raise StudyError(where, expected=expected, got=repr(name), remedy=remedy)
    if len(attacks.attackers) == len(found):
        raise StudyError(where, expected="an honest hospital besides", got="none")


def _check_same_attacks(known: Path, attacks: Attacks) -> None:
    told = {_name(way): told.to_json() for way, told in _ways(attacks).items()}
    way = known.parents[1].name
    if way in told and known.read_text(encoding="utf-8") != told[way]:
        remedy = "Choose another folder with --out."
        got = known.read_text(encoding="utf-8")
        raise RunError(known, expected=told[way], got=got, remedy=remedy)


def _name(way: str) -> str:
    return way.replace(" ", "-")


def _ways(attacks: Attacks) -> dict[str, Attacks]:
    """No attacks, each kind of attack alone, and all together."""
    ways = {HONEST: Attacks()}
    if attacks.mislabels:
        ways["wrong labels"] = Attacks(mislabels=attacks.mislabels)
    if attacks.scales:
        ways["scaled update"] = Attacks(scales=attacks.scales, factor=attacks.factor)
    if attacks.mislabels and attacks.scales:
        ways["both"] = attacks
    return ways


def _count_honest(run: Path, study: Study, attacks: Attacks) -> Counts:
    results, _ = read_results(run, len(study.classes))
    honest = [c for site, c in results[FEDERATED].items() if site not in attacks.attackers]
    return unite_counts(honest, len(study.classes))


def _report(study: Study, found: Found, runs: Mapping[RunFolder, int], folder: Path) -> None:
    metric = METRICS[study.select]
    ways = list(next(iter(found.values())))
    shown, within = table("strategy", *ways, left=("strategy",), signs=SIGNS), metric.range
    for name, by_way in found.items():
        base = {way: by_way[HONEST] for way in ways if way != HONEST}
        shown.add_row(name, *(format_change(by_way[way], base.get(way), within) for way in ways))
    seeds = len(next(iter(found.values()))[HONEST])
    what = f"{metric.label} on test images of the hospitals that never lie"
    console.print(f"\n{what}, {describe_seeds(seeds)}", style="bold")
    console.print(shown)
    console.print(f"in brackets: the difference to {HONEST}, paired by seed")
    drawn: dict[str, dict[str | None, Seeded]] = {
        way: {name: join_seeds(by_way[way], within) for name, by_way in found.items()}
        for way in ways
    }
    files.write(folder / "poison.json", json.dumps({"metric": study.select, "found": found}))
    title = title_runs([*runs], "strategies, with attacks and without", [*runs.values()])
    label = f"{metric.label} at honest hospitals"
    plots.plot_comparison(drawn, label, folder / "poison.png", title)
