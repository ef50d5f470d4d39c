"""Messages arrive as they were sent; whatever else arrives is a ContractError and nothing worse."""

import io
import json
import pickle
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict
from numpy.typing import NDArray

from client.privacy.rounding import Rounding
from common.errors import ContractError
from common.flower.messages import recorddict_from_proto, recorddict_to_proto
from common.metrics.counts import Counts
from common.model.contract import Contract, Versions
from common.protocol.disclosure import Disclosure
from common.protocol.fields import ByPart
from common.protocol.final import FinalCounts, FinalReply, FinalRequest
from common.protocol.join import JoinReply, JoinRequest
from common.protocol.ledger import LedgerHead, LedgerReply, LedgerRequest
from common.protocol.round import (
    Figures,
    RoundReply,
    RoundRequest,
    make_round_config,
    make_strategy_record,
)
from common.protocol.tensors import Tensors, count_bytes, from_arrays, to_arrays

SHAPES = {"head.weight": (3, 4), "head.bias": (3,), "scale": ()}
WEIGHT, CLASSES = 40, 3
IMAGES = ByPart(train=(30, 10, 0), validation=(4, 3, 3), test=(8, 6, 6))
GENERATOR = torch.Generator().manual_seed(0)
TENSORS = {name: torch.randn(shape, generator=GENERATOR) for name, shape in SHAPES.items()}
LOGITS = torch.randn(10, CLASSES, generator=GENERATOR)
COUNTS = Counts.of(LOGITS, torch.arange(10) % CLASSES)
JOINED = JoinReply(
    name="east",
    role="train",
    contract=Contract(study="01", backbone="ab", suffix="cd", preprocessing="ef", protocol="1"),
    disclosure=Disclosure(counts="exact", sums="none"),
    patients=ByPart(train=20, validation=3, test=5),
    images=IMAGES,
    enrolled=None,
    ledger=LedgerHead(count=3, hash="ab" * 32, receipt="cd" * 32),
    versions=Versions.here(),
)
SECRET = bytes(32)
TENS = ByPart(train=10, validation=10, test=10)
NO_IMAGES = ByPart(train=(0, 0, 0), validation=(0, 0, 0), test=(0, 0, 0))
NOTHING = ByPart(train=None, validation=None, test=None)


def joined(disclosure: Disclosure) -> JoinReply:
    """What the same site says at join if it discloses less."""
    rounding = Rounding(SECRET, disclosure.base)
    told = [*["train"] * disclosure.tells, *["validation", "test"] * disclosure.tells_held_out]
    patients = {p: rounding.round_number(getattr(JOINED.patients, p), "patients", p) for p in told}
    images = {p: rounding.round_images(getattr(IMAGES, p), p) for p in told}
    return JOINED.model_copy(
        update={
            "disclosure": disclosure.model_copy(update={"sums": "none"}),
            "patients": NOTHING.model_copy(update=patients),
            "images": NOTHING.model_copy(update=images),
        }
    )


def rounded(counts: Counts, part: str) -> Counts:
    return Rounding(SECRET, 10).round_counts(counts, part, "model")


ROUNDED = joined(Disclosure(counts="rounded", metrics="final"))
NOISED = joined(Disclosure(counts="exact", metrics="final", epsilon=1.0))
FINAL = joined(Disclosure(counts="exact", metrics="final"))
SILENT = joined(Disclosure(counts="none", metrics="none"))

Change = Callable[[RecordDict], object]


def sent(record: RecordDict) -> RecordDict:
    """The record after Flower's own trip over the wire."""
    proto = recorddict_to_proto(record)
    return recorddict_from_proto(type(proto).FromString(proto.SerializeToString()))


def same(a: Counts, b: Counts) -> bool:
    pairs = [(a.confusion, b.confusion), (a.positive, b.positive), (a.negative, b.negative)]
    return all(np.array_equal(x, y) for x, y in pairs) and a.loss_sum == b.loss_sum


def join_request() -> RecordDict:
    return JoinRequest(proposal='{"name": "µ"}').record()


def join_reply() -> RecordDict:
    return JOINED.record()


def round_request() -> RecordDict:
    config = make_round_config("0123")
    config["server-round"], config["proximal-mu"] = 3, 0.5  # as Flower's strategies do
    return RecordDict({"arrays": to_arrays(TENSORS), "config": config})


