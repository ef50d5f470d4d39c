"""The features that a head reads: what a solved head is solved from, and judged on."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor, nn

from client.training.dataset import Examples
from common.metrics.counts import Counts, Floats
from common.model.backbones import Head

_BATCH = 256


def compute_head_features(
    suffix: nn.Module, examples: Examples, width: int, view: int = 0
) -> Floats:
    """Features [n, width], float64, as they reach the head; view 0 is the images themselves."""
    head, device = _find_head(suffix), next(suffix.parameters()).device
    suffix.eval()
    with _listen(head) as seen, torch.inference_mode():
        for indices in torch.arange(len(examples)).split(_BATCH) if len(examples) else ():
            suffix(examples.batch(indices, view, device))
    return torch.cat(seen).double().numpy() if seen else np.zeros((0, width))


def compute_linear_input(suffix: nn.Module, examples: Examples, image: int, view: int) -> Tensor:
    """What the linear layer of the head reads of one image by itself, [r] on the CPU."""
    device = next(suffix.parameters()).device
    with _listen(_find_head(suffix).get_submodule("linear")) as seen:
        suffix(examples.batch(torch.tensor([image]), view, device))
    return seen[0][0]


def _find_head(suffix: nn.Module) -> Head:
    (head,) = (part for part in suffix.modules() if isinstance(part, Head))
    return head


@contextmanager
def _listen(part: nn.Module) -> Iterator[list[Tensor]]:
    """All that a part of a model reads meanwhile, on the CPU."""
    seen: list[Tensor] = []
    hook = part.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].cpu()))
    try:
        yield seen
    finally:
        hook.remove()


def count_heads(
    features: Floats, labels: Tensor, heads: Sequence[tuple[Tensor, Tensor]]
) -> list[Counts]:
    """The counts of each head, weight [K, d] and bias [K], on mapped features [n, d]."""
    mapped = torch.from_numpy(features)
    logits = (mapped @ weight.double().T + bias.double() for weight, bias in heads)
    return [Counts.of(each, labels) for each in logits]
