"""The mistakes that a model is surest of, on labelled images of a site: one sheet to look at."""

from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from client.data.records import Record
from client.models.evaluating import Evaluated
from common.model.explaining import compute_cam, draw_cam, save_picture
from common.model.inference import ReleasedModel

_MOST, _COLUMNS = 12, 2


@dataclass(frozen=True)
class Mistake:
    """A labelled image that a model calls otherwise.

    Attributes:
      record: The image, and its label.
      called: Position of the class that it is called.
      probability: Of that class.
    """

    record: Record
    called: int
    probability: float


def list_mistakes(model: ReleasedModel, found: Evaluated) -> list[Mistake]:
    """The mistakes of the highest probability, at most 12, the surest first."""
    called = found.logits.argmax(1)
    shares = model.read_out.scores(found.logits).softmax(1).gather(1, called[:, None])[:, 0]
    answers = zip(found.records, called.tolist(), shares.tolist(), strict=True)
    wrong = [Mistake(*answer) for answer in answers if answer[0].label != answer[1]]
    return sorted(wrong, key=lambda each: -each.probability)[:_MOST]


def draw_mistakes(model: ReleasedModel, mistakes: list[Mistake], folder: Path) -> Path:
    """Draw them with Grad-CAM of what they are called, on one sheet; returns its file.

    The sheet shows patients: the folder is for this user alone.
    """
    pictures = [_draw(model, each) for each in mistakes]
    width, height = pictures[0].size
    rows = -(-len(pictures) // _COLUMNS)
    sheet = Image.new("RGB", (_COLUMNS * width, rows * height), "white")
    for number, picture in enumerate(pictures):
        row, column = divmod(number, _COLUMNS)
        sheet.paste(picture, (column * width, row * height))
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    path = folder / "mistakes.png"
    save_picture(sheet, path)
    return path


def _draw(model: ReleasedModel, each: Mistake) -> Image.Image:
    square = each.record.image.square(model.preprocess)
    name, truth = model.classes[each.called], model.classes[each.record.label]
    caption = (
        f"{Path(each.record.image.name).name}: {truth}, called {name} ({each.probability:.2f})"
    )
    return draw_cam(square, compute_cam(model, square, each.called), caption)
