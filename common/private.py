"""What can be trained with differential privacy: where each patient's own gradient is known."""

from collections import Counter
from collections.abc import Sequence

import torch
from torch import nn
from torchvision.ops import StochasticDepth

LAYERS = (nn.Linear, nn.Conv2d, nn.LayerNorm, nn.GroupNorm)
"""Layers whose gradient has a norm for each row of a batch; of exactly these types."""


def prepare(model: nn.Module) -> None:
    """Rows stay apart and values stay as they were: no stochastic depth, nothing in place."""
    for part in model.modules():
        if isinstance(part, StochasticDepth):
            part.p = 0.0
        if hasattr(part, "inplace"):
            part.inplace = False  # type: ignore[assignment]


def hookable(model: nn.Module, names: Sequence[str], size: int) -> tuple[str, ...]:
    """Those of the parameters that can be trained privately, in their order.

    They belong to one of `LAYERS`, and the model calls it as a layer, once. What stays frozen: the
    scale of BatchNorm, attention that reads the weights of its parts, and parameters that stand
    alone (position tables, class tokens, layer scales).

    Args:
      model: A classifier as `Backbone.build` returns it.
      names: Of parameters of the model.
      size: Side in pixels of an image it takes.
    """
    called = _calls(model, size)
    return tuple(name for name in names if _known(model, name.rpartition(".")[0], called))


def _known(model: nn.Module, owner: str, called: Counter[str]) -> bool:
    layer = model.get_submodule(owner)
    if isinstance(layer, nn.Conv2d) and layer.padding_mode != "zeros":
        return False
    return type(layer) in LAYERS and called[owner] == 1


def _calls(model: nn.Module, size: int) -> Counter[str]:
    """How often one image passes each part, found without computing anything."""
    called: Counter[str] = Counter()
    hooks = [
        part.register_forward_hook(lambda *_, name=name: called.update([name]))
        for name, part in model.named_modules()
    ]
    try:
        state = {name: tensor.to("meta") for name, tensor in model.state_dict().items()}
        torch.func.functional_call(model, state, torch.empty(1, 3, size, size, device="meta"))
    finally:
        for hook in hooks:
            hook.remove()
    return called
