"""A model to validate arrives with its read-outs; anything odd is refused."""

import pytest
import torch
from flwr.app import MetricRecord, RecordDict

from common.errors import ContractError
from common.heads.read_out import AS_IT_IS, ReadOut
from common.protocol.final import FinalRequest
from common.protocol.tensors import to_arrays
from common.protocol.validate import ValidateReply, ValidateRequest, check_read_outs
from tests.common.protocol.test_messages import COUNTS, JOINED, ROUNDED
from tests.common.protocol.test_sums import sent

pytestmark = pytest.mark.numbers

ARRAYS = to_arrays({"w": torch.ones(2)})
READ_OUTS = [ReadOut(2.0, (0.0, 0.0)), ReadOut(0.5, (-1.0, -2.0))]


def ask(*read_outs: ReadOut) -> RecordDict:
    return ValidateRequest(study="01", arrays=ARRAYS, read_outs=read_outs).record()


def test_a_question_arrives() -> None:
    again = ValidateRequest.read(sent(ask(*READ_OUTS)))
    logits = torch.randn(5, 2)
    for got, asked in zip(again.read_outs, READ_OUTS, strict=True):
        assert torch.equal(got.scores(logits), asked.scores(logits))


@pytest.mark.parametrize(
    "read_out",
    [
        ReadOut(0.0),
        ReadOut(-1.0),
        ReadOut(1e9),
        ReadOut(float("nan")),
        ReadOut(1.0, (0.0, float("inf"))),
        ReadOut(1.0, (0.0, 1e9)),
        ReadOut(1.0, (0.0, 0.0, 0.0)),
        ReadOut(1.0, (0.0,)),
    ],
)
def test_read_outs_out_of_range_are_refused(read_out: ReadOut) -> None:
    request = ValidateRequest.read(sent(ask(read_out)))
    with pytest.raises(ContractError, match="out of range"):
        check_read_outs(request.read_outs, 2)
    final = FinalRequest(study="01", arrays=ARRAYS, read_out=read_out)
    with pytest.raises(ContractError, match="out of range"):
        check_read_outs([FinalRequest.read(sent(final.record())).read_out], 2)


def test_none_or_too_many_are_refused() -> None:
    for read_outs in ([], [AS_IT_IS] * 65):
        with pytest.raises(ContractError, match="expected 1 to 64"):
            ValidateRequest.read(sent(ask(*read_outs)))
    with pytest.raises(ContractError, match="expected 1 to 1 read-outs"):
        FinalRequest.read(sent(ask(*READ_OUTS)))
    with pytest.raises(ContractError, match="expected 1 to 64"):
        ValidateRequest.read(sent(ask(ReadOut(1.0, (0.0, 0.0)), ReadOut(1.0, (0.0,)))))


def reply(losses: list[float]) -> RecordDict:
    return ValidateReply(counts=COUNTS, losses=losses).record()


def test_what_is_told_arrives() -> None:
    again = ValidateReply.read(sent(reply([1.5, 0.25])), 2, JOINED)
    assert again.losses == [1.5, 0.25]


@pytest.mark.parametrize("losses", [[1.0], [1.0, -1.0], [1.0, float("nan")], [1, 2]])
def test_losses_of_others_or_out_of_range_are_refused(losses: list[float]) -> None:
    with pytest.raises(ContractError):
        ValidateReply.read(sent(reply(losses)), 2, JOINED)


def test_who_tells_no_rounds_tells_none_of_it() -> None:
    with pytest.raises(ContractError):
        ValidateReply.read(sent(reply([1.0, 2.0])), 2, ROUNDED)


def test_more_than_was_asked_is_refused() -> None:
    record = reply([1.0, 2.0])
    record["more"] = MetricRecord({"x": 1})
    with pytest.raises(ContractError):
        ValidateReply.read(sent(record), 2, JOINED)
