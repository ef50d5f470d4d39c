"""The freeze boundary: one model into a frozen prefix and a trainable suffix, bit for bit."""

import operator
from collections.abc import Collection
from itertools import takewhile
from typing import NamedTuple

from torch import nn
from torch.fx import Graph, GraphModule, Node, Tracer
from torch.nn.modules.batchnorm import _BatchNorm

from common.errors import BackboneError
from common.model.backbones import Head


class Split(NamedTuple):
    """A model in two parts, `suffix(prefix(images)) == model(images)`, sharing its parameters."""

    prefix: nn.Module
    """Frozen: images → one activation. The identity if nothing frozen comes first."""
    suffix: nn.Module
    """Activation → logits. Its parameters keep the names they have in the model."""
    at: str
    """The activation between them: one of `legal_cuts`, or `input`."""


def split(model: nn.Module, trainable: Collection[str]) -> Split:
    """Cut `model` as late as possible before the first use of a trainable parameter.

    Puts the model in eval mode, and leaves exactly the trainable parameters requiring gradients.

    Args:
      model: a classifier as `Backbone.build` returns it.
      trainable: names of parameters of the model.

    Raises:
      BackboneError: some of them are not in the suffix, because the model does not use them.
    """
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in trainable)
    graph = _trace(model)
    frozen = set(takewhile(lambda node: not _trains(node, model), graph.nodes))
    cuts = [node for node in _cuts(graph, model) if node in frozen]
    parts = _parts(graph, model, cuts[-1]) if cuts else None
    if parts is None or not any(True for _ in parts.prefix.parameters()):
        parts = Split(nn.Identity(), model, "input")
    _check(parts, trainable)
    return parts


def legal_cuts(model: nn.Module) -> tuple[str, ...]:
    """Every activation at which the model can be cut, from input to output."""
    return tuple(node.name for node in _cuts(_trace(model), model))


def cut_at(model: nn.Module, at: str) -> Split:
    """Cut `model` at one of its `legal_cuts`."""
    graph = _trace(model)
    return _parts(graph, model, next(node for node in _cuts(graph, model) if node.name == at))


def train_mode(module: nn.Module) -> None:
    """`module.train()`, but BatchNorm keeps its pretrained statistics.

    Statistics of a batch would mix its images, and move buffers that are never sent.
    """
    module.train()
    for part in module.modules():
        if isinstance(part, _BatchNorm):
            part.eval()


def list_batchnorm(model: nn.Module, names: Collection[str]) -> tuple[str, ...]:
    """Those of the parameters that scale or shift what BatchNorm's statistics have normalised.

    They go with statistics of other images, which no patient's noise covers.
    """
    owners = {name for name, part in model.named_modules() if isinstance(part, _BatchNorm)}
    return tuple(name for name in names if name.rpartition(".")[0] in owners)


class _Tracer(Tracer):
    """Keeps whole torch's own layers, what has no parts, what reads `training`, and the head.

    A traced module would have its present `training` written into the graph for good. The head's
    dropout belongs with its linear layer, not at the end of a frozen prefix.
    """

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return (
            super().is_leaf_module(m, module_qualified_name)
            or not any(True for _ in m.children())
            or "training" in m.forward.__code__.co_names
            or isinstance(m, Head)
        )


def _trace(model: nn.Module) -> Graph:
    return _Tracer().trace(model.eval())


def _cuts(graph: Graph, model: nn.Module) -> list[Node]:
    """The nodes after which no earlier value is needed, from input to output.

    Parameters read directly (`get_attr`) do not count: either side can read them.
    """
    images, *nodes = [node for node in graph.nodes if node.op != "get_attr"]
    position = {node: i for i, node in enumerate(nodes)}
    needed = max(position[user] for user in images.users)
    cuts = []
    for i, node in enumerate(nodes[:-2]):  # not the logits, nor the output
        if needed <= i and all(_cacheable(user, model) for user in node.users):
            cuts.append(node)
        needed = max([needed, *(position[user] for user in node.users)])
    return cuts


def _cacheable(user: Node, model: nn.Module) -> bool:
    """Whether `user` takes its input as one tensor, not a tuple, and does not overwrite it."""
    if user.op == "call_module":
        return not getattr(model.get_submodule(str(user.target)), "inplace", False)
    picks = user.target is operator.getitem and isinstance(user.args[1], int)
    return not picks and not user.kwargs.get("inplace", False)


def _trains(node: Node, model: nn.Module) -> bool:
    """Whether the node reads a parameter that requires a gradient."""
    if node.op == "call_module":
        part = model.get_submodule(str(node.target))
        return any(parameter.requires_grad for parameter in part.parameters())
    if node.op == "get_attr":
        return bool(operator.attrgetter(str(node.target))(model).requires_grad)
    return False


def _parts(graph: Graph, model: nn.Module, at: Node) -> Split:
    """The graph's two sides as modules that share the model's own parts."""
    prefix, suffix = Graph(), Graph()
    before: dict[Node, Node] = {}
    after = {at: suffix.placeholder("activation")}
    passed = False
    for node in graph.nodes:
        either = node.op == "get_attr"
        if either or not passed:
            before[node] = prefix.node_copy(node, before.__getitem__)
        if either or passed:
            after[node] = suffix.node_copy(node, after.__getitem__)
        passed = passed or node is at
    prefix.output(before[at])
    for node in (*prefix.nodes, *suffix.nodes):
        if node.op == "get_attr" and not node.users:
            node.graph.erase_node(node)
    return Split(GraphModule(model, prefix), GraphModule(model, suffix), at.name)


def _check(parts: Split, trainable: Collection[str]) -> None:
    lost = set(trainable) - {name for name, _ in parts.suffix.named_parameters()}
    frozen = {name for name, _ in parts.prefix.named_parameters()}
    if wrong := sorted(lost | frozen.intersection(trainable)):
        expected = f"the {len(trainable)} trainable parameters after it, and none before"
        got = f"{len(wrong)} elsewhere, such as {wrong[0]}"
        raise BackboneError(f"cut at {parts.at}", expected=expected, got=got)
