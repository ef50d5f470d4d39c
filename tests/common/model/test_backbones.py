"""Every registered backbone: its head, blocks, choices, preprocessing and weights."""

import hashlib
from functools import cache
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torchvision import models

from common.errors import BackboneError, StudyError
from common.model import backbones
from common.model.backbones import Backbone, Head

pytestmark = pytest.mark.numbers

SHA256 = {
    "squeezenet1_0": "57e921082f5f1717e26b4fadb9c0d631e1b2e4115a00e32c2953597b75fb733f",
    "mobilenet_v2": "d605d7b555ef853043686028885f653e5e6947a89748d916a4cc687f8a2490ac",
}

every_backbone = pytest.mark.parametrize("name", backbones.names())


@cache
def outline(name: str) -> tuple[Backbone, nn.Module]:
    """The model without memory for its parameters: enough to read names and shapes."""
    return backbones.get(name), backbones.get(name)._outline(classes=3)


def build(name: str, weights: Path | str, **options: object) -> nn.Module:
    settings = {"classes": 3, "dropout": 0.0, "seed": 1, **options}
    return backbones.get(name).build(weights=str(weights), **settings)


def torchvision_state(name: str) -> dict[str, Tensor]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        return models.get_model(name).state_dict()


@every_backbone
def test_every_parameter_is_in_exactly_one_block_or_the_head(name: str) -> None:
    backbone, model = outline(name)
    parts = [backbone.head, *(module for block in backbone.blocks for module in block.modules)]
    for key, _ in model.named_parameters():
        owners = [part for part in parts if key == part or key.startswith(f"{part}.")]
        assert len(owners) == 1, (key, owners)
    assert len({block.name for block in backbone.blocks}) == len(backbone.blocks)


@every_backbone
def test_head_is_a_zero_linear_layer_on_the_pooled_features(name: str) -> None:
    backbone, model = outline(name)
    head = model.get_submodule(backbone.head)
    assert isinstance(head, Head)
    assert [child for child, _ in head.named_children()] == ["dropout", "linear"]
    assert head.linear.weight.shape == (3, backbone.width)
    fresh = Head(backbone.width, classes=3, dropout=0.25)
    assert not fresh.linear.weight.any()
    assert not fresh.linear.bias.any()
    assert fresh.dropout.p == 0.25


@every_backbone
def test_head_is_the_only_dropout(name: str) -> None:
    model = outline(name)[1]
    active = [key for key, part in model.named_modules() if getattr(part, "p", 0) and "drop" in key]
    assert active == []


@every_backbone
def test_unfreezing_deeper_adds_whole_blocks(name: str) -> None:
    backbone, model = outline(name)
    order = [key for key in model.state_dict() if key in dict(model.named_parameters())]
    head = [f"{backbone.head}.linear.weight", f"{backbone.head}.linear.bias"]
    before = backbone.trainable(model, "head")
    assert list(before) == head
    for k, block in enumerate(reversed(backbone.blocks), start=1):
        names = backbone.trainable(model, f"last:{k}")
        assert list(names) == [key for key in order if key in names]
        added = set(names) - set(before)
        assert added == {
            key for key in order if any(f"{key}.".startswith(f"{m}.") for m in block.modules)
        }
        assert added
        before = names
    assert list(before) == list(backbone.trainable(model, "all")) == order


@every_backbone
def test_choices_count_what_is_trained(name: str) -> None:
    backbone, model = outline(name)
    choices = backbone.choices(classes=3)
    assert list(choices)[:2] == ["head", "last:1"]
    assert choices["head"] == 3 * backbone.width + 3
    assert list(choices.values()) == sorted(choices.values())
    assert choices["all"] == sum(parameter.numel() for parameter in model.parameters())


def test_batchnorm_of_an_unfrozen_block_trains_but_its_buffers_do_not() -> None:
    backbone, model = outline("resnet18")
    names = backbone.trainable(model, "last:1")
    assert {"layer4.1.bn2.weight", "layer4.1.bn2.bias"} < set(names)
    assert not any("running" in name or "num_batches" in name for name in names)


def test_unfreezing_more_than_there_is_names_the_largest() -> None:
    backbone, model = outline("resnet18")
    with pytest.raises(StudyError, match=r"model\.unfreeze: expected at most last:5 for resnet18"):
        backbone.trainable(model, "last:6")


def test_unknown_backbone_names_the_nearest() -> None:
    with pytest.raises(StudyError, match=r"model\.backbone: .* Did you mean 'resnet50'\?"):
        backbones.get("resnet05")


@every_backbone
def test_preprocessing_is_torchvisions_own(name: str) -> None:
    own = models.get_model_weights(name).DEFAULT.transforms()
    for weights in ("DEFAULT", "none", "some/file.pth"):
        preprocess = backbones.get(name).preprocess(weights)
        assert [preprocess.resize] == own.resize_size
        assert [preprocess.crop] == own.crop_size
        assert list(preprocess.mean) == own.mean
        assert list(preprocess.std) == own.std
        assert preprocess.interpolation == own.interpolation.value


