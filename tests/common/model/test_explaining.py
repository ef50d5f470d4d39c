"""Grad-CAM is its formula for every backbone, and a picture shows the image beside it."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from captum.attr import LayerGradCam
from PIL import Image
from torch import Tensor

from client.cli.main import main
from common.model import backbones
from common.model.backbones import FeatureMap
from common.model.explaining import CAVEAT, compute_cam, draw_cam
from common.model.inference import ReleasedModel, load_model
from tests.builders import paint_noise, write_model

SIZES = {"inception_v3": 128, "vit_b_16": 224}
# Of DenseNet the slope is not the same at every place: a ReLU follows.
QUICK = ("densenet121", "shufflenet_v2_x0_5", "squeezenet1_1", "swin_t")

Main = Callable[..., tuple[int, str]]


def by_captum(model: ReleasedModel, pixels: Tensor, place: FeatureMap, position: int) -> Tensor:
    """An implementation of others, for features whose channels come first."""
    layer = LayerGradCam(model.network, model.network.get_submodule(place.module))
    found: Tensor = layer.attribute(pixels, target=position, relu_attributions=True)
    return found[0, 0].detach()


def by_hand(model: ReleasedModel, pixels: Tensor, place: FeatureMap, position: int) -> Tensor:
    """The formula, place by place, for features [h, w, C] or tokens [1 + h·w, C]."""
    kept: list[Tensor] = []
    module = model.network.get_submodule(place.module)
    hook = module.register_forward_hook(lambda _, given, output: kept.append(output))
    logit = model.network(pixels)[0, position]
    hook.remove()
    (slope,) = torch.autograd.grad(logit, kept[0])
    rows, slopes = kept[0][0].detach(), slope[0]
    if place.layout == "class token first":
        rows, slopes = rows[1:], slopes[1:]
    else:
        rows, slopes = rows.reshape(-1, rows.shape[-1]), slopes.reshape(-1, rows.shape[-1])
    side = int(len(rows) ** 0.5)
    sums = [float(max(0, rows[i] @ slopes.mean(0))) for i in range(len(rows))]
    return torch.tensor([sums[i * side : (i + 1) * side] for i in range(side)])


@pytest.mark.parametrize(
    "backbone",
    [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in backbones.names()],
)
def test_it_is_the_formula(backbone: str, tmp_path: Path) -> None:
    size = SIZES.get(backbone, 64)
    changes = {"model": {"backbone": backbone}, "images": {"size": size}}
    model = load_model(write_model(tmp_path / "run", classes=list("abcdefgh"), **changes))
    drawn = torch.Generator().manual_seed(0)
    square = torch.randint(0, 256, (3, size, size), dtype=torch.uint8, generator=drawn)
    pixels = model.preprocess.normalise(square[None])
    place = backbones.get(backbone).last_map
    oracle = by_captum if place.layout == "channels first" else by_hand
    expected = [oracle(model, pixels.requires_grad_(), place, k) for k in range(8)]
    found = [compute_cam(model, square, k) for k in range(8)]
    assert min(found[0].shape) > 1
    assert any(cam.max() > 0 for cam in found)
    for cam, other in zip(found, expected, strict=True):
        scale = float(other.max()) or 1.0
        assert torch.allclose(cam / scale, other / scale, atol=1e-4)


def test_places_stay_where_they_are() -> None:
    grid = torch.arange(12.0).view(1, 1, 3, 4)
    assert FeatureMap("x").to_channels_first(grid).equal(grid)
    last = grid.permute(0, 2, 3, 1)
    assert FeatureMap("x", "channels last").to_channels_first(last).equal(grid)
    tokens = torch.cat([torch.tensor([[[-1.0]]]), torch.arange(9.0).view(1, 9, 1)], dim=1)
    square = torch.arange(9.0).view(1, 1, 3, 3)
    assert FeatureMap("x", "class token first").to_channels_first(tokens).equal(square)


def test_a_picture_has_the_image_as_it_is_and_under_its_map() -> None:
    pixels = np.full((320, 320, 3), 100, np.uint8)
    square = torch.from_numpy(pixels).permute(2, 0, 1)
    cam = torch.zeros(4, 4)
    cam[0, 3] = 5.0  # above, on the right
    page = np.asarray(draw_cam(square, cam, "a caption"))
    assert (page[:320, :320] == 100).all()
    light = page[:320, 320:].sum(axis=2)
    assert light[0, -1] > light[-1, -1] == light[-1, 0] == light[0, 0]
    assert (page[320:] != 255).any()
    nothing = np.asarray(draw_cam(square, torch.zeros(4, 4), "a caption"))
    assert len(np.unique(nothing[:320, 320:].reshape(-1, 3), axis=0)) == 1


def test_each_image_that_is_read_gets_its_picture(run_main: Main, tmp_path: Path) -> None:
    run, images, out = write_model(tmp_path / "run"), tmp_path / "images", tmp_path / "cams"
    (images / "inner").mkdir(parents=True)
    for name in ("a.png", "inner/a.png", "inner/a.bmp"):
        Image.fromarray(paint_noise(1, "a")).save(images / name)
    (images / "bad.png").write_bytes(b"no image")
    options = ("--out", tmp_path / "p.csv", "--explain")
    code, text = run_main(main, "predict", run, images, *options, out)
    assert code == 0, text
    assert CAVEAT in " ".join(text.split())
    found = {path.relative_to(out).as_posix() for path in out.rglob("*.png")}
    assert found == {"a.png.cam.png", "inner/a.png.cam.png", "inner/a.bmp.cam.png"}
    code, text = run_main(main, "predict", run, images, *options, images / "cams")
    assert code == 1
    assert "expected a folder elsewhere than the images" in " ".join(text.split())
