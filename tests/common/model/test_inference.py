"""What holds no released model, or none that can be used, is said to be what it is."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from common.errors import RunError
from common.model.description import read_description
from common.model.inference import load_model
from tests.builders import write_model


def put(folder: Path, *names: str) -> None:
    folder.mkdir(parents=True)
    for name in names:
        (folder / name).write_bytes(b"")


def test_where_no_model_is_the_cause_and_the_remedy_are_named(tmp_path: Path) -> None:
    put(tmp_path / "begun", "study.yaml")
    put(tmp_path / "empty")
    for model in ("seeds/seed-0", "seeds/seed-1", "state/adapted/0f98", "sweep/lr=0.1/seed-0"):
        put(tmp_path / model, "study.yaml", "model.safetensors")
    for name, got, remedy in (
        ("nowhere", "no such folder", "Name a run folder"),
        ("begun/study.yaml", "a file", "Name a run folder"),
        ("empty", "a folder without one", "Name a run folder"),
        ("begun", "a run that is not finished", f"run --resume {tmp_path / 'begun'}"),
        ("seeds", "a folder that holds 2", f"such as {tmp_path / 'seeds/seed-0'}."),
        ("sweep", "a folder that holds 1", f"such as {tmp_path / 'sweep/lr=0.1/seed-0'}."),
        ("state/adapted", "a folder that holds 1", f"such as {tmp_path / 'state/adapted/0f98'}."),
        ("state", "a folder that holds 1", f"such as {tmp_path / 'state/adapted/0f98'}."),
    ):
        with pytest.raises(RunError) as caught:
            load_model(tmp_path / name)
        expected = f"{tmp_path / name}: expected the folder of a finished run, got {got}. "
        assert str(caught.value).startswith(expected)
        assert remedy in str(caught.value)


UNUSABLE: dict[str, dict[str, Any]] = {
    "more classes than a study has": {"classes": [f"c{k}" for k in range(1001)]},
    "a path in place of an id": {"study_id": "../../x"},
    "an image beyond all memory": {"preprocess": {"resize": 10**6, "crop": 10**6}},
    "an image of no pixels": {"preprocess": {"crop": 0}},
    "pixels divided by nothing": {"preprocess": {"std": [0, 0, 0]}},
    "logits divided by nothing": {"read_out": {"temperature": 0}},
    "a prior of other classes": {"read_out": {"log_prior": [0.0, 1.0]}},
    "directions below none": {"head": {"directions": -1}},
    "directions beyond all memory": {"head": {"directions": 10**9}},
}


@pytest.mark.parametrize("changes", UNUSABLE.values(), ids=UNUSABLE)
def test_a_description_that_no_run_writes_is_refused(
    tmp_path: Path, changes: dict[str, Any]
) -> None:
    folder = write_model(tmp_path / "model")
    about = json.loads(read_description(folder).to_json())
    (folder / "model.json").write_text(json.dumps(about))
    load_model(folder)
    for key, value in changes.items():
        about[key] = about[key] | value if isinstance(value, dict) else value
    (folder / "model.json").write_text(json.dumps(about))
    with pytest.raises(RunError):
        load_model(folder)


@pytest.mark.parametrize("name", ["model.json", "read_out.json"])
def test_json_too_deep_to_read_is_refused(tmp_path: Path, name: str) -> None:
    folder = write_model(tmp_path / "model")
    (folder / name).write_text("[" * 100_000)
    with pytest.raises(RunError, match="damaged"):
        load_model(folder)


def test_weights_that_are_no_numbers_are_refused(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "model")
    tensors = load_file(folder / "model.safetensors")
    tensors[max(name for name in tensors if name.endswith("bias"))][0] = torch.nan
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(RunError, match="damaged"):
        load_model(folder)
