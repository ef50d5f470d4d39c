"""The released model of a finished run, whole, with its preprocessing.

from common.model.inference import load_model
model = load_model("runs/demo")
model.probabilities(["a.png", "b.jpg"])  # float32 [2, classes], columns as in model.classes
model.decisions(["a.png", "b.jpg"])  # int64 [2], positions in model.classes
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from common.config.study import Study
from common.errors import DataError, RunError
from common.heads.read_out import AS_IT_IS, ReadOut
from common.model import backbones
from common.model.images import Preprocess
from common.model.network import build_model


@dataclass(frozen=True)
class ReleasedModel:
    """A trained classifier for image files.

    Attributes:
      classes: Names of the columns of `probabilities`.
      network: Normalised float32 [n, 3, crop, crop] → logits [n, classes]; in eval mode.
      preprocess: From an image file to the network's input.
      read_out: From logits to probabilities, which know how common each class is; decisions do not.
    """

    classes: tuple[str, ...]
    network: nn.Module
    preprocess: Preprocess
    read_out: ReadOut = AS_IT_IS

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
    """The model that the run folder `run` released, or that a site keeps in state/adapted/<id>.

    Raises:
      RunError: there is no such folder, it holds none or several, the run is not finished, or its
        model file is damaged.
    """
    folder = Path(run)
    study_file, file = folder / "study.yaml", folder / "model.safetensors"
    if not (study_file.is_file() and file.is_file()):
        got, remedy = _explain_absence(folder)
        raise RunError(folder, expected="the folder of a finished run", got=got, remedy=remedy)
    study = Study.read(study_file)
    backbone = backbones.get(study.model.backbone)
    network = build_model(study, "none")
    try:
        network.load_state_dict(load_file(file))
    except (SafetensorError, RuntimeError, OSError):
        got = "a damaged one"
        raise RunError(file, expected="the released model", got=got) from None
    preprocess = backbone.preprocess(study.model.weights).with_size(study.images.size)
    return ReleasedModel(study.classes, network, preprocess, _read_out(folder))


def _explain_absence(folder: Path) -> tuple[str, str]:
    """What a folder is that holds no released model, and what to do."""
    name = "Name a run folder, or one in a site's state/adapted."
    if not folder.is_dir():
        return "a file" if folder.exists() else "no such folder", name
    if (folder / "study.yaml").is_file():
        resume = f"run --resume {folder}"
        remedy = f"Finish it with consilium-simulate {resume}, in a deployment consilium-server's."
        return "a run that is not finished", remedy
    # Of several seeds, of a sweep's settings and seeds, of a site's state.
    found = sorted([*folder.glob("*/model.safetensors"), *folder.glob("*/*/model.safetensors")])
    if found:
        return f"a folder that holds {len(found)}", f"Name one itself, such as {found[0].parent}."
    return "a folder without one", name


def _read_out(folder: Path) -> ReadOut:
    path = folder / "read_out.json"
    try:
        told = json.loads(path.read_text("utf-8"))
        return ReadOut(float(told["temperature"]), tuple(map(float, told["log_prior"])))
    except FileNotFoundError:
        return AS_IT_IS
    except (OSError, ValueError, KeyError, TypeError):
        raise RunError(path, expected="the model's read-out", got="a damaged one") from None
