"""The report of a run says what the run knows, what it does not, and nothing else."""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from common.metrics.by_patient import Evidence, Joint, Pair
from common.metrics.counts import Counts
from common.metrics.statistics import Estimate
from server.evidence.report import CARD, FACTS, REPORT, write_report
from server.runs.results import write_results
from server.runs.run_folder import RunFolder
from tests.browser import open_page
from tests.builders import make_study

SITE: dict[str, Any] = {
    "role": "train",
    "disclosure": {"counts": "exact", "metrics": "every_round", "epsilon": None},
    "patients": {"train": 9, "validation": 3, "test": 12},
    "images": {"train": [5, 4], "validation": [2, 1], "test": [20, 20]},
}


def count(seed: int, skill: float = 1.0, images: int = 40) -> Counts:
    rng = torch.Generator().manual_seed(seed)
    labels = torch.arange(images) % 2
    logits = torch.randn(images, 2, generator=rng)
    logits[torch.arange(images), labels] += skill
    return Counts.of(logits, labels)


def make_run(
    path: Path,
    *,
    sites: int = 2,
    rounds: int = 3,
    facts: Mapping[str, Any] | None = None,
    **changes: Any,
) -> RunFolder:
    """A finished run of so many sites, without training anything."""
    folder = RunFolder.create(path)
    folder.write_study(make_study(**{"classes": ["a", "b"], **changes}))
    names = [f"site-{i}" for i in range(sites)]
    said = {"sites": dict.fromkeys(names, SITE), "refused": {"late": "it waits for approval"}}
    folder.write_facts(said)
    folder.append_journal("joined", sites=names, after=0)
    for number in range(1, rounds + 1):
        told = {"balanced_accuracy": 0.5 + number / 1000, "auroc": 0.6}
        line = {"round": number, "train_loss": 1 / number, "model_round": number - 1, **told}
        folder.append_history([{**line, "site": n, "bytes": 4000} for n in [*names, None]])
        folder.append_journal("round", round=number, seconds=1.5)
    folder.append_journal("left out", of="round 1", site=names[0], why="it did not answer in time")
    folder.append_journal("finished", released=rounds)
    results = {
        way: {name: count(i, skill) for i, name in enumerate(names)}
        for way, skill in (("local", 0.5), ("federated", 1.5))
    }
    write_results(folder, results, released_round=rounds, **(facts or {}))
    return folder


def read(folder: RunFolder, name: str = REPORT) -> str:
    return (folder.path / name).read_text(encoding="utf-8")


