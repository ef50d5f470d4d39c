"""A released model as one ONNX file, its preprocessing and read-out in the graph.

It needs the extra `export`: onnx and onnxscript to write, onnxruntime to check what was written.
"""

import json
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor, nn

from common.errors import RunError
from common.model.inference import ReleasedModel

PACKAGES = ("onnx", "onnxscript", "onnxruntime")
TOLERANCE = 1e-4
"""How far a probability may lie from PyTorch's."""
_BATCHES = (1, 2, 5)
_OPSET = 20


class Served(nn.Module):
    """What stands in the graph: from squares of pixels to probabilities and decisions.

    Args:
      model: The released model.
    """

    mean: Tensor
    std: Tensor
    prior: Tensor

    def __init__(self, model: ReleasedModel) -> None:
        super().__init__()
        preprocess, read_out = model.preprocess, model.read_out
        self.network = model.network
        self.temperature = read_out.temperature
        self.register_buffer("mean", torch.tensor(preprocess.mean).view(3, 1, 1))
        self.register_buffer("std", torch.tensor(preprocess.std).view(3, 1, 1))
        prior = read_out.log_prior or (0.0,) * len(model.classes)
        self.register_buffer("prior", torch.tensor(prior))

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """uint8 [n, 3, crop, crop] → probabilities float32 [n, K], decisions int64 [n]."""
        logits = self.network((images.float() / 255 - self.mean) / self.std)
        return (logits / self.temperature + self.prior).softmax(1), logits.argmax(1)


def list_missing() -> list[str]:
    """The packages of the extra `export` that are not installed."""
    return [name for name in PACKAGES if find_spec(name) is None]


def write_onnx(model: ReleasedModel, path: Path) -> None:
    """Write the model, and run the file by ONNX Runtime to see that it says what PyTorch says.

    Its input `images` is uint8 [n, 3, crop, crop], for any n: an image resized and cropped, neither
    scaled nor normalised. Its outputs are `probabilities`, float32 [n, K], and `decision`, int64
    [n], as of `ReleasedModel`. Its metadata hold what `model.json` holds.

    Raises:
      RunError: the file does not say what PyTorch says; none is left.
    """
    served = Served(model).eval()
    side = model.preprocess.crop
    example = torch.zeros(2, 3, side, side, dtype=torch.uint8)  # of one image, n would be fixed
    with _quiet(), torch.no_grad():
        program = torch.onnx.export(
            served,
            (example,),
            dynamo=True,
            verbose=False,
            opset_version=_OPSET,
            input_names=["images"],
            output_names=["probabilities", "decision"],
            dynamic_shapes={"images": {0: torch.export.Dim("n", min=1)}},
        )
    assert program is not None  # noqa: S101  (as without a file to write to)
    for node in program.model.graph.all_nodes():
        node.metadata_props.clear()  # of PyTorch's own debugging: paths of this machine
    about = model.about
    program.model.metadata_props.update(
        {
            "classes": json.dumps(about.classes, ensure_ascii=False),
            "study": f"{about.study} {about.study_id}",
            "fingerprint": about.sha256 or "",
            "model.json": about.to_json(),
        }
    )
    program.save(path)
    if wrong := check_onnx(served, path):
        path.unlink()
        expected = f"probabilities within {TOLERANCE:g} of PyTorch's, and its decisions"
        raise RunError(path, expected=expected, got=wrong)


def check_onnx(served: Served, path: Path) -> str:
    """Run a file on random pixels beside PyTorch; returns in words what differs, if anything."""
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    side, drawn = session.get_inputs()[0].shape[-1], torch.Generator().manual_seed(0)
    for number in _BATCHES:
        size = (number, 3, side, side)
        images = torch.randint(0, 256, size, dtype=torch.uint8, generator=drawn)
        found, decided = map(torch.from_numpy, session.run(None, {"images": images.numpy()}))
        with torch.inference_mode():
            expected, _ = served(images)
            logits = served.network((images.float() / 255 - served.mean) / served.std)
        if not (apart := (found - expected).abs().max().item()) <= TOLERANCE:
            return f"{apart:.2g} apart on {number} images"
        # Rounding may part a tie otherwise.
        lost = logits.amax(1) - logits.gather(1, decided[:, None])[:, 0]
        if not (lost <= TOLERANCE * logits.abs().amax(1).clamp(min=1)).all():
            return f"other decisions on {number} images"
    return ""


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep what the exporter tells its developers off the terminal."""
    log = logging.getLogger("torch.onnx")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        log.setLevel(level)
