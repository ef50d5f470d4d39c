"""Each file has its row, and a threshold decides as it says."""

import csv
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image

from client.cli.main import main
from common.errors import RunError
from common.model.inference import load_model
from common.model.predicting import Prediction, decide, parse_thresholds, predict_folder
from tests.builders import make_study, paint_noise, write_model, write_site

CLASSES = ("a", "b", "c")

Main = Callable[..., tuple[int, str]]


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """A folder of 40 images, and of all that can lie beside them."""
    folder = tmp_path / "images"
    (folder / "inner").mkdir(parents=True)
    for i in range(40):
        Image.fromarray(paint_noise(i, "a")).save(folder / f"inner/{i:02d}.png")
    (folder / "inner/39.png").write_bytes(b"no image")
    (folder / "folder.png").mkdir()
    (folder / "gone.jpg").symlink_to(tmp_path / "nowhere")
    (folder / "link").symlink_to(tmp_path)
    for name in ("notes.txt", "more.TXT", "Thumbs"):
        (folder / name).write_text("")
    return folder


def read_rows(path: Path) -> list[dict[str, str]]:
    return list(csv.DictReader(path.read_text("utf-8").splitlines()))


def test_each_file_has_a_row_or_is_counted(run_main: Main, tmp_path: Path, images: Path) -> None:
    run, out = write_model(tmp_path / "run"), tmp_path / "p.csv"
    code, text = run_main(main, "predict", run, images, "--out", out)
    assert code == 0, text
    rows = read_rows(out)
    assert [row["image"] for row in rows] == [
        "gone.jpg",
        *(f"inner/{i:02d}.png" for i in range(40)),
    ]
    told = " ".join(text.split())
    assert f"41 images → {out}; 2 of them not read; no images: 2 .txt" in told
    assert "1 without suffix" in told
    assert "1 linked folder" in told
    bad = {row["image"]: row["error"] for row in rows if row["error"]}
    assert list(bad) == ["gone.jpg", "inner/39.png"]
    assert bad["gone.jpg"] == "expected an image, got No such file or directory"
    assert all(rows[0][name] == "" for name in ("predicted", *CLASSES))
    model, paths = load_model(run), sorted(images.glob("inner/*.png"))[:39]
    shares = model.probabilities(paths)
    assert [row["predicted"] for row in rows[1:40]] == [
        model.classes[k] for k in model.decisions(paths)
    ]
    for row, expected in zip(rows[1:40], shares, strict=True):
        found = torch.tensor([float(row[name]) for name in CLASSES])
        assert torch.allclose(found, expected, atol=1e-5)


def test_what_was_read_before_a_late_failure_is_in_the_file(tmp_path: Path, images: Path) -> None:
    model, out = load_model(write_model(tmp_path / "run")), tmp_path / "p.csv"

    def fail(each: Prediction) -> None:
        if each.path.name == "35.png":
            raise OSError("the disk is full")

    with pytest.raises(OSError, match="the disk is full"):
        predict_folder(model, images, out, {}, fail)
    assert [row["image"] for row in read_rows(out)][-1] == "inner/35.png"


def test_a_name_that_is_no_text_ends_in_no_traceback(run_main: Main, tmp_path: Path) -> None:
    folder, run = tmp_path / "images", write_model(tmp_path / "run")
    folder.mkdir()
    for name in (b"\xff.png", b"\xfe.png"):
        Image.fromarray(paint_noise(1, "a")).save(os.fsencode(tmp_path / "one.png"))
        shutil.copy(tmp_path / "one.png", os.fsencode(folder) + b"/" + name)
    Path(folder, os.fsdecode(b"\xfe.png")).write_bytes(b"no image")
    code, text = run_main(main, "predict", run, folder, "--out", tmp_path / "p.csv")
    assert code == 0, text
    assert "\\udcfe.png" in text
    assert [row["image"] for row in read_rows(tmp_path / "p.csv")] == ["\\udcfe.png", "\\udcff.png"]


def test_a_model_that_a_site_keeps_is_found_by_its_study(
    run_main: Main, tmp_path: Path, images: Path
) -> None:
    site, study = write_site(tmp_path / "site"), make_study(name="lesions")
    kept = write_model(tmp_path / f"site/state/adapted/{study.id}", name="lesions")
    for name in ("lesions", study.id, kept):
        out = tmp_path / "p.csv"
        options = ("--site", site, "--out", out)
        code, text = run_main(main, "predict", name, images, *options)
        assert code == 0, text
        out.unlink()
    code, text = run_main(main, "predict", "other", images, *options)
    assert code == 1
    assert f"left one here: lesions ({study.id}), got other" in " ".join(text.split())
    assert not out.exists()
    code, text = run_main(main, "predict", "other", images, "--out", out)
    assert code == 1
    assert "other: expected a folder with a model, or, with --site, a study" in text


def test_a_threshold_decides_by_probability_alone() -> None:
    logits = torch.tensor([[2.0, 0, 1], [2.0, 0, 1], [2.0, 3, 1], [2.0, 3, 1]])
    shares = torch.tensor([[0.1, 0.3, 0.6], [0.2, 0.5, 0.3], [0.1, 0.2, 0.7], [0.6, 0.3, 0.1]])
    assert decide(logits, shares, {}).tolist() == [0, 0, 1, 1]
    # Reached it is the class whatever its logit; not reached it is not, though that is the highest.
    assert decide(logits, shares, {1: 0.3}).tolist() == [1, 1, 0, 1]
    assert decide(logits, shares, {0: 0.2, 1: 0.3}).tolist() == [1, 0, 2, 0]
    assert decide(logits, shares, {1: 0.3, 0: 0.2}).tolist() == [1, 1, 2, 1]


def test_thresholds_that_are_none() -> None:
    assert parse_thresholds(["x=y=0.5", "b=1"], ("b", "x=y", "c")) == {1: 0.5, 0: 1.0}
    for texts, got in (
        (["d=0.5"], "expected CLASS=P of a class, got 'd'"),
        (["a"], "got ''"),
        (["a=0"], "expected a P above 0 and at most 1, got '0'"),
        (["a=nan"], "got 'nan'"),
        (["a=1.1"], "got '1.1'"),
        (["a=.1", "b=.1", "c=.1"], "a class without one, for the images that reach none"),
    ):
        with pytest.raises(RunError) as caught:
            parse_thresholds(texts, CLASSES)
        assert got in str(caught.value)


def test_no_cell_is_a_formula_to_a_spreadsheet(tmp_path: Path) -> None:
    names = ("=HYPERLINK(A1)", "+b", "c")
    model = load_model(write_model(tmp_path / "run", classes=list(names)))
    images = tmp_path / "images"
    (images / "-1").mkdir(parents=True)
    for name in ("=cmd|.png", "-1/a.png", "@a\nb,c.png"):
        Image.fromarray(paint_noise(1, "a")).save(images / name)
    predict_folder(model, images, tmp_path / "p.csv", {})
    with (tmp_path / "p.csv").open(encoding="utf-8", newline="") as file:
        head, *rows = csv.reader(file)
    assert head == ["image", "predicted", "'=HYPERLINK(A1)", "'+b", "c", "error"]
    assert not any(cell.startswith(("=", "+", "-", "@")) for row in rows for cell in row)
    assert all((images / row[0]).is_file() for row in rows)
