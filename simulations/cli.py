"""`consilium-simulate`: many virtual hospitals on one machine."""

import csv
import logging
import sys
from datetime import datetime
from pathlib import Path
from typing import Annotated

import click
import typer
from rich.logging import RichHandler
from rich.table import Table

from common.errors import ConsiliumError
from server.report import console

app = typer.Typer(
    help="Fine-tune one image backbone across virtual hospitals, with the code that real ones run.",
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
    str, typer.Option("--partition", help="How: iid, dirichlet:<α>, label:<k> or quantity:<α>.")
]
Count = Annotated[int, typer.Option("--sites", min=1, help="Into how many hospitals.")]
Changes = Annotated[
    list[str] | None,
    typer.Option("--set", help="Override a key of the study, such as train.lr=0.01. Repeat."),
]


def main() -> None:
    """Run the command line; a mistake with a known remedy ends in one line, never a traceback."""
    logging.basicConfig(
        level=logging.WARNING,
        format="%(message)s",
        handlers=[RichHandler(console=console, show_time=False, show_path=False)],
    )
    for name in ("client", "server", "simulations"):
        logging.getLogger(name).setLevel(logging.INFO)
    try:
        app(standalone_mode=False)
    except ConsiliumError as ex:
        typer.secho(str(ex), fg="red", err=True)
        sys.exit(1)
    except typer.Exit as ex:
        sys.exit(ex.exit_code)
    except typer.Abort:
        sys.exit(130)
    except click.ClickException as ex:
        ex.show()
        sys.exit(ex.exit_code)
    except KeyboardInterrupt:
        typer.secho("Stopped. Go on with: consilium-simulate run --resume RUN", err=True)
        sys.exit(130)


@app.command()
def run(
    study: Annotated[Path | None, typer.Argument(help="The study, a YAML file.")] = None,
    site: Sites = None,
    evaluate_site: Evaluators = None,
    pool: Pool = None,
    partition: PartitionSpec = "iid",
    sites: Count = 4,
    changes: Changes = None,
    seeds: Annotated[str | None, typer.Option(help="Repeat for these, such as 0,1,2.")] = None,
    compare: Annotated[
        bool, typer.Option("--compare", help="Also train locally and pooled, without federating.")
    ] = False,
    out: Annotated[Path | None, typer.Option(help="The run folder; a new one under runs/.")] = None,
    resume: Annotated[Path | None, typer.Option(help="A run folder to go on with.")] = None,
    cache: Annotated[
        Path, typer.Option(help="Prepared images, shared by all runs; delete it at will.")
    ] = Path("runs/cache"),
) -> None:
    """Run a study across virtual hospitals, or go on with one that was interrupted."""
    from simulations import study_runs

    if resume is not None:
        study_runs.resume(resume, study, tuple(changes or ()), compare=compare)
        return
    source = study_runs.Source(
        folders=tuple(site or ()),
        evaluators=tuple(evaluate_site or ()),
        pool=pool,
        partition=partition,
        sites=sites,
    )
    if study is None:
        raise typer.BadParameter("name a study file, or a run with --resume")
    folder = out or Path("runs") / f"{study.stem}-{datetime.now():%Y%m%d-%H%M%S}"
    study_runs.start(
        study,
        source,
        folder,
        changes=tuple(changes or ()),
        seeds=_numbers(seeds),
        compare=compare,
        cache=cache,
    )


@app.command()
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

    source = study_runs.Source(
        folders=tuple(site or ()),
        evaluators=tuple(evaluate_site or ()),
        pool=pool,
        partition=partition,
        sites=sites,
    )
    study_runs.check(study, source, tuple(changes or ()))


@app.command()
def backbones(
    classes: Annotated[int, typer.Option(min=2, help="Classes of the head.")] = 2,
) -> None:
    """List the registered backbones, and what each `unfreeze` trains and sends."""
    from common.backbones import REGISTRY

    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("backbone", "unfreeze", "from block", "parameters", "bytes sent"):
        right = column in ("parameters", "bytes sent")
        table.add_column(column, justify="right" if right else "left")
    for name, backbone in REGISTRY.items():
        table.add_section()
        blocks = [block.name for block in backbone.blocks]
        for i, (choice, size) in enumerate(backbone.choices(classes).items()):
            table.add_row(
                "" if i else name, choice, [*blocks, "head"][-1 - i], f"{size:,}", f"{4 * size:,}"
            )
    console.print(table)


@app.command()
def predict(
    run: Annotated[Path, typer.Argument(help="A finished run folder.")],
    folder: Annotated[Path, typer.Argument(help="Images; subfolders are searched too.")],
    out: Annotated[Path, typer.Option(help="The CSV file to write.")] = Path("predictions.csv"),
) -> None:
    """Write the released model's class probabilities for every image in a folder."""
    from common.errors import DataError, complaint
    from common.images import SUFFIXES
    from common.inference import load_model

    model = load_model(run)
    paths = sorted(path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES)
    if not paths:
        raise DataError(complaint(folder, expected="a folder with images", got="none"))
    unreadable = 0
    with out.open("w", newline="", encoding="utf-8") as file:
        table = csv.writer(file)
        table.writerow(["image", "predicted", *model.classes])
        for path in paths:
            try:
                row = model.probabilities([path])[0]
            except DataError as ex:
                unreadable += 1
                console.print(f"[yellow]left out: {ex}[/]")
                continue
            predicted = model.classes[int(row.argmax())]
            table.writerow(
                [path.relative_to(folder).as_posix(), predicted, *(f"{p:.6f}" for p in row)]
            )
    console.print(f"{len(paths) - unreadable} images → {out}")


@app.command()
def phantom(
    folder: Annotated[Path, typer.Argument(help="Where the four hospitals go.")],
    seed: Annotated[int, typer.Option(min=0)] = 0,
    patients: Annotated[int, typer.Option(min=40, help="Of all hospitals together.")] = 400,
) -> None:
    """Draw four phantom hospitals: synthetic chest films with something to find."""
    from simulations.phantom import HOSPITALS, write

    write(folder, seed=seed, patients=patients)
    console.print("  ".join(f"{folder / hospital.name}" for hospital in HOSPITALS))


@app.command()
def bench() -> None:
    """Measure what the engine itself costs per site and round."""
    from simulations import bench as benchmarks

    benchmarks.engine()


def _numbers(text: str | None) -> tuple[int, ...]:
    if text is None:
        return ()
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise typer.BadParameter(f"--seeds: expected numbers such as 0,1,2, got {text!r}") from None
