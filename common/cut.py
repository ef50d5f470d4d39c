"""The freeze boundary: one model into a frozen prefix and a trainable suffix, bit for bit."""

import operator
from collections.abc import Collection, Sequence
from typing import NamedTuple

from torch import nn
from torch.fx import Graph, GraphModule, Node, Tracer
from torch.nn.modules.batchnorm import _BatchNorm

from common.backbones import Head
from common.errors import BackboneError, complaint


class Split(NamedTuple):
    """A model in two parts, `suffix(prefix(images)) == model(images)`, sharing its parameters."""

    prefix: nn.Module
    """Frozen, in eval mode: images → one activation. The identity if nothing comes before."""
    suffix: nn.Module
    """Activation → logits; its parameters keep the names they have in the model."""
    at: str
    """The activation between them: a name among `legal_cuts`, or `input`."""


def split(model: nn.Module, trainable: Sequence[str]) -> Split:
    """Cut `model` as late as possible before the first use of a trainable parameter.

    The model is put in eval mode; exactly the trainable parameters are left requiring gradients.

    Args:
      model: a classifier as `Backbone.build` returns it.
      trainable: names of parameters of the model.

    Raises:
      BackboneError: a trainable parameter is unknown, unused, or would be left in the prefix.
    """
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in trainable)
    graph = _trace(model)
    nodes = list(graph.nodes)
    first = next((i for i, node in enumerate(nodes) if _trains(node, model)), len(nodes))
    cuts = [node for node in _cuts(graph, model) if node in set(nodes[:first])]
    parts = _at(model, graph, cuts[-1]) if cuts else _whole(model)
    if not list(parts.prefix.parameters()):
        parts = _whole(model)
    _check(parts, trainable)
    return parts


def legal_cuts(model: nn.Module) -> tuple[str, ...]:
    """Every activation at which the model can be cut, from input to output."""
    return tuple(node.name for node in _cuts(_trace(model), model))


def cut(model: nn.Module, at: str) -> Split:
    """Cut `model` at one of its `legal_cuts`."""
    graph = _trace(model)
    return _at(model, graph, next(node for node in _cuts(graph, model) if node.name == at))


def train_mode(module: nn.Module) -> None:
    """`module.train()`, but BatchNorm keeps using its pretrained statistics.

    Batch statistics would mix the images of a batch, and move buffers that nobody sends.
    """
    module.train()
    for part in module.modules():
        if isinstance(part, _BatchNorm):
            part.eval()


class _Tracer(Tracer):
    """Keeps whole what has no parts, torch's own layers, the head, and what reads `training`.

    Tracing freezes the value of `self.training`, so a module that reads it must stay a module. The
    head's dropout must train with its linear layer, not end up in the frozen prefix.
    """

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return (
            not any(True for _ in m.children())
            or isinstance(m, Head)
            or "training" in m.forward.__code__.co_names
            or super().is_leaf_module(m, module_qualified_name)
        )


def _trace(model: nn.Module) -> Graph:
    graph = _Tracer().trace(model.eval())
    graph.eliminate_dead_code()
    return graph


def _cuts(graph: Graph, model: nn.Module) -> list[Node]:
    """Nodes after which their own value is the only one still needed, and is left as it is.

    Parameters read directly (`get_attr`) are no obstacle: the suffix reads them again.
    """
    nodes = [node for node in graph.nodes if node.op != "get_attr"]
    position = {node: i for i, node in enumerate(nodes)}
    cuts, needed_until = [], 0
    for i, node in enumerate(nodes[:-1]):
        alone = needed_until <= i
        needed_until = max([needed_until, *(position[user] for user in node.users)])
        if alone and node.op != "placeholder" and needed_until < len(nodes) - 1:
            if node.users and not any(_unfit(user, node, model) for user in node.users):
                cuts.append(node)
    return cuts


def _unfit(user: Node, value: Node, model: nn.Module) -> bool:
    """Whether `user` shows that `value` is a tuple, or overwrites it, which a cache must not see."""
    if user.op == "call_module":
        return bool(getattr(model.get_submodule(str(user.target)), "inplace", False))
    picks = user.target is operator.getitem and isinstance(user.args[1], int)
    return picks or bool(user.kwargs.get("inplace"))


def _trains(node: Node, model: nn.Module) -> bool:
    """Whether a node reads a parameter that requires a gradient."""
    if node.op == "call_module":
        return any(p.requires_grad for p in model.get_submodule(str(node.target)).parameters())
    owner, _, name = str(node.target).rpartition(".")
    return node.op == "get_attr" and getattr(model.get_submodule(owner), name).requires_grad


def _at(model: nn.Module, graph: Graph, at: Node) -> Split:
    """Copy the graph's two sides into modules that share the model's own parts."""
    prefix, suffix = Graph(), Graph()
    before: dict[Node, Node] = {}
    after = {at: suffix.placeholder("activation")}
    side, copies = prefix, before
    for node in graph.nodes:
        if node.op == "get_attr":
            pass
        side ...
    return Split(GraphModule(model, prefix), GraphModule(model, suffix), at.name)
