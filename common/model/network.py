"""The study's network, built the same way by every party."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from common.config.study import Study
from common.errors import BackboneError, ContractError
from common.heads.whitening import WHITENING, Whitening
from common.metrics.counts import Floats
from common.model import backbones
from common.model.contract import Contract, digest
from common.model.images import Preprocess
from common.model.split import Split, list_batchnorm, split
from common.model.weights import LARGEST
from common.support.seeds import derive


@dataclass(frozen=True, eq=False)
class Network:
    """One backbone with the study's head, cut into a frozen prefix and a trainable suffix."""

    backbone: str
    """Its name."""
    model: nn.Module
    width: int
    """How many features its head reads."""
    split: Split
    trainable: tuple[str, ...]
    found: tuple[str, ...]
    """What the sites find together before the head is solved, and travels with it."""
    frozen: tuple[str, ...]
    """Asked to train as well, but frozen in a private study: BatchNorm's scales and shifts."""
    preprocess: Preprocess
    contract: Contract
    initial: dict[str, Tensor]
    """The tensors that travel as they were when the study was assembled."""

    @property
    def tensors(self) -> dict[str, Tensor]:
        """The tensors that travel, by name; the model's own, not copies."""
        trained = {name: self.model.get_parameter(name).data for name in self.trainable}
        return trained | {name: self.model.get_buffer(name) for name in self.found}

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Their shapes."""
        return {name: tuple(tensor.shape) for name, tensor in self.tensors.items()}

    def find_centre(self, tensors: Mapping[str, Tensor]) -> Floats | None:
        """What a model takes off its features [d]: its own centre, the study's, or none."""
        for name in self.found:
            if name.endswith("centre.mean"):
                return tensors[name].double().numpy()
        fixed = [b for name, b in self.model.named_buffers() if name.endswith("centre.mean")]
        return fixed[0].double().cpu().numpy() if fixed else None

    def digest(self, tensors: Mapping[str, Tensor]) -> str:
        """SHA-256 of a model: tensors that travel, in this network with all that stays as loaded.

        A backbone can be sent anew; the same tensors behind another one are another model.
        """
        whole = f"{self.contract.model_dump_json()} {digest(tensors)}"
        return hashlib.sha256(whole.encode()).hexdigest()

    def load(self, tensors: dict[str, Tensor]) -> None:
        """Overwrite the tensors that travel; raises `ContractError` unless all of them fit."""
        own = self.tensors
        if {name: tuple(tensor.shape) for name, tensor in tensors.items()} != self.shapes:
            raise ContractError("tensors with other names or shapes than agreed")
        for name, tensor in tensors.items():
            own[name].copy_(tensor)


def build_model(study: Study, weights: str) -> nn.Module:
    """The classifier of `study`, whole, in eval mode; `weights` as in `assemble`."""
    backbone, model = backbones.get(study.model.backbone), study.model
    return backbone.build(
        classes=len(study.classes),
        dropout=model.dropout,
        weights=weights,
        seed=derive(study.seed, "initial weights"),
        mean=(0.0,) * backbone.width if study.finds_centre else model.feature_mean,
        unit=model.unit_features,
        directions=study.directions,
    )


def place_head(
    study: Study, weight: Floats, bias: Floats, centre: Floats | None = None
) -> dict[str, Tensor]:
    """The tensors of the study's network that hold a linear head, float32.

    Args:
      study: The study.
      weight: [K, d].
      bias: [K].
      centre: [d], of the features that it reads; None keeps the one that is there.
    """
    numbers = {"linear.weight": weight, "linear.bias": bias}
    return _place(study, numbers if centre is None else numbers | {"centre.mean": centre})


def place_whitening(study: Study, whitening: Whitening) -> dict[str, Tensor]:
    """The tensors of the study's network that whiten features, float32."""
    return _place(study, {f"whiten.{name}": getattr(whitening, name) for name in WHITENING})


def _place(study: Study, numbers: Mapping[str, Floats]) -> dict[str, Tensor]:
    place = backbones.get(study.model.backbone).head
    return {
        f"{place}.{name}": torch.tensor(value, dtype=torch.float32).contiguous()
        for name, value in numbers.items()
    }


def _list_found(study: Study) -> tuple[str, ...]:
    if study.directions:
        return tuple(f"whiten.{name}" for name in WHITENING)
    return ("centre.mean",) if study.finds_centre else ()


def assemble(study: Study, weights: str) -> Network:
    """The network of `study` from `weights` (`DEFAULT`, `none` or a file on this machine).

    Raises:
      StudyError: unknown backbone or impossible `unfreeze`.
      BackboneError: the weights are missing or belong to another architecture.
    """
    backbone = backbones.get(study.model.backbone)
    if study.images.size:
        backbone.check_size(study.images.size)
    mean = study.model.feature_mean
    if mean is not None and len(mean) != backbone.width:
        expected, got = f"{backbone.width} numbers, the features of {backbone.name}", len(mean)
        remedy = "Make it with consilium-simulate feature-mean."
        raise study.error("model.feature_mean", expected=expected, got=got, remedy=remedy)
    if study.directions and study.directions > backbone.width:
        expected = f"at most {backbone.width}, the features of {backbone.name}"
        raise study.error("privacy.directions", expected=expected, got=study.directions)
    try:
        model = build_model(study, weights)
    except BackboneError as ex:
        if study.model.weights_file != Path(weights):  # a site's own file, which no study names
            raise
        raise BackboneError(f"{study.source}: model.weights: {ex}") from None
    preprocess = backbone.preprocess(study.model.weights).with_size(study.images.size)
    asked = backbone.trainable(model, study.model.unfreeze)
    untrained = list_batchnorm(model, asked) if study.private else ()
    trainable = tuple(name for name in asked if name not in untrained)
    state = model.state_dict()
    found = tuple(f"{backbone.head}.{name}" for name in _list_found(study))
    travelling = (*trainable, *found)
    frozen = {name: tensor for name, tensor in state.items() if name not in travelling}
    shapes = {name: tuple(state[name].shape) for name in travelling}
    contract = Contract.of(study=study.id, frozen=frozen, shapes=shapes, preprocess=preprocess)
    initial = {name: state[name].clone() for name in travelling}
    if beyond := [name for name, tensor in initial.items() if tensor.abs().max() > LARGEST]:
        expected = f"trained layers within ±{LARGEST:g}, as messages are"
        remedy = "Train fewer layers."
        raise study.error("model.unfreeze", expected=expected, got=beyond[0], remedy=remedy)
    return Network(
        backbone=backbone.name,
        model=model,
        width=backbone.width,
        split=split(model, trainable),
        trainable=trainable,
        found=found,
        frozen=untrained,
        preprocess=preprocess,
        contract=contract,
        initial=initial,
    )
