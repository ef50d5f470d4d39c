"""How a site's models compare on its test patients, as it travels beside their counts.

Values follow from the counts. What travels of an interval are its ends, cut to three decimals
outwards; and for each pair of ways, on how many images both were right, one of them, or neither.
"""

import math
from collections.abc import Mapping

from flwr.app import MetricRecord, RecordDict

from common.errors import ContractError
from common.metrics.by_patient import Evidence, Joint, Pair
from common.metrics.counts import Counts
from common.metrics.metrics import METRICS, value
from common.metrics.statistics import Estimate
from common.protocol.disclosure import Disclosure
from common.protocol.fields import get_part

ADAPTED, LOCAL = OWN = ("adapted", "local")
"""A site's own models: the released one fitted to it, and one of its patients alone."""
FEDERATED = "federated"
"""The released model."""
PAIRS = ((ADAPTED, LOCAL), (FEDERATED, LOCAL), (ADAPTED, FEDERATED))
"""The ways of training that a site compares: the first less the second."""

EVIDENCE = "evidence"
_FEWEST = 3
"""Test patients without whom nothing is told: an interval over two tells each of them."""
_JOINT = "joint"
_DECIMALS = 1000
_ROUNDING = 1e-9
"""How far two machines may differ in a value from the same counts."""


def tells_evidence(disclosure: Disclosure, patients: int | None) -> bool:
    """Whether a site whose models are compared tells how they compare.

    Args:
      disclosure: As agreed.
      patients: Its test patients.
    """
    return disclosure.tells_scores and patients is not None and patients >= _FEWEST


def list_metrics(select: str) -> tuple[str, ...]:
    """The metrics by which ways are compared: the study's own, and AUROC."""
    return tuple(dict.fromkeys((select, "auroc")))


def write_evidence(evidence: Evidence, counts: Mapping[str, Counts]) -> MetricRecord:
    """As it travels beside the counts of each way."""
    told: dict[str, int | float | list[int] | list[float]] = {}
    for way, figures in evidence.figures.items():
        for metric, found in figures.items():
            told[f"{way} {metric}"] = _write_ends(found, value(counts[way], metric))
    for pair in evidence.pairs:
        told[_name(pair.first, pair.second, _JOINT)] = list(pair.joint)
        for metric, found in pair.differences.items():
            gain = _subtract(counts[pair.first], counts[pair.second], metric)
            told[_name(pair.first, pair.second, metric)] = _write_ends(found, gain)
    return MetricRecord(told)


def _write_ends(found: Estimate | None, told: float | None) -> list[float]:
    """The ends of an interval around a value that the counts tell; none without one."""
    if found is None or told is None:
        return []
    low, high = min(found.low, told), max(found.high, told)
    return [math.floor(low * _DECIMALS) / _DECIMALS, math.ceil(high * _DECIMALS) / _DECIMALS]


def read_evidence(
    record: RecordDict, counts: Mapping[str, Counts], select: str, patients: int
) -> Evidence:
    """Back from Flower.

    Args:
      record: The whole message.
      counts: Of each way, on the same test images, checked.
      select: The study's metric.
      patients: Test patients, as told at join.

    Raises:
      ContractError: it is not of these images, or is nothing that such counts allow.
    """
    told, metrics = get_part(record.metric_records, EVIDENCE), list_metrics(select)
    names = {f"{way} {metric}" for way in counts for metric in metrics}
    names |= {_name(*pair, what) for pair in PAIRS for what in (_JOINT, *metrics)}
    if set(told) != names:
        raise ContractError("evidence with other fields than agreed")
    ways = {
        way: {m: _read_ends(told[f"{way} {m}"], value(found, m), METRICS[m].range) for m in metrics}
        for way, found in counts.items()
    }
    pairs = tuple(_read_pair(told, first, second, counts, metrics) for first, second in PAIRS)
    return Evidence(counts[FEDERATED].n, patients, ways, pairs)


def _name(first: str, second: str, what: str) -> str:
    return f"{first}-{second} {what}"


def _read_pair(
    told: Mapping[str, object],
    first: str,
    second: str,
    counts: Mapping[str, Counts],
    metrics: tuple[str, ...],
) -> Pair:
    def read(metric: str) -> Estimate | None:
        low, high = METRICS[metric].range
        gain = _subtract(counts[first], counts[second], metric)
        return _read_ends(told[_name(first, second, metric)], gain, (low - high, high - low))

    joint = _read_joint(told[_name(first, second, _JOINT)], counts[first], counts[second])
    return Pair(first, second, {metric: read(metric) for metric in metrics}, joint)


def _read_joint(told: object, first: Counts, second: Counts) -> Joint:
    if not isinstance(told, list) or len(told) != 4 or any(type(n) is not int for n in told):
        raise ContractError("evidence: expected four numbers of images")
    both, one, two, neither = told
    right = [int(counts.confusion.trace()) for counts in (first, second)]
    if min(told) < 0 or [both + one, both + two] != right or sum(told) != first.n:
        raise ContractError("evidence of other images than the counts beside it")
    return Joint(both, one, two, neither)


def _read_ends(told: object, found: float | None, within: tuple[float, float]) -> Estimate | None:
    """The interval around a value that the counts tell; None where none was told."""
    if told == []:
        return None
    if not isinstance(told, list) or len(told) != 2 or any(type(x) is not float for x in told):
        raise ContractError("evidence: expected the two ends of an interval")
    low, high = told
    if found is None or not all(map(math.isfinite, told)) or low < within[0] or high > within[1]:
        raise ContractError("evidence: an interval where there can be none")
    if not low - _ROUNDING <= found <= high + _ROUNDING:
        raise ContractError("evidence: an interval that is not around the value of the counts")
    return Estimate(found, low, high)


def _subtract(first: Counts, second: Counts, metric: str) -> float | None:
    a, b = value(first, metric), value(second, metric)
    return None if a is None or b is None else a - b
