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

from common import wire
from common.contract import Contract, Versions
from common.errors import ContractError
from common.flower import recorddict_from_proto, recorddict_to_proto
from common.metrics import Counts

SHAPES = {"head.weight": (3, 4), "head.bias": (3,), "scale": ()}
WEIGHT, CLASSES = 40, 3
IMAGES = wire.Parts(train=(30, 10, 0), validation=(4, 3, 3), test=(8, 6, 6))
GENERATOR = torch.Generator().manual_seed(0)
TENSORS = {name: torch.randn(shape, generator=GENERATOR) for name, shape in SHAPES.items()}
LOGITS = torch.randn(10, CLASSES, generator=GENERATOR)
COUNTS = Counts.of(LOGITS, torch.arange(10) % CLASSES)
JOINED = wire.JoinReply(
    name="east",
    role="train",
    contract=Contract(study="01", backbone="ab", suffix="cd", preprocessing="ef", protocol="1"),
    patients=wire.Parts(train=20, validation=3, test=5),
    images=IMAGES,
    prefix_dtype="float32",
    suffix_dtype="float32",
    versions=Versions.here(),
)

Change = Callable[[RecordDict], object]


def sent(record: RecordDict) -> RecordDict:
    """The record after Flower's own trip over the wire."""
    proto = recorddict_to_proto(record)
    return recorddict_from_proto(type(proto).FromString(proto.SerializeToString()))


def same(a: Counts, b: Counts) -> bool:
    pairs = [(a.confusion, b.confusion), (a.positive, b.positive), (a.negative, b.negative)]
    return all(np.array_equal(x, y) for x, y in pairs) and a.loss_sum == b.loss_sum


def join_request() -> RecordDict:
    return wire.JoinRequest(proposal='{"name": "µ"}').record()


def join_reply() -> RecordDict:
    return JOINED.record()


def round_request() -> RecordDict:
    config = wire.round_config("0123")
    config["server-round"], config["proximal-mu"] = 3, 0.5  # as Flower's strategies do
    return RecordDict({"arrays": wire.to_arrays(TENSORS), "config": config})


def round_reply() -> RecordDict:
    reply = wire.RoundReply(arrays=wire.to_arrays(TENSORS), train_loss=0.5, counts=COUNTS)
    return reply.record()


def final_request() -> RecordDict:
    last, best = wire.to_arrays(TENSORS), wire.to_arrays({n: -t for n, t in TENSORS.items()})
    return wire.FinalRequest(study="0123", last=last, best=best).record()


def final_reply() -> RecordDict:
    twice = COUNTS + COUNTS
    reply = wire.FinalReply(validation_last=COUNTS, test_last=twice, test_best=twice)
    return reply.record()


def read_round_request(record: RecordDict) -> wire.Tensors:
    """As the client reads it, arrays and all."""
    return wire.from_arrays(wire.RoundRequest.read(record).arrays, SHAPES)


def read_round_reply(record: RecordDict) -> wire.RoundReply:
    return wire.RoundReply.read(record, SHAPES, IMAGES.validation)


def read_final_request(record: RecordDict) -> tuple[wire.Tensors, wire.Tensors]:
    request = wire.FinalRequest.read(record)
    return wire.from_arrays(request.last, SHAPES), wire.from_arrays(request.best, SHAPES)


def read_final_reply(record: RecordDict) -> wire.FinalReply:
    return wire.FinalReply.read(record, IMAGES)


# Every message: how a good one is made, and how the other side reads it.
MESSAGES: dict[str, tuple[Callable[[], RecordDict], Callable[[RecordDict], Any]]] = {
    "join request": (join_request, wire.JoinRequest.read),
    "join reply": (join_reply, wire.JoinReply.read),
    "round request": (round_request, read_round_request),
    "round reply": (round_reply, read_round_reply),
    "final request": (final_request, read_final_request),
    "final reply": (final_reply, read_final_reply),
}


# --- what is sent arrives ---


def test_a_join_request_arrives() -> None:
    assert wire.JoinRequest.read(sent(join_request())).proposal == '{"name": "µ"}'


def test_a_join_reply_arrives() -> None:
    assert wire.JoinReply.read(sent(join_reply())) == JOINED


def equal(a: wire.Tensors, b: wire.Tensors) -> bool:
    return a.keys() == b.keys() and all(
        a[name].dtype == torch.float32
        and a[name].shape == b[name].shape
        and torch.equal(a[name], b[name])
        for name in a
    )


