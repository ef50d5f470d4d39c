"""An adversary who reads all that leaves a site, and knows everybody there but some canaries."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import torch
from flwr.app import Message
from numpy.typing import NDArray

from client.features.precision import fix_numerics
from client.models.membership import compute_losses, list_first_images, score_losses
from client.preparation import PreparedSite
from client.privacy import dp_sgd
from client.privacy.noised_rows import choose_rows, make_rows
from client.privacy.parameters import PrivateRelease, TrainingRelease
from client.session import Session
from client.training import trainer
from common.config.study import Train
from common.heads.sums import map_features
from common.metrics.counts import Floats
from common.model.split import train_mode
from common.protocol.fields import ARRAYS
from common.protocol.noised import NOISED, NoisedReply
from common.protocol.round import RoundRequest
from common.protocol.sums import SUMS, SumsReply, SumsRequest
from common.protocol.tensors import Tensors

_EXACT = 1e-2
"""The noise that a sum without any is thought to have, at most, beside rows of length 1."""
_SHARES = [2.0**k for k in range(-20, 4)]
"""Of the noise that was told, among which an adversary judges what is there."""
_PASSES = 2
"""How often the noise of each kind of sum is judged, given that of the others."""


@dataclass
class Seen:
    """All that was seen of a site's canaries in the noised sums of one kind.

    Attributes:
      gram: Products of canaries' rows over the variance of the noise, of all sums; [m, m].
      products: Products of canaries' rows with what was seen of them, over that variance; [m].
      energy: The squared length of all that was seen of them, over that variance.
      size: How many numbers that were.
    """

    gram: Floats
    products: Floats
    energy: float = 0.0
    size: int = 0

    def add(self, rows: Floats, rest: Floats, deviation: float) -> None:
        """One more sum: canaries' rows [m, d], what was seen of them [d], and the noise in it."""
        self.gram += rows @ rows.T / deviation**2
        self.products += rows @ rest / deviation**2
        self.energy += float(rest @ rest) / deviation**2
        self.size += len(rest)


@dataclass
class Canaries:
    """Patients of one site of whom a coin decided whether they train, and what gave them away.

    The adversary knows every other patient of the site, and every image. What the site tells is a
    sum over who trains, with noise: he takes off the rows of everybody he knows, and estimates the
    coins from the rest by least squares, as if each coin were a normal number of the same variance.
    How often a row counts, and how much noise there is in sums of each kind, he judges himself.

    Attributes:
      prepared: The site with all of them.
      numbers: Of the canaries among the site's training patients; [m].
      included: What the coins decided; [m].
      seen: By kind of sum.
    """

    prepared: PreparedSite
    numbers: NDArray[np.int64]
    included: NDArray[np.bool_]
    seen: dict[str, Seen] = field(default_factory=dict)

    def watch(self, kind: str, told: Floats, rows: Floats, deviation: float) -> None:
        """See one noised sum.

        Args:
          kind: Of the sum.
          told: [d], as it was told.
          rows: [patients, d], what each patient adds to it.
          deviation: Of the noise in each number, as it was told.
        """
        own = rows[self.numbers]
        expected = rows.sum(axis=0) - own.sum(axis=0) / 2
        scale = max(1, round(float(told @ expected) / max(float(expected @ expected), 1e-30)))
        m = len(own)
        seen = self.seen.setdefault(kind, Seen(np.zeros((m, m)), np.zeros(m)))
        seen.add(scale * own, told - scale * expected, deviation)

    def guess(self) -> Floats:
        """By all sums: how far above one half each coin is estimated; [m]; 0 if none was seen.

        The shares of the noise are those that make all that was seen the most likely, found for one
        kind of sum after the other.
        """
        shares = dict.fromkeys(self.seen, 1.0)
        for kind in [*self.seen] * _PASSES:
            shares = max(
                ({**shares, kind: share} for share in _SHARES),
                key=lambda tried: self._estimate(tried)[0],
            )
        return self._estimate(shares)[1]

    def _estimate(self, shares: Mapping[str, float]) -> tuple[float, Floats]:
        """With so much of the noise that was told: how likely all is (its logarithm); the coins."""
        m, energy, spread = len(self.numbers), 0.0, 0.0
        wide, products = 4 * np.eye(m), np.zeros(m)
        for kind, share in shares.items():
            seen = self.seen[kind]
            wide = wide + seen.gram / share**2
            products = products + seen.products / share**2
            energy += seen.energy / share**2
            spread += 2 * seen.size * math.log(share)
        guessed: Floats = np.linalg.solve(wide, products).astype(np.float64)
        spread += float(np.linalg.slogdet(wide / 4).logabsdet)
        return -0.5 * (spread + energy - float(products @ guessed)), guessed

    def judge(self, released: Tensors) -> Floats:
        """By the released model alone: how much smaller than usual each canary's loss is; [m]."""
        images = list_first_images(self.prepared.owners)[torch.from_numpy(self.numbers)]
        return score_losses(*compute_losses(self.prepared, released, "train", images))


