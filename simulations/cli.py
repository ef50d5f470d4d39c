"""`consilium-simulate`: many virtual hospitals on one machine."""

import csv
import io
import math
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.progress import track

from common import files, terminal
from common.errors import DataError, RunError, complaint
from common.terminal import Changes, StoppedError, console, table

if TYPE_CHECKING:
    from common.inference import ReleasedModel
    from simulations.engines import Engine
    from simulations.study_runs import Source

app = typer.Typer(
    help="Fine-tune one image backbone across virtual hospitals, with the code that real ones run.",
    epilog="Begin with: consilium-simulate phantom runs/phantom",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)

StudyFile = Annotated[Path, typer.Argument(help="The study, a YAML file; see configs/.")]
Sites = Annotated[
    list[Path] | None,
    typer.Option("--site", help="A hospital: a folder of images, or one with a site.yaml. Repeat."),
]
Evaluators = Annotated[
    list[Path] | None,
    typer.Option("--evaluate-site", help="A hospital that never trains, only tests. Repeat."),
]
Pool = Annotated[
    Path | None, typer.Option(help="One data set, to be cut into virtual hospitals by patient.")
]
PartitionSpec = Annotated[
    str,
    typer.Option(
        "--partition",
        help="How the pool is cut: iid, dirichlet:<α>, label:<k> or quantity:<α>, "
        "such as dirichlet:0.5.",
    ),
]
Count = Annotated[int, typer.Option("--sites", min=1, help="Hospitals to cut the pool into.")]

WorkerCount = Annotated[
    int | None,
    typer.Option(
        "--workers",
        min=1,
        max=128,
        help="Processes that share the hospitals, each computing on one core. They pay where many "
        "cores have long rounds, or many images, before them. Without it, one process does all, on "
        "all cores.",
    ),
]

_BATCH = 32


def main() -> None:
    """Run the command line; a mistake with a known remedy ends in one line, never a traceback."""
    terminal.run(app, remedy="Free some space, or choose another place with --out or --cache.")


@contextmanager
def _stoppable(folder: Path, go_on: str) -> Iterator[None]:
    try:
        yield
    except KeyboardInterrupt:
        begun = [*folder.glob("study.yaml"), *folder.glob("seed-*/study.yaml")]
        text = f"Go on with: {go_on}" if begun else "Nothing was begun: there is no run to resume."
        raise StoppedError(f"Stopped. {text}") from None


@app.command(epilog="Example: consilium-simulate phantom runs/phantom")
def phantom(
    folder: Annotated[Path, typer.Argument(help="Where the four hospitals go.")],
    seed: Annotated[int, typer.Option(min=0, help="Chooses the patients.")] = 0,
    patients: Annotated[int, typer.Option(min=40, help="Of all hospitals together.")] = 400,
) -> None:
    """Draw four phantom hospitals: synthetic chest films with something to find."""
    from simulations.phantom import HOSPITALS, write

    write(folder, seed=seed, patients=patients)
    console.print("  ".join(f"{folder / hospital.name}" for hospital in HOSPITALS))


@app.command(epilog="Example: consilium-simulate deployment runs/deployment")
def deployment(
    folder: Annotated[Path, typer.Argument(help="A new folder for all of it.")],
) -> None:
    """Show a real deployment on this machine: a coordinator and three phantom hospitals over TLS.

    They are processes of their own, with certificates and keys of their own. One hospital is killed
    at work and comes back.
    """
    from simulations import deployment_demo

    if folder.exists() and any(folder.iterdir()):
        expected, got = "a new or empty folder", "one with files"
        raise RunError(complaint(folder, expected=expected, got=got))
    with _stoppable(folder, "the same command in a new folder"):
        deployment_demo.show(folder)


@app.command(epilog="Example: consilium-simulate check configs/demo.yaml --site runs/phantom/north")
def check(
    study: StudyFile,
    site: Sites = None,
    evaluate_site: Evaluators = None,
    pool: Pool = None,
    partition: PartitionSpec = "iid",
    sites: Count = 4,
    changes: Changes = None,
) -> None:
    """Validate a study, its backbone and weights, and the hospitals' data, without training."""
    from simulations import study_runs

    source = _source(site, evaluate_site, pool, partition, sites)
    study_runs.check(study, source, tuple(changes or ()))


