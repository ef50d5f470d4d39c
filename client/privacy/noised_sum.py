"""The only way in which anything is noised: a sum of clipped rows, released on an integer lattice.

A row is what one patient adds: some numbers, in one or more tensors. The lattice is σ · C · 2⁻³⁶
wide, for noise σ and clipping norm C, so it depends on public values alone. In units of it

- a row is scaled down to a length of at most 2³⁶ / σ, then cut off to whole numbers;
- the rows are added as int64, which is exact, in whatever order;
- the noise is round(2³⁶ · ξ) for independent standard normal ξ (`client.privacy.noise`), and is
  added as int64.

Sensitivity. Cutting off moves every number towards 0, so a row gets no longer by it, and one row
more or less moves the sum by at most 2³⁶ / σ: exactly C, with nothing to add for the lattice. (To
round to the nearest would cost √d / 2 units.) The length is taken of the very numbers that are
added. It is computed in float64, where the squares of float32 numbers neither under- nor overflow;
what rounding may take off it is a share of less than 2⁻²² up to 10⁹ numbers, and rows are scaled
down to C · (1 − 2⁻²⁰). If a row is longer all the same, nothing is released (`RefusedError`).

What is released is round(2³⁶ · ξ) + S = round(2³⁶ · ξ + S), for the whole number S: a function of
the Gaussian mechanism over the real numbers alone. So what the accountant says of that mechanism,
for σ as it is, holds for every bit that leaves (Mironov 2012; Canonne, Kamath and Steinke 2020),
and what is computed from it afterwards, in float32 or otherwise, costs nothing. What `ξ` itself
differs from a normal number is far below what the accountant adds to ε for it.
"""

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from client.privacy.noise import DEVIATION, Entropy
from common.errors import RefusedError

_MARGIN = 1 - 2.0**-20
_MOST = 2**62
_BLOCK = 2**16
"""Numbers that are worked on at a time: they stay in a processor's cache."""


class NoisedSum:
    """Adds up rows, and tells their sum with noise, once.

    Args:
      shapes: Of a row's tensors.
      clip_norm: C, the L2 norm that a row counts with at most, over all of its tensors.
      noise_multiplier: σ, the deviation of the noise in each number, in units of C.
      device: Where rows come from; without float64 there, the sum is kept on the CPU.

    Attributes:
      sums: Of the rows so far, flat, int64, in units of the lattice; never to be told.
      longest: A row at most, in units of the lattice.
    """

    def __init__(
        self,
        shapes: Sequence[torch.Size],
        *,
        clip_norm: float,
        noise_multiplier: float,
        device: torch.device | None = None,
    ) -> None:
        self._clip = clip_norm
        self._unit = clip_norm * noise_multiplier / DEVIATION
        self.longest = DEVIATION / noise_multiplier
        place = device if device and device.type == "cuda" else torch.device("cpu")
        self._shapes, sizes = shapes, [shape.numel() for shape in shapes]
        self.sums = [torch.zeros(size, dtype=torch.int64, device=place) for size in sizes]
        self._rows = 0

    def add(self, row: Sequence[Tensor]) -> None:
        """Add one patient's row, float32 tensors, scaled down to the clipping norm if it is longer.

        A row with a number that is not finite adds nothing, and takes as long as any other.

        Raises:
          RefusedError: a row is longer than it may be or of other shapes, or so many rows do not
            fit; each would be an error of this code, and nothing may be released.
        """
        shapes = [part.shape for part in row if part.dtype == torch.float32]
        if shapes != list(self._shapes):
            raise _refusal("a row", f"float32 of {self._shapes}", [part.shape for part in row])
        row = [part.to(self.sums[0].device) for part in row]
        length = math.sqrt(sum(_square(block.double()) for block in _blocks(row)))
        if not length < math.inf:
            row, length = [torch.zeros_like(part) for part in row], 0.0
        self._rows += 1
        if self._rows * self.longest >= _MOST:
            raise _refusal("rows", f"less than {_MOST / self.longest:.3g}", self._rows)
        scale, square = _MARGIN * self.longest / max(length, self._clip), 0.0
        for place, block in zip(_blocks(self.sums), _blocks(row), strict=True):
            whole = block.double().mul_(scale).trunc_()
            square += _square(whole)
            place += whole.long()
        if not math.sqrt(square) <= self.longest:
            times = math.sqrt(square) / self.longest
            raise _refusal("a row", "at most the clipping norm long", f"{times:.9g} times that")

    def release(self, entropy: Entropy) -> list[Tensor]:
        """The sum of the rows with noise in each number, float64; the sum itself is gone then."""
        sums, self.sums = self.sums, []
        noises = entropy.gaussians([total.shape for total in sums])
        return [
            total.add_(noise.to(total.device)).double().mul_(self._unit).view(shape)
            for total, noise, shape in zip(sums, noises, self._shapes, strict=True)
        ]


def _blocks(parts: Sequence[Tensor]) -> Iterator[Tensor]:
    for part in parts:
        yield from part.flatten().split(_BLOCK)


def _square(numbers: Tensor) -> float:
    return float(numbers.dot(numbers))


def _refusal(what: str, expected: str, got: object) -> RefusedError:
    remedy = "Nothing was released. Report this."
    return RefusedError(f"a noised sum: {what}", expected=expected, got=got, remedy=remedy)
