"""A round: the tensors to train, and the trained ones with what a site tells."""

from dataclasses import dataclass

from flwr.app import ArrayRecord, ConfigRecord, MetricRecord, RecordDict

from common.errors import ContractError
from common.metrics.counts import Counts
from common.protocol.counts import read_counts
from common.protocol.fields import (
    ARRAYS,
    CONFIG,
    LEDGER_HEAD,
    LOSS,
    METRICS,
    PROXIMAL,
    ROUND,
    STUDY,
    VALIDATION,
    check_parts,
    get_part,
    get_value,
)
from common.protocol.join import JoinReply
from common.protocol.ledger import LedgerHead, read_ledger_head
from common.protocol.tensors import Shapes, from_arrays

WEIGHT = "weight"

_WORST_LOSS = 1e12
_MOST_PROXIMAL = 1e6


@dataclass(frozen=True, kw_only=True)
class RoundRequest:
    """Evaluate these tensors on your validation patients, then train them and send them back.

    The server's half is made by the Flower strategy from `make_round_config`.
    """

    study: str
    round: int
    proximal_mu: float
    arrays: ArrayRecord

    @classmethod
    def read(cls, record: RecordDict) -> "RoundRequest":
        """From Flower; the arrays are still unchecked. Raises `ContractError`."""
        check_parts(record, ARRAYS, CONFIG)
        config = get_part(record.config_records, CONFIG)
        mu = config.get(PROXIMAL, 0.0)
        if type(mu) not in (float, int) or not 0 <= mu <= _MOST_PROXIMAL:
            raise ContractError(f"a proximal term that is not in [0, {_MOST_PROXIMAL:g}]")
        number = get_value(record, CONFIG, ROUND, int)
        if number < 1:
            raise ContractError("a round before the first")
        study = get_value(record, CONFIG, STUDY, str)
        arrays = get_part(record.array_records, ARRAYS)
        return cls(study=study, round=number, proximal_mu=float(mu), arrays=arrays)


def make_round_config(study: str) -> ConfigRecord:
    """The part of a round's request that Flower's strategies do not write themselves."""
    return ConfigRecord({STUDY: study})


@dataclass(frozen=True, kw_only=True)
class Figures:
    """What a site tells about a round beside its tensors."""

    train_loss: float
    """Mean over the images seen."""
    counts: Counts
    """Of the tensors received, on the site's validation patients."""


@dataclass(frozen=True, kw_only=True)
class RoundReply:
    """What a site sends after a round."""

    arrays: ArrayRecord
    """The trained tensors; as read, checked and in the order agreed."""
    figures: Figures | None
    """If the site tells them every round."""
    ledger: LedgerHead
    """How far the site's ledger went before this left."""

    def record(self) -> RecordDict:
        """As Flower sends it."""
        record = RecordDict({ARRAYS: self.arrays, LEDGER_HEAD: self.ledger.record()})
        if self.figures:
            record[METRICS] = MetricRecord({LOSS: self.figures.train_loss})
            record[VALIDATION] = MetricRecord(self.figures.counts.sparse())
        return record

    @classmethod
    def read(cls, record: RecordDict, shapes: Shapes, joined: JoinReply) -> "RoundReply":
        """Back from Flower; raises `ContractError` unless it is exactly as agreed.

        Args:
          record: What the site sent.
          shapes: Of the tensors that travel.
          joined: What the site told at join.
        """
        tells = joined.disclosure.metrics == "every_round"
        check_parts(record, ARRAYS, LEDGER_HEAD, *((METRICS, VALIDATION) if tells else ()))
        arrays = get_part(record.array_records, ARRAYS)
        from_arrays(arrays, shapes)
        ordered = ArrayRecord({name: arrays[name] for name in shapes})
        figures = _figures(record, joined) if tells else None
        return cls(arrays=ordered, figures=figures, ledger=read_ledger_head(record))


def _figures(record: RecordDict, joined: JoinReply) -> Figures:
    images = joined.images.validation
    counts = read_counts(record, VALIDATION, images, len(images or ()), joined.disclosure)
    metrics = get_part(record.metric_records, METRICS)
    if set(metrics) != {LOSS}:
        raise ContractError("metrics other than the agreed ones")
    loss = metrics[LOSS]
    if not isinstance(loss, float) or not 0 <= loss <= _WORST_LOSS:
        raise ContractError("a loss that is no loss")
    return Figures(train_loss=loss, counts=counts)


def make_strategy_record(arrays: ArrayRecord, weight: float) -> RecordDict:
    """A checked reply in the one form that every Flower strategy accepts."""
    return RecordDict({ARRAYS: arrays, METRICS: MetricRecord({WEIGHT: float(weight)})})