def overhear(canaries: Canaries, message: Message, reply: Message) -> None:
    """Watch a sum, or the change that a private round made, on its way to the server."""
    prepared, kind = canaries.prepared, message.metadata.message_type
    plan = prepared.privacy_plan
    if kind == SUMS:
        _watch_exact_sum(canaries, message, reply)
    if plan is None or kind not in (*NOISED, "train"):
        return
    prepared.network.load({**prepared.network.initial, **_read_arrays(message)})
    with fix_numerics(prepared.site.threads):
        if kind == "train" and _is_plain(prepared.study.train):
            _watch_round(canaries, plan.round, plan.batch, message, reply)
        elif kind in NOISED:
            _watch_noised_sum(canaries, plan.find(kind.removeprefix("query.")).kind, reply)


def _watch_exact_sum(canaries: Canaries, message: Message, reply: Message) -> None:
    """The features of each class, added without noise."""
    prepared = canaries.prepared
    width, classes = prepared.network.width, len(prepared.study.classes)
    request = SumsRequest.read(message.content, width)
    told = SumsReply.read(reply.content, width, request.weights).sums.totals
    views = Session(prepared).view_features("train")
    features = np.mean([map_features(each, request.centre) for each in views], axis=0)
    rows = np.zeros((len(prepared.owners.counts), classes, width))
    owner, labels = prepared.owners.owner.numpy(), prepared.examples["train"].labels.numpy()
    np.add.at(rows, (owner, labels), features)
    canaries.watch(SUMS, told.ravel(), rows.reshape(len(rows), -1), _EXACT)


def _is_plain(train: Train) -> bool:
    """Whether the change of a round is the sum of its gradients, but for a factor."""
    return train.optimizer == "sgd" and train.momentum == 0


def _read_arrays(message: Message) -> Tensors:
    arrays = message.content.array_records[ARRAYS]
    return {name: torch.from_numpy(array.numpy().copy()) for name, array in arrays.items()}


def _watch_noised_sum(canaries: Canaries, kind: TrainingRelease, reply: Message) -> None:
    prepared, study = canaries.prepared, canaries.prepared.study
    make_row, size = choose_rows(kind, len(study.classes), study.directions or 0)
    suffix = prepared.network.split.suffix
    rows = [*make_rows(suffix, prepared.examples["train"], prepared.owners, make_row)]
    told = NoisedReply.read(reply.content, size).sums
    canaries.watch(kind, told.numbers, torch.stack(rows).double().numpy(), told.deviation)


def _watch_round(
    canaries: Canaries, one: PrivateRelease, batch: float, message: Message, reply: Message
) -> None:
    """Take the change of a round for the sum of its steps' gradients, as plain SGD makes it.

    Each step counts with the gradients at the beginning, the mean over a patient's images.
    """
    prepared, train = canaries.prepared, canaries.prepared.study.train
    suffix, examples = prepared.network.split.suffix, prepared.examples["train"]
    device = next(suffix.parameters()).device
    losses, owners = dp_sgd.choose_losses(train, device), prepared.owners
    train_mode(suffix)
    before = torch.cat([p.detach().flatten() for p in dp_sgd.list_trained(suffix)])

    def compute_row(image: int) -> torch.Tensor:
        inputs = examples.batch(torch.tensor([image]), 0, device)
        row = inputs, examples.labels[[image]].to(device), 0
        gradient = dp_sgd.compute_row_gradient(suffix, row, losses)
        flat = torch.cat([part.flatten() for part in gradient])
        return flat * min(1.0, one.clip_norm / max(float(flat.norm()), 1e-12))

    with dp_sgd.compute_exactly(device):
        rows = [
            torch.stack([compute_row(image) for image in images.tolist()]).mean(dim=0)
            for images in owners.images.split(owners.counts.tolist())
        ]
    prepared.network.load(_read_arrays(reply))
    after = torch.cat([p.detach().flatten() for p in dp_sgd.list_trained(suffix)])
    suffix.eval()
    number = RoundRequest.read(message.content).round
    lr = trainer.learning_rate(train, number)
    told = (before - after) * (batch / (lr * one.steps))
    deviation = one.noise_multiplier * one.clip_norm / math.sqrt(one.steps)
    expected = torch.stack(rows) * one.sample_rate
    canaries.watch("round", told.double().cpu().numpy(), expected.double().cpu().numpy(), deviation)
