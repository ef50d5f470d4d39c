"""The commands of `consilium-client` that use a model, on images of the hospital."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from client.cli.privacy import SiteFile
from common.cli.models import (
    OUT,
    Explain,
    Folder,
    Images,
    Out,
    ThresholdOption,
    export_files,
    predict_files,
)
from common.errors import SiteError
from common.support.terminal import console, table

if TYPE_CHECKING:
    from client.models.evaluating import Evaluated
    from common.model.inference import ReleasedModel

Model = Annotated[
    str,
    typer.Argument(
        metavar="MODEL", help="A run folder; or a study, by name or id, that left a model here."
    ),
]
SiteOption = Annotated[
    Path, typer.Option("--site", metavar="SITE_YAML", help="The site that keeps the model.")
]
SITE = Path("site.yaml")


def predict(
    model: Model,
    images: Images,
    out: Out = OUT,
    threshold: ThresholdOption = None,
    explain: Explain = None,
    site_file: SiteOption = SITE,
) -> None:
    """Write what a model calls every image in a folder, and its class probabilities.

    The model is a released one, in a folder, or the one that was fitted to this site at the end of
    a study. Each image file has a row, with the reason where it cannot be read. Where classes are
    unlike in number, what an image is called need not be its likeliest class: decisions treat all
    classes alike, so that rare ones are found; probabilities do not. A threshold decides by
    probability.
    """
    predict_files(_find(model, site_file), images, out, threshold or (), explain)


def export(model: Model, folder: Folder, site_file: SiteOption = SITE) -> None:
    """Write a model as other software at the hospital reads it: its tensors, and one ONNX file.

    The model that was fitted to this site is made of its patients without any privacy: wherever it
    goes, it must stay at the hospital. model.onnx is written where the extra export is installed.
    """
    export_files(_find(model, site_file), folder)


def evaluate(
    model: Model,
    explain: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="Also draw the mistakes that the model is surest of, and where its features "
            "react (Grad-CAM).",
        ),
    ] = None,
    site_file: SiteOption = SITE,
) -> None:
    """Show how a model does on this site's own labelled images; the figures stay here.

    All labelled images count. If this site joined the model's study, only its test patients do:
    others trained the model, or chose it.
    """
    from client.models.evaluating import evaluate_model, list_unseen
    from client.site import Site
    from common.model.inference import load_model

    released, site = load_model(_find(model, site_file)), Site.read(site_file)
    records = list_unseen(site, released)
    found = evaluate_model(released, records, cache=site.cache_folder, device=site.device)
    _show_figures(released, found)
    if explain:
        _explain_mistakes(released, found, explain)


def report(
    site_file: SiteFile,
    study: Annotated[
        str, typer.Argument(metavar="STUDY", help="A study that ended here, by name or id.")
    ],
) -> None:
    """Write this hospital's own page of a study: every figure in full, what was told, and ε.

    A client that is started writes it at the end of each study. It is one file that loads nothing,
    in the state folder. It stays here: it shows more than the coordinator was told.
    """
    from client.reports.page import write_page_later
    from client.site import Site

    console.print(f"page: {write_page_later(Site.read(site_file), study)}")


def _explain_mistakes(model: "ReleasedModel", found: "Evaluated", folder: Path) -> None:
    from client.models.mistakes import draw_mistakes, list_mistakes
    from common.model.explaining import CAVEAT

    mistakes = list_mistakes(model, found)
    if not mistakes:
        console.print("No mistakes to draw.")
        return
    path = draw_mistakes(model, mistakes, folder)
    shown = f"the {len(mistakes)} mistakes that the model is surest of"
    console.print(f"{shown} → {path}. {CAVEAT}")
    console.print("They are images of patients: they must stay here.", style="bold")


def _show_figures(model: "ReleasedModel", found: "Evaluated") -> None:
    from common.metrics.metrics import METRICS, sensitivity, specificity, value

    counts = found.count(model.read_out)
    console.print(f"{len(found.records)} images of {found.patients} patients")
    for name, metric in METRICS.items():
        console.print(f"{metric.label:18} {_format(value(counts, name))}")
    shown = table("class", "images", "sensitivity", "specificity", left=("class",))
    for k, name in enumerate(model.classes):
        images = str(counts.confusion[k].sum())
        shown.add_row(
            name, images, _format(sensitivity(counts, k)), _format(specificity(counts, k))
        )
    console.print(shown)
    console.print("Nothing was fitted to these images, and nothing left this site.", style="dim")


def _format(figure: float | None) -> str:
    return "–" if figure is None else f"{figure:.3f}"


def _find(model: str, site_file: Path) -> Path:
    """The folder of a model."""
    from client.models.kept import find_adapted
    from client.site import Site

    if Path(model).is_dir():
        return Path(model)
    if not site_file.is_file():
        expected = "a folder with a model, or, with --site, a study that left one there"
        raise SiteError(model, expected=expected, got="neither")
    return find_adapted(Site.read(site_file), model)
