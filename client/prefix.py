"""The frozen prefix: how a device runs it fastest, and whether its output is worth keeping."""

import copy
import logging
import shutil
import time
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.fx.experimental.optimization import fuse
from torch.utils.flop_counter import FlopCounterMode

from common.contract import Dtype
from common.cut import Split
from common.images import Preprocess

log = logging.getLogger(__name__)

BATCH = 32
# Activations that take more room than this many images are not worth keeping, nor are those that
# save less than this share of a training step.
_ROOM, _SHARE = 4.0, 0.3
# Compiling takes tens of seconds: only a long pass can win that back.
_MANY, _LONG, _GAIN = 2000, 120.0, 1.1


class Prefix(nn.Module):
    """uint8 pixels [n, 3, crop, crop] → activations [n, …]; frozen, and only ever in eval mode.

    Convolutions are folded with the batch norms after them, and run with channels last. Where this
    changes a float32 activation, it does so by rounding alone.

    Args:
      prefix: float32 [n, 3, crop, crop] → activations; left as it is.
      preprocess: Normalises the pixels.
      dtype: Computed in, and of the activations.
    """

    def __init__(self, prefix: nn.Module, preprocess: Preprocess, dtype: Dtype) -> None:
        super().__init__()
        traced = isinstance(prefix, GraphModule)
        own = fuse(prefix, no_trace=True) if traced else copy.deepcopy(prefix)
        self.dtype = getattr(torch, dtype)
        self.prefix = own.to(self.dtype).to(memory_format=torch.channels_last)
        self.preprocess = preprocess
        self._run: Callable[[Tensor], Tensor] = self.prefix
        self._judged = False

    @torch.no_grad()
    def forward(self, pixels: Tensor) -> Tensor:
        """Activations of `pixels`, which are on this prefix's device."""
        inputs = self.preprocess.normalise(pixels).to(self.dtype)
        run = self._run if len(pixels) == BATCH else self.prefix  # compiled for whole batches
        output: Tensor = run(inputs.contiguous(memory_format=torch.channels_last))
        return output.contiguous()

    def compile_for(self, images: int, device: torch.device) -> None:
        """Compile before a long pass over so many images, where a compiler exists and it pays."""
        if images < _MANY or self._judged or not _can_compile(device):
            return
        pixels = torch.zeros(BATCH, 3, self.preprocess.crop, self.preprocess.crop).byte().to(device)
        plain = seconds(lambda: self(pixels), device)
        if plain * images / BATCH < _LONG:
            return
        self._judged = True
        began = time.perf_counter()
        try:
            self._run = torch.compile(self.prefix, options={"freezing": True})
            self(pixels)
            spent, fast = time.perf_counter() - began, seconds(lambda: self(pixels), device)
        except Exception as ex:  # compilers fail in many ways; the plain prefix does not
            log.info("the prefix is not compiled: %s", type(ex).__name__)
            self._run = self.prefix
            return
        pays = plain > _GAIN * fast
        use = "used" if pays else "not used"
        log.info("compiled the prefix in %.0f s, %.2f times as fast: %s", spent, plain / fast, use)
        if not pays:
            self._run = self.prefix


def _can_compile(device: torch.device) -> bool:
    return device.type == "cuda" or any(map(shutil.which, ("c++", "g++", "clang++", "cl")))


class Worth(NamedTuple):
    """What keeping activations costs and saves, per image."""

    room: int
    """Bytes of an image's activations."""
    image: int
    """Bytes of its pixels, which are kept otherwise."""
    share: float
    """Of the operations of a training step, those of the prefix; in [0, 1]."""

    @classmethod
    def of(cls, split: Split, preprocess: Preprocess, dtype: Dtype) -> "Worth":
        """Measured on one image; a backward pass counts as two forward passes."""
        pixels = torch.zeros(1, 3, preprocess.crop, preprocess.crop, dtype=torch.uint8)
        if isinstance(split.prefix, nn.Identity):
            return cls(room=4 * pixels.nbytes, image=pixels.nbytes, share=0.0)
        device = next(split.suffix.parameters()).device
        with torch.no_grad(), FlopCounterMode(display=False) as frozen:
            activations = split.prefix(preprocess.normalise(pixels.to(device)))
        with torch.no_grad(), FlopCounterMode(display=False) as trained:
            split.suffix(activations)
        before, after = frozen.get_total_flops(), 3 * trained.get_total_flops()
        room = activations.numel() * getattr(torch, dtype).itemsize
        return cls(room=room, image=pixels.nbytes, share=before / max(before + after, 1))

    @property
    def pays(self) -> bool:
        """Whether activations are kept unless a site says otherwise."""
        return self.room <= _ROOM * self.image and self.share >= _SHARE

    def __str__(self) -> str:
        sizes = f"{self.room / 1000:,.1f} kB an image (its pixels: {self.image / 1000:,.0f} kB)"
        return f"{sizes}, {self.share:.0%} of the work of a training step"


def seconds(work: Callable[[], object], device: torch.device) -> float:
    """Median time of three runs of `work` on `device`, after one to warm up."""
    taken = []
    for _ in range(4):
        began = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        taken.append(time.perf_counter() - began)
    return sorted(taken[1:])[1]
