"""Sums and candidates arrive as they were sent; what could be none is refused."""

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from flwr.app import ArrayRecord, RecordDict

from common.errors import ContractError
from common.heads.registry import LinearHead
from common.heads.sums import Sums, map_features
from common.metrics.counts import Counts, Floats
from common.protocol.sums import (
    CandidatesReply,
    CandidatesRequest,
    MeansReply,
    MeansRequest,
    SumsReply,
    SumsRequest,
    size_reply,
    size_sums,
)
from common.protocol.tensors import count_bytes, to_arrays
from tests.common.protocol.test_messages import CLASSES, COUNTS, FINAL, JOINED, sent

WIDTH = 5
WEIGHTS = np.array([0.1, 0.2, 1.0])
RNG = np.random.default_rng(0)
CENTRE = RNG.normal(size=WIDTH).astype(np.float32).astype(np.float64)
SUMS = Sums.of(map_features(RNG.normal(size=(20, WIDTH)), None), np.arange(20) % CLASSES, WEIGHTS)
HEADS = [LinearHead(RNG.normal(size=(CLASSES, WIDTH)), RNG.normal(size=CLASSES)) for _ in range(3)]


def test_a_request_for_sums_arrives() -> None:
    asked = SumsRequest(study="01", centre=CENTRE, weights=WEIGHTS)
    again = SumsRequest.read(sent(asked.record()), WIDTH)
    assert (again.study, again.weights.tolist()) == ("01", WEIGHTS.tolist())
    assert np.array_equal(again.centre, CENTRE)
    with pytest.raises(ContractError):
        SumsRequest.read(sent(asked.record()), WIDTH + 1)
    assert size_reply(asked.record()) == size_sums(CLASSES, WIDTH)


def test_the_sum_of_all_features_arrives() -> None:
    assert MeansRequest.read(sent(MeansRequest("01").record())).study == "01"
    total = 1e5 * RNG.normal(size=WIDTH)
    again = MeansReply.read(sent(MeansReply(images=10**6, total=total).record()), WIDTH)
    assert again.images == 10**6
    assert np.array_equal(again.total, total)


@pytest.mark.parametrize(
    ("images", "total"),
    [
        (0, np.zeros(WIDTH)),
        (10, np.full(WIDTH, 2e5)),
        (10, np.full(WIDTH, np.nan)),
        (10, np.ones(3)),
    ],
)
def test_what_can_be_no_sum_of_features_is_refused(images: int, total: Floats) -> None:
    with pytest.raises(ContractError):
        MeansReply.read(sent(MeansReply(images=images, total=total).record()), WIDTH)


def test_sums_arrive_to_the_last_bit_in_the_size_announced() -> None:
    record = SumsReply(sums=SUMS).record()
    again = SumsReply.read(sent(record), WIDTH, WEIGHTS).sums
    for name in ("counts", "totals", "second"):
        assert np.array_equal(getattr(again, name), getattr(SUMS, name)), name
    assert count_bytes(record["arrays"]) <= sum(size_sums(CLASSES, WIDTH))


def spoil(name: str, change: Callable[[torch.Tensor], torch.Tensor]) -> RecordDict:
    arrays = SumsReply(sums=SUMS).record()["arrays"]
    tensors = {k: torch.from_numpy(a.numpy().copy()) for k, a in arrays.items()}
    return RecordDict({"arrays": to_arrays(tensors | {name: change(tensors[name])})})


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("counts", lambda t: t + 0.5),
        ("counts", lambda t: -t),
        ("counts", lambda t: t.float()),
        ("totals", lambda t: t + 100),
        ("totals", lambda t: t * float("nan")),
        ("totals", lambda t: t[:1]),
        ("second", lambda t: t + 100),
        ("second", lambda t: -t),
        ("second", lambda t: t[1:]),
    ],
)
def test_what_can_be_no_sums_of_unit_features_is_refused(name, change) -> None:
    with pytest.raises(ContractError):
        SumsReply.read(sent(spoil(name, change)), WIDTH, WEIGHTS)


def crafted(**changes) -> RecordDict:
    return SumsReply(sums=replace(SUMS, **changes)).record()


