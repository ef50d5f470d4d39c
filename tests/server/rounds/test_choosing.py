"""After a solved head, a later model is released only if it validates better beyond noise."""

import numpy as np
import pytest
import torch

from common.metrics.counts import Counts
from common.metrics.metrics import value
from server.rounds.choosing import choose_best, find_noise
from server.runs.run_folder import Checkpoint
from tests.builders import make_study

pytestmark = pytest.mark.numbers

STUDY = make_study(classes=["a", "b"], select="accuracy")


def counts_of(right: int, images: int) -> Counts:
    labels = torch.arange(images) % 2
    called = torch.where(torch.arange(images) < right, labels, 1 - labels)
    return Counts.of(torch.nn.functional.one_hot(called, 2).double(), labels)


def checkpoint(number: int, best=None) -> Checkpoint:
    return Checkpoint(
        round=number, tensors={"w": torch.full((1,), float(number))}, state={}, best=best
    )


def test_the_noise_is_the_standard_error_of_the_figure() -> None:
    found = find_noise(STUDY, counts_of(80, 100))
    assert found == pytest.approx(np.sqrt(0.8 * 0.2 / 100), rel=0.15)


def test_the_first_stands_until_one_is_better_beyond_its_noise() -> None:
    best = choose_best(STUDY, checkpoint(0), counts_of(80, 100))
    assert best is not None
    assert (best.round, best.score) == (0, 0.8)
    same = choose_best(STUDY, checkpoint(1, best), counts_of(83, 100))  # within a standard error
    assert same is best
    better = choose_best(STUDY, checkpoint(2, best), counts_of(88, 100))
    assert better is not None
    assert (better.round, better.tensors["w"].item()) == (2, 2.0)
    assert choose_best(STUDY, checkpoint(3, better), counts_of(60, 100)) is better


def test_less_loss_is_better() -> None:
    study = make_study(classes=["a", "b"], select="loss")
    best = choose_best(study, checkpoint(0), counts_of(50, 100))
    better = choose_best(study, checkpoint(1, best), counts_of(95, 100))
    assert best is not None
    assert better is not None
    assert better.round == 1
    assert better.score < best.score == value(counts_of(50, 100), "loss")


def test_where_nobody_tells_nothing_is_chosen() -> None:
    assert choose_best(STUDY, checkpoint(4), Counts.zero(2)) is None