def test_a_published_file_brings_its_own_preprocessing() -> None:
    vgg = backbones.get("vgg16")
    caffe = vgg.preprocess("weights/vgg16_features-amdegroot-88682ab5.pth")
    assert caffe.std == pytest.approx((1 / 255,) * 3)
    assert backbones.get("resnet50").preprocess("resnet50-0676ba61.pth").resize == 256
    assert backbones.get("resnet50").preprocess("DEFAULT").resize == 232


@pytest.mark.parametrize(("name", "good", "bad"), [("vit_b_16", 224, 96), ("inception_v3", 75, 64)])
def test_a_size_the_architecture_cannot_take_is_refused(name: str, good: int, bad: int) -> None:
    backbone = backbones.get(name)
    backbone.check_size(good)
    usual = backbone.preprocess("DEFAULT").crop
    with pytest.raises(StudyError, match=rf"images\.size: .*{name}.* such as {usual}, got {bad}"):
        backbone.check_size(bad)


@every_backbone
def test_every_backbone_takes_its_own_size(name: str) -> None:
    backbones.get(name).check_size(backbones.get(name).preprocess("DEFAULT").crop)


def test_random_weights_follow_the_seed_and_leave_the_global_generator_alone() -> None:
    before = torch.get_rng_state()
    one, same, other = (build("shufflenet_v2_x0_5", "none", seed=s) for s in (1, 1, 2))
    assert torch.equal(before, torch.get_rng_state())
    key = "stage2.0.branch1.0.weight"
    assert torch.equal(one.get_parameter(key), same.get_parameter(key))
    assert not torch.equal(one.get_parameter(key), other.get_parameter(key))
    assert not one.training


@every_backbone
def test_a_torchvision_checkpoint_fits_whatever_its_head(name: str) -> None:
    options = {"init_weights": True} if name == "inception_v3" else {}
    with torch.device("meta"):
        theirs = models.get_model(name, num_classes=7, **options).state_dict()
    assert backbones.get(name)._fit(theirs).exact


@pytest.mark.parametrize("name", ["squeezenet1_1", "mobilenet_v3_small", "resnet18"])
def test_loaded_weights_are_the_files(name: str, tmp_path: Path) -> None:
    state = torchvision_state(name)
    torch.save(state, tmp_path / "w.pth")
    before = torch.get_rng_state()
    model = build(name, tmp_path / "w.pth")
    assert torch.equal(before, torch.get_rng_state())
    head = f"{backbones.get(name).head}."
    own = {key: tensor for key, tensor in model.state_dict().items() if not key.startswith(head)}
    assert own.keys() == {key for key in state if not key.startswith(head)}
    assert all(torch.equal(tensor, state[key]) for key, tensor in own.items())
    assert not model.get_parameter(f"{head}linear.weight").any()
    assert not model.training
    assert model(torch.zeros(1, 3, 32, 32)).shape == (1, 3)


def test_safetensors_and_half_precision_become_float32(tmp_path: Path) -> None:
    state = torchvision_state("squeezenet1_1")
    save_file({key: tensor.bfloat16() for key, tensor in state.items()}, tmp_path / "w.safetensors")
    model = build("squeezenet1_1", tmp_path / "w.safetensors")
    loaded = model.get_parameter("features.0.weight")
    assert loaded.dtype == torch.float32
    assert torch.equal(loaded, state["features.0.weight"].bfloat16().float())


def test_the_names_of_older_torchvision_releases_load(tmp_path: Path) -> None:
    state = torchvision_state("densenet121")
    old = {
        key.replace("norm1", "norm.1").replace("conv2", "conv.2"): tensor
        for key, tensor in state.items()
        if not key.endswith("num_batches_tracked")
    }
    assert "features.denseblock1.denselayer1.norm.1.weight" in old
    torch.save(old, tmp_path / "w.pth")
    model = build("densenet121", tmp_path / "w.pth")
    key = "features.denseblock4.denselayer16.conv2.weight"
    assert torch.equal(model.get_parameter(key), state[key])
    assert model.get_buffer("features.norm0.num_batches_tracked").device.type == "cpu"
    with torch.device("meta"):
        vit = models.vit_b_16().state_dict()
    older = {k.replace("mlp.0", "mlp.linear_1").replace("mlp.3", "mlp.linear_2"): k for k in vit}
    torch.save({key: torch.zeros(1) for key in older}, tmp_path / "vit.pth")
    with pytest.raises(BackboneError, match=r"got \d+ mis-shaped"):
        build("vit_b_16", tmp_path / "vit.pth")


