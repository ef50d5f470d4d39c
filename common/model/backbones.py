"""Backbones: torchvision's pretrained classifiers with one new head, cut into named blocks.

Adding a backbone is one line in `_BACKBONES`.
"""

import math
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn
from torchvision import models

from common.errors import BackboneError, StudyError, did_you_mean
from common.model import weights as checkpoints
from common.model.images import Preprocess
from common.model.weights import Fit


class Centre(nn.Module):
    """Each image's features less their public mean [width], a frozen tensor of the study."""

    mean: torch.Tensor

    def __init__(self, mean: torch.Tensor) -> None:
        super().__init__()
        self.register_buffer("mean", mean)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """[n, width] → [n, width]."""
        return features - self.mean


class UnitNorm(nn.Module):
    """Each image's features, scaled to length 1: no image pulls harder for having large ones."""

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """[n, width] → [n, width]."""
        return nn.functional.normalize(features)


class Whiten(nn.Module):
    """Features in a few directions, spread alike in all of them, each image scaled to length 1.

    Empty at first: the tensors travel with the head that reads the features.
    """

    basis: torch.Tensor
    centre: torch.Tensor
    matrix: torch.Tensor

    def __init__(self, width: int, directions: int) -> None:
        super().__init__()
        self.register_buffer("basis", torch.zeros(directions, width))
        self.register_buffer("centre", torch.zeros(directions))
        self.register_buffer("matrix", torch.zeros(directions, directions))

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """[n, width] → [n, directions]."""
        projected = nn.functional.normalize(features @ self.basis.T)
        return nn.functional.normalize((projected - self.centre) @ self.matrix.T)


class Head(nn.Sequential):
    """Centre → UnitNorm → Whiten → Dropout → Linear on pooled features [n, width].

    The first three only where the study asks for them; logits [n, classes].

    Zero at first: every class starts equally likely, whatever the seed, and with or without noise
    the first step is already useful.
    """

    def __init__(
        self,
        width: int,
        classes: int,
        dropout: float,
        *,
        mean: Sequence[float] | None = None,
        unit: bool = False,
        directions: int | None = None,
    ) -> None:
        with torch.device("meta"):  # draws nothing from the global generator
            linear = nn.Linear(directions or width, classes)
        linear.to_empty(device="cpu")
        nn.init.zeros_(linear.weight)
        nn.init.zeros_(linear.bias)
        layers: OrderedDict[str, nn.Module] = OrderedDict()
        if mean is not None:
            layers["centre"] = Centre(torch.tensor(mean, dtype=torch.float32))
        if unit:
            layers["unit"] = UnitNorm()
        if directions:
            layers["whiten"] = Whiten(width, directions)
        layers |= {"dropout": nn.Dropout(dropout), "linear": linear}
        super().__init__(layers)


@dataclass(frozen=True)
class Block:
    """One of an architecture's own stages: a name, and the modules or parameters in it."""

    name: str
    modules: tuple[str, ...]


@dataclass(frozen=True)
class FeatureMap:
    """The output of a module whose features still have places in the image."""

    module: str
    layout: Literal["channels first", "channels last", "class token first"] = "channels first"
    """[n, C, h, w], [n, h, w, C], or tokens [n, 1 + h·w, C] of a square."""

    def to_channels_first(self, features: torch.Tensor) -> torch.Tensor:
        """Whatever its layout → [n, C, h, w]."""
        if self.layout == "class token first":
            side = math.isqrt(features.shape[1] - 1)
            features = features[:, 1:].unflatten(1, (side, side))
        return features if self.layout == "channels first" else features.permute(0, 3, 1, 2)


