"""Training and evaluation in plain torch. Knows no federation."""

import math
from collections.abc import Iterator
from itertools import chain, count, islice

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from client.features.precision import autocast
from client.training.dataset import Examples
from common.config.study import Dtype, Train
from common.heads.read_out import AS_IT_IS, ReadOut
from common.metrics.counts import Counts
from common.model.split import train_mode
from common.support.seeds import derive

_FOCUS = 2.0
_EVALUATION_BATCH = 128


def learning_rate(plan: Train, round_number: int) -> float:
    """Learning rate of a round, 1-based: constant, or a half cosine from `lr` towards 0."""
    if plan.schedule == "constant" or not plan.rounds:
        return plan.lr
    number = min(round_number, plan.rounds)
    return plan.lr * 0.5 * (1 + math.cos(math.pi * (number - 1) / plan.rounds))


def class_weights(plan: Train, labels: Tensor, classes: int) -> Tensor | None:
    """Weight of each class in the loss, float32 [classes], or None where all are equal.

    `weighted` gives every class present here the same total weight: n / (present · n_k).
    """
    if plan.class_weights:
        return torch.tensor(plan.class_weights)
    if plan.imbalance != "weighted":
        return None
    counts = labels.bincount(minlength=classes).float()
    present = counts > 0
    return torch.where(present, counts.sum() / (present.sum() * counts.clamp(min=1)), 0.0)


def loss(logits: Tensor, labels: Tensor, plan: Train, weights: Tensor | None) -> Tensor:
    """The mean of `losses` over images.

    A weighted image counts by its weight, whoever shares its batch: dividing by a batch's weights,
    as torch does, would let a site of common classes pull harder than its images do when pooled.
    """
    return losses(logits, labels, plan, weights).mean()


def losses(logits: Tensor, labels: Tensor, plan: Train, weights: Tensor | None) -> Tensor:
    """Each image's cross-entropy, or the focal loss of Lin et al. (2017) with γ = 2; [n]."""
    each = F.cross_entropy(logits, labels, weight=weights, reduction="none")
    if plan.imbalance == "focal":
        sure = logits.log_softmax(1).gather(1, labels[:, None]).squeeze(1).exp()
        each = each * (1 - sure) ** _FOCUS
    return each


def make_optimizer(suffix: nn.Module, plan: Train, lr: float) -> torch.optim.Optimizer:
    """The study's optimizer over what trains."""
    trained = [p for p in suffix.parameters() if p.requires_grad]
    if plan.optimizer == "sgd":
        sgd = torch.optim.SGD
        return sgd(trained, lr=lr, momentum=plan.momentum, weight_decay=plan.weight_decay)
    adam = torch.optim.AdamW if plan.optimizer == "adamw" else torch.optim.Adam
    return adam(trained, lr=lr, weight_decay=plan.weight_decay)


def train(
    suffix: nn.Module,
    examples: Examples,
    plan: Train,
    *,
    classes: int,
    lr: float,
    seed: int,
    proximal_mu: float = 0.0,
    dtype: Dtype = "float32",
) -> float:
    """Train `suffix` in place for the plan's local epochs or steps.

    Args:
      suffix: Activations → logits; what requires a gradient trains.
      examples: The training images; at least one.
      plan: The study's local training.
      classes: Number of logits.
      lr: Learning rate of this round.
      proximal_mu: FedProx (Li et al., 2020): adds μ/2 · ‖w − w_start‖² to the loss.
      seed: Of the order of examples, their views and dropout.
      dtype: What the suffix computes in; its parameters are float32 in any case.

    Returns:
      Mean loss over the examples seen, without the proximal term.
    """
    device = next(suffix.parameters()).device
    weights = class_weights(plan, examples.labels, classes)
    weights = weights.to(device) if weights is not None else None
    optimizer = make_optimizer(suffix, plan, lr)
    trained = [p for group in optimizer.param_groups for p in group["params"]]
    start = [p.detach().clone() for p in trained] if proximal_mu else []
    total, seen = 0.0, 0
    train_mode(suffix)
    on_cpu = device.type == "cpu"
    # Seeding every device costs milliseconds, more than a round of a small head.
    reseed = torch.default_generator.manual_seed if on_cpu else torch.manual_seed
    with torch.random.fork_rng(devices=[] if on_cpu else None):
        reseed(derive(seed, "dropout"))
        for indices in _batches(examples, plan, seed):
            views = _views(examples, indices, seed + seen)
            inputs, labels = examples.batch(indices, views, device), examples.labels[indices]
            with autocast(dtype, device):
                logits = suffix(inputs)
            objective = loss(logits.float(), labels.to(device), plan, weights)
            total, seen = total + objective.item() * len(indices), seen + len(indices)
            for now, before in zip(trained, start, strict=False):
                objective = objective + proximal_mu / 2 * (now - before).square().sum()
            optimizer.zero_grad()
            objective.backward()
            optimizer.step()
    suffix.eval()
    return total / seen


def _batches(examples: Examples, plan: Train, seed: int) -> Iterator[Tensor]:
    """Index batches of a round, drawn as they come; every epoch is a new order of all examples."""
    generator = torch.Generator().manual_seed(derive(seed, "order"))
    size = min(plan.batch_size, len(examples))
    steps = plan.local_steps or (plan.local_epochs or 1) * math.ceil(len(examples) / size)
    epochs = (torch.randperm(len(examples), generator=generator).split(size) for _ in count())
    return islice(chain.from_iterable(epochs), steps)


def _views(examples: Examples, indices: Tensor, seed: int) -> Tensor | int:
    views = examples.prepared.views
    if views == 1:
        return 0
    generator = torch.Generator().manual_seed(derive(seed, "views"))
    return torch.randint(views, (len(indices),), generator=generator)


def evaluate(
    suffix: nn.Module,
    examples: Examples,
    classes: int,
    some: Tensor | None = None,
    read_out: ReadOut = AS_IT_IS,
) -> Counts:
    """Counts of `suffix` on the images themselves (view 0), all of them or some; no randomness."""
    logits, labels = compute_logits(suffix, examples, classes, some)
    return Counts.of(logits, labels, read_out.scores(logits))


def compute_logits(
    suffix: nn.Module, examples: Examples, classes: int, some: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Logits, float32 [n, K] on the CPU, of the images themselves, and their labels [n]."""
    device = next(suffix.parameters()).device
    at = torch.arange(len(examples)) if some is None else some
    suffix.eval()
    with torch.inference_mode():
        batches = at.split(_EVALUATION_BATCH) if len(at) else ()
        logits = [suffix(examples.batch(b, 0, device)).float().cpu() for b in batches]
    return torch.cat([torch.zeros(0, classes), *logits]), examples.labels[at]