def test_it_says_what_the_run_knows(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run")
    write_report(folder)
    page = read(folder)
    for words in (
        "the model of round 3",
        "site-0 was left out of 1 exchanges: it did not answer in time",
        "late took no part: it waits for approval",
        "No differential privacy",
        "40 test images",
        "12.0 kB",
    ):
        assert words in page


def test_what_nobody_stated_is_not_stated(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run")
    write_report(folder)
    assert "not stated" in read(folder)
    card = yaml.safe_load(read(folder, CARD).split("---")[1])
    assert card["license"] == "not stated"
    assert json.loads(read(folder, FACTS))["card"]["intended_use"] == "not stated"
    card = {"intended_use": "Second reading.", "license": "CC BY 4.0"}
    other = make_run(tmp_path / "other", card=card)
    write_report(other)
    assert "Second reading." in read(other)
    assert yaml.safe_load(read(other, CARD).split("---")[1])["license"] == "CC BY 4.0"


def test_thresholds_are_chosen_on_validation_and_tried_on_test(tmp_path: Path) -> None:
    chosen = {"validation": count(7, 1.5).sparse()}
    folder = make_run(tmp_path / "run", facts=chosen)
    write_report(folder)
    assert "chosen on 40 validation images, tried on test images" in read(folder)
    without = make_run(tmp_path / "without")
    write_report(without)
    assert "Operating points" not in read(without)


def test_ways_are_compared_on_the_same_patients(tmp_path: Path) -> None:
    def compare(gain: Estimate, joint: Joint) -> dict[str, Any]:
        figure = {"balanced_accuracy": Estimate(0.7, 0.6, 0.8), "auroc": None}
        differences = {"balanced_accuracy": gain, "auroc": None}
        figures = {"federated": figure, "local": figure}
        pairs = (Pair("federated", "local", differences, joint),)
        return Evidence(40, 12, figures, pairs).facts()

    told = {
        "site-0": compare(Estimate(0.1, 0.02, 0.18), Joint(20, 9, 3, 8)),
        "site-1": compare(Estimate(-0.1, -0.18, -0.02), Joint(21, 2, 8, 9)),
    }
    folder = make_run(tmp_path / "run", facts={"evidence": told})
    write_report(folder)
    page = read(folder)
    assert "site-0: the federated model is better than one of the site" in page
    assert "site-1: the federated model is worse than one of the site" in page
    assert "on 40 test images of 12 patients" in page
    assert "0.700 (0.600 to 0.800)" in page
    assert "| federated | local | 41 | 11 | 11 | 17 |" in read(folder, CARD)


def test_names_are_text_on_the_page_and_in_the_card(tmp_path: Path) -> None:
    hostile = "<img src=x onerror=alert(1)>|$x_1$&lt;b&gt;"
    folder = make_run(tmp_path / "run", classes=[hostile, "b"])
    write_report(folder)
    assert "<img" not in read(folder)
    card = read(folder, CARD).partition("\n# ")[2]
    assert "<img" not in card.replace("\\<img", "")
    assert not re.search(r"(?<!\\)[&$]", card)


def test_no_path_of_the_coordinator_is_in_what_is_made_to_be_shown(tmp_path: Path) -> None:
    own = {"weights": "/home/me/secret/w.pth", "init": "/home/me/runs/before"}
    folder = make_run(tmp_path / "run", model=own)
    write_report(folder)
    assert not any("/home/me" in read(folder, name) for name in (REPORT, CARD, FACTS))
    assert "w.pth" in read(folder, FACTS)


def test_the_same_run_has_the_same_report(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run")
    write_report(folder)
    first = {name: read(folder, name) for name in (REPORT, CARD, FACTS)}
    write_report(folder)
    assert first == {name: read(folder, name) for name in first}


def test_a_large_run_has_a_small_page(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run", sites=20, rounds=100)
    write_report(folder)
    assert len(read(folder).encode()) < 2_000_000


def test_a_private_run_says_what_it_promises_and_to_whom(tmp_path: Path) -> None:
    private = {"mechanism": "dp_sgd", "epsilon": 3.0, "delta": 1e-5}
    folder = make_run(tmp_path / "run", privacy=private, facts={"spent": {"site-0": 2.5}})
    write_report(folder, audit=1.25)
    page = read(folder)
    for words in ("95.26%", "2.50 spent", "at least 1.25", "validation and test patients", "unit"):
        assert words in page
    assert "No differential privacy" not in page


def test_a_site_that_tells_nothing_is_named_and_nothing_is_made_up(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run", facts={"withheld": {"silent": "all figures"}})
    write_report(folder)
    assert re.search(r"silent: no figure; it withholds all figures", read(folder))


def test_without_a_comparison_nothing_shows_that_federating_helped(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run")
    write_results(folder, {"federated": {"site-0": count(0)}}, released_round=0)
    write_report(folder)
    assert "nothing here shows that federating helped" in read(folder)
    assert "the solved head" in read(folder)


@pytest.mark.parametrize("told", [{}, {"site-0": Counts.zero(2)}])
def test_no_figures_at_all_are_no_error(tmp_path: Path, told: dict[str, Counts]) -> None:
    folder = make_run(tmp_path / "run")
    write_results(folder, {"federated": told}, released_round=0, withheld={"site-0": "all figures"})
    write_report(folder)
    assert "No site tells figures" in read(folder)


@pytest.mark.system
@pytest.mark.parametrize(("width", "dark"), [(375, True), (1280, False)])
def test_a_browser_loads_nothing_else_and_it_fits(tmp_path: Path, width: int, dark: bool) -> None:
    long = ["a class with a long name, as registries have them", "b"]
    folder = make_run(tmp_path / "run", sites=6, classes=long, facts={"withheld": {"x": "all"}})
    write_report(folder)
    seen = open_page(folder.path / REPORT, width, dark=dark)
    assert not seen.errors
    assert not seen.requests
    assert seen.overflow <= 0