@dataclass(frozen=True)
class Backbone:
    """A pretrained image classifier whose own head is replaced by ours."""

    name: str
    make: Callable[[], nn.Module]
    """torchvision's model, randomly initialised, its pooled features ready for the head."""
    head: str
    """Module path of our head: the place of torchvision's own."""
    width: int
    """Number of pooled features the head reads."""
    blocks: tuple[Block, ...]
    """From input to output; with the head they hold every parameter once."""
    dropped: tuple[str, ...] = ()
    """Prefixes of checkpoint keys that are not used, beside the head's own."""
    map: FeatureMap | None = None
    """The last features that have places; by default the last block's, channels first."""

    def build(
        self,
        *,
        classes: int,
        dropout: float,
        weights: str,
        seed: int,
        mean: Sequence[float] | None = None,
        unit: bool = False,
        directions: int | None = None,
    ) -> nn.Module:
        """The classifier in eval mode: normalised images [n, 3, H, W] → logits [n, classes].

        Args:
          classes: number of logits.
          dropout: probability in the head, in [0, 1).
          weights: `DEFAULT` (torchvision's own), `none` (random), or a checkpoint file.
          seed: draws the random weights of `none`; the global generators are left alone.
          mean: subtracted from each image's features before the head, `width` numbers.
          unit: then scale them to length 1.
          directions: then whiten them in so many.

        Raises:
          BackboneError: the weights cannot be had, read, or belong to another architecture.
        """
        if weights == "none":
            with torch.random.fork_rng(devices=[]):
                torch.default_generator.manual_seed(seed)
                model = self.make()
        else:
            model = self._load(weights)
        head = Head(self.width, classes, dropout, mean=mean, unit=unit, directions=directions)
        model.set_submodule(self.head, head)
        return model.eval()

    def _load(self, weights: str) -> nn.Module:
        """The architecture holding the given weights, its own head left without any."""
        model = self._outline()
        model.load_state_dict(self.read_weights(weights), strict=False, assign=True)
        return model

    def read_weights(self, weights: str) -> dict[str, torch.Tensor]:
        """The tensors that this architecture takes from `DEFAULT` or a file, all but the head's.

        Raises:
          BackboneError: they cannot be had or read, or belong to another architecture.
        """
        state = self._read(weights)
        fit = self._fit(state)
        if not fit.exact:
            owners = [other.name for other in _BACKBONES if other._fit(state).exact]
            remedy = (
                f"It fits {owners[0]}: change model.backbone or model.weights." if owners else ""
            )
            expected = f"a checkpoint of {self.name}"
            raise BackboneError(weights, expected=expected, got=f"{fit}", remedy=remedy)
        if absurd := checkpoints.find_absurd(fit.tensors):
            most, variance = checkpoints.LARGEST, checkpoints.LARGEST_VARIANCE
            expected = f"numbers within ±{most:g}, and variances from 0 to {variance:g}"
            remedy = "Take the checkpoint as it was published."
            got = f"others in {absurd[0]}"
            raise BackboneError(weights, expected=expected, got=got, remedy=remedy)
        return fit.tensors

    def read_classifier(self, weights: str) -> torch.Tensor | None:
        """What the weights' own head multiplies features by, [n, width]; None if there is none.

        Raises:
          BackboneError: they cannot be had or read.
        """
        if weights == "none":
            return None
        for name, tensor in self._read(weights).items():
            matrix = tensor.flatten(1) if tensor.ndim in (2, 4) else tensor
            if name.startswith(f"{self.head}.") and matrix.shape[1:] == (self.width,):
                return matrix.float() if matrix.isfinite().all() else None
        return None

    def _read(self, weights: str) -> dict[str, torch.Tensor]:
        """All that `DEFAULT` or a file holds."""
        if weights == "DEFAULT":
            return checkpoints.download(self._published(weights))
        return checkpoints.read(Path(weights))

    def check_sent(self, path: Path) -> None:
        """Refuse a file that was sent unless it is what `read_weights` makes, by its header alone.

        Raises:
          BackboneError: it is not of safetensors, or has other names, shapes or types.
        """
        outline = checkpoints.read_outline(path)
        fit = self._fit(outline)
        good = [n for n, fitting in fit.tensors.items() if fitting.dtype == outline[n].dtype]
        if not fit.exact or (other := sorted(outline.keys() - good)):
            expected, got = f"the tensors of {self.name}", f"{fit}" or f"another {other[0]}"
            raise BackboneError(path, expected=expected, got=got)

    @property
    def last_map(self) -> FeatureMap:
        """The last features that have places in the image."""
        return self.map or FeatureMap(self.blocks[-1].modules[-1])

    @property
    def largest_sent(self) -> int:
        """Bytes that no file of `read_weights` exceeds."""
        state = self._outline().state_dict()
        numbers = sum(int(t.numel()) * t.element_size() for t in state.values())
        return int(numbers) + checkpoints.LARGEST_HEADER

    @property
    def own_file(self) -> Path:
        """Where this machine has torchvision's own weights of it, once they are downloaded."""
        return Path(torch.hub.get_dir(), "checkpoints", Path(self._published("DEFAULT").url).name)

    def _fit(self, state: dict[str, torch.Tensor]) -> Fit:
        return Fit.of(state, self._outline(), ignore=(f"{self.head}.", *self.dropped))

    def _outline(self, classes: int = 1) -> nn.Module:
        """The model without memory for its parameters: made at once, and nothing is drawn."""
        with torch.device("meta"):
            model = self.make()
        model.set_submodule(self.head, Head(self.width, classes, dropout=0.0).to("meta"))
        return model

    def _published(self, weights: str) -> Any:
        """The entry of torchvision for `weights`: the one whose file it is, or else its default."""
        entries = models.get_model_weights(self.name)
        file = Path(weights).name
        return next((e for e in entries if Path(e.url).name == file), entries.DEFAULT)

    def preprocess(self, weights: str) -> Preprocess:
        """The resize, crop and normalisation that `weights` were trained with.

        A file under the name torchvision publishes it by brings its own; anything else has the
        architecture's default.
        """
        own = self._published(weights).transforms()
        return Preprocess(
            resize=own.resize_size[0],
            crop=own.crop_size[0],
            mean=tuple(own.mean),
            std=tuple(own.std),
            interpolation=own.interpolation.value,
        )

    def check_size(self, size: int) -> None:
        """Refuse square images of a side, in pixels, that the architecture cannot take.

        Raises:
          StudyError: naming the size that fits.
        """
        try:
            self._outline().eval()(torch.empty(1, 3, size, size, device="meta"))
        except (RuntimeError, AssertionError):
            usual = self.preprocess("DEFAULT").crop
            expected = f"a size that {self.name} can take, such as {usual}"
            raise StudyError("images.size", expected=expected, got=size) from None

    def trainable(self, model: nn.Module, unfreeze: str) -> tuple[str, ...]:
        """Names of the parameters that are trained and sent, in the order of `state_dict`.

        Args:
          model: what `build` returned.
          unfreeze: `head`, `last:<k>` (the head and the last k blocks) or `all`.

        Raises:
          StudyError: there are fewer than k blocks.
        """
        fixed = {"head": 0, "all": len(self.blocks)}
        count = fixed[unfreeze] if unfreeze in fixed else int(unfreeze.removeprefix("last:"))
        if count > len(self.blocks):
            expected = f"at most last:{len(self.blocks)} for {self.name}"
            raise StudyError("model.unfreeze", expected=expected, got=unfreeze)
        last = self.blocks[len(self.blocks) - count :]
        parts = (self.head, *(module for block in last for module in block.modules))
        return tuple(name for name, _ in model.named_parameters() if _within(name, parts))

    def choices(self, classes: int) -> dict[str, int]:
        """Parameters trained and sent, as float32, for every `unfreeze`, smallest first."""
        model = self._outline(classes)
        sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
        options = ["head", *(f"last:{k}" for k in range(1, len(self.blocks))), "all"]
        return {o: sum(sizes[name] for name in self.trainable(model, o)) for o in options}