def round_reply(loss: float = 0.5, counts: Counts | None = COUNTS) -> RecordDict:
    figures = Figures(train_loss=loss, counts=counts) if counts else None
    arrays = to_arrays(TENSORS)
    return RoundReply(arrays=arrays, figures=figures, ledger=JOINED.ledger).record()


def final_request() -> RecordDict:
    return FinalRequest(study="0123", arrays=to_arrays(TENSORS)).record()


def final_reply() -> RecordDict:
    return final(COUNTS, COUNTS + COUNTS)


def final(validation: Counts, test: Counts) -> RecordDict:
    return FinalReply(counts=FinalCounts(validation=validation, test=test)).record()


def ledger_request() -> RecordDict:
    return LedgerRequest(7).record()


def ledger_reply() -> RecordDict:
    return LedgerReply("0f" * 32).record()


def read_round_request(record: RecordDict) -> Tensors:
    """As the client reads it, arrays and all."""
    return from_arrays(RoundRequest.read(record).arrays, SHAPES)


def read_round_reply(record: RecordDict) -> RoundReply:
    return RoundReply.read(record, SHAPES, JOINED)


def read_final_request(record: RecordDict) -> Tensors:
    return from_arrays(FinalRequest.read(record).arrays, SHAPES)


def read_final_reply(record: RecordDict) -> FinalReply:
    return FinalReply.read(record, CLASSES, "auroc", JOINED)


# Every message: how a good one is made, and how the other side reads it.
MESSAGES: dict[str, tuple[Callable[[], RecordDict], Callable[[RecordDict], Any]]] = {
    "join request": (join_request, JoinRequest.read),
    "join reply": (join_reply, JoinReply.read),
    "round request": (round_request, read_round_request),
    "round reply": (round_reply, read_round_reply),
    "final request": (final_request, read_final_request),
    "final reply": (final_reply, read_final_reply),
    "ledger request": (ledger_request, LedgerRequest.read),
    "ledger reply": (ledger_reply, LedgerReply.read),
}


# --- what is sent arrives ---


def test_a_join_request_arrives() -> None:
    assert JoinRequest.read(sent(join_request())).proposal == '{"name": "µ"}'
    knows = JoinRequest(proposal="{}", known=LedgerHead(count=3, hash="a" * 64, receipt="b" * 64))
    assert JoinRequest.read(sent(knows.record())) == knows


def test_a_join_reply_arrives() -> None:
    assert JoinReply.read(sent(join_reply())) == JOINED


def equal(a: Tensors, b: Tensors) -> bool:
    return a.keys() == b.keys() and all(
        a[name].dtype == torch.float32
        and a[name].shape == b[name].shape
        and torch.equal(a[name], b[name])
        for name in a
    )


def test_a_round_request_arrives() -> None:
    request = RoundRequest.read(sent(round_request()))
    assert (request.study, request.round, request.proximal_mu) == ("0123", 3, 0.5)
    assert equal(from_arrays(request.arrays, SHAPES), TENSORS)


def test_a_round_request_needs_no_proximal_term() -> None:
    record = round_request()
    del record["config"]["proximal-mu"]
    assert RoundRequest.read(sent(record)).proximal_mu == 0.0


def test_a_round_reply_arrives() -> None:
    reply = read_round_reply(sent(round_reply()))
    assert equal(from_arrays(reply.arrays, SHAPES), TENSORS)
    assert list(reply.arrays) == list(SHAPES)
    assert reply.figures is not None
    assert reply.figures.train_loss == 0.5
    assert reply.ledger == JOINED.ledger
    assert same(reply.figures.counts, COUNTS)


def test_a_final_request_arrives() -> None:
    assert FinalRequest.read(sent(final_request())).study == "0123"
    assert equal(read_final_request(sent(final_request())), TENSORS)


def test_a_final_reply_arrives() -> None:
    counts = read_final_reply(sent(final_reply())).counts
    assert counts is not None
    assert same(counts.validation, COUNTS)
    assert same(counts.test, COUNTS + COUNTS)


def test_a_site_without_validation_images_answers() -> None:
    images = IMAGES.model_copy(update={"validation": (0, 0, 0)})
    nobody = JOINED.model_copy(update={"images": images})
    record = sent(round_reply(counts=Counts.zero(CLASSES)))
    figures = RoundReply.read(record, SHAPES, nobody).figures
    assert figures is not None
    assert same(figures.counts, Counts.zero(CLASSES))