def test_a_round_request_arrives() -> None:
    request = wire.RoundRequest.read(sent(round_request()))
    assert (request.study, request.round, request.proximal_mu) == ("0123", 3, 0.5)
    assert equal(wire.from_arrays(request.arrays, SHAPES), TENSORS)


def test_a_round_request_needs_no_proximal_term() -> None:
    record = round_request()
    del record["config"]["proximal-mu"]
    assert wire.RoundRequest.read(sent(record)).proximal_mu == 0.0


def test_a_round_reply_arrives() -> None:
    reply = read_round_reply(sent(round_reply()))
    assert equal(wire.from_arrays(reply.arrays, SHAPES), TENSORS)
    assert list(reply.arrays) == list(SHAPES)
    assert reply.train_loss == 0.5
    assert same(reply.counts, COUNTS)


def test_a_final_request_arrives() -> None:
    assert wire.FinalRequest.read(sent(final_request())).study == "0123"
    last, best = read_final_request(sent(final_request()))
    assert equal(last, TENSORS)
    assert equal(best, {name: -tensor for name, tensor in TENSORS.items()})


def test_a_final_reply_arrives() -> None:
    reply = read_final_reply(sent(final_reply()))
    assert same(reply.validation_last, COUNTS)
    assert same(reply.test_last, COUNTS + COUNTS)
    assert same(reply.test_best, COUNTS + COUNTS)


def test_a_site_without_validation_images_answers() -> None:
    empty = Counts.zero(CLASSES)
    record = wire.RoundReply(arrays=wire.to_arrays(TENSORS), train_loss=0.5, counts=empty).record()
    assert same(wire.RoundReply.read(sent(record), SHAPES, (0, 0, 0)).counts, empty)


def test_the_weight_is_the_training_images_told_at_join() -> None:
    assert JOINED.weight == WEIGHT


def test_tensors_that_arrive_are_our_own_to_change() -> None:
    arrays = sent(round_reply())["arrays"]
    wire.from_arrays(arrays, SHAPES)["head.bias"].zero_()
    assert equal(wire.from_arrays(arrays, SHAPES), TENSORS)


def test_a_tensor_in_another_memory_order_arrives() -> None:
    turned = {**TENSORS, "head.weight": torch.randn(4, 3, generator=GENERATOR).T}
    record = RecordDict({"arrays": wire.to_arrays(turned)})
    assert equal(wire.from_arrays(sent(record)["arrays"], SHAPES), turned)


def test_a_round_reply_holds_the_float32_tensors_of_the_suffix_and_no_other_array() -> None:
    record = sent(round_reply())
    arrays = [
        (name, array) for part in record.array_records.values() for name, array in part.items()
    ]
    assert sorted(name for name, _ in arrays) == sorted(SHAPES)
    assert {array.dtype for _, array in arrays} == {"float32"}
    assert all(array.numpy().dtype == np.float32 for _, array in arrays)
    size = sum(4 * tensor.numel() for tensor in TENSORS.values())
    assert size <= wire.payload(record["arrays"]) <= size + 128 * len(SHAPES)
    # Beside the tensors: two numbers, and counts of images without an image's own scores.
    assert list(record.config_records) == []
    assert {part: set(metrics) for part, metrics in record.metric_records.items()} == {
        "metrics": {"train-loss"},
        "last": {"confusion", "positive", "negative", "loss_sum"},
    }


def test_what_strategies_get_is_one_weight_and_the_tensors() -> None:
    record = wire.strategy_record(wire.to_arrays(TENSORS), WEIGHT)
    assert equal(wire.from_arrays(record["arrays"], SHAPES), TENSORS)
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
    | bad_counts("last")
    | {f"weight {w!r}": setting("metrics", "weight", w) for w in (WEIGHT, 10**9, -40, [40])}
    | {f"loss {x!r}": setting("metrics", "train-loss", x) for x in (1, [0.5], [], -0.5, 1.7e308)}
    | {f"loss {x!r}": setting("metrics", "train-loss", float(x)) for x in ("nan", "inf", "-inf")}
    | {"no loss": dropping("metrics", "train-loss")}
    | {"one more metric": setting("metrics", "patients", 3)},
    "final request": bad_tensors("last") | bad_tensors("best") | bad_text("study"),
    "final reply": bad_counts("validation-last")
    | bad_counts("test-last")
    | bad_counts("test-best"),
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
