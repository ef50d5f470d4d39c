"""Whether private training does here what its ε is computed from; on made-up rows, in no time.

Libraries have been silently wrong in every one of these points, and a model that trains well does
not show it. So a site looks for itself, with its own layers, versions and processor, before
anything is drawn from a patient: at the noise once, and at the weights of every round.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn
from torch.linalg import vector_norm
from torch.nn.functional import one_hot

from client.privacy.dp_sgd import (
    Row,
    compute_exactly,
    compute_noised_gradient,
    compute_row_gradient,
    make_sum,
)
from client.privacy.noise import DEVIATION, Entropy
from client.privacy.noised_rows import noise_rows
from client.privacy.plan import PrivacyPlan, Query
from client.training.dataset import Examples
from common.errors import RefusedError
from common.model.split import train_mode

_SIDE = 1000
_DEVIATIONS = 6.5
"""Correct noise is this far off once in 10¹⁰ checks."""
_SIZES = (1.0, 0.0, 1e-30, 1e-10, 1e10, 1e30)
"""Of the numbers in a row: ordinary ones, and such as hostile weights before it would make them."""
_APART = 1e-3
"""A share of the clipping norm; where a processor adds in any order, no row is twice the same."""

Finding = tuple[str, float, float]
"""What was looked at, how far it is off, and how far it may be."""


def check_noise(privacy_plan: PrivacyPlan, entropy: Entropy | None = None) -> None:
    """Return if what a step or sum without rows tells is the noise that was promised.

    Args:
      privacy_plan: Whose noise is checked, of each query.
      entropy: Of tests only.

    Raises:
      RefusedError: its mean or its deviation is off.
    """
    for query in privacy_plan.queries:
        _judge(partial(_noise, privacy_plan, query, entropy or Entropy()))


def check_rows(
    suffix: nn.Module, examples: Examples, privacy_plan: PrivacyPlan, entropy: Entropy | None = None
) -> None:
    """Return if rows are clipped on these very weights, and leave nothing behind for the next.

    Args:
      suffix: With the weights that a round begins with; left as it is.
      examples: Of them only the shape is used.
      privacy_plan: Whose clipping is checked.
      entropy: Of tests only.

    Raises:
      RefusedError: a row counts for more than the clipping norm, or changes what another adds, or
        a layer cannot be trained privately; says which.
    """
    _judge(partial(_rows, suffix, examples, privacy_plan, entropy or Entropy()))


def _judge(look: Callable[[], Iterator[Finding]]) -> None:
    try:
        for what, off, limit in look():
            if not off <= limit:  # so that NaN is refused as well
                raise _refusal(what, f"within {limit:g}", f"{off:.3g}")
    except (ArithmeticError, RuntimeError, TypeError, ValueError) as ex:
        raise _refusal("a step", "one that runs", ex) from None


def _refusal(what: str, expected: str, got: object) -> RefusedError:
    remedy = "Nothing was trained. Keep the versions this release was tested with."
    where = f"self-check of private training: {what}"
    return RefusedError(where, expected=expected, got=got, remedy=remedy)


def _noise(privacy_plan: PrivacyPlan, query: Query, entropy: Entropy) -> Iterator[Finding]:
    """Of a step or sum without rows, in units of what was promised."""
    one = query.release
    deviation = one.noise_multiplier * one.clip_norm
    if query.kind == "round":
        many = nn.Linear(_SIDE, _SIDE)
        drawn = compute_noised_gradient(many, [], _losses, privacy_plan, entropy)
        noise = torch.cat([part.flatten() for part in drawn]).double() * privacy_plan.batch
    else:
        noise = torch.from_numpy(noise_rows([], one, _SIDE**2, entropy).numbers)
    noise = noise / deviation
    n = len(noise)
    mean, variance = float(noise.mean()), float(noise.square().mean())
    yield "the noise's mean, in its deviations", abs(mean) * math.sqrt(n), _DEVIATIONS
    off = abs(variance - 1) * math.sqrt(n / 2)
    yield "the noise's variance, in its deviations", off, _DEVIATIONS


def _rows(
    suffix: nn.Module, examples: Examples, privacy_plan: PrivacyPlan, entropy: Entropy
) -> Iterator[Finding]:
    """Each row by itself, and the first once more: after all others it must add the same."""
    device = next(suffix.parameters()).device
    shape = examples.batch(torch.tensor([0]), 0, device).shape
    rows = list(_made_up(suffix, shape, device, entropy))
    state = {name: buffer.clone() for name, buffer in suffix.named_buffers()}
    first: list[Tensor] = []
    with _as_it_was(suffix), compute_exactly(device):
        for row in (*rows, rows[0]):
            total = make_sum(suffix, privacy_plan)
            total.add(compute_row_gradient(suffix, row, _losses))
            yield "a row, in clipping norms", _length(total.sums) / total.longest, 1.0
            first = first or total.sums
        apart = [a - b for a, b in zip(total.sums, first, strict=True)]
    yield "a row, after others", _length(apart) / total.longest, _APART
    moved = [buffer for name, buffer in suffix.named_buffers() if not buffer.equal(state[name])]
    yield "its buffers that rows change", len(moved), 0


def _made_up(
    suffix: nn.Module, shape: torch.Size, device: torch.device, entropy: Entropy
) -> Iterator[Row]:
    (drawn,) = entropy.gaussians([shape])
    usual = (drawn.double() / DEVIATION).float().to(device)
    cancelling = torch.ones(shape.numel(), device=device)
    cancelling[::2] = -1
    inputs = [usual * size for size in _SIZES] + [cancelling.view(shape) * 1e10]
    with torch.no_grad():
        classes = suffix(usual).shape[1]
    labels = entropy.below(torch.full((len(inputs),), classes)).to(device)
    for i, given in enumerate(inputs):
        yield given, labels[[i]], i


@contextmanager
def _as_it_was(suffix: nn.Module) -> Iterator[None]:
    """In training mode, and afterwards in the modes it had."""
    modes = [(part, part.training) for part in suffix.modules()]
    train_mode(suffix)
    try:
        yield
    finally:
        for part, training in modes:
            part.training = training


def _losses(logits: Tensor, labels: Tensor) -> Tensor:
    """Squared distances; where a trained head is too sure, cross-entropy has no gradient left."""
    return (logits - one_hot(labels, logits.shape[1])).square().sum(1)


def _length(numbers: Sequence[Tensor]) -> float:
    return math.hypot(*(float(vector_norm(part.double())) for part in numbers))
