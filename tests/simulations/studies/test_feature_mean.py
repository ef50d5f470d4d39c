"""Public feature means: averaged from images, named by a study, part of what all agree to."""

import json
import shutil

import pytest
import torch
from typer.testing import CliRunner

from common.config.study import Study
from common.errors import DataError, StudyError
from common.model.inference import load_model
from common.model.network import assemble
from server.app import app as server_app
from simulations.cli.main import app
from simulations.engines.grid import simulate_run
from simulations.studies import feature_mean
from tests.builders import (
    PHANTOM_CLASSES,
    client_app,
    create_run,
    find_phantoms,
    make_study,
    write_study,
)

pytestmark = pytest.mark.numbers

WIDTH = 1024
STUDY = {"classes": PHANTOM_CLASSES, "train": {"rounds": 1, "local_epochs": 1}}


def centred(**model):
    return make_study(**STUDY, model={"unit_features": True} | model)


def features(wanted, pixels):
    """What the linear layer reads."""
    network, seen = assemble(wanted, "none"), []
    head = network.model.get_submodule("fc")
    hook = head.linear.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    with torch.inference_mode():
        network.model(network.preprocess.normalise(pixels))
    hook.remove()
    return seen[0]


def test_the_command_averages_what_the_head_reads(phantoms, tmp_path):
    write_study(tmp_path, **STUDY, model={"unit_features": True})
    images = tmp_path / "public"
    (images / "deep").mkdir(parents=True)
    for i, path in enumerate(sorted((phantoms / "east" / "images").iterdir())[:70]):
        shutil.copy(path, images / ("deep" if i % 2 else "") / path.name)
    (images / "broken.png").write_bytes(b"not an image")
    arguments = ["feature-mean", str(tmp_path / "study.yaml"), str(images), "--out"]
    result = CliRunner().invoke(app, [*arguments, str(tmp_path / "mean.json")])
    assert result.exit_code == 0, result.output
    written = json.loads((tmp_path / "mean.json").read_text())
    count = len(list(images.rglob("*.png"))) - 1
    assert (written["backbone"], written["images"]) == ("shufflenet_v2_x0_5", count)
    plain = centred(unit_features=False)
    preprocess = assemble(plain, "none").preprocess
    paths = [path for path in images.rglob("*.png") if path.name != "broken.png"]
    pixels = torch.stack([preprocess.read(path.read_bytes(), "") for path in paths])
    mean = features(plain, pixels).mean(0)
    torch.testing.assert_close(torch.tensor(written["mean"]), mean, rtol=1e-4, atol=1e-6)
    seen = features(centred(feature_mean=written["mean"]), pixels)
    wanted = torch.nn.functional.normalize(features(plain, pixels) - mean)
    torch.testing.assert_close(seen, wanted, rtol=1e-3, atol=1e-5)


def test_a_study_names_the_file_and_carries_what_it_holds(tmp_path):
    numbers = [i / 7 for i in range(WIDTH)]
    (tmp_path / "mean.json").write_text(json.dumps({"mean": numbers}))
    model = {"unit_features": True, "feature_mean": "mean.json"}
    write_study(tmp_path, **STUDY, model=model)
    read = Study.read(tmp_path / "study.yaml")
    assert read.model.feature_mean == tuple(numbers)
    told = Study.model_validate_json(read.proposal())
    assert told.model.feature_mean == tuple(numbers)
    (tmp_path / "again.yaml").write_text(read.yaml())
    assert Study.read(tmp_path / "again.yaml").id == read.id


def test_it_is_part_of_what_all_agree_to():
    one, other = centred(feature_mean=[0.5] * WIDTH), centred(feature_mean=[0.5] * 1023 + [0.6])
    assert one.id != other.id
    first, second = (assemble(s, "none").contract for s in (one, other))
    assert first != second


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "expected a readable file, got .*mean.json: No such file"),
        ("{", "expected what consilium-simulate feature-mean writes, got something else"),
        ("[1, 2]", "expected what consilium-simulate feature-mean writes"),
        ('{"mean": ["a"]}', "feature_mean.0: expected"),
        ('{"mean": [NaN]}', "feature_mean.0: expected"),
    ],
)
def test_a_wrong_file_is_explained(tmp_path, content, said):
    if content:
        (tmp_path / "mean.json").write_text(content)
    model = {"unit_features": True, "feature_mean": "mean.json"}
    write_study(tmp_path, **STUDY, model=model)
    with pytest.raises(StudyError, match=said):
        Study.read(tmp_path / "study.yaml")


def test_a_mean_of_another_backbone_is_refused():
    with pytest.raises(StudyError, match=r"feature_mean: expected 1024 numbers.*got 5\. Make it"):
        assemble(centred(feature_mean=[1.0] * 5), "none")


def test_a_proposal_reads_no_file_of_a_hospital(tmp_path):
    """Numbers travel; a name that a server sends is no path here."""
    (tmp_path / "mean.json").write_text('{"mean": [1.0]}')
    path = f'"feature_mean":"{tmp_path}/mean.json"'
    text = centred().proposal().replace('"feature_mean":null', path)
    with pytest.raises(ValueError, match="feature_mean"):
        Study.model_validate_json(text)


def test_no_image_no_mean(tmp_path):
    with pytest.raises(DataError, match="expected a folder with images, got none"):
        feature_mean.write_feature_mean(centred(), tmp_path, tmp_path / "mean.json")


def test_the_released_model_subtracts_it_too(phantoms, tmp_path, new_process):
    wanted = centred(feature_mean=[0.1] * WIDTH)
    found = find_phantoms(phantoms, ["east", "north"])
    files = create_run(found, wanted, tmp_path / "run", tmp_path / "cache")
    new_process()
    simulate_run(server_app, client_app, files, tmp_path / "run")
    model = load_model(tmp_path / "run")
    image = next((phantoms / "east" / "images").iterdir())
    network = assemble(wanted, "none")
    network.load({n: dict(model.network.named_parameters())[n].data for n in network.trainable})
    pixels = network.preprocess.read(image.read_bytes(), "")[None]
    with torch.inference_mode():
        expected = network.model(network.preprocess.normalise(pixels))
    torch.testing.assert_close(model.logits([image]), expected)
