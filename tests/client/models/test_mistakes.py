"""The sheet of mistakes has the surest ones, and stays at the site."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image

from client.cli.main import main
from client.data.records import FileImage, Record
from client.models.evaluating import Evaluated
from client.models.mistakes import list_mistakes
from common.model.inference import load_model
from tests.builders import write_images, write_model, write_site


def test_the_surest_mistakes_come_first(tmp_path: Path) -> None:
    model = load_model(write_model(tmp_path / "run"))
    names = [f"{i}.png" for i in range(20)]
    records = [Record(FileImage(Path(name)), i % 2, name) for i, name in enumerate(names)]
    logits = torch.tensor([[float(i), 0.0, 0.0] for i in range(1, 21)])  # all are called a
    found = list_mistakes(model, Evaluated(records, logits, 0))
    assert [each.record.image.name for each in found[:2]] == ["19.png", "17.png"]
    assert len(found) == 10
    assert {each.called for each in found} == {0}
    assert {each.record.label for each in found} == {1}
    assert found[-1].probability == pytest.approx(logits[1].softmax(0)[0].item())


def test_a_site_draws_its_mistakes_and_is_told_that_they_stay(
    run_main: Callable[..., tuple[int, str]], tmp_path: Path
) -> None:
    rows = [(f"{i}.png", "abc"[i % 3], f"p{i}") for i in range(12)]
    write_images(tmp_path / "site", rows)
    site, run = write_site(tmp_path / "site"), write_model(tmp_path / "run")
    code, text = run_main(main, "evaluate", run, "--site", site, "--explain", tmp_path / "sheet")
    assert code == 0, text
    assert "must stay here" in text
    assert (tmp_path / "sheet").stat().st_mode & 0o077 == 0
    assert (tmp_path / "sheet/mistakes.png").stat().st_mode & 0o077 == 0
    sheet = Image.open(tmp_path / "sheet/mistakes.png")
    assert sheet.width == 2 * 640
