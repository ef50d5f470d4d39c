"""Probabilities know how common a class is and how sure a head may be; decisions need not."""

import math

import pytest
import torch

from common.heads.read_out import AS_IT_IS, ReadOut, choose_read_out, list_read_outs
from common.metrics.counts import Counts
from common.metrics.metrics import brier_score, value

pytestmark = pytest.mark.numbers


def drawn() -> tuple[torch.Tensor, torch.Tensor]:
    """Three normal classes of unlike size; logits know not how unlike, and are too sure."""
    generator = torch.Generator().manual_seed(5)
    means = 1.5 * torch.eye(3, dtype=torch.float64)
    labels = torch.arange(4000).clamp(max=3999) % 20
    labels = (labels > 15).long() + (labels > 18).long()
    x = means[labels] + torch.randn(4000, 3, generator=generator, dtype=torch.float64)
    return 4 * (x @ means.T - means.square().sum(1) / 2), labels


def test_as_it_is_changes_nothing() -> None:
    logits, _ = drawn()
    assert torch.equal(AS_IT_IS.scores(logits), logits)


def test_the_true_temperature_and_prior_are_found() -> None:
    logits, labels = drawn()
    images = tuple(torch.bincount(labels).tolist())
    read_outs = list_read_outs(images)
    losses = [Counts.of(logits, labels, each.scores(logits)).loss_sum for each in read_outs]
    found = choose_read_out(read_outs, losses)
    assert found.temperature == 4
    assert found.log_prior == pytest.approx([math.log(n / 4000) for n in images], abs=0.02)
    plain, read = Counts.of(logits, labels), Counts.of(logits, labels, found.scores(logits))
    assert (plain.confusion == read.confusion).all()
    assert brier_score(read) < 0.7 * brier_score(plain)
    for metric in ("accuracy", "auroc"):
        assert value(read, metric) > value(plain, metric)


def test_where_nobody_tells_nothing_is_changed() -> None:
    read_outs = list_read_outs(None)
    assert choose_read_out(read_outs, []) == AS_IT_IS
    assert not any(read_out.log_prior for read_out in read_outs)
    assert ReadOut() in read_outs


def test_a_class_without_images_has_a_prior_that_may_travel() -> None:
    assert all(each.good(2) for each in list_read_outs((10**9, 0)))