def test_a_question_about_the_ledger_and_its_answers_arrive() -> None:
    assert LedgerRequest.read(sent(ledger_request())).count == 7
    assert LedgerReply.read(sent(ledger_reply())).hash == "0f" * 32
    beyond = LedgerReply(None).record()
    assert LedgerReply.read(sent(beyond)).hash is None


# --- a site tells just as much as it said at join ---


def test_what_is_told_coarsely_arrives() -> None:
    once, twice = rounded(COUNTS, "validation"), rounded(COUNTS + COUNTS, "test")
    counts = FinalReply.read(sent(final(once, twice)), CLASSES, "auroc", ROUNDED).counts
    assert counts is not None
    assert same(counts.validation, once)
    assert same(counts.test, twice)


def test_what_is_told_with_noise_arrives() -> None:
    noisy = COUNTS.coarse(COUNTS.confusion - 3, 2.5)
    counts = FinalReply.read(sent(final(noisy, noisy)), CLASSES, "auroc", NOISED).counts
    assert counts is not None
    assert same(counts.test, noisy)
    assert counts.test.noise == 2.5
    for plain in (COUNTS, COUNTS.coarse(COUNTS.confusion, 0.0)):
        with pytest.raises(ContractError):
            FinalReply.read(sent(final(plain, plain)), CLASSES, "auroc", NOISED)
    with pytest.raises(ContractError):
        FinalReply.read(sent(final(noisy, noisy)), CLASSES, "auroc", FINAL)


def test_who_withholds_figures_still_answers() -> None:
    for told in (FINAL, SILENT):
        reply = RoundReply.read(sent(round_reply(counts=None)), SHAPES, told)
        assert reply.figures is None
        assert equal(from_arrays(reply.arrays, SHAPES), TENSORS)
    assert FinalReply.read(sent(final_reply()), CLASSES, "auroc", FINAL).counts is not None
    nothing = FinalReply(counts=None).record()
    assert FinalReply.read(sent(nothing), CLASSES, "auroc", SILENT).counts is None


@pytest.mark.parametrize("told", [FINAL, SILENT])
def test_a_round_that_tells_more_than_was_said_is_refused(told: JoinReply) -> None:
    for spoil in (lambda r: None, dropping("metrics", "train-loss"), lambda r: r.pop("validation")):
        record = round_reply()
        spoil(record)
        with pytest.raises(ContractError, match="other parts than agreed"):
            RoundReply.read(sent(record), SHAPES, told)


def test_an_end_that_tells_more_than_was_said_is_refused() -> None:
    with pytest.raises(ContractError, match="other parts than agreed"):
        FinalReply.read(sent(final_reply()), CLASSES, "auroc", SILENT)


@pytest.mark.parametrize("told", [JOINED])
def test_who_said_it_tells_and_does_not_is_refused(told: JoinReply) -> None:
    with pytest.raises(ContractError, match="other parts than agreed"):
        RoundReply.read(sent(round_reply(counts=None)), SHAPES, told)
    with pytest.raises(ContractError, match="other parts than agreed"):
        FinalReply.read(sent(FinalReply(counts=None).record()), CLASSES, "auroc", told)


def test_a_loss_said_to_be_told_is_not_left_out() -> None:
    record = round_reply()
    del record["metrics"]
    with pytest.raises(ContractError, match="other parts than agreed"):
        read_round_reply(sent(record))


