"""The commands of `consilium-client` that use a model, on images of the hospital."""

from pathlib import Path
from typing import Annotated

import typer

from common.cli.models import (
    OUT,
    Folder,
    Images,
    Out,
    ThresholdOption,
    export_files,
    predict_files,
)

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
    site_file: SiteOption = SITE,
) -> None:
    """Write what a model calls every image in a folder, and its class probabilities.

    The model is a released one, in a folder, or the one that was fitted to this site at the end of
    a study. Each image file has a row, with the reason where it cannot be read. Where classes are
    unlike in number, what an image is called need not be its likeliest class: decisions treat all
    classes alike, so that rare ones are found; probabilities do not. A threshold decides by
    probability.
    """
    predict_files(_find(model, site_file), images, out, threshold or ())


def export(model: Model, folder: Folder, site_file: SiteOption = SITE) -> None:
    """Write a model as other software at the hospital reads it: its tensors, and one ONNX file.

    The model that was fitted to this site is made of its patients without any privacy: wherever it
    goes, it must stay at the hospital. model.onnx is written where the extra export is installed.
    """
    export_files(_find(model, site_file), folder)


def _find(model: str, site_file: Path) -> Path:
    """The folder of a model."""
    from client.models.kept import find_adapted
    from client.site import Site

    return Path(model) if Path(model).is_dir() else find_adapted(Site.read(site_file), model)
