"""Figures of all sites together are of the same sites for every way of training."""

from pathlib import Path

import pytest
import torch

from common.errors import RunError
from common.metrics.counts import Counts
from server.runs.results import describe_gaps, find_left_out, read_results, unite_sites


def test_overall_names_the_sites_it_leaves_out() -> None:
    counts = Counts.of(torch.randn(4, 2), torch.tensor([0, 1, 0, 1]))
    results = {"local": {"a": counts}, "federated": {"a": counts, "b": counts}}
    assert find_left_out(results) == ["b"]
    assert "overall leaves out b" in describe_gaps(results, {})
    assert unite_sites(results, 2)["federated"].n == 4
    assert not describe_gaps({"federated": {"a": counts, "b": counts}}, {})


def test_what_sites_withhold_is_told_in_words() -> None:
    counts = Counts.of(torch.randn(4, 2), torch.tensor([0, 1, 0, 1]))
    told = describe_gaps({"federated": {"a": counts}}, {"c": "all figures", "b": "scores"})
    assert told == "withheld by sites: b: scores; c: all figures"


@pytest.mark.parametrize("content", ['{"results": {', "[]", "{}", '{"results": {"federated": 1}}'])
def test_a_damaged_report_is_said_to_be_one(tmp_path: Path, content: str) -> None:
    (tmp_path / "report.json").write_text(content)
    with pytest.raises(RunError, match="results as a run writes them"):
        read_results(tmp_path, 2)
