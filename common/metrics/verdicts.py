"""What an interval says in words: whether one way of training is better than another, or not sure.

Nothing else here; how sure a difference is, is told by whoever computed it.
"""

from typing import Literal

from common.metrics.by_patient import Evidence, Pair
from common.metrics.metrics import METRICS
from common.metrics.statistics import Estimate

Verdict = Literal["better", "worse", "unsure"]

_WORDS: dict[Verdict, str] = {
    "better": "the {} model is better than one of the site's patients alone",
    "worse": "the {} model is worse than one of the site's patients alone",
    "unsure": "the {} model cannot be told from one of the site's patients alone",
}


def judge_difference(found: Estimate, metric: str) -> Verdict:
    """Whether an interval lies beyond 0, on the side where the metric is better, or worse."""
    low, high = (found.low, found.high) if METRICS[metric].higher else (-found.high, -found.low)
    return "better" if low > 0 else "worse" if high < 0 else "unsure"


def find_pair(evidence: Evidence, first: str, second: str) -> Pair | None:
    """Two ways that were compared, in this order; None if they were not."""
    found = [pair for pair in evidence.pairs if (pair.first, pair.second) == (first, second)]
    return found[0] if found else None


def judge_own(evidence: Evidence, select: str) -> tuple[Verdict, str] | None:
    """Say whether a site's adapted model, or else the federated one, beats its own alone.

    Args:
      evidence: Of the site.
      select: The metric of the study.

    Returns:
      The verdict and a sentence about it; None where the two were not compared.
    """
    pairs = ((way, find_pair(evidence, way, "local")) for way in ("adapted", "federated"))
    for way, pair in pairs:
        if pair and (found := pair.differences[select]):
            verdict = judge_difference(found, select)
            gain = f"{found.value:+.3f} ({found.low:+.3f} to {found.high:+.3f})"
            of = f"{evidence.images} test images of {evidence.patients} patients"
            told = f"{_WORDS[verdict].format(way)}: {METRICS[select].label} {gain}, on {of}."
            return verdict, told
    return None
