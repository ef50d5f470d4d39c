"""What holds no released model is said to be what it is."""

from pathlib import Path

import pytest

from common.errors import RunError
from common.model.inference import load_model


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
