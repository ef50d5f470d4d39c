"""The commands that run one study many times: settings, privacy, audits, attacks."""

from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from common.support.terminal import Changes, console, table
from simulations.cli.options import (
    CACHE,
    Cache,
    SeriesFolder,
    StudyFile,
    ask_for,
    choose_engine,
    explain_stop,
    name_source,
    parse_epsilons,
    parse_seeds,
)

if TYPE_CHECKING:
    from simulations.engines.base import Engine
    from simulations.studies.runner import Source


@ask_for("source", name_source)
@ask_for("engine", choose_engine)
def utility(
    study: Annotated[Path, typer.Argument(help="A study with privacy, a YAML file.")],
    *,
    source: "Source",
    changes: Changes = None,
    epsilons: Annotated[
        str, typer.Option(help="Privacy to compare; none is the study without.")
    ] = "none,8,3,1",
    seeds: Annotated[str, typer.Option(help="Run once for each at each ε.")] = "0,1,2",
    of: Annotated[
        str | None, typer.Option("--class", help="A class whose own AUROC is shown as well.")
    ] = None,
    by: Annotated[
        list[str] | None,
        typer.Option(
            help="A column of the manifests, such as sex: groups of test patients are shown as "
            "well. Ages, and other numbers, are cut at 40 and 60. Repeat."
        ),
    ] = None,
    audit: Annotated[
        Path | None,
        typer.Option(help="The folder of an audit of this study: its bounds are drawn in."),
    ] = None,
    out: SeriesFolder = None,
    cache: Cache = CACHE,
    engine: "Engine",
) -> None:
    """Show what privacy costs: one study at several ε and without, on the same holdouts."""
    from common.config.study import Study
    from simulations.studies import privacy_utility

    read = Study.read(study, tuple(changes or ()))
    folder = out or _name_folder(study, "utility")
    with explain_stop(folder, f"the same command with --out {folder}"):
        privacy_utility.compare_epsilons(
            read,
            source,
            folder,
            epsilons=parse_epsilons(epsilons),
            seeds=parse_seeds(seeds),
            of=of,
            by=by or (),
            audit=audit,
            cache=cache,
            engine=engine,
        )


@ask_for("source", name_source)
def audit(
    study: StudyFile,
    *,
    source: "Source",
    changes: Changes = None,
    epsilons: Annotated[
        str, typer.Option(help="Privacy to audit; none is the study without.")
    ] = "none,8,3,1",
    seeds: Annotated[str, typer.Option(help="Run once for each at each ε.")] = "0,1,2",
    canaries: Annotated[
        int, typer.Option(min=1, help="Of all hospitals of a run; at most half of the patients.")
    ] = 400,
    out: SeriesFolder = None,
    cache: Cache = CACHE,
) -> None:
    """Attack a study: can anybody tell who took part?

    A coin decides of each canary, a training patient, whether he takes part. An adversary guesses
    the coins, by the released model alone, and by all that the hospitals send; he knows every image
    and every other patient. How often he is right bounds ε from below.
    """
    from common.config.study import Study
    from simulations.studies.audit import audit_study

    read = Study.read(study, tuple(changes or ()))
    folder = out or _name_folder(study, "audit")
    with explain_stop(folder, f"the same command with --out {folder}"):
        audit_study(
            read,
            source,
            folder,
            epsilons=parse_epsilons(epsilons),
            seeds=parse_seeds(seeds),
            canaries=canaries,
            cache=cache,
        )


@ask_for("source", name_source)
@ask_for("engine", choose_engine)
def sweep(
    study: StudyFile,
    *,
    source: "Source",
    changes: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            help="A key and the values to try, such as train.lr=0.01,0.1; brackets and quotes keep "
            "a comma, as in [1, 3]. Repeat: every combination runs. One value is for all runs.",
        ),
    ] = None,
    seeds: Annotated[str, typer.Option(help="Run each setting once for each.")] = "0,1,2",
    out: SeriesFolder = None,
    cache: Cache = CACHE,
    engine: "Engine",
) -> None:
    """Run a study at several settings, and show which does best on validation patients.

    Test patients never choose: their figures are shown for the chosen setting only. With the same
    --out the same command goes on, and more values or seeds run only what is missing.
    """
    from simulations.studies import sweep

    folder = out or _name_folder(study, "sweep")
    with explain_stop(folder, f"the same command with --out {folder}"):
        sweep.run_sweep(
            study,
            source,
            folder,
            changes=changes or (),
            seeds=parse_seeds(seeds),
            cache=cache,
            engine=engine,
        )