def test_an_end_that_tells_finer_than_was_said_is_refused() -> None:
    coarse, good = rounded(COUNTS, "validation"), rounded(COUNTS + COUNTS, "test")
    unrounded = coarse.coarse(COUNTS.confusion, coarse.noise)
    scored = Counts(
        coarse.confusion, COUNTS.positive, COUNTS.negative, coarse.loss_sum, COUNTS.right
    )
    with_loss = Counts(coarse.confusion, coarse.positive, coarse.negative, 0.01, coarse.right)
    cells = coarse.confusion.copy()
    cells[coarse.confusion.sum(axis=1).argmax(), 0] += 10
    more = coarse.coarse(cells, coarse.noise)
    cells = coarse.confusion.copy()
    row = cells[cells.sum(axis=1).argmax()]
    row[row.argmax()] -= 1
    row[row.argmin()] += 1  # the row's sum stays
    finer = coarse.coarse(cells, coarse.noise)
    with pytest.raises(ContractError, match="counts finer than it disclosed"):
        FinalReply.read(sent(final(finer, good)), CLASSES, "auroc", ROUNDED)
    for counts in (COUNTS, unrounded, scored, with_loss, more, finer):
        with pytest.raises(ContractError):
            FinalReply.read(sent(final(counts, good)), CLASSES, "auroc", ROUNDED)
    FinalReply.read(sent(final(coarse, good)), CLASSES, "auroc", ROUNDED)
    with pytest.raises(ContractError, match="other parts than agreed"):
        RoundReply.read(sent(round_reply(0.5, coarse)), SHAPES, ROUNDED)


def test_scores_said_to_be_told_are_not_left_out() -> None:
    unscored = COUNTS.coarse(COUNTS.confusion, 0.0)
    with pytest.raises(ContractError):
        read_round_reply(sent(round_reply(0.5, unscored)))


@pytest.mark.parametrize(
    "change",
    [
        {"disclosure": Disclosure(counts="rounded", metrics="final")},
        {"disclosure": Disclosure(counts="rounded"), "patients": TENS, "images": NO_IMAGES},
        {"disclosure": Disclosure(counts="exact", metrics="final", min_cell=7)},
        {"disclosure": Disclosure(counts="exact", metrics="final", epsilon=1.0)},
        {"disclosure": Disclosure(counts="none", metrics="none")},
        {"disclosure": Disclosure(counts="exact"), "patients": NOTHING, "images": NOTHING},
        {"patients": NOTHING},
        {"images": NOTHING},
        {"images": ByPart(train=(30, 10, 0), validation=None, test=(8, 6, 6))},
        {
            "disclosure": Disclosure(counts="none", metrics="every_round"),
            "patients": NOTHING,
            "images": NOTHING,
        },
        {"disclosure": Disclosure()},
    ],
)
def test_a_join_reply_that_contradicts_itself_is_refused(change: dict[str, Any]) -> None:
    with pytest.raises(ContractError):
        JoinReply.read(sent(JOINED.model_copy(update=change).record()))


@pytest.mark.parametrize("told", [JOINED, ROUNDED, NOISED, FINAL, SILENT])
def test_a_join_reply_tells_as_much_as_it_says(told: JoinReply) -> None:
    assert JoinReply.read(sent(told.record())) == told
    # Under privacy it keeps its training patients to itself, whatever else it tells.
    hidden = {
        name: getattr(told, name).model_copy(update={"train": None})
        for name in ("patients", "images")
    }
    assert JoinReply.read(sent(told.model_copy(update=hidden).record())).images.train is None


def test_tensors_that_arrive_are_our_own_to_change() -> None:
    arrays = sent(round_reply())["arrays"]
    from_arrays(arrays, SHAPES)["head.bias"].zero_()
    assert equal(from_arrays(arrays, SHAPES), TENSORS)


def test_a_tensor_in_another_memory_order_arrives() -> None:
    turned = {**TENSORS, "head.weight": torch.randn(4, 3, generator=GENERATOR).T}
    record = RecordDict({"arrays": to_arrays(turned)})
    assert equal(from_arrays(sent(record)["arrays"], SHAPES), turned)


def test_a_round_reply_holds_the_float32_tensors_of_the_suffix_and_no_other_array() -> None:
    record = sent(round_reply())
    arrays = [
        (name, array) for part in record.array_records.values() for name, array in part.items()
    ]
    assert sorted(name for name, _ in arrays) == sorted(SHAPES)
    assert {array.dtype for _, array in arrays} == {"float32"}
    assert all(array.numpy().dtype == np.float32 for _, array in arrays)
    size = sum(4 * tensor.numel() for tensor in TENSORS.values())
    assert size <= count_bytes(record["arrays"]) <= size + 128 * len(SHAPES)
    # Beside the tensors: how far the ledger goes, the training loss, and counts of images without
    # an image's own scores.
    assert {part: set(config) for part, config in record.config_records.items()} == {
        "ledger": {"count", "hash", "receipt"}
    }
    assert {part: set(metrics) for part, metrics in record.metric_records.items()} == {
        "metrics": {"train-loss"},
        "validation": {"confusion", "positive", "negative", "loss_sum", "right", "noise"},
    }


