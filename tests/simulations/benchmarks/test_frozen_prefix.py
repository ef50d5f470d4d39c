"""The benchmark: its baselines are what they say they are, and its figures agree."""

import json
from dataclasses import asdict, replace
from math import prod
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.utils.data import TensorDataset
from torch.utils.flop_counter import FlopCounterMode
from typer.testing import CliRunner

from common.config.study import Study
from common.errors import RunError, StudyError
from common.model import backbones
from common.protocol.tensors import count_bytes, to_arrays
from simulations.benchmarks.contenders import Contender, Task
from simulations.benchmarks.flops import count_operations
from simulations.benchmarks.frozen_prefix import Plan
from simulations.benchmarks.tutorial_baseline import Tutorial
from simulations.cli.main import app

pytestmark = pytest.mark.system

SMALL = "shufflenet_v2_x0_5"
PLAN = Plan(backbones=(SMALL,), images=16, side=32, rounds=2, repeats=1)
WAYS = [
    ("naive", "all"),
    ("frozen", "head"),
    ("ours", "head"),
    ("frozen", "last:1"),
    ("ours", "last:1"),
]
Told = tuple[dict, str]


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> Told:
    """What the command wrote and what it printed, at the smallest size."""
    file = tmp_path_factory.mktemp("bench") / "bench.json"
    options = ["--backbone", SMALL, "--images", "16", "--size", "32", "--rounds", "2"]
    done = CliRunner().invoke(app, ["bench", *options, "--repeats", "1", "--json", str(file)])
    assert done.exit_code == 0, done.output
    return json.loads(file.read_text()), done.output


def test_every_way_of_training_has_a_row(told: Told) -> None:
    results, printed = told
    assert [(row["way"], row["trains"]) for row in results["rows"]] == WAYS
    assert [row["trains"] for row in results["caching"]] == ["head", "last:1"]
    lines = [line.split() for line in printed.splitlines()]
    for way, trains in WAYS:
        assert any({way, trains} <= set(line) for line in lines)
    assert results["plan"] == {**asdict(PLAN), "backbones": [SMALL]}
    assert results["machine"]["torch"] == torch.__version__


def test_ratios_and_shares_follow_from_the_other_columns(told: Told) -> None:
    results, _ = told
    peak = results["machine"]["peak_gflops"]
    rows = {(row["way"], row["trains"]): row for row in results["rows"]}
    for (_, trains), row in rows.items():
        naive, frozen = rows["naive", "all"], rows.get(("frozen", trains))
        assert row["naive_ratio"] == pytest.approx(naive["study_seconds"] / row["study_seconds"])
        if frozen:
            expected = frozen["study_seconds"] / row["study_seconds"]
            assert row["frozen_ratio"] == pytest.approx(expected)
        assert row["study_seconds"] > 2 * row["round_seconds"] or row["way"] == "ours"
        assert row["peak_share"] == pytest.approx(row["gflops"] / peak["float32"])
    assert rows["naive", "all"]["frozen_ratio"] is None
    for row in results["caching"]:
        assert row["images_per_second"] == pytest.approx(16 / row["seconds"])
        assert row["peak_share"] == pytest.approx(row["gflops"] / peak[row["dtype"]])


def test_ours_sends_exactly_what_frozen_sends(told: Told) -> None:
    rows = {(row["way"], row["trains"]): row for row in told[0]["rows"]}
    for trains in ("head", "last:1"):
        assert rows["ours", trains]["wire"] == rows["frozen", trains]["wire"]
        assert rows["ours", trains]["wire"] < rows["naive", "all"]["wire"]


def test_ours_spares_the_prefix_in_every_round(told: Told) -> None:
    rows = {(row["way"], row["trains"]): row for row in told[0]["rows"]}
    for trains in ("head", "last:1"):
        work = {
            w: rows[w, trains]["gflops"] * rows[w, trains]["round_seconds"] for w, _ in WAYS[1:3]
        }
        before, after = (16 * each / 1e9 for each in count_operations(PLAN.study(SMALL, trains)))
        assert work["ours"] == pytest.approx(after)
        assert work["frozen"] == pytest.approx(before + after)


