"""The frozen prefix: how a device runs it fastest, and whether its output is worth keeping."""

import copy
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.fx.experimental.optimization import fuse
from torch.utils.flop_counter import FlopCounterMode

from common.config.study import Dtype
from common.model.images import Preprocess
from common.model.split import Split

BATCH = 32
"""Images that go through the prefix at once: always so many, however few there are.

Under privacy it is one: then not even rounding can carry one patient into the row of another."""

# Activations that take more room than this many images are not worth keeping, nor are those that
# save less than this share of a training step.
_ROOM, _SHARE = 4.0, 0.3


class Prefix(nn.Module):
    """uint8 pixels [n, 3, crop, crop] → activations [n, …]; frozen, and only ever in eval mode.

    Convolutions are folded with the batch norms after them, and run with channels last. Where this
    changes a float32 activation, it does so by rounding alone. Batches are filled up to one size:
    libraries compute small ones in other ways, and an activation is to depend on its image alone.

    Args:
      prefix: float32 [n, 3, crop, crop] → activations; left as it is.
      preprocess: Normalises the pixels.
      dtype: Computed in, and of the activations.
      batch: Images at once.
    """

    def __init__(
        self, prefix: nn.Module, preprocess: Preprocess, dtype: Dtype, batch: int = BATCH
    ) -> None:
        super().__init__()
        traced = isinstance(prefix, GraphModule)
        own = fuse(prefix, no_trace=True) if traced else copy.deepcopy(prefix)
        self.dtype = getattr(torch, dtype)
        self.prefix = own.to(self.dtype).to(memory_format=torch.channels_last)
        self.preprocess, self.batch = preprocess, batch

    @torch.no_grad()
    def forward(self, pixels: Tensor) -> Tensor:
        """Activations of `pixels`, which are on this prefix's device."""
        return torch.cat([self._batch(some) for some in pixels.split(self.batch)])

    def _batch(self, pixels: Tensor) -> Tensor:
        whole = pixels.new_zeros(self.batch, *pixels.shape[1:])
        whole[: len(pixels)] = pixels
        inputs = self.preprocess.normalise(whole).to(self.dtype)
        output: Tensor = self.prefix(inputs.contiguous(memory_format=torch.channels_last))
        return output[: len(pixels)].contiguous()


class CacheDecision(NamedTuple):
    """What keeping activations costs and saves, per image."""

    room: int
    """Bytes of an image's activations."""
    image: int
    """Bytes of its pixels, which are kept otherwise."""
    share: float
    """Of the operations of a training step, those of the prefix; in [0, 1]."""

    @classmethod
    def of(cls, split: Split, preprocess: Preprocess, dtype: Dtype) -> "CacheDecision":
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