def _within(name: str, parts: tuple[str, ...]) -> bool:
    return any(name == part or name.startswith(f"{part}.") for part in parts)


def _blocks(*specs: str) -> tuple[Block, ...]:
    """Blocks written as `name: module module`, or as one module that is its own name."""
    blocks = []
    for spec in specs:
        name, _, modules = spec.partition(": ")
        blocks.append(Block(name, tuple(modules.split()) or (name,)))
    return tuple(blocks)


def _features(count: int) -> tuple[Block, ...]:
    return _blocks(*(f"features.{index}" for index in range(count)))


def _fires(*indices: int) -> tuple[Block, ...]:
    fires = (f"fire{n}: features.{index}" for n, index in enumerate(indices, start=2))
    return _blocks("stem: features.0", *fires)


def _stages(final: str) -> tuple[Block, ...]:
    """Four stages, each from the second on after its downsampling; the last with its norm."""
    return _blocks(
        "stem: features.0",
        "stage1: features.1",
        "stage2: features.2 features.3",
        "stage3: features.4 features.5",
        f"stage4: features.6 features.7 {final}",
    )


def _vgg16() -> nn.Module:
    """VGG without its hidden classifier layers: features pooled to 1×1."""
    model: nn.Module = models.vgg16()
    model.avgpool = nn.AdaptiveAvgPool2d(1)
    return model


def _squeezenet1_0() -> nn.Module:
    return _pooled(models.squeezenet1_0())


def _squeezenet1_1() -> nn.Module:
    return _pooled(models.squeezenet1_1())


def _pooled(model: Any) -> nn.Module:
    """SqueezeNet pooled before its head; its own ends in a ReLU and never learns from zero."""
    model.features.extend([nn.AdaptiveAvgPool2d(1), nn.Flatten()])
    squeezenet: nn.Module = model
    return squeezenet