@app.command(
    epilog="Example: consilium-simulate run configs/demo.yaml --site runs/phantom/north --site …"
)
def run(
    study: Annotated[Path | None, typer.Argument(help="The study, a YAML file.")] = None,
    site: Sites = None,
    evaluate_site: Evaluators = None,
    pool: Pool = None,
    partition: PartitionSpec = "iid",
    sites: Count = 4,
    changes: Changes = None,
    seeds: Annotated[str | None, typer.Option(help="Run once for each, such as 0,1,2.")] = None,
    compare: Annotated[
        bool, typer.Option("--compare", help="Also train locally and pooled, without federating.")
    ] = False,
    out: Annotated[
        Path | None, typer.Option(help="The run folder; by default a new one under runs/.")
    ] = None,
    resume: Annotated[Path | None, typer.Option(help="A run folder to go on with.")] = None,
    cache: Annotated[
        Path, typer.Option(help="Prepared images, shared by all runs; delete it at will.")
    ] = Path("runs/cache"),
    workers: WorkerCount = None,
) -> None:
    """Run a study across virtual hospitals, or go on with one that was interrupted."""
    from common.study import Study
    from simulations import study_runs

    if resume is not None:
        if site or evaluate_site or pool or seeds or out or (changes and study is None):
            raise typer.BadParameter("--resume goes on with the run's own study and hospitals")
        with _stoppable(resume, f"consilium-simulate run --resume {resume}"):
            expected = Study.read(study, tuple(changes or ())) if study else None
            study_runs.resume(resume, expected, _engine(workers), compare=compare)
        return
    source = _source(site, evaluate_site, pool, partition, sites)
    if study is None:
        raise typer.BadParameter("name a study file, or a run with --resume")
    folder = out or Path("runs") / f"{study.stem}-{datetime.now():%Y%m%d-%H%M%S}"
    again = f"the same command with --out {folder}" if seeds else ""
    with _stoppable(folder, again or f"consilium-simulate run --resume {folder}"):
        study_runs.start(
            study,
            source,
            folder,
            changes=tuple(changes or ()),
            seeds=_numbers(seeds),
            compare=compare,
            cache=cache,
            engine=_engine(workers),
        )


