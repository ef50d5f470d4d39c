"""`consilium-simulate`: many virtual hospitals on one machine."""

from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from common.cli import models
from common.errors import RunError
from common.support import files, terminal
from common.support.terminal import Changes, console, table
from simulations.cli import external, reports, series
from simulations.cli.options import (
    CACHE,
    Cache,
    StudyFile,
    ask_for,
    choose_engine,
    explain_stop,
    name_source,
    parse_seeds,
)

if TYPE_CHECKING:
    from simulations.engines.base import Engine
    from simulations.studies.runner import Source

app = typer.Typer(
    help="Fine-tune one image backbone across virtual hospitals, with the code that real ones run.",
    epilog="Begin with: consilium-simulate phantom runs/phantom",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)


def main() -> None:
    """Run the command line; a mistake with a known remedy ends in one line, never a traceback."""
    terminal.run(app, remedy="Free some space, or choose another place with --out or --cache.")


@app.command(epilog="Example: consilium-simulate phantom runs/phantom")
def phantom(
    folder: Annotated[Path, typer.Argument(help="Where the four hospitals go.")],
    seed: Annotated[int, typer.Option(min=0, help="Chooses the patients.")] = 0,
    patients: Annotated[int, typer.Option(min=40, help="Of all hospitals together.")] = 400,
) -> None:
    """Draw four phantom hospitals: synthetic chest films with something to find."""
    from simulations.sites.phantom import HOSPITALS, write_phantoms

    write_phantoms(folder, seed=seed, patients=patients)
    console.print("  ".join(f"{folder / hospital.name}" for hospital in HOSPITALS))


@app.command(epilog="Example: consilium-simulate deployment runs/deployment")
def deployment(
    folder: Annotated[Path, typer.Argument(help="A new folder for all of it.")],
) -> None:
    """Show a real deployment on this machine: a coordinator and three phantom hospitals over TLS.

    They are processes of their own, with certificates and keys of their own. One hospital is killed
    at work and comes back.
    """
    from simulations.demo.deployment import show_deployment

    if folder.exists() and any(folder.iterdir()):
        expected, got = "a new or empty folder", "one with files"
        raise RunError(folder, expected=expected, got=got)
    with explain_stop(folder, "the same command in a new folder"):
        show_deployment(folder)


@app.command(epilog="Example: consilium-simulate check configs/demo.yaml --site runs/phantom/north")
@ask_for("source", name_source)
def check(study: StudyFile, *, source: "Source", changes: Changes = None) -> None:
    """Validate a study, its backbone and weights, and the hospitals' data, without training."""
    from simulations.studies import runner

    runner.check_study(study, source, tuple(changes or ()))


@app.command(
    epilog="Example: consilium-simulate run configs/demo.yaml --site runs/phantom/north --site …"
)
@ask_for("source", name_source)
@ask_for("engine", choose_engine)
def run(
    study: Annotated[Path | None, typer.Argument(help="The study, a YAML file.")] = None,
    *,
    source: "Source",
    changes: Changes = None,
    seeds: Annotated[str | None, typer.Option(help="Run once for each, such as 0,1,2.")] = None,
    compare: Annotated[
        bool, typer.Option("--compare", help="Also train locally and pooled, without federating.")
    ] = False,
    out: Annotated[
        Path | None, typer.Option(help="The run folder; by default a new one under runs/.")
    ] = None,
    resume: Annotated[Path | None, typer.Option(help="A run folder to go on with.")] = None,
    cache: Cache = CACHE,
    engine: "Engine",
) -> None:
    """Run a study across virtual hospitals, or go on with one that was interrupted."""
    from common.config.study import Study
    from simulations.studies import runner

    if resume is not None:
        if source.named or seeds or out or (changes and study is None):
            raise typer.BadParameter("--resume goes on with the run's own study and hospitals")
        with explain_stop(resume, f"consilium-simulate run --resume {resume}"):
            expected = Study.read(study, tuple(changes or ())) if study else None
            runner.resume_run(resume, expected, engine, compare=compare)
        return
    if study is None:
        raise typer.BadParameter("name a study file, or a run with --resume")
    folder = out or Path("runs") / f"{study.stem}-{datetime.now():%Y%m%d-%H%M%S}"
    again = f"the same command with --out {folder}" if seeds else ""
    with explain_stop(folder, again or f"consilium-simulate run --resume {folder}"):
        runner.run_study(
            study,
            source,
            folder,
            changes=tuple(changes or ()),
            seeds=parse_seeds(seeds),
            compare=compare,
            cache=cache,
            engine=engine,
        )