def test_naive_trains_and_sends_everything() -> None:
    tutorial = Tutorial(_study("all"), torch.device("cpu"))
    before = _copy(tutorial)
    _train(tutorial)
    state = tutorial.model.state_dict()
    assert not [name for name in state if torch.equal(state[name], before[name])]
    assert tutorial.exchange_model() == count_bytes(to_arrays(state))


@pytest.mark.parametrize("unfreeze", ["head", "last:1"])
def test_frozen_leaves_the_frozen_part_as_it_was(unfreeze: str) -> None:
    tutorial = Tutorial(_study(unfreeze, lr=50.0), torch.device("cpu"))  # features are small
    trained = backbones.get(SMALL).trainable(tutorial.model, unfreeze)
    before = _copy(tutorial)
    _train(tutorial)
    state = tutorial.model.state_dict()
    assert {name for name in state if not torch.equal(state[name], before[name])} == set(trained)
    arrays = to_arrays({name: state[name] for name in trained})
    assert tutorial.exchange_model() == count_bytes(arrays)


def test_a_message_brings_back_what_was_sent() -> None:
    tutorial = Tutorial(_study("all"), torch.device("cpu"))
    _train(tutorial)
    before = _copy(tutorial)
    tutorial.exchange_model()
    after = tutorial.model.state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


def test_operations_count_two_backward_for_one_forward() -> None:
    """All but the gradient of the pixels; also where convolutions are depthwise."""
    study = PLAN.study(SMALL, "all")
    model = backbones.get(SMALL).build(classes=2, dropout=0.0, weights="none", seed=0)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(torch.zeros(1, 3, 32, 32))
    forward = counter.get_total_flops()
    first = 2 * prod(model.conv1[0].weight.shape) * 16 * 16
    assert count_operations(study) == (0, 3 * forward - first)
    head = model.fc.linear.weight.numel()
    assert count_operations(PLAN.study(SMALL, "head")) == (forward - 2 * head, 2 * 2 * head)


def test_epochs_are_timed_on_whole_batches() -> None:
    assert [replace(PLAN, images=n).sample for n in (2, 16, 33, 200, 512)] == [2, 16, 32, 32, 128]


def test_a_contender_that_fails_is_named(tmp_path: Path) -> None:
    task = Task(way="frozen", study=_study("head"), images=tmp_path, sample=1, repeats=1)
    contender = Contender(task)
    contender.ready()
    with pytest.raises(RunError, match=f"{SMALL}, frozen: expected a step, got a process that"):
        contender.step()


def test_what_cannot_be_measured_is_refused_at_once(tmp_path: Path) -> None:
    unknown = CliRunner().invoke(app, ["bench", "--backbone", "resnet19"])
    assert isinstance(unknown.exception, StudyError)
    assert "resnet18" in str(unknown.exception)
    nowhere = CliRunner().invoke(app, ["bench", "--json", str(tmp_path / "none" / "bench.json")])
    assert isinstance(nowhere.exception, FileNotFoundError)


def _study(unfreeze: str, lr: float = 0.5) -> Study:
    """With a rate large enough for every tensor to move in a few steps."""
    study = PLAN.study(SMALL, unfreeze)
    return study.model_copy(update={"train": study.train.model_copy(update={"lr": lr})})


def _train(tutorial: Tutorial) -> None:
    pixels = torch.randint(256, (16, 3, 32, 32), dtype=torch.uint8)
    labels = (torch.arange(16) % 4 == 0).long()
    for _ in range(3):  # from a zero head, the first step moves nothing before it
        tutorial.train_epoch(TensorDataset(pixels, labels))


def _copy(tutorial: Tutorial) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in tutorial.model.state_dict().items()}
