"""The command line as a person uses it: good input works, bad input ends in one clear line."""

import csv
import gc
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image
from rich.table import Table
from safetensors.torch import save_file

from client.session import Session
from common.support.terminal import PlainConsole
from server.runs.results import READ_OUTS
from simulations.cli.main import main
from tests.builders import CONFIGS, DEMO, PHANTOMS, ROOT

pytestmark = pytest.mark.system

SHORT = ("--set", "train.rounds=2", "--set", "train.local_epochs=1")

Command = Callable[..., tuple[int, str]]


@pytest.fixture
def command(
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
    new_process: Callable[[], None],
    tmp_path: Path,
) -> Command:
    """Runs `consilium-simulate` with arguments in an empty folder: exit code, all it printed."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments: object) -> tuple[int, str]:
        caplog.clear()
        new_process()
        monkeypatch.setattr(sys, "argv", ["consilium-simulate", *map(str, arguments)])
        try:
            main()
            code = 0
        except SystemExit as ex:
            code = int(ex.code or 0)
        out, err = capsys.readouterr()
        return code, out + err + caplog.text

    return run


@pytest.fixture
def site_options(phantoms: Path) -> list[str]:
    """The four phantom hospitals, as options."""
    return [part for name in PHANTOMS for part in ("--site", str(phantoms / name))]


@pytest.fixture
def hospital(phantoms: Path, tmp_path: Path) -> Path:
    """A copy of one phantom hospital, to be spoilt."""
    return Path(shutil.copytree(phantoms / "north", tmp_path / "hospital"))


def test_run_compare_predict(command: Command, site_options: list[str], phantoms: Path) -> None:
    code, text = command("run", DEMO, *site_options, *SHORT, "--compare", "--out", "run")
    assert code == 0, text
    for word in ("round   2/2", "north", "local", "pooled", "federated", "overall", "run folder"):
        assert word in text
    assert READ_OUTS in " ".join(text.split())
    report = json.loads(Path("run/report.json").read_text())
    ways = ["local", "fedavg", "solved", "federated", "adapted", "pooled"]
    assert list(report["results"]) == ways
    assert set(json.loads(Path("run/sites/hospitals.json").read_text())) == set(PHANTOMS)
    assert Path("run/comparison.png").exists()
    page = Path("run/report.html").read_text()
    for words in ("north: ", "test images of", "adapted less local", "one site&#39;s model"):
        assert words in page
    assert "not stated" in Path("run/card.md").read_text()
    code, text = command("predict", "run", phantoms / "west/images", "--out", "p.csv")
    assert code == 0, text
    assert "predicted: the decision, which need not be the most probable class" in text
    rows = list(csv.DictReader(Path("p.csv").read_text().splitlines()))
    assert len(rows) == len(list((phantoms / "west/images").iterdir()))
    shares = [float(rows[0][name]) for name in ("clear", "nodule", "consolidation", "effusion")]
    assert sum(shares) == pytest.approx(1, abs=1e-4)


def test_a_federation_of_one_is_local_training(command: Command, phantoms: Path) -> None:
    """All ways of training keep the last model: nothing but the others can make a difference."""
    one = ("--site", phantoms / "north", "--set", "aggregate.quorum=1")
    code, text = command("run", DEMO, *one, *SHORT, "--compare", "--out", "run")
    assert code == 0, text
    results = json.loads(Path("run/report.json").read_text())["results"]
    assert results["federated"] == results["local"]


def test_a_pool_is_cut_by_patient_and_shown(command: Command, phantoms: Path) -> None:
    pool = ("--pool", phantoms / "north", "--partition", "dirichlet:0.5", "--sites", 3)
    code, text = command("run", DEMO, *pool, *SHORT, "--set", "aggregate.quorum=1", "--out", "run")
    assert code == 0, text
    ids = [set(path.read_text().split()) for path in Path("run/sites").glob("*/patients.txt")]
    assert len(ids) == 3
    assert sum(map(len, ids)) == len(set.union(*ids))
    assert all(f"site-{i}" in text for i in (1, 2, 3))


def test_seeds_are_summarised_and_completed(command: Command, phantoms: Path) -> None:
    two = [part for name in ("north", "south") for part in ("--site", phantoms / name)]
    short = (*SHORT, "--set", "aggregate.quorum=2")
    arguments = ("run", DEMO, *two, *short, "--seeds", "0,1", "--out", "runs")
    code, text = command(*arguments)
    assert code == 0, text
    assert "2 seeds" in text
    assert " ".join(text.split()).count(READ_OUTS) == 1 + 2  # the seeds together, and each
    summary = json.loads(Path("runs/summary.json").read_text())
    assert len(summary["overall"]["federated"]["balanced_accuracy"]) == 2
    assert set(summary["sites"]) == {"north", "south", "overall"}
    assert {gain["site"] for gain in summary["differences"]} <= {"north", "south", "overall"}
    assert "of each of 2 seeds: fewer than 5 make no interval" in " ".join(text.split())
    assert all(gain["estimate"] is None for gain in summary["differences"])
    assert {len(gain["values"]) for gain in summary["differences"]} == {2}
    before = Path("runs/seed-0/report.json").stat().st_mtime_ns
    shutil.rmtree("runs/seed-1")
    assert command(*arguments)[0] == 0
    assert Path("runs/seed-0/report.json").stat().st_mtime_ns == before
    assert Path("runs/seed-1/report.json").exists()


def test_check_validates_without_training(command: Command, site_options: list[str]) -> None:
    code, text = command("check", DEMO, *site_options)
    assert code == 0, text
    assert "a valid study" in text
    assert "north" in text
    assert not list(Path().iterdir())


def test_backbones_lists_each_choice(command: Command) -> None:
    code, text = command("backbones", "--classes", 7)
    assert code == 0
    # 512 features × 7 classes + 7 biases, four bytes each
    assert "3,591" in text
    assert "14,364" in text


# --- bad input: one clear line, no traceback, nothing half-written ---


def refused(command: Command, expected: str, *arguments: object) -> None:
    code, text = command(*arguments)
    assert code != 0
    assert expected in " ".join(text.split()), text
    assert "Traceback" not in text
    assert not list(Path().glob("run/report.json"))


@pytest.mark.parametrize(
    ("key", "expected"),
    [
        ("train.rouds=3", "train.rouds: expected a known key, got 'rouds'. Did you mean 'rounds'?"),
        ("train.rounds=none", "train.rounds: expected"),
        ("model.backbone=resnet81", "Did you mean 'resnet18'?"),
        ("model.unfreeze=last:99", "model.unfreeze: expected at most last:5"),
        ("model.unfreeze=some", "model.unfreeze: expected head, last:<k> or all, got 'some'"),
        (
            "model.weights=missing.pth",
            f"demo.yaml: model.weights: {DEMO.parent / 'missing.pth'}: expected a state dict",
        ),
        ("aggregate.strategy=fedavgg", "Did you mean 'fedavg'?"),
        ("aggregate.options.mu=1", "aggregate.options.mu: expected an option of fedavg"),
        ("images.size=16", "images.size: expected"),
        ("privacy.mechanism=dp_sdg", "'gaussian', got 'dp_sdg'. Did you mean 'dp_sgd'?"),
        ("privacy.mechanism=dp_sgd", "privacy.epsilon: expected a value, got nothing. Add the key"),
    ],
)
def test_a_wrong_study(key: str, expected: str, command: Command, site_options: list[str]) -> None:
    refused(command, expected, "check", DEMO, *site_options, "--set", key)
    refused(command, expected, "run", DEMO, *site_options, "--set", key, "--out", "run")
    assert not Path("run").exists()


def test_a_checkpoint_of_another_architecture(command: Command, site_options: list[str]) -> None:
    options = ("--set", "model.backbone=mobilenet_v2", "--out", "run")
    refused(command, "It fits shufflenet_v2_x0_5", "run", DEMO, *site_options, *options)
    save_file({"a": torch.zeros(3)}, "other.safetensors")
    options = ("--set", f"model.weights={Path('other.safetensors').resolve()}", "--out", "run")
    refused(command, "expected a checkpoint of shufflenet", "run", DEMO, *site_options, *options)
    assert not Path("run").exists()


def test_a_missing_folder(command: Command) -> None:
    refused(command, "nowhere: expected", "run", DEMO, "--site", "nowhere", "--out", "run")
    refused(command, "expected --site folders or one --pool", "run", DEMO, "--out", "run")
    refused(command, "nothing.yaml: expected a readable YAML file", "check", "nothing.yaml")
    refused(command, "expected the folder of a finished run", "predict", "nowhere", ".")
    assert not Path("run").exists()


def spoil(hospital: Path, change: Callable[[list[str]], list[str]]) -> None:
    """Rewrite the rows of a manifest."""
    path = hospital / "manifest.csv"
    header, *rows = path.read_text().splitlines()
    path.write_text("\n".join([header, *change(rows)]) + "\n")


def alone(hospital: Path) -> tuple[object, ...]:
    return (DEMO, "--site", hospital, *SHORT, "--set", "aggregate.quorum=1", "--out", "run")


def test_an_unknown_class(command: Command, hospital: Path) -> None:
    spoil(hospital, lambda rows: [rows[0].replace(rows[0].split(",")[1], "fracture"), *rows[1:]])
    refused(command, "fracture", "run", *alone(hospital))
    assert not Path("run").exists()


def test_a_class_missing_at_a_site_is_fine(command: Command, hospital: Path) -> None:
    spoil(hospital, lambda rows: [row for row in rows if ",nodule," not in row])
    code, text = command("run", *alone(hospital))
    assert code == 0, text
    assert " nan" not in text


def test_an_empty_site(command: Command, hospital: Path) -> None:
    spoil(hospital, lambda rows: [])
    refused(command, "expected", "run", *alone(hospital))
    assert not Path("run").exists()


def test_a_site_with_one_patient(command: Command, hospital: Path) -> None:
    """Its one patient trains; no figure can be given, and none is made up."""

    def one(rows: list[str]) -> list[str]:
        return [row for row in rows if row.split(",")[2] == rows[0].split(",")[2]]

    spoil(hospital, one)
    everyone = ("--set", "holdout.test=0", "--set", "holdout.validation=0")
    code, text = command("run", *alone(hospital), *everyone)
    assert code == 0, text
    assert "–" in text


def test_an_unreadable_image(command: Command, hospital: Path) -> None:
    first = sorted((hospital / "images").iterdir())[0]
    first.write_bytes(b"\x89PNG not really")
    refused(command, f"{first.name}", "run", *alone(hospital))
    assert not Path("run").exists()
    code, text = command("run", *alone(hospital), "--set", "images.unreadable=skip")
    assert code == 0, text
    assert "1 of" in text
    assert first.name in text


def test_resuming_another_study(command: Command, hospital: Path) -> None:
    assert command("run", *alone(hospital))[0] == 0
    Path("run/report.json").unlink()
    options = ("--resume", "run", "--set", "train.lr=0.5")
    refused(command, "expected the study this run began with", "run", DEMO, *options)
    refused(command, "expected a run folder", "run", "--resume", "nowhere")
    refused(command, "expected a new or empty folder", "run", *alone(hospital))


def test_a_folder_of_class_folders(command: Command, tmp_path: Path) -> None:
    for name in ("clear", "nodule", "consolidation", "effusion"):
        (tmp_path / "site" / name).mkdir(parents=True)
        for i in range(6):
            picture = Image.effect_noise((70, 60), 40 + i)
            picture.save(tmp_path / "site" / name / f"{name}{i}.png")
    code, text = command("run", *alone(tmp_path / "site"))
    assert code == 0, text


def test_real_data_by_its_readme_line(command: Command, shared: Path) -> None:
    """A round of the chest study on PneumoniaMNIST with real weights."""
    weights = shared / "weights/mobilenet_v2.pth"
    pool = ("--pool", shared / "data/pneumoniamnist/pneumoniamnist.npz", "--sites", 4)
    cut = ("--partition", "dirichlet:0.5", "--set", f"model.weights={weights}")
    few = ("--set", "train.rounds=1", "--set", "images.size=32")
    shallow = ("--set", "model.unfreeze=last:1", "--out", "run")
    code, text = command("run", CONFIGS / "chest.yaml", *pool, *cut, *few, *shallow)
    assert code == 0, text
    assert "overall" in text


# --- text from elsewhere, interruptions, places that cannot be written ---


def test_text_from_elsewhere_is_printed_as_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    plain = PlainConsole(markup=False, emoji=False, width=100)
    table = Table("[/e]")
    table.add_row("[red]\x1b[31mname")
    plain.print("node: it sent [/e]\x1b[31m :smile:", style="yellow")
    plain.print(table)
    text = capsys.readouterr().out
    assert "\x1b" not in text
    assert text.count("[/e]") == 2
    assert "[red]" in text
    assert ":smile:" in text


def test_classes_that_look_like_markup(command: Command, tmp_path: Path) -> None:
    classes = ["[/e]", "[bold]", "c", "d"]
    manifest = "".join(f"{i}.png,{classes[i % 4]},p{i}\n" for i in range(40))
    (tmp_path / "site").mkdir()
    (tmp_path / "site/manifest.csv").write_text("image,label,patient\n" + manifest)
    for i in range(40):
        Image.effect_noise((64, 64), 40 + i).save(tmp_path / f"site/{i}.png")
    names = ("--set", f"classes={json.dumps(classes)}")
    code, text = command("run", *alone(tmp_path / "site"), *names)
    assert code == 0, text
    assert "[/e]" in text
    assert "[bold]" in text
    (tmp_path / "site/[red].png").write_bytes(b"no image")
    code, text = command("predict", "run", tmp_path / "site")
    assert code == 0, text
    assert "[red].png" in text
    assert len(Path("predictions.csv").read_text().splitlines()) == 42


def interrupted(folder: Path, awaited: Path, *arguments: object) -> tuple[int, str]:
    """Exit code and words of a real process that got SIGINT once `awaited` was there."""
    code = "from simulations.cli.main import main; main()"
    process = subprocess.Popen(
        [sys.executable, "-c", code, *map(str, arguments)],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    deadline = time.monotonic() + 60
    while not awaited.exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=60)
    return process.returncode, said


@pytest.mark.system
def test_ctrl_c_says_how_to_go_on(site_options: list[str], tmp_path: Path) -> None:
    options = (*site_options, "--set", "train.rounds=10000", "--out")
    code, said = interrupted(tmp_path, tmp_path / "a/last.safetensors", "run", DEMO, *options, "a")
    assert code == 130, said
    assert said.strip() == "Stopped. Go on with: consilium-simulate run --resume a"


def test_places_that_cannot_be_written(command: Command, hospital: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    refused(command, "Not a directory", "run", *alone(hospital), "--cache", "file/cache")
    refused(command, "expected a folder to write", "run", *alone(hospital)[:-1], "file")
    assert not Path("run").exists()
    assert command("run", *alone(hospital))[0] == 0
    code, text = command("predict", "run", hospital / "images", "--out", "missing/x.csv")
    assert code == 1
    assert "missing/x.csv: expected to read and write here, got No such file or directory" in text


def test_a_quorum_beyond_the_hospitals(command: Command, site_options: list[str]) -> None:
    options = (*site_options, "--set", "aggregate.quorum=5")
    expected = "aggregate.quorum: expected at most 4, as many hospitals as train, got 5"
    refused(command, expected, "check", DEMO, *options)
    refused(command, expected, "run", DEMO, *options, "--seeds", "0,1", "--out", "run")
    assert not list(Path().iterdir())


def test_no_training_patient_is_refused_by_check_too(command: Command, hospital: Path) -> None:
    options = (*alone(hospital)[:-2], "--set", "holdout.test=0.99", "--set", "holdout.validation=0")
    refused(command, "hospital: expected at least one training patient", "check", *options)
    refused(command, "hospital: expected at least one training patient", "run", *options)
    assert not list(Path().glob("run*"))


def test_a_tiny_virtual_site_is_left_out(command: Command, phantoms: Path) -> None:
    pool = ("--pool", phantoms / "north", "--partition", "quantity:0.1", "--sites", 8)
    options = (*pool, *SHORT, "--set", "aggregate.quorum=1")
    code, text = command("run", DEMO, *options, "--out", "run")
    assert code == 0, text
    out = [f"site-{i}" for i in range(1, 9) if f"site-{i} is left out" in text]
    assert out
    assert not any(Path("run/sites", name).exists() for name in out)


def test_a_folder_names_its_site(command: Command, hospital: Path, tmp_path: Path) -> None:
    sites: list[object] = []
    for year in (2024, 2025):
        sites += ["--site", shutil.copytree(hospital, tmp_path / f"h.{year}")]
    code, text = command("check", DEMO, *sites, "--set", "aggregate.quorum=2")
    assert code == 0, text
    assert "h.2024" in text
    odd = shutil.copytree(hospital, tmp_path / "Site A")
    expected = f"--site {odd}: expected a folder whose name can name the site (letters, digits,"
    refused(command, expected, "check", DEMO, "--site", odd)


def test_sessions_end_with_their_seed(command: Command, site_options: list[str]) -> None:
    assert command("run", DEMO, *site_options, *SHORT, "--seeds", "0", "--out", "runs")[0] == 0
    gc.collect()
    assert not [kept for kept in gc.get_objects() if isinstance(kept, Session)]


def test_many_sites_are_cut_short(command: Command, shared: Path) -> None:
    pool = ("--pool", shared / "data/pneumoniamnist/pneumoniamnist.npz", "--sites", 41)
    weights = ("--set", f"model.weights={shared / 'weights/mobilenet_v2.pth'}")
    code, text = command("check", CONFIGS / "chest.yaml", *pool, *weights)
    assert code == 0, text
    assert "and 1 more" in text