for _command, _example in series.COMMANDS.items():
    app.command(epilog=f"Example: consilium-simulate {_command.__name__} {_example}")(_command)


app.command(epilog="Example: consilium-simulate report runs/mine")(reports.report)


@app.command(
    name="feature-mean",
    epilog="Example: consilium-simulate feature-mean configs/skin_private.yaml PUBLIC --out "
    "configs/mean.json",
)
def feature_mean(
    study: StudyFile,
    folder: Annotated[Path, typer.Argument(help="Public images; subfolders are searched too.")],
    changes: Changes = None,
    out: Annotated[Path, typer.Option(help="The JSON file to write.")] = Path("mean.json"),
) -> None:
    """Average a backbone's features over public images, for `model.feature_mean` of a study.

    Subtracting it makes private training better, and costs no privacy as long as no image is one
    of a hospital's. The study's own kind of images is best; any others help.
    """
    from common.config.study import Study
    from simulations.studies import feature_mean

    count = feature_mean.write_feature_mean(Study.read(study, tuple(changes or ())), folder, out)
    console.print(f"mean of {count} images → {out}")


app.command(epilog="Example: consilium-simulate predict runs/mine images/ --out predictions.csv")(
    models.predict
)
app.command(epilog="Example: consilium-simulate export runs/mine exported/")(models.export)
app.command(epilog="Example: consilium-simulate evaluate runs/skin --site SKIN/vienna_dias")(
    external.evaluate
)


@app.command(epilog="Example: consilium-simulate backbones --classes 7")
def backbones(
    classes: Annotated[int, typer.Option(min=2, help="Classes of the head.")] = 2,
) -> None:
    """List the registered backbones, and what each `unfreeze` trains and sends."""
    from common.model.backbones import REGISTRY

    left, right = ("backbone", "unfreeze", "from block"), ("parameters", "bytes sent")
    shown = table(*left, *right, left=left)
    for name, backbone in REGISTRY.items():
        shown.add_section()
        blocks = [block.name for block in backbone.blocks]
        for i, (choice, size) in enumerate(backbone.choices(classes).items()):
            shown.add_row(
                "" if i else name, choice, [*blocks, "head"][-1 - i], f"{size:,}", f"{4 * size:,}"
            )
    console.print(shown)


@app.command(epilog="Example: consilium-simulate bench --backbone resnet18 --json bench.json")
def bench(
    backbone: Annotated[
        list[str], typer.Option(help="Which to measure; see `backbones`. Repeat.")
    ] = ["resnet18", "mobilenet_v3_small", "squeezenet1_0"],  # noqa: B006
    images: Annotated[int, typer.Option(min=2, help="Drawn at random, all to train on.")] = 512,
    size: Annotated[int, typer.Option(min=32, help="Their side in pixels.")] = 224,
    rounds: Annotated[int, typer.Option(min=1, help="Of a study, an epoch each.")] = 20,
    repeats: Annotated[int, typer.Option(min=1, help="Timed epochs of naive and frozen.")] = 3,
    json: Annotated[
        Path | None, typer.Option(help="Also write the figures to this file, unrounded.")
    ] = None,
    engine: Annotated[
        bool, typer.Option("--engine", help="Measure instead what the round loop itself costs.")
    ] = False,
    privacy: Annotated[
        bool, typer.Option("--privacy", help="Measure instead what DP-SGD costs in time.")
    ] = False,
) -> None:
    """Measure what it is worth to run the frozen part of a backbone only once.

    Three ways of fine-tuning take turns on this machine. [b]naive[/b]: the whole model trains and
    travels, as in a Flower tutorial. [b]frozen[/b]: only the head (or also the last block) trains
    and travels, but every epoch runs the whole model. [b]ours[/b]: the same training by a real
    study, which runs the frozen part once and keeps its output.

    Read the table like this: "× naive" is how many times as long naive takes for the same study.
    At full size this takes minutes; nothing else should run meanwhile. For a quick look:
    --backbone mobilenet_v3_small --images 128 --rounds 5.
    """
    if engine:
        from simulations.benchmarks.engine_overhead import show_overhead

        show_overhead()
        return
    if privacy:
        from simulations.benchmarks import dp_cost

        for name in backbone:
            dp_cost.show_cost(name)
        return
    from simulations.benchmarks import frozen_prefix

    if json is not None:
        json.touch()  # what cannot be written is said now, not after minutes
    plan = frozen_prefix.Plan(
        backbones=tuple(backbone), images=images, side=size, rounds=rounds, repeats=repeats
    )
    results = frozen_prefix.measure_ways(plan)
    frozen_prefix.show_results(results)
    if json is not None:
        files.write(json, results.to_json())
