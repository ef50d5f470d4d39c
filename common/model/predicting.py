"""What a model calls each image file; a file that cannot be read has the reason instead."""

import csv
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.progress import track
from torch import Tensor

from common.errors import DataError, RunError, did_you_mean
from common.model.image_files import count_kinds, list_files
from common.model.inference import ReleasedModel
from common.support.terminal import console

_BATCH = 32
_FORMULA = ("=", "+", "-", "@", "\t", "\r")
"""A spreadsheet computes a cell that begins so; names of files and classes come from others."""

Thresholds = Mapping[int, float]
"""By position of a class, in the order given: the least probability for which it is called."""


@dataclass(frozen=True, eq=False)
class Prediction:
    """What a model says of one image file.

    Attributes:
      path: The file.
      called: Position of the class it is called; None if it cannot be read.
      probabilities: Of each class; empty if it cannot be read.
      square: uint8 [3, crop, crop], as the model saw it; None if it cannot be read.
      error: Why it cannot be read; empty if it can.
    """

    path: Path
    called: int | None = None
    probabilities: tuple[float, ...] = ()
    square: Tensor | None = None
    error: str = ""


def parse_thresholds(texts: Sequence[str], classes: Sequence[str]) -> Thresholds:
    """The thresholds in texts such as `melanoma=0.2`.

    Raises:
      RunError: a text is no threshold, or no class is left for all other images.
    """
    found: dict[int, float] = {}
    for text in texts:
        name, _, number = text.rpartition("=")
        where = f"--threshold {text}"
        if name not in classes:
            remedy = did_you_mean(name, classes)
            raise RunError(where, expected="CLASS=P of a class", got=repr(name), remedy=remedy)
        found[list(classes).index(name)] = _read_share(where, number)
    if len(found) == len(classes):
        expected, got = "a class without one, for the images that reach none", "one for each class"
        raise RunError("--threshold", expected=expected, got=got)
    return found


def _read_share(where: str, text: str) -> float:
    try:
        share = float(text)
    except ValueError:
        share = math.nan
    if not 0 < share <= 1:
        raise RunError(where, expected="a P above 0 and at most 1", got=repr(text))
    return share


def decide(logits: Tensor, probabilities: Tensor, thresholds: Thresholds) -> Tensor:
    """The class that each image is called, int64 [n]: the first whose threshold is reached.

    Of the classes without a threshold it is the one with the highest logit, which need not be the
    most probable one. A class below its threshold is never called.

    Args:
      logits: [n, K].
      probabilities: [n, K].
      thresholds: Of some of the classes, not of all.
    """
    called = logits.index_fill(1, torch.tensor([*thresholds], dtype=torch.long), -math.inf).argmax(
        1
    )
    for position, least in reversed([*thresholds.items()]):
        called = called.where(probabilities[:, position] < least, position)
    return called


def predict_images(
    model: ReleasedModel, paths: Sequence[Path], thresholds: Thresholds
) -> Iterator[Prediction]:
    """What the model says of each file, in their order."""
    for start in range(0, len(paths), _BATCH):
        read = [_read(model, path) for path in paths[start : start + _BATCH]]
        logits = model.compute_logits([each.square for each in read if each.square is not None])
        shares = model.read_out.scores(logits).softmax(1)
        answers = zip(decide(logits, shares, thresholds).tolist(), shares.tolist(), strict=True)
        for each in read:
            if each.square is None:
                yield each
            else:
                called, row = next(answers)
                yield Prediction(each.path, called, tuple(row), each.square)


def _read(model: ReleasedModel, path: Path) -> Prediction:
    """The file as the model is shown it, without an answer yet."""
    try:
        return Prediction(path, square=model.read(path))
    except DataError as ex:
        return Prediction(path, error=str(ex).removeprefix(f"{path}: "))


def predict_folder(
    model: ReleasedModel,
    folder: Path,
    out: Path,
    thresholds: Thresholds,
    explain: Callable[[Prediction], None] | None = None,
) -> None:
    """Write a CSV file with a row for each image of a folder, as the model reads them.

    Its columns are image (the path below `folder`), predicted, each class, and error. A byte of a
    file name that is not UTF-8 is written as an escape. No cell is a formula to a spreadsheet: a
    path that begins like one is written with `./` before it, the name of a class with `'`.

    Args:
      model: The model.
      folder: Of images; folders below it are searched, too.
      out: The file to write.
      thresholds: As in `decide`.
      explain: Is given each image that could be read.

    Raises:
      DataError: no file of the folder is an image.
      OSError: a folder cannot be read, or the file not be written.
    """
    listing = list_files(folder)
    total, unread = len(listing.images), 0
    classes = [_write_text(name, "'") for name in model.classes]
    found = predict_images(model, listing.images, thresholds)
    with out.open("w", encoding="utf-8", errors="backslashreplace", newline="") as file:
        table = csv.writer(file)
        table.writerow(("image", "predicted", *classes, "error"))
        hidden = not console.is_terminal
        for each in track(found, "images", total=total, console=console, disable=hidden):
            name = _write_text(each.path.relative_to(folder).as_posix(), "./")
            table.writerow((name, *_row(classes, each)))
            file.flush()
            if each.error:
                unread += 1
                console.print(f"not read: {each.path}: {each.error}", style="yellow")
            elif explain:
                explain(each)
    told = [f"{total} images → {out}", f"{unread} of them not read" * bool(unread)]
    told.append(f"no images: {count_kinds(listing.others)}" * bool(listing.others))
    console.print("; ".join(filter(None, told)))


def _write_text(text: str, before: str) -> str:
    """A text that no spreadsheet takes for a formula."""
    return before + text if text.startswith(_FORMULA) else text


def _row(classes: Sequence[str], each: Prediction) -> tuple[str, ...]:
    if each.called is None:
        return ("", *[""] * len(classes), each.error)
    return (classes[each.called], *[f"{p:.6f}" for p in each.probabilities], "")