def test_a_spread_below_zero_in_some_direction_is_refused() -> None:
    """Added to honest sums, it would leave a matrix from which no head can be solved."""
    level = np.trace(SUMS.second) / WIDTH
    beside = SUMS.second + 2 * level * (1 - np.eye(WIDTH))  # the trace as it was
    none = level * np.eye(WIDTH) * 1e-3  # below what the means alone give
    outer = np.outer(np.ones(WIDTH), np.ones(WIDTH))
    for second in (beside, none, -outer + np.diag(np.diagonal(outer))):
        with pytest.raises(ContractError, match="of no features"):
            SumsReply.read(sent(crafted(second=second)), WIDTH, WEIGHTS)


@pytest.mark.parametrize("seed", range(5))
def test_whatever_images_a_site_has_its_sums_are_accepted(seed: int) -> None:
    """One image, the same image many times, few in many directions, a class of weight 0."""
    rng = np.random.default_rng(seed)
    images, width = int(rng.integers(1, 40)), int(rng.integers(2, 60))
    labels = rng.integers(0, CLASSES, images)
    features = map_features(rng.normal(size=(images, width)), None)
    weights = np.where(np.arange(CLASSES) == seed % CLASSES, 0.0, 10.0 ** -rng.integers(0, 6))
    for some in (features, features[:1].repeat(images, axis=0), np.zeros_like(features)):
        views = Sums.mean([Sums.of(some, labels, weights), Sums.of(some[:, ::-1], labels, weights)])
        SumsReply.read(sent(SumsReply(sums=views).record()), width, weights)


def test_more_or_less_than_the_sums_is_refused() -> None:
    for record in (RecordDict(), RecordDict({"arrays": ArrayRecord()})):
        with pytest.raises(ContractError):
            SumsReply.read(record, WIDTH, WEIGHTS)


@pytest.mark.parametrize("weights", [[2.0], [-0.1], [float("nan")]])
def test_weights_out_of_bounds_are_refused(weights: list[float]) -> None:
    asked = SumsRequest(study="01", centre=CENTRE, weights=np.array(weights))
    with pytest.raises(ContractError, match="class weights"):
        SumsRequest.read(sent(asked.record()), WIDTH)


def test_candidates_and_their_counts_arrive() -> None:
    asked = CandidatesRequest.read(sent(CandidatesRequest.of("01", HEADS, CENTRE).record()))
    assert asked.study == "01"
    heads, centre = asked.heads(CLASSES, WIDTH)
    assert np.array_equal(centre, CENTRE)
    for (weight, bias), head in zip(heads, HEADS, strict=True):
        assert np.allclose(weight, head.weight)
        assert np.allclose(bias, head.bias)
    reply = CandidatesReply(counts=[COUNTS, COUNTS]).record()
    again = CandidatesReply.read(sent(reply), 2, JOINED)
    assert [c.sparse() for c in again.counts] == [COUNTS.sparse()] * 2


def test_candidates_of_another_shape_or_number_are_refused() -> None:
    asked = CandidatesRequest.of("01", HEADS, CENTRE)
    for classes, width in ((CLASSES + 1, WIDTH), (CLASSES, WIDTH - 1)):
        with pytest.raises(ContractError):
            asked.heads(classes, width)
    with pytest.raises(ContractError, match="1 to 16 heads"):
        CandidatesRequest.of("01", HEADS * 6, CENTRE).heads(CLASSES, WIDTH)
    with pytest.raises(ContractError, match="1 to 16 heads"):
        CandidatesRequest(study="01", arrays=ArrayRecord()).heads(CLASSES, WIDTH)


def test_who_tells_no_rounds_tells_no_candidates_either() -> None:
    reply = CandidatesReply(counts=[COUNTS.coarse(COUNTS.confusion, 1.0)]).record()
    with pytest.raises(ContractError):
        CandidatesReply.read(sent(reply), 1, JOINED)
    with pytest.raises(ContractError):
        CandidatesReply.read(sent(CandidatesReply(counts=[COUNTS]).record()), 2, FINAL)


def test_counts_are_of_the_images_told_at_join() -> None:
    other = Counts.of(torch.zeros(4, CLASSES), torch.zeros(4, dtype=torch.long))
    with pytest.raises(ContractError, match="other images"):
        CandidatesReply.read(sent(CandidatesReply(counts=[other]).record()), 1, JOINED)
