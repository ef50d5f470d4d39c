"""What a person does with a model that was released: predict."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from common.support.terminal import console

Images = Annotated[Path, typer.Argument(help="Images; subfolders are searched too.")]
Out = Annotated[Path, typer.Option(help="The CSV file to write.")]
OUT = Path("predictions.csv")
ThresholdOption = Annotated[
    list[str] | None,
    typer.Option(
        "--threshold",
        metavar="CLASS=P",
        help="Call an image so if, and only if, this class has a probability of at least P. "
        "Repeat; of several the first given counts.",
    ),
]


def predict(
    model: Annotated[Path, typer.Argument(metavar="MODEL", help="A finished run folder.")],
    images: Images,
    out: Out = OUT,
    threshold: ThresholdOption = None,
) -> None:
    """Write what a model calls every image in a folder, and its class probabilities.

    Each image file has a row, with the reason where it cannot be read. Where classes are unlike in
    number, what an image is called need not be its likeliest class: decisions treat all classes
    alike, so that rare ones are found; probabilities do not. A threshold decides by probability.
    """
    predict_files(model, images, out, threshold or ())


def predict_files(folder: Path, images: Path, out: Path, thresholds: Sequence[str]) -> None:
    """The command for a model in this folder."""
    from common.model.inference import load_model
    from common.model.predicting import parse_thresholds, predict_folder

    model = load_model(folder)
    predict_folder(model, images, out, parse_thresholds(thresholds, model.classes))
    console.print("predicted: the decision, which need not be the most probable class", style="dim")