@app.command(
    epilog="Example: consilium-simulate utility configs/skin_private.yaml --site SKIN/rosendahl "
    "--site SKIN/vidir_modern --epsilons none,8,3,1 --seeds 0,1,2,3,4,5,6,7,8,9 --class mel"
)
def utility(
    study: Annotated[Path, typer.Argument(help="A study with privacy, a YAML file.")],
    site: Sites = None,
    evaluate_site: Evaluators = None,
    pool: Pool = None,
    partition: PartitionSpec = "iid",
    sites: Count = 4,
    changes: Changes = None,
    epsilons: Annotated[
        str, typer.Option(help="Privacy to compare; none is the study without.")
    ] = "none,8,3,1",
    seeds: Annotated[str, typer.Option(help="Run once for each at each ε.")] = "0,1,2",
    of: Annotated[
        str | None, typer.Option("--class", help="A class whose own AUROC is shown as well.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="The folder of all runs; the same again goes on.")
    ] = None,
    cache: Annotated[
        Path, typer.Option(help="Prepared images, shared by all runs; delete it at will.")
    ] = Path("runs/cache"),
    workers: WorkerCount = None,
) -> None:
    """Show what privacy costs: one study at several ε and without, on the same holdouts."""
    from common.study import Study
    from simulations import utility

    read = Study.read(study, tuple(changes or ()))
    folder = out or Path("runs") / f"{study.stem}-utility-{datetime.now():%Y%m%d-%H%M%S}"
    with _stoppable(folder, f"the same command with --out {folder}"):
        utility.show(
            read,
            _source(site, evaluate_site, pool, partition, sites),
            folder,
            epsilons=_epsilons(epsilons),
            seeds=_numbers(seeds),
            of=of,
            cache=cache,
            engine=_engine(workers),
        )


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
    from common.study import Study
    from simulations import feature_mean

    count = feature_mean.write(Study.read(study, tuple(changes or ())), folder, out)
    console.print(f"mean of {count} images → {out}")


@app.command(epilog="Example: consilium-simulate predict runs/mine images/ --out predictions.csv")
def predict(
    run: Annotated[Path, typer.Argument(help="A finished run folder.")],
    folder: Annotated[Path, typer.Argument(help="Images; subfolders are searched too.")],
    out: Annotated[Path, typer.Option(help="The CSV file to write.")] = Path("predictions.csv"),
) -> None:
    """Write the released model's class probabilities for every image in a folder."""
    from common.images import found_in
    from common.inference import load_model

    model = load_model(run)
    paths = found_in(folder)
    if out.is_dir() or not os.access(out.parent, os.W_OK):
        expected, got = "a file in a folder that can be written", "none"
        remedy = "Choose another place with --out."
        raise RunError(complaint(out, expected=expected, got=got, remedy=remedy))
    rows = []
    batches = [paths[i : i + _BATCH] for i in range(0, len(paths), _BATCH)]
    for batch in track(batches, "images", console=console, disable=not console.is_terminal):
        for path, row in _probabilities(model, batch):
            predicted = model.classes[row.index(max(row))]
            shares = (f"{p:.6f}" for p in row)
            rows.append((path.relative_to(folder).as_posix(), predicted, *shares))
    text = io.StringIO(newline="")
    csv.writer(text).writerows([("image", "predicted", *model.classes), *rows])
    files.write(out, text.getvalue())
    console.print(f"{len(rows)} images → {out}")


def _probabilities(
    model: "ReleasedModel", paths: Sequence[Path]
) -> Iterator[tuple[Path, list[float]]]:
    """The images with their probabilities; those that cannot be read are named and left out."""
    try:
        yield from zip(paths, model.probabilities(paths).tolist(), strict=True)
    except DataError as ex:
        if len(paths) == 1:
            console.print(f"left out: {ex}", style="yellow")
            return
        for path in paths:
            yield from _probabilities(model, [path])


@app.command(epilog="Example: consilium-simulate backbones --classes 7")
def backbones(
    classes: Annotated[int, typer.Option(min=2, help="Classes of the head.")] = 2,
) -> None:
    """List the registered backbones, and what each `unfreeze` trains and sends."""
    from common.backbones import REGISTRY

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
        from simulations.engine_bench import show

        show()
        return
    if privacy:
        from simulations import private_bench

        for name in backbone:
            private_bench.show(name)
        return
    from simulations import bench as benchmark

    if json is not None:
        json.touch()  # what cannot be written is said now, not after minutes
    plan = benchmark.Plan(
        backbones=tuple(backbone), images=images, side=size, rounds=rounds, repeats=repeats
    )
    results = benchmark.run(plan)
    benchmark.show(results)
    if json is not None:
        files.write(json, results.json())


def _source(
    site: list[Path] | None,
    evaluate_site: list[Path] | None,
    pool: Path | None,
    partition: str,
    sites: int,
) -> "Source":
    """The hospitals that the shared options of `run` and `check` name."""
    from simulations.study_runs import Source

    return Source(
        folders=tuple(site or ()),
        evaluators=tuple(evaluate_site or ()),
        pool=pool,
        partition=partition,
        sites=sites,
    )


def _engine(workers: int | None) -> "Engine":
    """Where `run` and `utility` have hospitals compute."""
    from simulations.engines import InProcess
    from simulations.workers import Workers

    return InProcess() if workers is None else Workers(workers)


def _epsilons(text: str) -> list[float | None]:
    try:
        found = [None if part == "none" else float(part) for part in text.split(",")]
    except ValueError:
        found = [0.0]
    if any(epsilon is not None and not 0 < epsilon < math.inf for epsilon in found):
        expected = "--epsilons: expected numbers above 0, or none, such as none,8,3,1"
        raise typer.BadParameter(f"{expected}, got {text!r}")
    return found


def _numbers(text: str | None) -> tuple[int, ...]:
    if text is None:
        return ()
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise typer.BadParameter(f"--seeds: expected numbers such as 0,1,2, got {text!r}") from None
