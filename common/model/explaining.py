"""Where in an image the last features react for a class: Grad-CAM, laid over the image."""

import os
from pathlib import Path

import matplotlib
import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor, nn

from common.errors import RunError
from common.model import backbones
from common.model.inference import ReleasedModel
from common.model.predicting import Prediction

CAVEAT = "Grad-CAM shows where the last features react, not why."
_COLOURS, _ALPHA = "magma", 0.45
"""A colour map that colour-blind people read, too; how much it covers the image."""
_SIDE, _LINE = 320, 18
"""Of each picture and each line of text, pixels."""


def compute_cam(model: ReleasedModel, square: Tensor, position: int) -> Tensor:
    """Grad-CAM of one class (Selvaraju et al. 2017): relu(Σ_c mean_hw(∂logit/∂A_c) · A_c).

    A are the backbone's last features that have places in the image.

    Args:
      model: The model; its parameters need no gradient from then on.
      square: uint8 [3, crop, crop], as of `ReleasedModel.read`.
      position: Of the class.

    Returns:
      float32 [h, w], at least 0; all 0 where no place speaks for the class.
    """
    network, place = (
        model.network.requires_grad_(False),
        backbones.get(model.about.backbone).last_map,
    )
    kept: list[Tensor] = []

    def keep(module: nn.Module, given: object, output: Tensor) -> Tensor:
        kept.append(output.detach().clone().requires_grad_())
        return kept[0].clone()  # what follows may work in place

    hook = network.get_submodule(place.module).register_forward_hook(keep)
    try:
        pixels = square[None].to(next(network.parameters()).device)
        logit = network(model.preprocess.normalise(pixels))[0, position]
    finally:
        hook.remove()
    (slope,) = torch.autograd.grad(logit, kept[0])
    slopes, features = (place.to_channels_first(x.detach()) for x in (slope, kept[0]))
    return (slopes.mean((2, 3), keepdim=True) * features).sum(1).relu()[0].cpu()


def draw_cam(square: Tensor, cam: Tensor, caption: str) -> Image.Image:
    """The image, the same under its map scaled to its own maximum, and the caveat below.

    Args:
      square: uint8 [3, crop, crop].
      cam: [h, w], as of `compute_cam`.
      caption: One line above the caveat.
    """
    scaled = cam / cam.max().clamp(min=torch.finfo(cam.dtype).tiny)
    smooth = F.interpolate(scaled[None, None], (_SIDE, _SIDE), mode="bilinear")[0, 0]
    colours = matplotlib.colormaps[_COLOURS](smooth.numpy(), bytes=True)[..., :3]
    pixels = np.ascontiguousarray(square.permute(1, 2, 0).numpy())
    plain = Image.fromarray(pixels).resize((_SIDE, _SIDE), Image.Resampling.BICUBIC)
    page = Image.new("RGB", (2 * _SIDE, _SIDE + 2 * _LINE), "white")
    page.paste(plain, (0, 0))
    page.paste(Image.blend(plain, Image.fromarray(colours), _ALPHA), (_SIDE, 0))
    draw, font = ImageDraw.Draw(page), ImageFont.load_default(size=13)
    for number, line in enumerate((caption, CAVEAT)):
        draw.text((4, _SIDE + 1 + number * _LINE), line, fill="black", font=font)
    return page


def save_picture(picture: Image.Image, path: Path) -> None:
    """Write a picture of a patient, which this user alone can read."""
    opened = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(opened, "wb") as file:
        picture.save(file, "PNG")


class Explainer:
    """Writes a picture of each image whose prediction it is given.

    Args:
      model: The model that predicts.
      images: The folder of the images.
      out: The folder of the pictures, laid out likewise; the name of each adds `.cam.png`.

    Raises:
      RunError: `out` lies in `images`, where pictures would be taken for images.
    """

    def __init__(self, model: ReleasedModel, images: Path, out: Path) -> None:
        if out.resolve().is_relative_to(images.resolve()):
            expected = "a folder elsewhere than the images"
            raise RunError(f"--explain {out}", expected=expected, got=f"one in {images}")
        self._model, self._images, self._out = model, images, out

    def __call__(self, each: Prediction) -> None:
        """Write the picture of the class that the image is called."""
        if each.square is None or each.called is None:
            return
        cam = compute_cam(self._model, each.square, each.called)
        inside = each.path.relative_to(self._images)
        path = self._out / inside.with_name(f"{inside.name}.cam.png")
        self._out.mkdir(mode=0o700, parents=True, exist_ok=True)
        path.parent.mkdir(parents=True, exist_ok=True)
        save_picture(draw_cam(each.square, cam, describe_prediction(self._model, each)), path)


def describe_prediction(model: ReleasedModel, each: Prediction) -> str:
    """Such as `melanoma, probability 0.83`."""
    if each.called is None:
        return each.error
    return f"{model.classes[each.called]}, probability {each.probabilities[each.called]:.2f}"
