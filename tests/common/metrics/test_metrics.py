"""Metrics are counts: exact against scikit-learn, the same in any order, hostile input refused."""

import itertools
import math
from typing import Any, get_args

import numpy as np
import pytest
import torch
from sklearn import metrics as sk
from torch.nn.functional import cross_entropy, one_hot

from common.config.study import Study
from common.errors import ContractError
from common.metrics.counts import BINS, MOST, Counts
from common.metrics.metrics import (
    METRICS,
    average_precision,
    better,
    brier_score,
    class_auroc,
    macro_average_precision,
    npv,
    ppv,
    sensitivity,
    specificity,
    value,
)

pytestmark = pytest.mark.numbers


def scores(n: int, classes: int, scale: float, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits that know something about the labels, spread by `scale`."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, classes, (n,), generator=generator)
    noise = torch.randn(n, classes, generator=generator)
    return (noise + 0.7 * one_hot(labels, classes)) * scale, labels


def log_odds(logits: torch.Tensor, k: int) -> torch.Tensor:
    others = torch.cat([logits[:, :k], logits[:, k + 1 :]], dim=1).double()
    return logits[:, k].double() - others.logsumexp(1)


def macro_auroc(logits: torch.Tensor, labels: torch.Tensor) -> float:
    """The exact one, from the log-odds, where float probabilities would already tie."""
    areas = [sk.roc_auc_score(labels == k, log_odds(logits, k)) for k in range(logits.shape[1])]
    return float(np.mean(areas))


SHAPES = {
    "sharp": lambda z: z * 20,
    "very sharp": lambda z: z * 80,
    "plain": lambda z: z * 2,
    "within ±1": lambda z: torch.tanh(z),
    "N(0, 0.3)": lambda z: z * 0.3,
    "nearly constant": lambda z: z * 0.1,
    "tied": lambda z: z.round(),
    "tied and sharp": lambda z: z.round() * 30,
    "all the same": lambda z: z * 0,
    "half precision": lambda z: (z * 5).half(),
}


@pytest.mark.parametrize("classes", [2, 7])
@pytest.mark.parametrize("shape", SHAPES)
def test_auroc_is_scikit_learns_whatever_the_scores_look_like(shape: str, classes: int) -> None:
    logits, labels = scores(1500, classes, 1.0)
    logits = SHAPES[shape](logits)
    counts = Counts.of(logits, labels)
    assert value(counts, "auroc") == pytest.approx(macro_auroc(logits, labels), abs=0.005)
    if shape == "sharp":
        saturated = (torch.softmax(logits, 1) - 0.5).abs() > 0.495
        assert saturated.float().mean() > 0.84


@pytest.mark.parametrize("classes", [2, 7])
@pytest.mark.parametrize("shape", SHAPES)
def test_average_precision_is_scikit_learns(shape: str, classes: int) -> None:
    logits, labels = scores(1500, classes, 1.0)
    logits = SHAPES[shape](logits)
    counts = Counts.of(logits, labels)
    exact = [sk.average_precision_score(labels == k, log_odds(logits, k)) for k in range(classes)]
    found = [average_precision(counts, k) for k in range(classes)]
    assert found == pytest.approx(exact, abs=0.025)
    assert macro_average_precision(counts) == pytest.approx(np.mean(exact), abs=0.015)
    assert average_precision(Counts.zero(classes), 0) is None
    assert macro_average_precision(Counts.zero(classes)) is None


def test_nothing_called_has_no_predictive_value() -> None:
    counts = Counts.of(torch.tensor([[1.0, 0.0]] * 3), torch.tensor([0, 0, 1]))
    assert ppv(counts, 1) is None
    assert npv(counts, 0) is None
    assert ppv(counts, 0) == npv(counts, 1) == pytest.approx(2 / 3)


@pytest.mark.parametrize("classes", [2, 7])
def test_the_other_metrics_are_exact(classes: int) -> None:
    logits, labels = scores(600, classes, 2.0)
    labels[labels == 1] = 0 if classes > 2 else 1
    counts, called = Counts.of(logits, labels), logits.argmax(1)
    present = sorted(set(labels.tolist()))
    expected = {
        "accuracy": sk.accuracy_score(labels, called),
        "balanced_accuracy": np.mean([sk.recall_score(labels == k, called == k) for k in present]),
        "f1": sk.f1_score(labels, called, average="macro", labels=present),
        "loss": float(cross_entropy(logits, labels)),
    }
    for name, figure in expected.items():
        assert value(counts, name) == pytest.approx(figure, abs=1e-6), name
    for k in range(classes):
        if k not in present:
            assert sensitivity(counts, k) is None
            assert class_auroc(counts, k) is None
            continue
        recall, other = labels == k, labels != k
        assert sensitivity(counts, k) == pytest.approx(sk.recall_score(recall, called == k))
        assert specificity(counts, k) == pytest.approx(sk.recall_score(other, called != k))
        assert ppv(counts, k) == pytest.approx(sk.precision_score(recall, called == k))
        assert npv(counts, k) == pytest.approx(sk.precision_score(other, called != k))
        exact = sk.roc_auc_score(labels == k, log_odds(logits, k))
        assert class_auroc(counts, k) == pytest.approx(exact, abs=0.005)


@pytest.mark.parametrize("name", METRICS)
@pytest.mark.parametrize("classes", [2, 5])
class TestEveryMetric:
    def test_is_of_the_union_in_any_order(self, name: str, classes: int) -> None:
        logits, labels = scores(400, classes, 3.0)
        whole = value(Counts.of(logits, labels), name)
        # Unequal parts: a mean of the parts' figures would be another number.
        parts = [
            Counts.of(z, y)
            for z, y in zip(logits.split([10, 90, 300]), labels.split([10, 90, 300]), strict=True)
        ]
        for order in itertools.permutations(parts):
            assert value(sum(order, Counts.zero(classes)), name) == pytest.approx(whole, abs=1e-12)

    def test_an_absent_class_is_harmless(self, name: str, classes: int) -> None:
        logits, labels = scores(200, classes, 1.0)
        logits[:, -1] = -60
        padded = torch.cat([logits, torch.full((200, 1), -80.0)], dim=1)
        figure = value(Counts.of(padded, labels), name)
        assert figure is not None
        assert math.isfinite(figure)
        assert figure == pytest.approx(value(Counts.of(logits, labels), name), abs=0.005)

    def test_one_class_alone_is_defined_or_none(self, name: str, classes: int) -> None:
        logits, _ = scores(50, classes, 1.0)
        figure = value(Counts.of(logits, torch.zeros(50, dtype=torch.long)), name)
        assert (figure is None) == (name == "auroc")

    def test_no_images_give_none(self, name: str, classes: int) -> None:
        assert value(Counts.zero(classes), name) is None
        empty = Counts.of(torch.zeros(0, classes), torch.zeros(0, dtype=torch.long))
        assert value(empty, name) is None

    def test_better_knows_the_direction(self, name: str, classes: int) -> None:
        low, high = (0.9, 0.1) if name == "loss" else (0.1, 0.9)
        assert better(name, high, low)
        assert not better(name, low, high)
        assert not better(name, low, low)
        assert better(name, low, None)
        assert not better(name, None, low)
        assert not better(name, None, None)

    def test_a_perfect_model_beats_a_blind_one(self, name: str, classes: int) -> None:
        labels = torch.arange(classes).repeat(20)
        perfect = Counts.of(one_hot(labels, classes) * 30.0, labels)
        blind = Counts.of(torch.zeros(len(labels), classes), labels)
        assert better(name, value(perfect, name), value(blind, name))


def test_a_study_selects_among_exactly_these_metrics() -> None:
    assert set(get_args(Study.model_fields["select"].annotation)) == set(METRICS)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_what_is_no_number_counts_as_wrong(bad: float) -> None:
    """An error would tell that there is an image on which this model gives none."""
    logits, labels = scores(4, 3, 1.0)
    others = Counts.of(logits[[0, 1, 3]], labels[[0, 1, 3]])
    logits[2, 1] = bad
    counts, k = Counts.of(logits, labels), int(labels[2])
    wrong = counts.confusion - others.confusion
    assert (wrong.sum(), wrong[k].sum(), wrong[k, k]) == (1, 1, 0)
    assert (counts.positive - others.positive)[k].argmax() == 0
    assert math.isfinite(counts.loss_sum)
    assert Counts.from_sparse(counts.sparse(), 3).n == 4


def test_enormous_logits_are_counted_without_a_warning() -> None:
    logits = torch.tensor([[3e38, -3e38], [-3e38, 3e38], [1e30, 1e30]])
    counts = Counts.of(logits, torch.tensor([0, 0, 1]))
    assert counts.n == 3
    assert math.isfinite(counts.loss_sum)
    assert Counts.from_sparse(counts.sparse(), 2).n == 3


# --- the wire ---


def test_sparse_round_trip_is_exact_and_small() -> None:
    logits, labels = scores(200, 7, 3.0)
    counts = Counts.of(logits, labels)
    sent = counts.sparse()
    again = Counts.from_sparse(sent, 7)
    assert again.sparse() == sent
    for array in ("confusion", "positive", "negative"):
        assert (getattr(again, array) == getattr(counts, array)).all()
        assert getattr(again, array).dtype == np.int64
    numbers = sum(len(part) for part in sent.values() if isinstance(part, list))
    assert numbers <= 2 * (7 * 7 + 200 * 7)
    zero = Counts.zero(7)
    assert Counts.from_sparse(zero.sparse(), 7).sparse() == zero.sparse()


def test_sparse_holds_only_what_a_flower_record_takes() -> None:
    logits, labels = scores(20, 3, 1.0)
    for part in Counts.of(logits, labels).sparse().values():
        assert type(part) in (int, float, list)
        assert not isinstance(part, list) or {type(number) for number in part} == {int}


def hostile(**changes: Any) -> dict[str, Any]:
    """A true record of three images of two classes, then changed."""
    logits = torch.tensor([[2.0, 0.0], [0.0, 2.0], [1.0, 0.0]])
    return {**Counts.of(logits, torch.tensor([0, 1, 1])).sparse(), **changes}


TRUE = hostile()
UNTRUE: dict[str, dict[str, Any]] = {
    "a negative count": hostile(confusion=[0, -1, 3, 4]),
    "a negative index": hostile(confusion=[-1, 1, 2, 1, 3, 1]),
    "an index too large": hostile(confusion=[0, 1, 2, 1, 4, 1]),
    "an enormous index": hostile(confusion=[0, 1, 2, 1, 2**62, 1]),
    "an index beyond int64": hostile(confusion=[0, 1, 2, 1, 2**80, 1]),
    "a repeated index": hostile(confusion=[0, 1, 0, 1, 3, 1]),
    "falling indices": hostile(confusion=[3, 1, 2, 1, 0, 1]),
    "a zero spelt out": hostile(confusion=[0, 1, 1, 0, 2, 1, 3, 1]),
    "an odd list": hostile(confusion=[0, 1, 2]),
    "a list too long": hostile(confusion=[0, 1] * 5),
    "a float for an int": hostile(confusion=[0, 1.0, 2, 1, 3, 1]),
    "a bool for an int": hostile(confusion=[0, True, 2, 1, 3, 1]),
    "text": hostile(confusion="0102"),
    "nothing": hostile(confusion=None),
    "a nested list": hostile(confusion=[[0, 1]]),
    "an overflowing count": hostile(confusion=[0, 2**63 - 1, 2, 1, 3, 1]),
    "counts too large together": hostile(confusion=[0, MOST, 1, MOST, 2, MOST, 3, MOST]),
    "more images than scores": hostile(confusion=[0, 2, 2, 1, 3, 1]),
    "no scores": hostile(positive=[], negative=[]),
    "a positive moved to another class": hostile(positive=[0, 2, BINS, 1]),
    "a negative moved to another class": hostile(negative=[0, 1, BINS, 2]),
    "a NaN loss": hostile(loss_sum=math.nan),
    "an infinite loss": hostile(loss_sum=math.inf),
    "a negative loss": hostile(loss_sum=-0.1),
    "an int loss": hostile(loss_sum=1),
    "a list for a loss": hostile(loss_sum=[1.0]),
    "a loss without images": {**Counts.zero(2).sparse(), "loss_sum": 1.0},
    "a key too many": hostile(extra=1),
    "more right than there are": {**TRUE, "right": [0, 10**6]},
    "a right of nobody": {**Counts.zero(2).sparse(), "right": [0, 1]},
    "a negative right": {**TRUE, "right": [0, -1]},
    "a key missing": {key: TRUE[key] for key in ("confusion", "positive", "loss_sum")},
    "nothing at all": {},
}


@pytest.mark.parametrize("what", UNTRUE)
def test_hostile_counts_are_refused(what: str) -> None:
    assert Counts.from_sparse(TRUE, 2).n == 3
    with pytest.raises(ContractError, match="counts"):
        Counts.from_sparse(UNTRUE[what], 2)


def test_a_refusal_does_not_repeat_what_was_sent() -> None:
    with pytest.raises(ContractError) as refused:
        Counts.from_sparse(hostile(confusion=[0, 1] * 100_000), 2)
    assert len(str(refused.value)) < 200


def test_counts_of_other_classes_are_refused() -> None:
    logits, labels = scores(50, 5, 1.0)
    with pytest.raises(ContractError):
        Counts.from_sparse(Counts.of(logits, labels).sparse(), 3)


def test_the_largest_counts_add_up_without_overflow() -> None:
    largest = Counts.from_sparse(
        {
            "confusion": [0, MOST, 3, MOST],
            "positive": [BINS - 1, MOST, 2 * BINS - 1, MOST],
            "negative": [0, MOST, BINS, MOST],
            "loss_sum": 1.0,
            "right": [0, MOST, 1, MOST],
            "noise": 0.0,
        },
        2,
    )
    total = sum([largest] * 20, Counts.zero(2))
    assert value(total, "auroc") == 1.0
    assert value(total, "accuracy") == 1.0


def test_scores_are_told_of_all_images_or_of_none() -> None:
    counts = Counts.of(*scores(60, 3, 2.0))
    withheld = counts.coarse(counts.confusion, 1.0)
    assert (withheld.positive.any(), withheld.negative.any(), withheld.loss_sum) == (0, 0, 0)
    again = Counts.from_sparse(withheld.sparse(), 3, scored=False)
    assert np.array_equal(again.confusion, counts.confusion)
    for record, scored in ((withheld.sparse(), True), (counts.sparse(), False)):
        with pytest.raises(ContractError, match="counts: positive"):
            Counts.from_sparse(record, 3, scored=scored)
    # A loss would tell what scores are withheld for.
    with pytest.raises(ContractError, match="counts: loss_sum"):
        Counts.from_sparse(withheld.sparse() | {"loss_sum": 1.0}, 3, scored=False)


def test_the_loss_is_of_the_images_with_scores() -> None:
    one, other = Counts.of(*scores(60, 3, 2.0)), Counts.of(*scores(40, 3, 2.0, seed=1))
    withheld = other.coarse(other.confusion, 1.0)
    assert value(withheld, "loss") is None
    assert value(one + withheld, "loss") == value(one, "loss")
    assert value(one + withheld, "accuracy") == value(one + other, "accuracy")


# --- noise ---


def noised(cells: list[list[int]], noise: float = 3.5) -> Counts:
    return Counts.zero(len(cells)).coarse(np.array(cells, np.int64), noise)


def test_noised_counts_travel_with_their_noise() -> None:
    counts = noised([[20, -3], [0, 7]])
    again = Counts.from_sparse(counts.sparse(), 2, scored=False)
    assert np.array_equal(again.confusion, counts.confusion)
    assert again.noise == 3.5
    exact = noised([[1, 2], [3, 4]], 0.0)
    for record, scored in ((counts.sparse(), True), (exact.sparse(), False)):
        with pytest.raises(ContractError, match=r"counts: (noise|confusion)"):
            Counts.from_sparse(record, 2, scored=scored)


def test_noise_adds_up_by_its_variance() -> None:
    total = noised([[20, 3], [0, 7]], 3.0) + noised([[-2, 1], [4, 9]], 4.0)
    assert total.noise == 5.0
    assert total.confusion.tolist() == [[18, 4], [4, 16]]


@pytest.mark.parametrize("cells", [[[20, -3], [0, 7]], [[-4, -3], [2, 7]], [[-1, 0], [0, -9]]])
def test_figures_of_noised_counts_stay_within_bounds(cells: list[list[int]]) -> None:
    for name in METRICS:
        figure = value(noised(cells), name)
        assert figure is None or 0 <= figure <= 1


# --- two read-outs: what is called, and how probable it is ---


def test_decisions_come_from_logits_and_probabilities_from_scores() -> None:
    generator = torch.Generator().manual_seed(3)
    logits = torch.randn(400, 3, generator=generator, dtype=torch.float64)
    labels = torch.multinomial((logits + torch.tensor([2.0, 0, -2])).softmax(1), 1)[:, 0]
    scores = logits + torch.tensor([2.0, 0, -2])
    counts = Counts.of(logits, labels, scores)
    called, probable = logits.argmax(1), scores.argmax(1)
    assert np.trace(counts.confusion) == int((called == labels).sum())
    assert counts.right.sum() == int((probable == labels).sum()) > np.trace(counts.confusion)
    assert value(counts, "accuracy") == pytest.approx(counts.right.sum() / 400)
    loss = torch.nn.functional.cross_entropy(scores, labels)
    assert value(counts, "loss") == pytest.approx(loss.item())
    truth = torch.nn.functional.one_hot(labels, 3)
    brier = (scores.softmax(1) - truth).square().sum(1).mean()
    assert brier_score(counts) == pytest.approx(brier.item(), abs=1e-4)


def test_the_brier_score_is_between_none_and_two() -> None:
    labels = torch.arange(40) % 2
    sure = 60.0 * torch.nn.functional.one_hot(labels, 2)
    assert brier_score(Counts.of(sure, labels)) == pytest.approx(0, abs=1e-9)
    assert brier_score(Counts.of(-sure, labels)) == pytest.approx(2, abs=1e-9)
    assert brier_score(Counts.zero(2)) is None
