"""The mean of a backbone's features on public images, which a study may subtract."""

import json
from collections.abc import Iterator
from pathlib import Path

import torch
from rich.progress import track
from torch import Tensor, nn

from common.config.study import Study
from common.errors import DataError
from common.model import backbones
from common.model.image_files import find_images
from common.model.images import Preprocess
from common.model.network import assemble
from common.support import files
from common.support.terminal import console

_BATCH = 64


def write_feature_mean(study: Study, folder: Path, out: Path) -> int:
    """Write to `out` the mean of `study`'s pooled features over all images in `folder`.

    Returns:
      The number of images behind the mean; those that cannot be read are named and left out.

    Raises:
      DataError: no readable image.
      BackboneError: the study's weights are missing or belong to another architecture.
    """
    network = assemble(study, study.model.weights)
    head = network.model.get_submodule(backbones.get(network.backbone).head)
    total, count = torch.zeros((), dtype=torch.float64), 0

    def add(layer: nn.Module, inputs: tuple[Tensor]) -> None:
        nonlocal total
        total = total + inputs[0].double().sum(0)

    hook = head.register_forward_pre_hook(add)
    for images in _batches(folder, network.preprocess):
        with torch.inference_mode():
            network.model(network.preprocess.normalise(images))
        count += len(images)
    hook.remove()
    if not count:
        raise DataError(folder, expected="a folder with images", got="none")
    mean = [float(f"{number:.6g}") for number in (total / count).tolist()]
    files.write(out, json.dumps({"backbone": network.backbone, "images": count, "mean": mean}))
    return count


def _batches(folder: Path, preprocess: Preprocess) -> Iterator[Tensor]:
    """The readable images, uint8 [n, 3, H, W] at a time."""
    images: list[Tensor] = []
    paths, hidden = find_images(folder), not console.is_terminal
    for path in track(paths, "images", console=console, disable=hidden):
        try:
            images.append(preprocess.read(path.read_bytes(), str(path)))
        except DataError as ex:
            console.print(f"left out: {ex}", style="yellow")
        if len(images) == _BATCH:
            yield torch.stack(images)
            images = []
    if images:
        yield torch.stack(images)
