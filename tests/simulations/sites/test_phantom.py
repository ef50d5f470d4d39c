import csv
import json
from collections import defaultdict
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import balanced_accuracy_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import nn
from torchvision.models import shufflenet_v2_x0_5

from common.errors import RunError
from simulations.sites import phantom, pretrain
from simulations.sites.anatomy import BODY, LESION, POSE, SIDE, Chest, Scanner, traits

pytestmark = pytest.mark.numbers

Row = dict[str, str]


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("phantoms")
    phantom.write_phantoms(folder, patients=240)
    return folder


def rows(folder: Path, hospital: str) -> list[Row]:
    with (folder / hospital / "manifest.csv").open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def picture(folder: Path, hospital: str, row: Row) -> NDArray[np.uint8]:
    return np.asarray(Image.open(folder / hospital / row["image"]))


def content(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


def test_each_hospital_is_a_manifest_of_readable_grey_images(demo: Path) -> None:
    assert sorted(path.name for path in demo.iterdir()) == sorted(
        hospital.name for hospital in phantom.HOSPITALS
    )
    for hospital in phantom.HOSPITALS:
        table = rows(demo, hospital.name)
        assert set(table[0]) == {"image", "label", "patient", "scanner", "age"}
        assert len({row["image"] for row in table}) == len(table)
        assert len(list((demo / hospital.name / "images").iterdir())) == len(table)
        assert {row["scanner"] for row in table} == {hospital.model}
        for row in table[:5]:
            film = picture(demo, hospital.name, row)
            assert film.shape == (SIDE, SIDE)
            assert film.dtype == np.uint8
            assert film.std() > 20


def test_a_patient_has_one_to_nine_images_one_label_and_one_age(demo: Path) -> None:
    counts = []
    for hospital in phantom.HOSPITALS:
        patients: dict[str, list[Row]] = defaultdict(list)
        for row in rows(demo, hospital.name):
            patients[row["patient"]].append(row)
        assert len(patients) == round(240 * hospital.share)
        for images in patients.values():
            assert len({(row["label"], row["age"]) for row in images}) == 1
        counts += [len(images) for images in patients.values()]
    assert min(counts) == 1
    assert 5 < max(counts) <= phantom.MOST_IMAGES
    assert 2 < np.mean(counts) < 4


def test_a_patients_images_resemble_each_other_without_being_copies(demo: Path) -> None:
    own, others = [], []
    films: dict[str, list[NDArray[np.float64]]] = defaultdict(list)
    for row in rows(demo, "north"):
        films[row["patient"]].append(picture(demo, "north", row).astype(float))
    previous = next(iter(films.values()))[0]
    for images in films.values():
        own += [np.abs(a - b).mean() for a, b in pairwise(images)]
        others.append(np.abs(images[0] - previous).mean())
        previous = images[0]
    assert min(own) > 1
    assert np.mean(own) < np.mean(others)


def test_every_class_is_everywhere_but_in_other_proportions(demo: Path) -> None:
    mixes = []
    for hospital in phantom.HOSPITALS:
        label = {row["patient"]: row["label"] for row in rows(demo, hospital.name)}
        mixes.append([list(label.values()).count(name) / len(label) for name in phantom.CLASSES])
        assert np.abs(np.array(mixes[-1]) - hospital.mix).max() <= 1 / len(label)
    assert np.min(mixes) > 0
    rare = {
        name for mix in mixes for name, part in zip(phantom.CLASSES, mix, strict=True) if part < 0.1
    }
    assert rare == set(phantom.CLASSES), "each class is rare at one hospital"


def test_shares_and_mixes_add_up() -> None:
    assert sum(hospital.share for hospital in phantom.HOSPITALS) == pytest.approx(1)
    for hospital in phantom.HOSPITALS:
        assert sum(hospital.mix) == pytest.approx(1)
        assert len(hospital.mix) == len(phantom.CLASSES)


def test_scanners_film_the_same_chests_differently() -> None:
    rng = np.random.default_rng(0)
    film = Chest.posed(traits(rng, 20, BODY), traits(rng, 20, POSE)).attenuation()
    seen = [hospital.scanner.film(film, np.random.default_rng(1)) for hospital in phantom.HOSPITALS]
    for i, one in enumerate(seen):
        for other in seen[:i]:
            assert np.abs(one.astype(int) - other).mean() > 5
    still = Scanner(blur=0.0, noise=0.0).film(film, rng)
    blurred = Scanner(blur=1.5, noise=0.0).film(film, rng)
    assert np.abs(np.diff(blurred.astype(int))).mean() < np.abs(np.diff(still.astype(int))).mean()


@pytest.mark.parametrize("name", [*phantom.FINDINGS, *pretrain.FINDINGS])
def test_each_finding_changes_a_part_of_the_chest(name: str) -> None:
    rng = np.random.default_rng(0)
    chest = Chest.posed(traits(rng, 100, BODY), traits(rng, 100, POSE))
    finding = {**phantom.FINDINGS, **pretrain.FINDINGS}[name]
    added = finding(chest, traits(rng, 100, LESION))
    assert added.shape == chest.u.shape
    touched = (np.abs(added) > 0.05).mean(axis=(1, 2))
    if name == "clear":
        assert not added.any()
    else:
        assert (touched > 0.001).mean() > 0.9, "it can be seen"
        assert touched.max() < 0.5, "it leaves most of the chest alone"


def test_pretraining_never_sees_the_demos_findings() -> None:
    assert not set(phantom.FINDINGS) & set(pretrain.FINDINGS)


def test_the_seed_alone_decides(tmp_path: Path) -> None:
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        phantom.write_phantoms(tmp_path / name, seed=seed, patients=40)
    assert content(tmp_path / "a") == content(tmp_path / "b")
    assert content(tmp_path / "a") != content(tmp_path / "c")


def test_writing_again_touches_nothing(demo: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in demo.rglob("*")}
    phantom.write_phantoms(demo, patients=240)
    assert {path: path.stat().st_mtime_ns for path in demo.rglob("*")} == before


def test_an_interrupted_write_is_redone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    phantom.write_phantoms(tmp_path / "whole", patients=40)
    save, calls = Image.Image.save, 0

    def dies(self: Image.Image, *args: object) -> None:
        nonlocal calls
        calls += 1
        if calls == 60:
            raise KeyboardInterrupt
        save(self, *args)  # type: ignore[arg-type]

    with monkeypatch.context() as patched:
        patched.setattr(Image.Image, "save", dies)
        with pytest.raises(KeyboardInterrupt):
            phantom.write_phantoms(tmp_path / "torn", patients=40)
    assert not (tmp_path / "torn" / "west").exists()
    phantom.write_phantoms(tmp_path / "torn", patients=40)
    assert content(tmp_path / "torn") == content(tmp_path / "whole")


def test_other_phantoms_in_the_folder_are_refused(demo: Path, tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"expected phantoms .*'seed': 5.* Remove the folder"):
        phantom.write_phantoms(demo, seed=5, patients=240)
    (tmp_path / "north").mkdir()
    with pytest.raises(RunError, match="got none"):
        phantom.write_phantoms(tmp_path)
    with pytest.raises(RunError, match="at least 40 patients, got 4"):
        phantom.write_phantoms(tmp_path, patients=4)


def test_the_backbone_file_is_small_and_says_how_it_was_made() -> None:
    assert pretrain.WEIGHTS.stat().st_size <= 1_500_000
    with safe_open(pretrain.WEIGHTS, framework="pt") as file:
        metadata = file.metadata()
    recipe = json.loads(metadata["recipe"])
    assert metadata["architecture"] == "shufflenet_v2_x0_5"
    assert {"seed", "images", "epochs", "balanced_accuracy"} <= set(recipe)
    assert pretrained(shufflenet_v2_x0_5(num_classes=len(pretrain.FINDINGS)))


def pretrained(model: nn.Module) -> nn.Module:
    model.load_state_dict(load_file(pretrain.WEIGHTS), strict=True)
    return model


def settled(model: nn.Module) -> nn.Module:
    """Random weights with BatchNorm statistics of real inputs: a fairer rival than bare ones."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = None
    model.train()
    with torch.no_grad():
        model(pretrain.pixels(pretrain.films(200, 0)[0]))
    return model


def test_pretrained_features_find_what_random_ones_do_not(demo: Path) -> None:
    table = [(h.name, row) for h in phantom.HOSPITALS for row in rows(demo, h.name)]
    inputs = pretrain.pixels(np.stack([picture(demo, name, row) for name, row in table]))
    labels = np.array([row["label"] for _, row in table])
    test = np.array([int(row["patient"][1:]) % 3 == 0 for _, row in table])
    scores = {}
    for prepare in (pretrained, settled):
        torch.manual_seed(0)
        model = prepare(shufflenet_v2_x0_5(num_classes=len(pretrain.FINDINGS))).eval()
        model.fc = nn.Identity()
        with torch.inference_mode():
            features = model(inputs).numpy()
        probe = make_pipeline(StandardScaler(), LogisticRegression(C=0.01, max_iter=300))
        said = probe.fit(features[~test], labels[~test]).predict(features[test])
        scores[prepare.__name__] = balanced_accuracy_score(labels[test], said)
    assert scores["pretrained"] > scores["settled"] + 0.2, scores


def test_pretraining_learns_and_repeats_itself() -> None:
    pictures, shows = (torch.from_numpy(part) for part in pretrain.films(128, 0))
    first, second = (
        pretrain.train(pictures, shows.float(), seed=3, epochs=1, batch=32).state_dict()
        for _ in range(2)
    )
    assert all(torch.equal(first[key], second[key]) for key in first)
