"""DP-SGD by patient (Abadi et al. 2016), on the trainable suffix.

A row is a patient: one image in one view, drawn anew for each step. What leaves a step is the sum
of the rows' gradients, each of a norm of at most `clip_norm`, plus Gaussian noise, over a constant.
Nothing else is told of the rows: not their number, not their loss.

Each row passes the suffix by itself, in a batch of one, with dropout from a seed of its own. So its
gradient is a function of that patient, that seed and the weights alone, to the last bit: in a
larger batch it would be rounded differently with other patients beside it, and from one stream for
all of them one patient more would change the dropout of the next. Crafted weights can make any such
difference large. The gradient whose norm is taken is the very one that is added
(`client.privacy.noised_sum`), so no weights can make a patient count for more than the clipping
norm.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn

from client.features.precision import autocast
from client.privacy.noise import Entropy
from client.privacy.noised_sum import NoisedSum
from client.privacy.plan import PrivacyPlan
from client.privacy.sampling import Patients
from client.training import trainer
from client.training.dataset import Examples
from common.config.study import Train
from common.errors import RefusedError
from common.model.split import train_mode

Losses = Callable[[Tensor, Tensor], Tensor]
"""From logits [n, classes] and labels [n] to each row's own loss [n]."""

Row = tuple[Tensor, Tensor, int]
"""A patient in a step: the suffix's input [1, …], the label [1], and the seed of dropout."""

_READ = 64
"""Rows that are read at a time."""


def train(
    suffix: nn.Module,
    examples: Examples,
    patients: Patients,
    plan: Train,
    privacy_plan: PrivacyPlan,
    *,
    lr: float,
    proximal_mu: float = 0.0,
    entropy: Entropy | None = None,
) -> None:
    """Train `suffix` in place for one protected round.

    Never twice the same: sampling and noise are the operating system's. Steps without a patient are
    taken too; a patient whose gradient is not finite adds nothing. The suffix computes in
    float32. Weight decay, momentum and the proximal term act on what the noise already protects.

    Args:
      suffix: Activations → logits; what requires a gradient trains.
      examples: The training images.
      patients: Whose they are.
      plan: The study's local training; its batch size and number of steps do not count here.
      privacy_plan: Steps, sampling, clipping, noise, and what a sum is divided by.
      lr: Learning rate of this round.
      proximal_mu: FedProx (Li et al., 2020): adds μ · (w − w_start) to the gradient.
      entropy: Of tests only.

    Raises:
      RefusedError: something would train that cannot be protected, or a loss that depends on
        other patients.
    """
    if plan.imbalance == "weighted":
        expected, got = "class weights that are constants", "weights from patients"
        remedy = "Ask the coordinator for train.class_weights."
        raise RefusedError("train.imbalance", expected=expected, got=got, remedy=remedy)
    entropy, one = entropy or Entropy(), privacy_plan.round
    device = next(suffix.parameters()).device
    losses = choose_losses(plan, device)
    optimizer = trainer.make_optimizer(suffix, plan, lr)
    trained = list_trained(suffix)
    start = [p.detach().clone() for p in trained] if proximal_mu else []
    train_mode(suffix)
    with compute_exactly(device):
        for _ in range(one.steps):
            images, views = patients.draw(one.sample_rate, examples.prepared.views, entropy)
            rows = _rows(examples, images, views, entropy.seeds(len(images)), device)
            gradients = compute_noised_gradient(suffix, rows, losses, privacy_plan, entropy)
            for p, gradient in zip(trained, gradients, strict=True):
                p.grad = gradient
            for gradient, p, before in zip(gradients, trained, start, strict=False):
                gradient.add_(p.detach() - before, alpha=proximal_mu)
            optimizer.step()
    optimizer.zero_grad()
    suffix.eval()


def choose_losses(plan: Train, device: torch.device) -> Losses:
    """What each row's loss is; class weights are constants of the study."""
    weights = torch.tensor(plan.class_weights, device=device) if plan.class_weights else None
    return partial(trainer.losses, plan=plan, weights=weights)


def compute_noised_gradient(
    suffix: nn.Module,
    rows: Iterable[Row],
    losses: Losses,
    privacy_plan: PrivacyPlan,
    entropy: Entropy,
) -> list[Tensor]:
    """The protected gradient of one step, for each trained parameter.

    Args:
      suffix: In `train_mode`.
      rows: All who were sampled; maybe nobody.
      losses: What to minimise.
      privacy_plan: Of the round.
      entropy: Of the noise.
    """
    noised = make_sum(suffix, privacy_plan)
    for row in rows:
        noised.add(compute_row_gradient(suffix, row, losses))
    sums = noised.release(entropy)
    return [
        total.div_(privacy_plan.batch).float().to(p.device)
        for total, p in zip(sums, list_trained(suffix), strict=True)
    ]


def make_sum(suffix: nn.Module, privacy_plan: PrivacyPlan) -> NoisedSum:
    """The noised sum of a step, before the first row."""
    one, trained = privacy_plan.round, list_trained(suffix)
    return NoisedSum(
        [p.shape for p in trained],
        clip_norm=one.clip_norm,
        noise_multiplier=one.noise_multiplier,
        device=trained[0].device,
    )


def compute_row_gradient(suffix: nn.Module, row: Row, losses: Losses) -> tuple[Tensor, ...]:
    """The gradient of one row's loss, as it is."""
    inputs, labels, seed = row
    # Seeding every device costs milliseconds.
    (torch.default_generator if inputs.device.type == "cpu" else torch).manual_seed(seed)
    loss = losses(suffix(inputs), labels).sum()
    return torch.autograd.grad(loss, list_trained(suffix))


def list_trained(suffix: nn.Module) -> list[nn.Parameter]:
    """What trains, in the order of gradients here."""
    return [p for p in suffix.parameters() if p.requires_grad]


@contextmanager
def compute_exactly(device: torch.device) -> Iterator[None]:
    """Float32 throughout, by fixed kernels; torch's generators as they were afterwards.

    In half precision, or TF32, a patient's gradient is only a rough one.
    """
    with (
        torch.random.fork_rng(devices=[] if device.type == "cpu" else None),
        torch.backends.cudnn.flags(enabled=True, deterministic=True, allow_tf32=False),
        autocast("float32", device),
    ):
        yield


def _rows(
    examples: Examples, images: Tensor, views: Tensor, seeds: Tensor, device: torch.device
) -> Iterator[Row]:
    """Each row in memory of its own: where it stands among others must not count either."""
    prepared = examples.prepared
    for some, seen, drawn in zip(*(t.split(_READ) for t in (images, views, seeds)), strict=True):
        stored, labels = prepared.rows[some * prepared.views + seen], examples.labels[some]
        for i, seed in enumerate(drawn.tolist()):
            with torch.no_grad():
                inputs = prepared.front(stored[[i]].to(device)).float()
            yield inputs, labels[[i]].to(device), seed
