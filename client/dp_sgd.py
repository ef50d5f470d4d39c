"""DP-SGD by patient (Abadi et al. 2016), on the trainable suffix.

A row of a batch is a patient: one image in one view, drawn anew for each step. What leaves a step
is the sum of the rows' gradients, each of a norm of at most `clip_norm`, plus Gaussian noise, over
a constant. Nothing else is told of the rows: not their number, not their loss.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from client import trainer
from client.entropy import Entropy
from client.ghost import row_norms, watched
from client.precision import autocast
from client.protection import Protection
from client.trainer import Examples
from common.cut import train_mode
from common.errors import RefusedError, complaint
from common.study import Train

Losses = Callable[[Tensor, Tensor], Tensor]
"""From logits [n, classes] and labels [n] to each row's own loss [n]."""

_ROWS = 64
"""Rows that are in memory at a time."""


@dataclass(frozen=True)
class Patients:
    """Who trains: which images are whose.

    Attributes:
      images: Positions of all images, those of one patient side by side; int64 [images].
      counts: How many each patient has; int64 [patients].
    """

    images: Tensor
    counts: Tensor

    @classmethod
    def of(cls, ids: Sequence[str]) -> "Patients":
        """From the patient of each image."""
        number = {patient: k for k, patient in enumerate(dict.fromkeys(ids))}
        owner = torch.tensor([number[patient] for patient in ids], dtype=torch.int64)
        return cls(owner.argsort(stable=True), owner.bincount())

    def draw(self, rate: float, views: int, entropy: Entropy) -> tuple[Tensor, Tensor]:
        """The patients of a step, each with probability `rate`: an image of each, and its view."""
        drawn = entropy.poisson(len(self.counts), rate)
        first = self.counts.cumsum(0) - self.counts
        chosen = first[drawn] + entropy.below(self.counts[drawn])
        return self.images[chosen], entropy.below(torch.full_like(drawn, views))


def train(
    suffix: nn.Module,
    examples: Examples,
    patients: Patients,
    plan: Train,
    protection: Protection,
    *,
    lr: float,
    proximal_mu: float = 0.0,
    entropy: Entropy | None = None,
) -> None:
    """Train `suffix` in place for one protected round.

    Never twice the same: sampling and noise are the operating system's. Steps without a patient are
    taken too; a patient whose loss or gradient is not finite adds nothing. The suffix computes in
    float32. Weight decay, momentum and the proximal term act on what the noise already protects.

    Args:
      suffix: Activations → logits; what requires a gradient trains.
      examples: The training images.
      patients: Whose they are.
      plan: The study's local training; its batch size and number of steps do not count here.
      protection: Steps, sampling, clipping, noise, and what a sum is divided by.
      lr: Learning rate of this round.
      proximal_mu: FedProx (Li et al., 2020): adds μ · (w − w_start) to the gradient.
      entropy: Of tests only.

    Raises:
      RefusedError: something would train that cannot be protected, or a loss that depends on
        other patients.
    """
    if plan.imbalance == "weighted":
        expected, got = "class weights that are constants", "weights from patients"
        raise RefusedError(complaint("train.imbalance", expected=expected, got=got))
    entropy, one = entropy or Entropy(), protection.round
    device = next(suffix.parameters()).device
    weights = torch.tensor(plan.class_weights, device=device) if plan.class_weights else None
    losses = partial(trainer.losses, plan=plan, weights=weights)
    optimizer = trainer.make_optimizer(suffix, plan, lr)
    trained = trained_by(suffix)
    start = [p.detach().clone() for p in trained] if proximal_mu else []
    train_mode(suffix)
    with exact(device, entropy):
        for _ in range(one.steps):
            drawn = patients.draw(one.sample_rate, examples.prepared.views, entropy)
            batches = _batches(examples, *drawn, device)
            gradients = released(suffix, batches, losses, protection, entropy)
            for p, gradient in zip(trained, gradients, strict=True):
                p.grad = gradient
            for gradient, p, before in zip(gradients, trained, start, strict=False):
                gradient.add_(p.detach() - before, alpha=proximal_mu)
            optimizer.step()
    optimizer.zero_grad()
    suffix.eval()


def released(
    suffix: nn.Module,
    batches: Iterable[tuple[Tensor, Tensor]],
    losses: Losses,
    protection: Protection,
    entropy: Entropy,
) -> list[Tensor]:
    """The protected gradient of one step, for each trained parameter.

    Args:
      suffix: In `train_mode`.
      batches: Inputs and labels of all who were sampled, some at a time; maybe none at all.
      losses: What to minimise; a row's must depend on that row and on constants alone.
      protection: Of the round.
      entropy: Of the noise.
    """
    one = protection.round
    sums = [torch.zeros_like(p) for p in trained_by(suffix)]
    for inputs, labels in batches:
        for total, part in zip(
            sums, clipped_sum(suffix, inputs, labels, losses, one.clip_norm), strict=True
        ):
            total += part
    noises = entropy.gaussians([total.shape for total in sums])
    scale = one.noise_multiplier * one.clip_norm
    return [
        total.add_(noise.to(total.device), alpha=scale).div_(protection.batch)
        for total, noise in zip(sums, noises, strict=True)
    ]


def clipped_sum(
    suffix: nn.Module, inputs: Tensor, labels: Tensor, losses: Losses, clip_norm: float
) -> list[Tensor]:
    """The rows' gradients, each scaled down to `clip_norm` if it is longer, added up; no noise."""
    trained = trained_by(suffix)
    if not len(inputs):
        return [torch.zeros_like(p) for p in trained]
    with watched(suffix) as calls:
        each = losses(suffix(inputs), labels)
    norms = row_norms(suffix, calls, each)
    finite = norms.isfinite() & each.isfinite()
    if not finite.all():  # again without: 0 · NaN would be NaN
        return clipped_sum(suffix, inputs[finite], labels[finite], losses, clip_norm)
    shares = clip_norm / norms.clamp(min=clip_norm)
    return list(torch.autograd.grad((each * shares).sum(), trained))


def trained_by(suffix: nn.Module) -> list[nn.Parameter]:
    """What trains, in the order of gradients here."""
    return [p for p in suffix.parameters() if p.requires_grad]


@contextmanager
def exact(device: torch.device, entropy: Entropy) -> Iterator[None]:
    """Float32 throughout, and dropout from a seed of its own; torch's generators as they were.

    In half precision, or TF32, a gradient may be longer than its norm says.
    """
    on_cpu = device.type == "cpu"
    reseed = torch.default_generator.manual_seed if on_cpu else torch.manual_seed
    with (
        torch.random.fork_rng(devices=[] if on_cpu else None),
        torch.backends.cudnn.flags(allow_tf32=False),
        autocast("float32", device),
    ):
        reseed(entropy.seed())
        yield


def _batches(
    examples: Examples, images: Tensor, views: Tensor, device: torch.device
) -> Iterator[tuple[Tensor, Tensor]]:
    for some, seen in zip(images.split(_ROWS), views.split(_ROWS), strict=True):
        yield examples.batch(some, seen, device), examples.labels[some].to(device)