def _inception_v3() -> nn.Module:
    """Inception without its auxiliary head, on ImageNet-normalised input as its weights expect."""
    model: nn.Module = models.inception_v3(
        aux_logits=False, transform_input=True, dropout=0.0, init_weights=True
    )
    return model


_RESNET = _blocks("stem: conv1 bn1", "layer1", "layer2", "layer3", "layer4")
_VGG16 = _blocks(
    "stage1: features.0 features.2",
    "stage2: features.5 features.7",
    "stage3: features.10 features.12 features.14",
    "stage4: features.17 features.19 features.21",
    "stage5: features.24 features.26 features.28",
)
_INCEPTION = _blocks(
    *("Conv2d_1a_3x3", "Conv2d_2a_3x3", "Conv2d_2b_3x3", "Conv2d_3b_1x1", "Conv2d_4a_3x3"),
    *("Mixed_5b", "Mixed_5c", "Mixed_5d"),
    *("Mixed_6a", "Mixed_6b", "Mixed_6c", "Mixed_6d", "Mixed_6e"),
    *("Mixed_7a", "Mixed_7b", "Mixed_7c"),
)
_DENSENET = _blocks(
    "stem: features.conv0 features.norm0",
    "denseblock1: features.denseblock1 features.transition1",
    "denseblock2: features.denseblock2 features.transition2",
    "denseblock3: features.denseblock3 features.transition3",
    "denseblock4: features.denseblock4 features.norm5",
)
_SHUFFLENET = _blocks("stem: conv1", "stage2", "stage3", "stage4", "conv5")
_VIT = _blocks(
    "stem: conv_proj class_token encoder.pos_embedding",
    *(f"encoder_layer_{n}: encoder.layers.encoder_layer_{n}" for n in range(11)),
    "encoder_layer_11: encoder.layers.encoder_layer_11 encoder.ln",
)
# The class token alone is read, so that the other tokens must still be before attention.
_VIT_MAP = FeatureMap("encoder.layers.encoder_layer_11.ln_1", "class token first")
_SQUEEZENET1_0 = _fires(3, 4, 5, 7, 8, 9, 10, 12)
_SQUEEZENET1_1 = _fires(3, 4, 6, 7, 9, 10, 11, 12)

# name, torchvision's model, place of the head, pooled features, blocks
_BACKBONES = (
    Backbone(
        "convnext_tiny",
        models.convnext_tiny,
        "classifier.2",
        768,
        _stages("classifier.0"),
        map=FeatureMap("features.7"),
    ),
    Backbone("densenet121", models.densenet121, "classifier", 1024, _DENSENET),
    Backbone("efficientnet_b0", models.efficientnet_b0, "classifier", 1280, _features(9)),
    Backbone("inception_v3", _inception_v3, "fc", 2048, _INCEPTION, dropped=("AuxLogits.",)),
    Backbone("mobilenet_v2", models.mobilenet_v2, "classifier", 1280, _features(19)),
    Backbone("mobilenet_v3_small", models.mobilenet_v3_small, "classifier", 576, _features(13)),
    Backbone("resnet18", models.resnet18, "fc", 512, _RESNET),
    Backbone("resnet50", models.resnet50, "fc", 2048, _RESNET),
    Backbone("shufflenet_v2_x0_5", models.shufflenet_v2_x0_5, "fc", 1024, _SHUFFLENET),
    Backbone("squeezenet1_0", _squeezenet1_0, "classifier", 512, _SQUEEZENET1_0),
    Backbone("squeezenet1_1", _squeezenet1_1, "classifier", 512, _SQUEEZENET1_1),
    Backbone(
        "swin_t",
        models.swin_t,
        "head",
        768,
        _stages("norm"),
        map=FeatureMap("norm", "channels last"),
    ),
    Backbone("vgg16", _vgg16, "classifier", 512, _VGG16, map=FeatureMap("features.29")),
    Backbone("vit_b_16", models.vit_b_16, "heads", 768, _VIT, map=_VIT_MAP),
)

REGISTRY = {backbone.name: backbone for backbone in _BACKBONES}


def names() -> list[str]:
    """Every registered backbone."""
    return list(REGISTRY)


def get(name: str) -> Backbone:
    """The backbone of that name.

    Raises:
      StudyError: there is none; names the nearest.
    """
    if name not in REGISTRY:
        remedy = did_you_mean(name, REGISTRY)
        raise StudyError("model.backbone", expected="a known one", got=repr(name), remedy=remedy)
    return REGISTRY[name]
