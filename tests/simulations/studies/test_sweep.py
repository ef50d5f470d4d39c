"""A study at several settings: validation chooses, nothing runs twice, mistakes come first."""

import json
import re
import shutil
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from common.config.yaml import alternatives, dump
from common.errors import StudyError
from common.support.terminal import console
from server.runs.run_folder import RunFolder
from simulations.cli.main import main
from simulations.studies.sweep import plan_settings
from tests.builders import DEMO, OPEN

pytestmark = pytest.mark.system

CHANGES = (
    "train.rounds=1",
    "train.batch_size=4",
    "aggregate.quorum=2",
    "select=loss",
    "model.init=zero",
    "adapt=false",
)
SHORT = [part for change in CHANGES for part in ("--set", change)]

Sweep = Callable[..., tuple[int, str]]


@pytest.fixture
def sweep(
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    new_process: Callable[[], None],
    phantoms: Path,
    tmp_path: Path,
) -> Sweep:
    """Runs `consilium-simulate sweep` on two hospitals, into `s`: exit code, all it printed."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(console, "width", 200)

    def run(
        *arguments: object, sites: Sequence[str | Path] = ("north", "south")
    ) -> tuple[int, str]:
        new_process()
        places = [part for name in sites for part in ("--site", phantoms / name)]
        fixed = (*places, *SHORT, "--out", "s", "--cache", phantoms / "cache")
        line = ["consilium-simulate", "sweep", DEMO, *arguments, *fixed]
        monkeypatch.setattr(sys, "argv", [str(part) for part in line])
        with pytest.raises(SystemExit) as end:
            main()
        out, err = capsys.readouterr()
        return int(end.value.code or 0), out + err

    return run


def runs() -> dict[str, int]:
    """Each finished run, and when its report was written."""
    return {str(path.parent): path.stat().st_mtime_ns for path in Path("s").glob("*/*/report.json")}


def told() -> dict[str, Any]:
    content: dict[str, Any] = json.loads(Path("s/sweep.json").read_text())
    return content


def test_validation_chooses_and_nothing_runs_twice(sweep: Sweep) -> None:
    assert sweep("--set", "train.lr=0.1,1e-3", "--seeds", "0")[0] == 0
    before = runs()
    assert len(before) == 2
    shutil.rmtree(next(Path("s").glob("*lr=0.1*")) / "seed-0")
    # The same values in other words and another order, and one more seed.
    code, text = sweep("--set", "train.lr=0.001,1.0e-1,0.10", "--seeds", "1,0,1")
    assert code == 0, text
    after = runs()
    assert len(after) == 4
    kept = next(path for path in before if "lr=0.001" in path)
    assert after[kept] == before[kept]
    _the_better_is_shown(text)
    with Image.open("s/sweep.png") as picture:
        assert picture.format == "PNG"
    # Of other hospitals, or of another study, nothing is reused; a run that fails is named.
    again = ("--set", "train.lr=0.1,1e-3", "--seeds", "0,1")
    code, text = sweep(*again, sites=("north", "west"))
    assert code == 1
    assert "began with, got them without south, with west. Choose another folder" in text
    code, text = sweep("--set", "train.lr=0.1,1e4", "--seeds", "0")
    assert code == 1
    assert "train.lr=1e4, seed 0: round 1: expected 2 good replies" in " ".join(text.split())
    assert "Traceback" not in text
    study = Path(kept, "study.yaml")
    study.write_text(study.read_text().replace("patience: null", "patience: 3"))
    code, text = sweep(*again)
    assert code == 1
    assert "expected the study this run began with, got another train" in text
    assert runs() == after


def _the_better_is_shown(text: str) -> None:
    settings = list(told()["settings"].values())
    assert [setting["set"] for setting in settings] == [
        {"train.lr": "0.001"},
        {"train.lr": "1.0e-1"},
    ]
    for name, setting in told()["settings"].items():
        for seed, score in zip((1, 0), setting["validation"], strict=True):
            released = RunFolder(Path("s", name, f"seed-{seed}")).read_history()[-1]
            assert released["model_round"] == 1  # the last
            assert score == released["loss"]
        assert setting["mean"] == pytest.approx(sum(setting["validation"]) / 2)
    best = min(settings, key=lambda setting: setting["mean"])  # of losses
    assert told()["settings"][told()["chosen"]] == best
    rows = [line for line in text.splitlines() if re.match(r"(0\.001|1\.0e-1) ", line)]
    assert len(rows) == 3  # two scores, and the test figures of one
    told_scores = ", ".join(f"{score:.3f}" for score in best["validation"])
    assert told_scores in next(row for row in rows if "chosen" in row)
    assert rows[2].startswith(best["set"]["train.lr"])
    assert ", ".join(f"{figure:.3f}" for figure in best["test"]["accuracy"]) in rows[2]
    (other,) = (setting["validation"] for setting in settings if setting is not best)
    gaps = ", ".join(f"{a - b:+.3f}" for a, b in zip(best["validation"], other, strict=True))
    assert f"to the next best, {settings[best is settings[0]]['set']['train.lr']}: {gaps}" in text
    assert "test patients never choose" in text
    assert "two read-outs" in text
    assert "sensitivity per class" not in text  # no run shows its own test figures


def test_without_validation_figures_none_is_chosen(sweep: Sweep, phantoms: Path) -> None:
    sites = []
    for name in ("north", "south"):
        data = {"format": "manifest", "root": str(phantoms / name), "manifest": "manifest.csv"}
        policy = OPEN | {"disclose": {"metrics": "none"}}
        site = {"name": name, "data": data, "state": "state", "policy": policy}
        Path(f"{name}.yaml").write_text(dump(site))
        sites.append(Path(f"{name}.yaml").resolve())
    code, text = sweep("--set", "train.lr=0.1,1e-3", "--seeds", "0", sites=sites)
    assert code == 0, text
    assert "none is chosen" in text
    assert "test images" not in text
    assert [line.split() for line in text.splitlines()].count(["0.1", "–"]) == 1
    assert told()["chosen"] is None


def test_a_setting_that_a_site_refuses_is_compared_with_none(sweep: Sweep, phantoms: Path) -> None:
    data = {"format": "manifest", "root": str(phantoms / "west"), "manifest": "manifest.csv"}
    policy = OPEN | {"unfreeze": ["head"]}
    site = {"name": "west", "data": data, "state": "state", "policy": policy}
    Path("west.yaml").write_text(dump(site))
    sites = ("north", "south", Path("west.yaml").resolve())
    code, text = sweep("--set", "model.unfreeze=head,last:1", "--seeds", "0", sites=sites)
    assert code == 1
    expected = "expected the sites of the other settings, got a setting that some of them refuse"
    assert expected in " ".join(text.split())
    assert not Path("s/sweep.json").exists()


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (("--set", "aggregate.fraction=0.5,1"), "fraction: expected one value, got 2 values"),
        (("--set", "train.lrr=1,2"), "train.lrr: expected a known key, got 'lrr'. Did you mean"),
        (("--set", "images.size=32,64,huge"), "images.size: expected a valid integer, got 'huge'"),
        (("--set", "model.unfreeze=head,last:99"), "model.unfreeze: expected at most last:5"),
        (("--set", "train.lr=0.1"), "--set: expected a key with several values, such as"),
        (("--set", "train.lr=0.1,1e-1"), "--set: expected a key with several values, such as"),
        (("--set", "train.lr=0.1,,1"), "--set train.lr: expected YAML values with commas between"),
        (("--set", "train.lr=1,2", "--set", "train.lr=3"), "--set train.lr: expected it once"),
        (("--set", "train.lr"), "--set: expected key=value, got 'train.lr'"),
        (("--set", "seed=0,1"), "--set seed: expected seeds with --seeds"),
        (("--set", "classes=[a, b],[b, a]"), "--set classes: expected one value, got 2 values"),
        (("--set", "holdout.test=0.1,0.2"), "--set holdout.test: expected one value"),
        (("--set", "train.lr=1,2", "--seeds", "0,x"), "--seeds: expected numbers such as 0,1,2"),
        (("--set", "train.lr=1,2", "--seeds", "0,-1"), "seed: expected greater than or equal to 0"),
    ],
)
def test_mistakes_come_before_the_first_run(
    options: tuple[str, ...], expected: str, sweep: Sweep
) -> None:
    code, text = sweep(*options)
    assert code != 0
    assert expected in " ".join(re.sub("[│╭╮╰╯─]", " ", text).split()), text
    assert "Traceback" not in text
    assert not Path("s").exists()


@pytest.mark.parametrize(
    ("change", "values"),
    [
        ("k=1e-3, 0.1", ["1e-3", "0.1"]),
        ("k=head,last:1", ["head", "last:1"]),
        ("k=[1, 3],[2, 4]", ["[1, 3]", "[2, 4]"]),
        ("k='a,b',\"c,d\"", ["'a,b'", '"c,d"']),
        ("k={mechanism: none},{a: 1, b: 2}", ["{mechanism: none}", "{a: 1, b: 2}"]),
        ("k=[1, 3]", ["[1, 3]"]),
        ("k=", [""]),
    ],
)
def test_commas_in_brackets_and_quotes_part_nothing(change: str, values: list[str]) -> None:
    assert alternatives(change, StudyError) == [f"k={value}" for value in values]


@pytest.mark.parametrize("text", ["[1", "a]: b, [c", "'a", "1]\n---\n[2"])
def test_what_is_no_list_of_values_is_refused(text: str) -> None:
    with pytest.raises(StudyError, match="--set k: expected YAML values with commas between"):
        alternatives(f"k={text}", StudyError)


def test_folders_are_safe_and_tell_values_apart(tmp_path: Path) -> None:
    weights = f"model.weights={tmp_path / 'a.pth'},{tmp_path / 'x' / 'a.pth'}"
    lists = "train.class_weights=[1, 3, 1, 1],[1, 31, 1, 1],[13, 1, 1, 1]"
    settings = plan_settings(DEMO, (weights, lists, "model.unfreeze=last:1"), (0,), tmp_path)
    names = [setting.folder.name for setting in settings]
    assert len(set(names)) == 6
    for name in names:
        assert re.fullmatch(r"[\w.,=+-]{1,220}", name)
        assert "model.unfreeze=last-1" in name
        assert "a.pth-" in name
    again = plan_settings(DEMO, (lists, "model.unfreeze=last:1", weights), (3,), tmp_path)
    assert {setting.folder.name for setting in again} == set(names)
