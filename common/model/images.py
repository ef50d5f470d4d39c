"""Images: bytes → pixels → a backbone's input, the same at every site and in every simulation."""

import io
import math
from dataclasses import dataclass, field, replace
from typing import Annotated, Literal, Self

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError
from pydantic import Field
from torch import Tensor
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as vision

from common.errors import DataError

# A closed list: some of Pillow's other formats start programs or hold no picture.
FORMATS = ("JPEG", "PNG", "TIFF", "BMP", "GIF", "WEBP", "JPEG2000", "PPM")
MAX_PIXELS = 80_000_000
MAX_ELONGATION = 50
DEEP_GREY = ("I;16", "I;16L", "I;16B", "I;16N")
DEEP_OTHER = ("I", "F")


def decode(data: bytes, name: str = "image", at_least: int | None = None) -> Tensor:
    """The image in `data`, upright; of several frames the first.

    Transparent pixels are composited on black; 16-bit grey is scaled, its full range to 0–255.

    Args:
      data: a file's content, in one of `FORMATS`.
      name: what errors call the image, on this machine only.
      at_least: a JPEG may come at 1/2, 1/4 or 1/8 of its size, which is far quicker, as long as
        its shorter side keeps this many pixels. None: at its full size.

    Returns:
      uint8 RGB, [3, H, W], the channels last in memory as `Preprocess.pixels` is quickest with.

    Raises:
      DataError: whatever the reason this cannot be decoded.
    """
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            _check(image)
            if at_least is not None:
                image.draft(None, (at_least, at_least))
            ImageOps.exif_transpose(image, in_place=True)
            rgb = _rgb(image)
    except UnidentifiedImageError:  # its own text names an object in memory
        got = f"bytes in none of {', '.join(FORMATS)}" if data else "an empty file"
        raise DataError(name, expected="a readable image", got=got) from None
    # Damaged files make Pillow raise nearly any class, and one bad image must not end a run.
    except Exception as ex:
        got = f"{type(ex).__name__}: {ex}"
        raise DataError(name, expected="a readable image", got=got) from None
    return torch.from_numpy(rgb).permute(2, 0, 1)


def _check(image: Image.Image) -> None:
    """Refuse, before any pixel is decoded, what would exhaust memory or has no known range."""
    width, height = image.size
    long, short = max(image.size), min(image.size)
    if width * height > MAX_PIXELS or long > MAX_ELONGATION * short:
        raise ValueError(
            f"{width}×{height} pixels, more than {MAX_PIXELS:,} "
            f"or more than {MAX_ELONGATION} times as long as wide"
        )
    if image.mode in DEEP_OTHER:
        raise ValueError(f"pixel mode {image.mode!r} has no fixed range; save as 8 or 16 bit")
    tags = getattr(image, "tag_v2", {})
    if image.mode in DEEP_GREY and (tags.get(258, (16,)) != (16,) or tags.get(262, 1) != 1):
        # Pillow reads such TIFFs as if they were plain 16 bit: dark, or inverted.
        raise ValueError("grey TIFF of 12 bit or with white as zero; save as 16 bit, black is zero")


def _rgb(image: Image.Image) -> NDArray[np.uint8]:
    """uint8 [H, W, 3] of any Pillow mode."""
    if image.mode in DEEP_GREY:  # Pillow's own conversion clips at 255
        grey = (np.asarray(image).astype(np.uint32) + 128) // 257
        return np.repeat(grey.astype(np.uint8)[..., None], 3, axis=2)
    if image.has_transparency_data:
        black = Image.new("RGBA", image.size, (0, 0, 0, 255))
        image = Image.alpha_composite(black, image.convert("RGBA"))
    return np.array(image.convert("RGB"))


# What a description of somebody else's making may ask of this machine.
_Side = Annotated[int, Field(ge=1, le=1024)]
_Deviation = Annotated[float, Field(gt=0)]


@dataclass(frozen=True)
class Preprocess:
    """From an image file to a backbone's input.

    Attributes:
      resize: length of the shorter side after resizing, pixels.
      crop: side of the square cut from the centre, pixels, at most `resize`.
      mean: per channel, of values in [0, 1].
      std: per channel, of values in [0, 1].
      interpolation: how the resize, always antialiased, reads between pixels.
      version: raised whenever the same file comes to give other pixels, or other views.
    """

    resize: _Side
    crop: _Side
    mean: tuple[float, float, float]
    std: tuple[_Deviation, _Deviation, _Deviation]
    interpolation: Literal["bilinear", "bicubic"] = "bilinear"
    version: int = field(default=2, init=False)

    def read(self, data: bytes, name: str = "image") -> Tensor:
        """A file's content → uint8 [3, crop, crop]: the one way from a file to what is kept of it.

        Args:
          data: a file's content, in one of `FORMATS`.
          name: what errors call the image, on this machine only.

        Raises:
          DataError: whatever the reason this cannot be decoded.
        """
        # Two decoded pixels for each kept one leave the antialiasing to the resize.
        return self.pixels(decode(data, name, at_least=2 * self.resize))

    def pixels(self, image: Tensor) -> Tensor:
        """uint8 [3, H, W] → uint8 [3, crop, crop]: what is kept of an image."""
        mode = InterpolationMode(self.interpolation)
        resized = vision.resize(image, [self.resize], interpolation=mode, antialias=True)
        square: Tensor = vision.center_crop(resized, [self.crop, self.crop])
        return square.contiguous()

    def normalise(self, batch: Tensor) -> Tensor:
        """uint8 [n, 3, crop, crop] → float32 of the same shape, on the same device."""
        mean = torch.tensor(self.mean, device=batch.device).view(3, 1, 1)
        std = torch.tensor(self.std, device=batch.device).view(3, 1, 1)
        return (batch.float() / 255 - mean) / std

    def with_size(self, size: int | None) -> Self:
        """For images of another side: all of a square image is kept. None changes nothing."""
        return self if size is None else replace(self, resize=size, crop=size)


def view(pixels: Tensor, ops: tuple[str, ...], seed: int) -> Tensor:
    """One random view of an image that leaves its label as it was.

    `flip` mirrors left–right half of the time, `rotate` turns by up to ±15°, `crop` keeps a window
    of 85–100 % of the side and enlarges it, `brightness` scales by ±15 %. Outside is reflection.

    Args:
      pixels: uint8 [3, c, c].
      ops: which of the four to apply.
      seed: decides the view; each op has its own draw, whichever others are on.

    Returns:
      uint8 [3, c, c].
    """
    draws = torch.rand(6, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    mirror, turn, window, across, down, light = draws.tolist()
    side = 0.85 + 0.15 * window if "crop" in ops else 1.0
    angle = math.radians(30 * turn - 15) if "rotate" in ops else 0.0
    sign = -1 if "flip" in ops and mirror < 0.5 else 1
    gain = 0.85 + 0.3 * light if "brightness" in ops else 1.0
    cos, sin = side * math.cos(angle), side * math.sin(angle)
    # All geometry in one affine map from output to input, so pixels are interpolated once.
    offset_x, offset_y = (1 - side) * (2 * across - 1), (1 - side) * (2 * down - 1)
    affine = torch.tensor([[[sign * cos, -sin, offset_x], [sign * sin, cos, offset_y]]])
    grid = F.affine_grid(affine, [1, *pixels.shape], align_corners=False)
    image = pixels[None].float()
    moved = F.grid_sample(image, grid, padding_mode="reflection", align_corners=False)[0]
    return (moved * gain).round().clamp(0, 255).to(torch.uint8)