@ask_for("source", name_source)
def poison(
    study: StudyFile,
    *,
    source: "Source",
    changes: Changes = None,
    mislabels: Annotated[
        list[str] | None,
        typer.Option(help="A hospital that trains with each class taken for the next. Repeat."),
    ] = None,
    scales: Annotated[
        list[str] | None,
        typer.Option(help="A hospital that sends its update times --factor. Repeat."),
    ] = None,
    factor: Annotated[float, typer.Option(help="Below 0 the update is reversed.")] = -10.0,
    strategies: Annotated[
        str | None, typer.Option(help="To compare, such as fedavg,krum; by default all.")
    ] = None,
    seeds: Annotated[str, typer.Option(help="Run once for each.")] = "0,1,2",
    out: SeriesFolder = None,
    cache: Cache = CACHE,
) -> None:
    """Show which strategies hold when some hospitals attack: one study by each, with and without.

    The robust ones are told how many hospitals attack. All runs are judged by the released
    model on test patients of the hospitals that never attack.
    """
    from common.config.study import Study
    from server.rounds.strategies import REGISTRY
    from simulations.engines.attacks import Attacks
    from simulations.studies import robustness

    if not (mislabels or scales):
        raise typer.BadParameter("name a hospital that attacks, with --mislabels or --scales")
    attacks = Attacks(frozenset(mislabels or ()), frozenset(scales or ()), factor)
    folder = out or _name_folder(study, "poison")
    with explain_stop(folder, f"the same command with --out {folder}"):
        robustness.compare_strategies(
            Study.read(study, tuple(changes or ())),
            source,
            folder,
            attacks=attacks,
            strategies=strategies.split(",") if strategies else tuple(REGISTRY),
            seeds=parse_seeds(seeds),
            cache=cache,
        )


def disclosure(
    runs: Annotated[list[Path], typer.Argument(help="Finished runs with exact counts.")],
    epsilons: Annotated[
        str, typer.Option(help="ε of held-out patients to compare.")
    ] = "8,4,2,1,0.5",
    delta: Annotated[float, typer.Option(help="δ of each.")] = 1e-5,
    metric: Annotated[
        str, typer.Option(help="accuracy, balanced_accuracy or f1, of all sites together.")
    ] = "balanced_accuracy",
    draws: Annotated[int, typer.Option(min=1, help="How often each run is told again.")] = 50,
) -> None:
    """Show what rounding and noise cost the figures of finished runs; nothing is trained."""
    from simulations.studies.disclosure_cost import measure_costs, read_exact_counts

    chosen = [epsilon for epsilon in parse_epsilons(epsilons) if epsilon is not None]
    exact = [read_exact_counts(run) for run in runs]
    shown = table("told", metric.replace("_", " "), "off by", "width of the 95 % interval")
    for cost in measure_costs(exact, metric, chosen, delta, draws):
        shown.add_row(cost.way, f"{cost.figure:.3f}", f"{cost.error:.3f}", f"{cost.width:.3f}")
    console.print(shown)


def _name_folder(study: Path, what: str) -> Path:
    """Where a series is put that nobody names a folder for."""
    return Path("runs") / f"{study.stem}-{what}-{datetime.now():%Y%m%d-%H%M%S}"


COMMANDS: dict[Callable[..., None], str] = {
    sweep: "configs/demo.yaml --set train.lr=0.001,0.01,0.1 --set model.unfreeze=head,last:1 "
    "--seeds 0,1,2 --site runs/phantom/north --site … --out runs/sweep",
    utility: "configs/skin_private.yaml --site SKIN/rosendahl --site SKIN/vidir_modern "
    "--epsilons none,8,3,1 --seeds 0,1,2,3,4,5,6,7,8,9 --class mel --by sex --by age",
    audit: "configs/skin_private.yaml --site SKIN/rosendahl --site SKIN/vidir_modern "
    "--epsilons none,8,3,1 --seeds 0,1,2",
    poison: "configs/poisoned.yaml --pool runs/many/north --partition dirichlet:5 --sites 9 "
    "--mislabels site-1 --scales site-2",
    disclosure: "runs/skin/seed-0 runs/skin/seed-1 --epsilons 4,1",
}
"""The commands, with an example of each."""
