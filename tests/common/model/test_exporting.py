"""An exported model says what the run's says, in each form, and tells what it is."""

import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from client.cli import main as client
from common.errors import RunError
from common.model import backbones
from common.model.exporting import export_model
from common.model.inference import ReleasedModel, load_model
from common.model.onnx_file import PACKAGES, Served, check_onnx
from server.cli import main as server
from simulations.cli import main as simulations
from tests.builders import ROOT, make_study, paint_noise, write_model, write_site

READ_OUT = {"temperature": 2.0, "log_prior": [-6.0, -0.1, -3.0]}
SIZES = {"inception_v3": 80, "vit_b_16": 224}

Main = Callable[..., tuple[int, str]]


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run's folder, as a coordinator has it: its decisions are not the likeliest classes."""
    folder = write_model(tmp_path / "runs/run", model={"unit_features": True})
    (folder / "read_out.json").write_text(json.dumps(READ_OUT))
    report = {
        "released_round": 3,
        "results": {
            "federated": {
                "overall": {"auroc": 0.9, "left_out": ["secret-ward"]},
                "sites": {"secret-ward": {}},
            }
        },
    }
    (folder / "report.json").write_text(json.dumps(report))
    (folder / "run.yaml").write_text("{fingerprint: abc, sites: {secret-ward: {}}}")
    (folder / "card.md").write_text("# A card")
    return folder


@pytest.fixture
def without_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    """As where one package of the extra is not installed."""
    monkeypatch.setitem(sys.modules, "onnxscript", None)


@pytest.fixture
def images(tmp_path: Path) -> list[Path]:
    paths = [tmp_path / f"{i}.png" for i in range(6)]
    for i, path in enumerate(paths):
        Image.fromarray(paint_noise(i, "a")).save(path)
    return paths


def draw_pixels(model: ReleasedModel, number: int) -> torch.Tensor:
    side, drawn = model.preprocess.crop, torch.Generator().manual_seed(1)
    return torch.randint(0, 256, (number, 3, side, side), dtype=torch.uint8, generator=drawn)


def open_onnx(path: Path) -> Any:
    for name in PACKAGES:
        pytest.importorskip(name, reason="needs ONNX: pip install '.[export]'")
    import onnxruntime

    return onnxruntime.InferenceSession(path)


def test_a_folder_says_what_the_run_says(
    run: Path, images: list[Path], tmp_path: Path, without_extra: None
) -> None:
    export_model(run, tmp_path / "out")
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {"model.safetensors", "model.json", "card.md"}
    # Also of an export of an export.
    export_model(tmp_path / "out", tmp_path / "again")
    first, second = (tmp_path / folder / "model.json" for folder in ("out", "again"))
    assert first.read_text() == second.read_text()
    model = load_model(run)
    called, likeliest = model.decisions(images), model.probabilities(images).argmax(1)
    assert not called.equal(likeliest)
    for name in ("out", "again"):
        exported = load_model(tmp_path / name)
        assert exported.probabilities(images).equal(model.probabilities(images))
        assert exported.decisions(images).equal(called)


def test_it_tells_what_it_is_and_no_site(run: Path, tmp_path: Path, without_extra: None) -> None:
    export_model(run, tmp_path / "out")
    text = (tmp_path / "out/model.json").read_text()
    told, study = json.loads(text), make_study(model={"unit_features": True})
    assert "secret-ward" not in text
    assert told["classes"] == ["a", "b", "c"]
    assert told["study_id"] == study.id
    assert told["backbone"] == "shufflenet_v2_x0_5"
    assert told["head"] == {"centre": True, "unit": True, "directions": None}
    assert told["preprocess"] == {
        "resize": 32,
        "crop": 32,
        "mean": [0.485, 0.456, 0.406],
        "std": [0.229, 0.224, 0.225],
        "interpolation": "bilinear",
    }
    assert told["read_out"] == READ_OUT
    assert told["facts"]["results"] == {"federated": {"auroc": 0.9}}
    assert told["facts"]["fingerprint"] == "abc"
    assert told["facts"]["privacy"]["private"] is False


def test_a_private_model_tells_its_epsilon(tmp_path: Path, without_extra: None) -> None:
    privacy = {"preset": "head", "epsilon": 3.0, "delta": 1e-5, "directions": 8}
    model, train = {"head": "discriminant", "init": None}, {"rounds": 0}
    run = write_model(tmp_path / "run", privacy=privacy, model=model, train=train)
    told = export_model(run, tmp_path / "out")["privacy"]
    assert told == {
        "private": True,
        "unit": "training patient",
        "mechanism": "gaussian",
        "epsilon": 3.0,
        "delta": 1e-5,
    }
    assert load_model(tmp_path / "out").about.head.directions == 8


