"""External validation: every labelled image of other hospitals, and nobody who trained."""

import csv
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from client.cli import main as client
from common.metrics.metrics import value
from common.model.inference import load_model
from server.runs.results import FEDERATED, read_evidence, read_results
from simulations.cli.main import main
from simulations.studies.external import NOT_FITTED
from tests.builders import CONFIGS, DEMO, PHANTOM_CLASSES, edit_site, write_site

pytestmark = pytest.mark.system

Command = Callable[..., tuple[int, str]]

TRAINED = ("east", "north", "south")


@pytest.fixture(scope="module")
def finished(phantoms: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run on three of the phantom hospitals; `west` is not in it."""
    folder = tmp_path_factory.mktemp("finished")
    sites = [option for name in TRAINED for option in ("--site", str(phantoms / name))]
    few = ("--set", "train.rounds=1", "--cache", str(folder / "cache"))
    arguments = ["run", str(DEMO), *sites, *few, "--out", str(folder / "run")]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["consilium-simulate", *arguments])
        with pytest.raises(SystemExit) as ended:
            main()
    assert not ended.value.code
    return folder / "run"


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    """A copy of the finished run, to be changed."""
    return Path(shutil.copytree(finished, tmp_path / "run"))


@pytest.fixture
def evaluate(run_main: Command, run: Path, caplog: pytest.LogCaptureFixture) -> Command:
    """Evaluates the run on hospitals, with options: exit code, all it printed and logged."""

    def command(*sites: Path, options: tuple[object, ...] = ()) -> tuple[int, str]:
        caplog.clear()
        named = [option for site in sites for option in ("--site", site)]
        cache = ("--cache", run.parent / "cache")
        code, text = run_main(main, "evaluate", run, *named, *cache, *options)
        return code, " ".join((text + caplog.text).split())

    return command


@pytest.fixture
def west(phantoms: Path, tmp_path: Path) -> Path:
    """A copy of the hospital that is not in the run, to be spoilt."""
    return Path(shutil.copytree(phantoms / "west", tmp_path / "west"))


def rewrite(site: Path, change: Callable[[int, dict[str, str]], dict[str, str]]) -> None:
    """Change every row of a hospital's manifest, by its number."""
    with (site / "manifest.csv").open(newline="") as file:
        rows = [change(i, row) for i, row in enumerate(csv.DictReader(file))]
    with (site / "manifest.csv").open("w", newline="") as file:
        table = csv.DictWriter(file, list(rows[0]))
        table.writeheader()
        table.writerows(rows)


def test_every_labelled_image_is_decided_as_by_the_released_model(
    evaluate: Command, run: Path, phantoms: Path
) -> None:
    code, text = evaluate(phantoms / "west")
    assert code == 0, text
    assert NOT_FITTED in text
    with (phantoms / "west/manifest.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    decided = load_model(run).decisions([phantoms / "west" / row["image"] for row in rows])
    confusion = np.zeros((4, 4), int)
    for row, called in zip(rows, decided.tolist(), strict=True):
        confusion[PHANTOM_CLASSES.index(row["label"]), called] += 1
    results, facts = read_results(run / "external/west", 4)
    assert (results[FEDERATED]["west"].confusion == confusion).all()
    assert facts["external"]["shared"] == {"west": {}}
    patients = len({row["patient"] for row in rows})
    assert facts["external"]["patients"] == {"west": patients}
    evidence = read_evidence(facts)["west"]
    assert (evidence.images, evidence.patients) == (len(rows), patients)
    figure = evidence.figures[FEDERATED]["balanced_accuracy"]
    assert figure is not None
    assert figure.value == pytest.approx(value(results[FEDERATED]["west"], "balanced_accuracy"))
    assert f"{patients} patients, 95 % intervals by patient" in text
    assert evaluate(phantoms / "west")[0] == 0  # the same report again


def test_a_hospital_that_trained_is_refused_under_any_name(
    evaluate: Command, run: Path, phantoms: Path, tmp_path: Path
) -> None:
    data = {"format": "manifest", "root": str(phantoms / "north")}
    alias = write_site(tmp_path / "alias", name="other", data=data)
    for site in (phantoms / "north", alias):
        code, text = evaluate(phantoms / "west", site)
        assert code == 1
        assert "expected a hospital that no round saw, got north of the run, which trained" in text
    assert not (run / "external").exists()


def test_a_hospital_that_only_evaluated_may_be_evaluated(
    evaluate: Command, run: Path, phantoms: Path
) -> None:
    edit_site(run / "sites/north/site.yaml", role="evaluate")
    assert evaluate(phantoms / "north")[0] == 0


def test_images_that_trained_elsewhere_are_counted_and_said(
    evaluate: Command, run: Path, phantoms: Path, tmp_path: Path
) -> None:
    west = Path(shutil.copytree(phantoms / "west", tmp_path / "west"))
    first = next(iter(sorted((phantoms / "north/images").iterdir())))
    shutil.copy(first, sorted((west / "images").iterdir())[0])
    code, text = evaluate(west)
    assert code == 0, text
    count = len(list((west / "images").iterdir()))
    assert f"west: 1 of {count} images are also images of north, which trained" in text
    facts = read_results(run / "external/west", 4)[1]["external"]
    assert facts["shared"] == {"west": {"north": 1}}


def test_an_image_that_cannot_be_read_is_named_and_counted(
    evaluate: Command, run: Path, west: Path
) -> None:
    spoilt, *rest = sorted((west / "images").iterdir())
    spoilt.write_bytes(b"no image")
    code, text = evaluate(west)
    assert code == 0, text
    assert spoilt.name in text.replace(" ", "")
    results, facts = read_results(run / "external/west", 4)
    assert facts["external"]["unreadable"] == {"west": 1}
    assert results[FEDERATED]["west"].n == len(rest)


def test_fewer_classes_are_fine_and_an_unknown_one_is_named(
    evaluate: Command, run: Path, west: Path
) -> None:
    rewrite(west, lambda _, row: row | {"label": "clear"})
    assert evaluate(west)[0] == 0
    counts = read_results(run / "external/west", 4)[0][FEDERATED]["west"]
    assert counts.confusion[1:].sum() == 0
    rewrite(west, lambda i, row: row | {"label": "clear" if i else "fracture"})
    code, text = evaluate(west)
    assert code == 1
    assert "'fracture' (1)" in text


def test_a_part_is_that_of_the_data(evaluate: Command, run: Path, west: Path) -> None:
    code, text = evaluate(west, options=("--part", "test"))
    assert code == 1
    assert "expected images that the data puts into its test part, got none" in text
    patients: dict[str, str] = {}

    def cut(_: int, row: dict[str, str]) -> dict[str, str]:
        split = patients.setdefault(row["patient"], "train" if len(patients) % 3 else "test")
        return row | {"split": split}

    rewrite(west, cut)
    assert evaluate(west, options=("--part", "test"))[0] == 0
    facts = read_results(run / "external/west", 4)[1]["external"]
    assert facts["part"] == "test"
    assert facts["patients"] == {"west": list(patients.values()).count("test")}
    assert evaluate(west)[0] == 0
    facts = read_results(run / "external/west", 4)[1]["external"]
    assert facts["patients"] == {"west": len(patients)}


def test_reports_say_where_the_model_was_validated(
    run_main: Command, evaluate: Command, run: Path, phantoms: Path
) -> None:
    def report(folder: Path) -> str:
        assert run_main(main, "report", folder)[0] == 0
        return (folder / "report.html").read_text()

    assert "No external validation" in report(run)
    assert evaluate(phantoms / "west")[0] == 0
    assert "External validation is in reports of its own: west" in report(run)
    page = (run / "external/west/report.html").read_text()
    assert "External validation: nothing was fitted to these hospitals" in page


def test_no_other_run_is_written_over(evaluate: Command, run: Path, phantoms: Path) -> None:
    before = (run / "report.json").read_bytes()
    code, text = evaluate(phantoms / "west", options=("--out", run))
    assert code == 1
    assert "Choose another with --out" in text
    assert (run / "report.json").read_bytes() == before


def test_a_hospital_evaluates_a_model_at_home(
    run_main: Command, run: Path, phantoms: Path, tmp_path: Path
) -> None:
    data = {"format": "manifest", "root": str(phantoms / "west")}
    site = write_site(tmp_path / "ward", data=data)
    code, text = run_main(client.main, "evaluate", run, "--site", site)
    assert code == 0, text
    with (phantoms / "west/manifest.csv").open(newline="") as file:
        count = len(list(csv.DictReader(file)))
    assert f"{count} images of" in text
    assert "nothing left this site" in text
    assert not (tmp_path / "ward/state/ledger.jsonl").exists()


def test_at_a_site_of_the_study_only_its_test_patients_count(run_main: Command, run: Path) -> None:
    report = json.loads((run / "report.json").read_text())
    tested = report["results"][FEDERATED]["sites"]["north"]
    site = run / "sites/north/site.yaml"
    code, text = run_main(client.main, "evaluate", run, "--site", site)
    assert code == 0, text
    assert f"{tested['images']} images of" in text
    assert f"balanced accuracy  {tested['balanced_accuracy']:.3f}" in text


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_fourth_real_site_is_read_far_above_chance(
    run_main: Command, shared: Path, tmp_path: Path
) -> None:
    """Three clinics train; the fourth, with another camera, has all its images tested."""
    *trained, other = (
        shared / "data/skin_sites" / name
        for name in ("rosendahl", "vidir_modern", "vidir_molemax", "vienna_dias")
    )
    weights = ("--set", f"model.weights={shared / 'weights/squeezenet1_0.pth'}")
    cache = ("--cache", tmp_path / "cache")
    sites = [option for site in trained for option in ("--site", site)]
    few = ("--set", "train.rounds=1", "--set", "images.augment={}")
    options = (*sites, *weights, *few, *cache, "--out", tmp_path / "run")
    assert run_main(main, "run", CONFIGS / "skin.yaml", *options)[0] == 0
    code, text = run_main(main, "evaluate", tmp_path / "run", "--site", other, *cache)
    assert code == 0, text
    results, facts = read_results(tmp_path / "run/external/vienna_dias", 7)
    counts = results[FEDERATED]["vienna_dias"]
    assert counts.n == 174
    auroc, balanced = value(counts, "auroc"), value(counts, "balanced_accuracy")
    assert auroc is not None
    assert auroc > 0.75
    assert balanced is not None
    assert balanced > 2 / 7
    assert facts["external"]["shared"] == {"vienna_dias": {}}
