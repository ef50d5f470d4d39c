"""Words follow the interval, whichever way a metric is better, and the model that a site keeps."""

import pytest

from common.metrics.by_patient import Evidence, Joint, Pair
from common.metrics.statistics import Estimate
from common.metrics.verdicts import judge_difference, judge_own


@pytest.mark.parametrize(
    ("low", "high", "metric", "verdict"),
    [
        (0.01, 0.2, "auroc", "better"),
        (-0.2, -0.01, "auroc", "worse"),
        (-0.1, 0.1, "auroc", "unsure"),
        (0.0, 0.1, "auroc", "unsure"),
        (0.01, 0.2, "loss", "worse"),
        (-0.2, -0.01, "loss", "better"),
    ],
)
def test_only_an_interval_beyond_0_is_a_verdict(low, high, metric, verdict):
    assert judge_difference(Estimate((low + high) / 2, low, high), metric) == verdict


def evidence(**gains):
    pairs = [
        Pair(first, "local", {"auroc": gain}, Joint(8, 2, 1, 1)) for first, gain in gains.items()
    ]
    return Evidence(12, 7, {}, tuple(pairs))


def test_a_site_is_judged_by_the_model_that_it_keeps():
    up, down = Estimate(0.1, 0.05, 0.2), Estimate(-0.1, -0.2, -0.05)
    verdict, told = judge_own(evidence(federated=down, adapted=up), "auroc")
    assert verdict == "better"
    assert "adapted model is better" in told
    assert "AUROC +0.100 (+0.050 to +0.200), on 12 test images of 7 patients" in told
    assert judge_own(evidence(federated=down, adapted=None), "auroc")[0] == "worse"
    assert judge_own(evidence(), "auroc") is None