@pytest.mark.parametrize(
    ("name", "old", "new", "expected"),
    [
        ("model.safetensors", b"\x00\x00", b"\x00\x01", "expected the released model, got a dam"),
        ("model.json", b'"crop"', b'"corp"', "model.json: preprocess.corp: expected"),
        ("model.json", b"{", b"[", "expected a model's description, got a damaged one"),
        ("model.json", b"model 1", b"model 2", "model.json: format: expected"),
    ],
)
def test_a_damaged_export_is_refused(
    name: str,
    old: bytes,
    new: bytes,
    expected: str,
    run: Path,
    tmp_path: Path,
    without_extra: None,
) -> None:
    export_model(run, tmp_path / "out")
    path = tmp_path / "out" / name
    path.write_bytes(path.read_bytes()[::-1].replace(old[::-1], new[::-1], 1)[::-1])
    with pytest.raises(RunError) as caught:
        load_model(tmp_path / "out")
    assert expected in str(caught.value)


def test_nothing_is_overwritten(run: Path, tmp_path: Path) -> None:
    with pytest.raises(RunError, match="expected a new or empty folder"):
        export_model(run, run)
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match="expected a new or empty folder"):
        export_model(run, tmp_path / "file")


def test_every_role_exports_and_says_how_to_get_onnx(
    run: Path, run_main: Main, tmp_path: Path, without_extra: None
) -> None:
    site = write_site(tmp_path / "site")
    for number, (main, *arguments) in enumerate(
        (
            (simulations.main, run),
            (server.main, "run", "--project", tmp_path),
            (client.main, run, "--site", site),
        )
    ):
        out = tmp_path / f"out{number}"
        code, text = run_main(main, "export", *arguments, out)
        assert code == 0, text
        assert "pip install 'consilium[export]'" in " ".join(text.split())
        assert load_model(out).classes == ("a", "b", "c")


def test_a_site_s_own_model_is_said_to_be_not_private(
    run_main: Main, tmp_path: Path, without_extra: None
) -> None:
    site, study = write_site(tmp_path / "site"), make_study(name="lesions")
    kept = write_model(tmp_path / f"site/state/adapted/{study.id}", name="lesions")
    (kept / "about.json").write_text(json.dumps({"note": "it must not leave."}))
    code, text = run_main(client.main, "export", "lesions", tmp_path / "out", "--site", site)
    assert code == 0, text
    assert "NOT PRIVATE: it must not leave." in text
    told = json.loads((tmp_path / "out/model.json").read_text())
    assert told["facts"]["privacy"] == {"private": False, "note": "it must not leave."}


def test_one_onnx_file_is_the_whole_model(run: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    export_model(run, out)
    session, model = open_onnx(out / "model.onnx"), load_model(out)
    about = session.get_modelmeta().custom_metadata_map
    assert json.loads(about["classes"]) == ["a", "b", "c"]
    assert about["fingerprint"] == model.about.sha256
    assert about["model.json"] == (out / "model.json").read_text()
    pixels = draw_pixels(model, 7)
    shares, called = session.run(["probabilities", "decision"], {"images": pixels.numpy()})
    logits = model.compute_logits([*pixels])
    expected = model.read_out.scores(logits).softmax(1).float()
    assert torch.allclose(torch.from_numpy(shares), expected, atol=1e-5)
    assert called.tolist() == logits.argmax(1).tolist()
    assert called.tolist() != expected.argmax(1).tolist()
    content = (out / "model.onnx").read_bytes()
    assert not any(path in content for path in (b"site-packages", str(ROOT).encode()))


def test_a_file_of_another_model_does_not_pass(run: Path, tmp_path: Path) -> None:
    export_model(run, tmp_path / "out")
    path, model = tmp_path / "out/model.onnx", load_model(run)
    open_onnx(path)
    assert check_onnx(Served(model), path) == ""
    hotter = model.about.model_copy(update={"read_out": replace(model.read_out, temperature=2.1)})
    assert "apart on" in check_onnx(Served(replace(model, about=hotter)), path)


@pytest.mark.parametrize(
    "backbone",
    [
        name if name == "squeezenet1_1" else pytest.param(name, marks=pytest.mark.slow)
        for name in backbones.names()
    ],
)
def test_every_backbone_goes_home(backbone: str, tmp_path: Path) -> None:
    size = SIZES.get(backbone, 64)
    run = write_model(tmp_path / "run", model={"backbone": backbone}, images={"size": size})
    export_model(run, tmp_path / "out")  # fails unless ONNX Runtime says what PyTorch says
    model, exported = load_model(run), load_model(tmp_path / "out")
    pixels = [*draw_pixels(model, 2)]
    assert exported.compute_logits(pixels).equal(model.compute_logits(pixels))
    session = open_onnx(tmp_path / "out/model.onnx")
    shares, _ = session.run(None, {"images": torch.stack(pixels).numpy()})
    expected = model.compute_logits(pixels).softmax(1)
    assert torch.allclose(torch.from_numpy(shares), expected, atol=1e-4)
