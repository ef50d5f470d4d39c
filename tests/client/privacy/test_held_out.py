"""What the end of a study tells of held-out patients is noise of the size that its ε asks for."""

import math

import numpy as np
import pytest
import torch

from client.privacy.accountant import compute_epsilon
from client.privacy.held_out import choose_images, noise_counts, plan_end
from common.metrics.counts import Counts

CELLS = np.array([[12, 3, 0], [1, 20, 2], [0, 0, 0]], np.int64)


def counts(cells: np.ndarray = CELLS) -> Counts:
    return Counts.zero(3).coarse(cells, 0.0)


@pytest.mark.parametrize(("epsilon", "delta"), [(0.5, 1e-5), (1.0, 1e-5), (4.0, 1e-3)])
def test_the_plan_spends_no_more_than_its_epsilon(epsilon: float, delta: float) -> None:
    plan = plan_end(epsilon, delta)
    spent = compute_epsilon([plan.event], delta)
    assert 0.97 * epsilon < spent <= epsilon
    assert (plan.sample_rate, plan.steps) == (1.0, 1)


def test_noise_has_the_deviation_that_is_told_and_hides_no_bias() -> None:
    plan = plan_end(1.0, 1e-5)
    told = [noise_counts([counts(), counts()], plan) for _ in range(400)]
    cells = np.array([[part.confusion for part in parts] for parts in told])
    error = cells - CELLS
    size = error.size
    assert {part.noise for parts in told for part in parts} == {plan.noise_multiplier}
    assert error.std() == pytest.approx(math.hypot(plan.noise_multiplier, 12**-0.5), rel=0.04)
    assert abs(error.mean()) < 5 * plan.noise_multiplier / size**0.5
    # Cells are noised one by one: in each part, empty or not.
    flat = error.reshape(400, -1)
    off = np.corrcoef(flat.T) - np.eye(flat.shape[1])
    assert abs(off).max() < 0.3
    assert not any(part.positive.any() or part.loss_sum for parts in told for part in parts)


def test_every_answer_is_drawn_anew() -> None:
    plan = plan_end(1.0, 1e-5)
    answers = {noise_counts([counts()], plan)[0].confusion.tobytes() for _ in range(20)}
    assert len(answers) == 20


def test_presence_is_told_no_better_than_epsilon_allows() -> None:
    """The best test of one patient's presence, on its own cell, by an attacker who knows the rest.

    For ε and δ, true positives are at most e^ε · false positives + δ at any threshold.
    """
    plan = plan_end(0.5, 1e-5)
    alone, nobody = np.zeros((3, 3), np.int64), np.zeros((3, 3), np.int64)
    alone[0, 0] = 1
    scores = {
        name: np.array(
            [noise_counts([counts(cells)], plan)[0].confusion[0, 0] for _ in range(2000)]
        )
        for name, cells in (("in", alone), ("out", nobody))
    }
    for threshold in range(-25, 25):
        hit, miss = ((scores[name] >= threshold).mean() for name in ("in", "out"))
        assert hit <= math.exp(0.5) * miss + 0.06
        assert 1 - miss <= math.exp(0.5) * (1 - hit) + 0.06


def test_each_patient_counts_with_one_image_always_the_same() -> None:
    patients = ["a", "b", "a", "c", "b", "a", "d"]
    secret = bytes(32)
    chosen = choose_images(patients, secret)
    assert [patients[i] for i in chosen] == [patients[i] for i in sorted(chosen.tolist())]
    assert sorted(patients[i] for i in chosen) == ["a", "b", "c", "d"]
    assert torch.equal(chosen, choose_images(patients, secret))
    others = [p for p in patients if p != "b"]
    without = [
        others[: i + 1].count("a") for i in choose_images(others, secret) if others[i] == "a"
    ]
    among = [patients[: i + 1].count("a") for i in chosen if patients[i] == "a"]
    assert among == without  # one patient more or less leaves the others as they are
    drawn = {tuple(choose_images(patients, bytes([k]) * 32).tolist()) for k in range(40)}
    assert len(drawn) == 6  # every choice there is
    assert choose_images([], secret).tolist() == []
