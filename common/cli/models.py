"""What a person does with a model that was released: predict, export."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from common.support.terminal import console

INSTALL = (
    "pip install 'consilium[export]', "
    "in a checkout pip install --require-hashes -r constraints-export.txt"
)
Images = Annotated[Path, typer.Argument(help="Images; subfolders are searched too.")]
Out = Annotated[Path, typer.Option(help="The CSV file to write.")]
OUT = Path("predictions.csv")
Explain = Annotated[
    Path | None,
    typer.Option(
        metavar="DIR",
        help="Also draw where in each image the features react for what it is called (Grad-CAM).",
    ),
]
Folder = Annotated[Path, typer.Argument(metavar="DIR", help="A new or empty folder.")]
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
    explain: Explain = None,
) -> None:
    """Write what a model calls every image in a folder, and its class probabilities.

    Each image file has a row, with the reason where it cannot be read. Where classes are unlike in
    number, what an image is called need not be its likeliest class: decisions treat all classes
    alike, so that rare ones are found; probabilities do not. A threshold decides by probability.
    """
    predict_files(model, images, out, threshold or (), explain)


def predict_files(
    folder: Path, images: Path, out: Path, thresholds: Sequence[str], explain: Path | None
) -> None:
    """The command for a model in this folder."""
    from common.model.inference import load_model
    from common.model.predicting import parse_thresholds, predict_folder

    model = load_model(folder)
    chosen = parse_thresholds(thresholds, model.classes)
    if explain is None:
        predict_folder(model, images, out, chosen)
    else:
        from common.model.explaining import CAVEAT, Explainer

        predict_folder(model, images, out, chosen, Explainer(model, images, explain))
        console.print(f"pictures → {explain}; they are images of patients. {CAVEAT}")
    console.print("predicted: the decision, which need not be the most probable class", style="dim")


def export(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A finished run folder.")],
    folder: Folder,
) -> None:
    """Take a released model home: its tensors, all that they need, and one ONNX file.

    model.safetensors and model.json are read by predict, and by other software that knows the
    backbone. model.onnx needs nothing else: pixels in, probabilities and decisions out; it is
    written where the extra export is installed, and checked against PyTorch.
    """
    export_files(run, folder)


def export_files(model: Path, folder: Path) -> None:
    """The command for a model in this folder."""
    from common.model.exporting import export_model
    from common.model.onnx_file import list_missing

    privacy = export_model(model, folder)["privacy"]
    console.print(f"{', '.join(sorted(path.name for path in folder.iterdir()))} → {folder}")
    if not privacy["private"]:
        console.print(f"NOT PRIVATE: {privacy['note']}", style="bold red")
    if missing := list_missing():
        console.print(f"no model.onnx without {', '.join(missing)}: {INSTALL}")
