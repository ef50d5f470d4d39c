"""The released model of a finished run, whole, with its preprocessing.

from common.model.inference import load_model
model = load_model("runs/demo")
model.probabilities(["a.png", "b.jpg"])  # float32 [2, classes], columns as in model.classes
model.decisions(["a.png", "b.jpg"])  # int64 [2], positions in model.classes
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor, nn

from common.errors import DataError, RunError
from common.heads.read_out import ReadOut
from common.model import backbones
from common.model.description import WEIGHTS, Description, read_description
from common.model.images import Preprocess


@dataclass(frozen=True)
class ReleasedModel:
    """A trained classifier for image files.

    Attributes:
      about: All of it but the weights.
      network: Normalised float32 [n, 3, crop, crop] → logits [n, classes]; in eval mode.
    """

    about: Description
    network: nn.Module

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the columns of `probabilities`."""
        return self.about.classes

    @property
    def preprocess(self) -> Preprocess:
        """From an image file to the network's input."""
        return self.about.preprocess

    @property
    def read_out(self) -> ReadOut:
        """From logits to probabilities, which know how common each class is; decisions do not."""
        return self.about.read_out

    def probabilities(self, images: Sequence[str | Path]) -> Tensor:
        """Class probabilities float32 [len(images), classes] of image files.

        Raises:
          DataError: an image cannot be read; names it.
        """
        return self.read_out.scores(self.logits(images)).softmax(1).float()

    def decisions(self, images: Sequence[str | Path]) -> Tensor:
        """The class each image file is called, int64 [len(images)]; not always the likeliest.

        Raises:
          DataError: an image cannot be read; names it.
        """
        return self.logits(images).argmax(1)

    def logits(self, images: Sequence[str | Path]) -> Tensor:
        """Logits float32 [len(images), classes] of image files.

        Raises:
          DataError: an image cannot be read; names it.
        """
        return self.compute_logits([self.read(Path(path)) for path in images])

    def compute_logits(self, squares: Sequence[Tensor]) -> Tensor:
        """Logits float32 [len(squares), classes] of what `read` returned."""
        if not squares:
            return torch.empty(0, len(self.classes))
        with torch.inference_mode():
            logits: Tensor = self.network(self.preprocess.normalise(torch.stack([*squares])))
        return logits

    def read(self, path: Path) -> Tensor:
        """An image file → uint8 [3, crop, crop].

        Raises:
          DataError: it cannot be read; names it.
        """
        try:
            return self.preprocess.read(path.read_bytes(), str(path))
        except OSError as ex:
            raise DataError(path, expected="an image", got=ex.strerror) from None


def load_model(run: str | Path) -> ReleasedModel:
    """The model that a run released into its folder, that a site keeps, or that was exported.

    Raises:
      RunError: there is no such folder, it holds none or several, the run is not finished, or its
        model file is damaged.
    """
    folder = Path(run)
    about = read_description(folder)
    network = build_network(about)
    try:
        content = (folder / WEIGHTS).read_bytes()
        if about.sha256 not in (None, hashlib.sha256(content).hexdigest()):
            raise OSError("another file")
        network.load_state_dict(load(content))
        if not all(tensor.isfinite().all() for tensor in network.state_dict().values()):
            raise OSError("numbers that are none")
    except (SafetensorError, RuntimeError, OSError):
        expected, got = "the released model", "a damaged one"
        raise RunError(folder / WEIGHTS, expected=expected, got=got) from None
    return ReleasedModel(about, network)


def build_network(about: Description) -> nn.Module:
    """The network in eval mode, its weights still random."""
    backbone, head = backbones.get(about.backbone), about.head
    return backbone.build(
        classes=len(about.classes),
        dropout=0.0,
        weights="none",
        seed=0,
        mean=(0.0,) * backbone.width if head.centre else None,
        unit=head.unit,
        directions=head.directions,
    )
