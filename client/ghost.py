"""The norm of every row's own gradient, without making that gradient (ghost clipping).

Goodfellow (2015) for linear layers; Bu, Mao and Xu (2022) for convolutions. A layer's weight has
the gradient Σₜ aₜ gₜᵀ over positions t, of its inputs a and the loss's gradients g in its outputs.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from common.errors import RefusedError, complaint

_ROUNDING = 1e-6
"""What rounding may take off a squared norm, as a share of its terms without their signs."""
_BLOCK = 16
"""Rows whose patches are laid out at a time."""


class Call(NamedTuple):
    """One pass of a batch through a layer with something to train."""

    layer: nn.Module
    input: Tensor
    output: Tensor


@contextmanager
def watched(module: nn.Module) -> Iterator[list[Call]]:
    """Collects the calls of all layers of `module` with parameters that require a gradient."""
    calls: list[Call] = []

    def note(layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        calls.append(Call(layer, inputs[0].detach(), output))

    hooks = [layer.register_forward_hook(note) for layer in _trained(module)]
    try:
        yield calls
    finally:
        for hook in hooks:
            hook.remove()


def row_norms(module: nn.Module, calls: Sequence[Call], losses: Tensor) -> Tensor:
    """L2 norm of the gradient of each loss in all that trains, float32 [n]; never below the true.

    Args:
      module: What was watched.
      calls: Of one batch of n rows.
      losses: One for each row, [n]; their graph is kept.

    Raises:
      RefusedError: something trains that is not a known layer, called once, on n rows.
    """
    layers = _trained(module)
    for layer in layers:
        met = [len(call.input) for call in calls if call.layer is layer]
        if type(layer) not in _SQUARES or met != [len(losses)]:
            got = f"{type(layer).__name__}, called on {met} rows"
            expected = f"known layers to train, called once on {len(losses)} rows"
            raise RefusedError(complaint("private training", expected=expected, got=got))
    wanted = [call.output for call in calls]
    backprops = torch.autograd.grad(losses.sum(), wanted, retain_graph=True)
    squares = torch.zeros_like(losses, requires_grad=False)
    for call, backprop in zip(calls, backprops, strict=True):
        squares += _SQUARES[type(call.layer)](call.layer, call.input, backprop)
    return squares.sqrt()


def _trained(module: nn.Module) -> list[nn.Module]:
    return [
        part
        for part in module.modules()
        if any(parameter.requires_grad for parameter in part.parameters(recurse=False))
    ]


def _linear(layer: Any, a: Tensor, g: Tensor) -> Tensor:
    a, g = (x.reshape(len(x), 1, -1, x.shape[-1]).mT for x in (a, g))
    return _product(a, g) + _shift(layer, g)


def _conv2d(layer: Any, a: Tensor, g: Tensor) -> Tensor:
    # Contiguous: what unfolds a tensor in another layout may read it in the wrong order.
    window = (layer.kernel_size, layer.dilation, layer.padding, layer.stride)
    squares = []
    for rows, backprops in zip(a.split(_BLOCK), g.split(_BLOCK), strict=True):
        shape = (len(rows), layer.groups, -1, g.shape[2] * g.shape[3])
        patches = F.unfold(rows.contiguous(), *window).view(shape)
        backprops = backprops.contiguous().view(shape)
        squares.append(_product(patches, backprops) + _shift(layer, backprops))
    return torch.cat(squares)


def _layer_norm(layer: Any, a: Tensor, g: Tensor) -> Tensor:
    normal = F.layer_norm(a, layer.normalized_shape, eps=layer.eps)
    shape = (len(a), -1, layer.weight.numel())
    return _scale(layer, normal.reshape(shape).mT, g.reshape(shape).mT)


def _group_norm(layer: Any, a: Tensor, g: Tensor) -> Tensor:
    normal = F.group_norm(a, layer.num_groups, eps=layer.eps)
    shape = (len(a), layer.num_channels, -1)
    return _scale(layer, normal.reshape(shape), g.reshape(shape))


_SQUARES: dict[type[nn.Module], Callable[[Any, Tensor, Tensor], Tensor]] = {
    nn.Linear: _linear,
    nn.Conv2d: _conv2d,
    nn.LayerNorm: _layer_norm,
    nn.GroupNorm: _group_norm,
}
"""Squared norm of each row's gradient in a layer's parameters, [n], from its a and g."""


def _product(a: Tensor, g: Tensor) -> Tensor:
    """‖Σₜ aₜ gₜᵀ‖², summed over groups; a is [n, groups, in, t], g is [n, groups, out, t]."""
    (inputs, t), outputs = a.shape[2:], g.shape[2]
    if t * (inputs + outputs) >= inputs * outputs:
        return (a @ g.mT).square().sum((1, 2, 3))
    aa, gg = a.mT @ a, g.mT @ g
    # Where terms cancel, what is left may be rounding; it must not pass for a small norm.
    lengths = (aa.diagonal(dim1=2, dim2=3) * gg.diagonal(dim1=2, dim2=3)).sqrt().sum(2)
    squares = (aa * gg).sum((2, 3)).clamp(min=0) + _ROUNDING * lengths.square()
    return squares.sum(1)


def _scale(layer: Any, normal: Tensor, g: Tensor) -> Tensor:
    """Of a scale and a shift for each channel; both are [n, channels, t]."""
    return (normal * g).sum(2).square().sum(1) + _shift(layer, g)


def _shift(layer: Any, g: Tensor) -> Tensor | float:
    """Of the bias; g is [n, …, t]."""
    return 0.0 if layer.bias is None else g.sum(-1).flatten(1).square().sum(1)