def test_what_strategies_get_is_one_weight_and_the_tensors() -> None:
    record = make_strategy_record(to_arrays(TENSORS), WEIGHT)
    assert equal(from_arrays(record["arrays"], SHAPES), TENSORS)
    assert dict(record["metrics"]) == {"weight": float(WEIGHT)}
    assert set(record) == {"arrays", "metrics"}


# --- what else arrives is refused ---


def raw(data: bytes, stype: str = "numpy.ndarray") -> Array:
    return Array(dtype="float32", shape=(3, 4), stype=stype, data=data)


def npy(values: NDArray[Any]) -> bytes:
    file = io.BytesIO()
    np.save(file, values, allow_pickle=True)
    return file.getvalue()


def npz(values: NDArray[Any]) -> bytes:
    file = io.BytesIO()
    np.savez(file, values)
    return file.getvalue()


def lying(shape: tuple[int, ...]) -> bytes:
    """An npy file whose header promises more than it holds."""
    file = io.BytesIO()
    header = {"descr": "<f4", "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(file, header)
    return file.getvalue() + bytes(48)


def with_value(value: float) -> Array:
    values = np.zeros((3, 4), np.float32)
    values[1, 2] = value
    return Array(values)


class Bomb:
    def __reduce__(self) -> tuple[Any, ...]:
        return pytest.fail, ("a message ran code",)


GOOD = np.zeros((3, 4), np.float32)
# What may be sent in place of the float32 [3, 4] tensor `head.weight`.
BAD_ARRAYS: dict[str, Array] = {
    "another shape": Array(np.zeros((4, 3), np.float32)),
    "one more axis": Array(np.zeros((1, 3, 4), np.float32)),
    "flat": Array(np.zeros(12, np.float32)),
    "empty": Array(np.zeros((0, 4), np.float32)),
    "broadcastable": Array(np.zeros((1, 4), np.float32)),
    "float64": Array(GOOD.astype(np.float64)),
    "float16": Array(GOOD.astype(np.float16)),
    "int32": Array(GOOD.astype(np.int32)),
    "bool": Array(GOOD.astype(bool)),
    "complex": Array(GOOD.astype(np.complex64)),
    "two raw bytes each, as bfloat16": Array(np.zeros((3, 4), "V2")),
    "the other byte order": Array(GOOD.astype(">f4")),
    "records": Array(np.zeros((3, 4), [("x", "<f4")])),
    "text": Array(np.full((3, 4), "x")),
    "NaN": with_value(np.nan),
    "inf": with_value(np.inf),
    "-inf": with_value(-np.inf),
    "a value no network has": with_value(3e38),
    "as large and negative": with_value(-3e38),
    "huge": Array(np.zeros((1000, 1000), np.float32)),
    "huge tail": raw(npy(GOOD) + bytes(10_000_000)),
    "garbage": raw(bytes(range(256))),
    "nothing": raw(b""),
    "a cut file": raw(npy(GOOD)[:-4]),
    "only the magic": raw(b"\x93NUMPY"),
    "a header of nonsense": raw(b"\x93NUMPY\x01\x00\x10\x00" + b"((((((((((((((((" + bytes(48)),
    "a header that promises a terabyte": raw(lying((2**19, 2**19))),
    "a header that promises more than there is": raw(lying((2**62, 2**62))),
    "a negative shape": raw(lying((-3, 4))),
    "pickled npy": raw(npy(np.array([[Bomb()] * 4] * 3, dtype=object))),
    "pickle": raw(pickle.dumps(Bomb())),
    "an archive": raw(npz(GOOD)),
    "the start of an archive": raw(b"PK\x03\x04" + bytes(100)),
    "torch's own form": raw(npy(GOOD), stype="torch"),
}


def setting(part: str, key: str, value: Any) -> Change:
    return lambda record: record[part].__setitem__(key, value)


def dropping(part: str, key: str) -> Change:
    return lambda record: record[part].pop(key)


def adding(part: str, value: Any) -> Change:
    return lambda record: record.__setitem__(part, value)


def bad_tensors(part: str) -> dict[str, Change]:
    """Ways to spoil the tensors in one part of a message."""
    one = "head.weight"
    swaps = {f"{part}: {how}": setting(part, one, array) for how, array in BAD_ARRAYS.items()}
    return swaps | {
        f"{part}: one missing": dropping(part, one),
        f"{part}: one more": setting(part, "extra", Array(GOOD)),
        f"{part}: one of another name": lambda r: r[part].update(x=r[part].pop(one)),
        f"{part}: empty": adding(part, ArrayRecord()),
        f"{part}: not tensors": adding(part, ConfigRecord({one: 1.0})),
    }


def bad_counts(part: str) -> dict[str, Change]:
    """Ways to spoil the counts in one part of a message."""
    return {
        f"{part}: one missing": dropping(part, "positive"),
        f"{part}: one more": setting(part, "patient", [1, 2]),
        f"{part}: negative": setting(part, "confusion", [0, -1]),
        f"{part}: beyond the classes": setting(part, "confusion", [9, 1]),
        f"{part}: fractions": setting(part, "confusion", [0.0, 1.0]),
        f"{part}: an odd list": setting(part, "confusion", [0, 1, 2]),
        f"{part}: a number": setting(part, "confusion", 5),
        f"{part}: more than anyone has": setting(part, "confusion", [0, 2**62]),
        f"{part}: sums that differ": setting(part, "positive", [0, 1]),
        f"{part}: NaN loss": setting(part, "loss_sum", float("nan")),
        f"{part}: infinite loss": setting(part, "loss_sum", float("inf")),
        f"{part}: negative loss": setting(part, "loss_sum", -1.0),
        f"{part}: a whole number as loss": setting(part, "loss_sum", 1),
        f"{part}: megabytes": setting(part, "positive", [0, 1] * 500_000),
        f"{part}: of other classes": adding(part, MetricRecord(Counts.zero(9).sparse() | {"x": 1})),
        f"{part}: of more images than told": adding(
            part, MetricRecord((COUNTS + COUNTS + COUNTS).sparse())
        ),
        f"{part}: of no images": adding(part, MetricRecord(Counts.zero(CLASSES).sparse())),
        f"{part}: not counts": adding(part, ConfigRecord({"confusion": [0]})),
    }


def bad_text(key: str, part: str = "config") -> dict[str, Change]:
    """Ways to spoil a text."""
    values = {"missing": None, "number": 5, "bytes": b"x", "list": ["x"], "long": "x" * 1_000_001}
    return {
        f"{key}: {how}": dropping(part, key) if value is None else setting(part, key, value)
        for how, value in values.items()
    }


def bad_join_replies() -> dict[str, Change]:
    """Ways to spoil the JSON of a join reply."""
    good = json.loads(JOINED.model_dump_json())
    texts = {
        "not JSON": "{",
        "a list": "[]",
        "nothing": "",
        "null": "null",
        "deep": "[" * 100_000,
        "lone surrogate": '{"name": "\\ud800"}',
        "megabytes of JSON": json.dumps({**good, "versions": {"x": "y" * 1_000_000}}),
    }
    changes: dict[str, dict[str, Any]] = {
        "an unknown key": {"patient": "p1"},
        "a weight of its own": {"weight": 10**9},
        "fractional counts": {"patients": {**good["patients"], "train": 1.5}},
        "endless counts": {"images": {**good["images"], "train": [10**400]}},
        "negative counts": {"patients": {**good["patients"], "train": -1}},
        "counts of another part": {"images": {**good["images"], "secret": [1, 2, 3]}},
        "markup for a version": {"versions": {**good["versions"], "torch": "[/x]"}},
        "an escape for a version": {"versions": {**good["versions"], "torch": "\x1b[31m"}},
        "an endless version": {"versions": {**good["versions"], "torch": "2" * 41}},
        "one more version": {"versions": {**good["versions"], "os": "1"}},
        "one more contract part": {"contract": {**good["contract"], "[/x]": "ab"}},
        "a contract that is no hash": {"contract": {**good["contract"], "study": "[/x]"}},
        "a path as name": {"name": "../east"},
        "a line end in the name": {"name": "east\n"},
        "an endless name": {"name": "e" * 65},
        "another role": {"role": "server"},
        "a contract of numbers": {"contract": {"protocol": 1}},
        "no contract": {"contract": None},
        "another disclosure": {"disclosure": {"counts": "all"}},
        "a disclosure with more to it": {"disclosure": {**good["disclosure"], "patient": "p1"}},
        "a ledger of no lines": {"ledger": {**good["ledger"], "count": 0}},
        "a ledger of less": {"ledger": {**good["ledger"], "count": -1}},
        "a ledger without a hash": {"ledger": {"count": 3}},
        "markup for a hash": {"ledger": {"count": 3, "hash": "[/x]"}},
        "one more line of the ledger": {"ledger": {**good["ledger"], "line": "x"}},
    }
    texts |= {how: json.dumps({**good, **change}) for how, change in changes.items()}
    texts |= {f"no {key}": json.dumps({k: good[k] for k in good if k != key}) for key in good}
    return {how: setting("config", "json", text) for how, text in texts.items()}


HOSTILE: dict[str, dict[str, Change]] = {
    "join request": bad_text("json"),
    "join reply": bad_text("json") | bad_join_replies(),
    "round request": bad_tensors("arrays")
    | bad_text("study")
    | {f"mu {mu!r}": setting("config", "proximal-mu", mu) for mu in (-0.1, -1, "1", [0.1], True)}
    | {f"mu {mu!r}": setting("config", "proximal-mu", float(mu)) for mu in ("nan", "inf", "-inf")}
    | {f"round {n!r}": setting("config", "server-round", n) for n in (1.0, "1", [1], True, 0, -1)}
    | {"no round": dropping("config", "server-round")},
    "round reply": bad_tensors("arrays")
    | bad_counts("validation")
    | {f"weight {w!r}": setting("metrics", "weight", w) for w in (WEIGHT, 10**9, -40, [40])}
    | {f"loss {x!r}": setting("metrics", "train-loss", x) for x in (1, [0.5], [], -0.5, 1.7e308)}
    | {f"loss {x!r}": setting("metrics", "train-loss", float(x)) for x in ("nan", "inf", "-inf")}
    | {"no loss": dropping("metrics", "train-loss")}
    | {"one more metric": setting("metrics", "patients", 3)}
    | {f"line {n!r}": setting("ledger", "count", n) for n in (0, -1, 1.0, "1", [1], True)}
    | {f"hash {h!r}": setting("ledger", "hash", h) for h in ("", "[/x]", "0f" * 33, 5, b"0f")}
    | {"one more key of the ledger": setting("ledger", "line", "p1")}
    | {"no hash": dropping("ledger", "hash")},
    "final request": bad_tensors("arrays") | bad_text("study"),
    "final reply": bad_counts("validation") | bad_counts("test"),
    "ledger request": {
        f"line {n!r}": setting("config", "count", n) for n in (0, -1, 1.0, "1", [1], True)
    }
    | {"one more key": setting("config", "path", "ledger.jsonl")}
    | {"no line": dropping("config", "count")},
    "ledger reply": bad_text("hash")
    | {f"hash {h!r}": setting("config", "hash", h) for h in ("[/x]", "0f" * 33, "0F" * 32, "0\n")}
    | {"one more key": setting("config", "line", "p1")},
}
for message, (make, _) in MESSAGES.items():
    for part in make():
        HOSTILE[message][f"no {part}"] = lambda record, part=part: record.pop(part)  # type: ignore[misc]
    for kind, more in (
        ("arrays", ArrayRecord({"x": Array(GOOD)})),
        ("metrics", MetricRecord({"x": 1})),
        ("config", ConfigRecord({"x": "p1"})),
    ):
        HOSTILE[message][f"other {kind} beside"] = adding("more", more)
    HOSTILE[message]["nothing at all"] = RecordDict.clear


@pytest.mark.parametrize(
    ("message", "how"), [(message, how) for message in HOSTILE for how in HOSTILE[message]]
)
@pytest.mark.filterwarnings("error")
def test_what_is_not_agreed_is_a_contract_error(message: str, how: str) -> None:
    make, read = MESSAGES[message]
    record = make()
    HOSTILE[message][how](record)
    with pytest.raises(ContractError) as caught:
        read(sent(record))
    assert len(str(caught.value)) < 300  # the server repeats it; no message fills its log


@pytest.mark.parametrize("message", MESSAGES)
def test_the_unspoilt_messages_are_read(message: str) -> None:
    make, read = MESSAGES[message]
    read(sent(make()))
