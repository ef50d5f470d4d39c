"""Whether private training does here what its ε is computed from; on random inputs, in a second.

Libraries have been silently wrong in every one of these points, and a model that trains well does
not show it. So a site looks for itself, with its own layers and versions, before anything is drawn
from a patient.
"""

import copy
import math
from collections.abc import Iterator, Sequence
from functools import partial

import torch
from torch import Tensor, nn
from torch.linalg import vector_norm
from torch.nn.functional import one_hot

from client.dp_sgd import clipped_sum, exact, released, trained_by
from client.entropy import Entropy
from client.ghost import row_norms, watched
from client.protection import Protection
from client.trainer import Examples
from common.cut import train_mode
from common.errors import RefusedError, complaint

_ROWS = 4
_NUMBERS = 1_000_000
_DEVIATIONS = 6.5
"""Correct noise is this far off once in 10¹⁰ checks."""

Finding = tuple[str, float, float]
"""What was looked at, how far it is off, and how far it may be."""


def check(
    suffix: nn.Module, examples: Examples, protection: Protection, entropy: Entropy | None = None
) -> None:
    """Return if one step of DP-SGD on a copy of `suffix` is right; no patient takes part.

    Args:
      suffix: As it will be trained; left as it is.
      examples: Of them only the shape is used.
      protection: Whose noise is checked.
      entropy: Of tests only.

    Raises:
      RefusedError: rows are not clipped as they should be or touch each other, the noise is not
        what it should be, or a layer cannot be trained privately; says which.
    """
    entropy, device = entropy or Entropy(), next(suffix.parameters()).device
    shape = examples.batch(torch.tensor([0]), 0, device).shape[1:]
    with exact(device, entropy):
        twin = _twin(suffix, entropy)
        rows, other = entropy.gaussians([torch.Size([_ROWS, *shape])] * 2)
        findings = _findings(twin, rows.to(device), other.to(device), protection, entropy)
        try:
            for what, off, limit in findings:
                if not off <= limit:  # so that NaN is refused as well
                    raise _refusal(what, f"within {limit:g}", f"{off:.3g}")
        except (ArithmeticError, RuntimeError, TypeError, ValueError) as ex:
            raise _refusal("a step", "one that runs", ex) from None


def _refusal(what: str, expected: str, got: object) -> RefusedError:
    remedy = "Nothing was trained. Keep the versions this release was tested with."
    where = f"self-check of private training: {what}"
    return RefusedError(complaint(where, expected=expected, got=got, remedy=remedy))


def _twin(suffix: nn.Module, entropy: Entropy) -> nn.Module:
    """A copy without dropout, and with nothing zero, behind which gradients would vanish."""
    twin = copy.deepcopy(suffix)
    train_mode(twin)
    for part in twin.modules():
        if isinstance(part, nn.Dropout):
            part.p = 0.0
    blank = [p for p in trained_by(twin) if not p.any()]
    for p, values in zip(blank, entropy.gaussians([p.shape for p in blank]), strict=True):
        p.data.copy_(values).mul_(0.1)
    return twin


def _findings(
    twin: nn.Module, inputs: Tensor, strange: Tensor, protection: Protection, entropy: Entropy
) -> Iterator[Finding]:
    classes = twin(inputs).shape[1]
    labels = entropy.below(torch.full((_ROWS,), classes)).to(inputs.device)
    clip = protection.round.clip_norm
    usual = sorted(_length(_plain(twin, inputs[[i]], labels[[i]], 1.0)) for i in range(_ROWS))
    scale = clip / usual[_ROWS // 2]  # so that some are clipped, and some are not
    losses = partial(_losses, scale=scale)
    alone = [_plain(twin, inputs[[i]], labels[[i]], scale) for i in range(_ROWS)]
    lengths = [_length(gradient) for gradient in alone]
    kept = [[part * min(1.0, clip / n) for part in g] for g, n in zip(alone, lengths, strict=True)]
    for rows in _layouts(inputs):
        norms = _norms(twin, rows, labels, scale)
        short = max(1 - norm / n for norm, n in zip(norms, lengths, strict=True))
        yield "norms of rows, short of the true ones", short, 1e-4
    got = clipped_sum(twin, inputs, labels, losses, clip)
    yield "clipped gradients, against row by row", _apart(got, _added(kept)), 1e-3
    changed = torch.cat([strange[:1], inputs[1:]])
    others = clipped_sum(twin, changed, labels, partial(_all_but_first, scale=scale), clip)
    yield "the others' gradients, one row changed", _apart(others, _added(kept[1:])), 1e-3
    yield from _noise(twin, protection, entropy)


def _noise(twin: nn.Module, protection: Protection, entropy: Entropy) -> Iterator[Finding]:
    """The gradients of empty batches, which are noise alone, in units of what was promised."""
    one = protection.round
    unit = protection.batch / (one.noise_multiplier * one.clip_norm)
    n, total, squares = 0, 0.0, 0.0
    while n < _NUMBERS:
        for noise in released(twin, [], _losses, protection, entropy):
            n, total = n + noise.numel(), total + noise.sum(dtype=torch.float64).item() * unit
            squares += (_length([noise]) * unit) ** 2
    yield "the noise's mean, in its deviations", abs(total) / math.sqrt(n), _DEVIATIONS
    off = abs(squares / n - 1) * math.sqrt(n / 2)
    yield "the noise's variance, in its deviations", off, _DEVIATIONS


def _losses(logits: Tensor, labels: Tensor, scale: float = 1.0) -> Tensor:
    """Squared distances; where a trained head is too sure, cross-entropy has no gradient left."""
    return (logits - one_hot(labels, logits.shape[1])).square().sum(1) * scale


def _all_but_first(logits: Tensor, labels: Tensor, scale: float) -> Tensor:
    return _losses(logits, labels, scale) * (torch.arange(len(labels), device=labels.device) > 0)


def _layouts(inputs: Tensor) -> Iterator[Tensor]:
    yield inputs
    if inputs.ndim == 4:
        yield inputs.contiguous(memory_format=torch.channels_last)


def _norms(twin: nn.Module, inputs: Tensor, labels: Tensor, scale: float) -> list[float]:
    with watched(twin) as calls:
        each = _losses(twin(inputs), labels, scale)
    norms: list[float] = row_norms(twin, calls, each).tolist()
    return norms


def _plain(twin: nn.Module, inputs: Tensor, labels: Tensor, scale: float) -> Sequence[Tensor]:
    return torch.autograd.grad(_losses(twin(inputs), labels, scale).sum(), trained_by(twin))


def _added(gradients: Sequence[Sequence[Tensor]]) -> list[Tensor]:
    return [torch.stack(parts).sum(0) for parts in zip(*gradients, strict=True)]


def _length(gradient: Sequence[Tensor]) -> float:
    """In float64: over millions of terms, float32 is wrong in the fourth digit."""
    return math.hypot(*(vector_norm(part, dtype=torch.float64).item() for part in gradient))


def _apart(one: Sequence[Tensor], other: Sequence[Tensor]) -> float:
    """Distance of the two, as a share of the second's length."""
    return _length([a - b for a, b in zip(one, other, strict=True)]) / _length(other)