def test_another_architecture_is_named(tmp_path: Path) -> None:
    path = tmp_path / "w.pth"
    torch.save(torchvision_state("squeezenet1_1"), path)
    with pytest.raises(BackboneError) as caught:
        build("resnet18", path)
    text = str(caught.value)
    assert text.startswith(f"{path}: expected a checkpoint of resnet18, got ")
    assert "missing (such as conv1.weight)" in text
    assert "unexpected (such as features.0.weight)" in text
    assert text.endswith("It fits squeezenet1_1: change model.backbone or model.weights.")
    assert "\n" not in text


def test_wrong_shapes_and_kinds_are_counted(tmp_path: Path) -> None:
    state = torchvision_state("squeezenet1_1")
    state["features.0.weight"] = torch.zeros(1)
    state["features.0.bias"] = state["features.0.bias"].to(torch.int8)
    torch.save(state, tmp_path / "w.pth")
    with pytest.raises(BackboneError, match=r"got 2 mis-shaped \(such as features\.0\.weight\)$"):
        build("squeezenet1_1", tmp_path / "w.pth")


@pytest.mark.parametrize("content", [[1, 2], {"state_dict": {"a": torch.zeros(1)}}, torch.zeros(2)])
def test_what_is_not_a_state_dict_is_refused(content: object, tmp_path: Path) -> None:
    torch.save(content, tmp_path / "w.pth")
    with pytest.raises(BackboneError, match=r"w\.pth: expected a state dict .* Save it by torch"):
        build("resnet18", tmp_path / "w.pth")


def test_code_in_a_checkpoint_is_refused_not_run(tmp_path: Path) -> None:
    torch.save(nn.Linear(2, 2), tmp_path / "w.pth")
    with pytest.raises(BackboneError, match="not only tensors"):
        build("resnet18", tmp_path / "w.pth")


@pytest.mark.parametrize(
    ("name", "value", "good"),
    [
        ("bn1.running_var", 900.0, True),
        ("bn1.running_var", -1e-3, False),
        ("bn1.running_var", 2e6, False),
        ("bn1.running_mean", float("nan"), False),
        ("layer1.0.conv1.weight", float("inf"), False),
        ("layer1.0.conv1.weight", -2e4, False),
    ],
)
def test_numbers_that_no_training_leaves_are_refused(
    name: str, value: float, good: bool, tmp_path: Path
) -> None:
    state = torchvision_state("resnet18")
    state[name].view(-1)[-1] = value
    torch.save(state, tmp_path / "w.pth")
    if good:
        assert build("resnet18", tmp_path / "w.pth").get_buffer(name).view(-1)[-1] == value
        return
    with pytest.raises(BackboneError, match=rf"got others in {name}\. Take the checkpoint"):
        build("resnet18", tmp_path / "w.pth")


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_damaged_and_missing_files_are_named(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"w{suffix}"
    with pytest.raises(BackboneError, match=rf"w{suffix}: .* got No such file or directory"):
        build("squeezenet1_1", path)
    state = {key: tensor.contiguous() for key, tensor in torchvision_state("squeezenet1_1").items()}
    (save_file if suffix == ".safetensors" else torch.save)(state, path)
    whole = path.read_bytes()
    for content in (whole[: len(whole) // 2], b"", b"not a checkpoint"):
        path.write_bytes(content)
        with pytest.raises(BackboneError, match=rf"w{suffix}: .* damaged, incomplete"):
            build("squeezenet1_1", path)
    path.unlink()
    path.mkdir()
    with pytest.raises(BackboneError, match="Is a directory"):
        build("squeezenet1_1", path)


def test_default_weights_come_from_torchvisions_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    state = torchvision_state("squeezenet1_1")
    cached = tmp_path / "hub/checkpoints" / Path(models.SqueezeNet1_1_Weights.DEFAULT.url).name
    cached.parent.mkdir(parents=True)
    torch.save(state, cached)
    model = build("squeezenet1_1", "DEFAULT")
    assert torch.equal(model.get_parameter("features.0.weight"), state["features.0.weight"])


def test_a_failed_download_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")  # nobody listens: no network needed
    with pytest.raises(BackboneError, match=r"a download of https://.*name it in model\.weights"):
        build("squeezenet1_1", "DEFAULT")


@pytest.mark.parametrize("name", SHA256)
def test_real_pretrained_weights_load(name: str, shared: Path) -> None:
    path = shared / "weights" / f"{name}.pth"
    assert hashlib.sha256(path.read_bytes()).hexdigest() == SHA256[name]
    model = build(name, path)
    state = torch.load(path, weights_only=True)
    own = {key: t for key, t in model.state_dict().items() if not key.startswith("classifier.")}
    assert own.keys() == {key for key in state if not key.startswith("classifier.")}
    assert all(torch.equal(tensor, state[key]) for key, tensor in own.items())


def test_real_weights_of_another_architecture_are_named(shared: Path) -> None:
    with pytest.raises(BackboneError, match="It fits mobilenet_v2"):
        build("resnet18", shared / "weights/mobilenet_v2.pth")
