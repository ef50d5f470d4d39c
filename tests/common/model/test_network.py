"""Every party builds the same network, and a difference has a name."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch.nn.functional import cross_entropy

from common.config.study import Study
from common.errors import ContractError, StudyError
from common.model import backbones
from common.model.contract import digest
from common.model.images import Preprocess
from common.model.network import Network, assemble

pytestmark = pytest.mark.numbers

NAME = "shufflenet_v2_x0_5"
PARTS = {"study", "backbone", "suffix", "preprocessing", "protocol"}


def study(**changes: Any) -> Study:
    content: dict[str, Any] = {
        "name": "lesions",
        "classes": ["benign", "malignant"],
        "model": {
            "backbone": NAME,
            "weights": "none",
            "unfreeze": changes.pop("unfreeze", "head"),
            "init": "zero",
        },
        "images": {"size": changes.pop("size", 64)},
        "train": {"rounds": 1},
    }
    return Study.model_validate({**content, **changes})


def build(weights: str = "none", **changes: Any) -> Network:
    """A network of its own, not the one this process keeps."""
    return assemble(study(**changes), weights)


def differing(a: Network, b: Network) -> set[str]:
    parts = set(a.contract.differences(b.contract))
    assert (a.contract.fingerprint != b.contract.fingerprint) == bool(parts)
    return parts


@pytest.fixture(scope="module")
def plain() -> Network:
    return build()


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, torch.Tensor]]:
    """A checkpoint file of the backbone, and what is in it."""
    state = build().model.state_dict()
    state = {name: t.clone() for name, t in state.items() if not name.startswith("fc.")}
    path = tmp_path_factory.mktemp("weights") / "net.safetensors"
    save_file(state, path)
    return path, state


def test_equal_studies_make_equal_contracts(plain: Network) -> None:
    torch.manual_seed(99)  # nobody's global generator takes part
    again = build()
    assert again is not plain
    assert again.model is not plain.model
    assert set(plain.contract.model_dump()) == PARTS
    assert again.contract == plain.contract
    assert differing(again, plain) == set()
    assert len(plain.contract.fingerprint) == 16


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ({"classes": ["malignant", "benign"]}, {"study"}),
        ({"classes": ["a", "b", "c"]}, {"study", "suffix"}),
        ({"size": 96}, {"study", "preprocessing"}),
        ({"unfreeze": "last:1"}, {"study", "suffix", "backbone"}),
        ({"seed": 1}, {"study", "backbone"}),
        ({"train": {"rounds": 2}}, {"study"}),
    ],
)
def test_a_difference_is_named(changes: dict[str, Any], parts: set[str], plain: Network) -> None:
    assert differing(build(**changes), plain) == parts


def flipped(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor with the lowest bit of its first value turned over."""
    bits = tensor.clone().view(torch.int32 if tensor.dtype == torch.float32 else torch.int64)
    bits.view(-1)[0] ^= 1
    return bits.view(tensor.dtype)


@pytest.mark.parametrize(
    "name", ["conv1.0.weight", "conv5.1.running_var", "stage2.0.branch1.1.num_batches_tracked"]
)
def test_one_bit_of_the_frozen_weights_is_named(
    name: str, weights: tuple[Path, dict[str, torch.Tensor]], tmp_path: Path
) -> None:
    path, state = weights
    copy, other = tmp_path / "copy" / "renamed.safetensors", tmp_path / "net.safetensors"
    copy.parent.mkdir()
    save_file(state, copy)
    save_file({**state, name: flipped(state[name])}, other)
    ours = build(str(path))
    assert differing(ours, build(str(copy))) == set()
    assert differing(ours, build(str(other))) == {"backbone"}


def test_digests_see_names_shapes_types_and_values() -> None:
    tensor = torch.arange(6.0)
    digests = [
        digest({"a": tensor}),
        digest({"b": tensor}),
        digest({"a": tensor.view(2, 3)}),
        digest({"a": tensor.view(torch.int32)}),
        digest({"a": flipped(tensor)}),
        digest({"a": tensor, "b": tensor}),
        digest({"a": -torch.zeros(6)}),
        digest({"a": torch.zeros(6)}),
    ]
    assert len(set(digests)) == len(digests)
    assert digest({"a": tensor, "b": -tensor}) == digest({"b": -tensor, "a": tensor})
    assert digest({"a": tensor.view(2, 3).T}) == digest({"a": tensor.view(2, 3).T.contiguous()})


def test_the_suffix_travels_and_nothing_else(plain: Network) -> None:
    assert plain.trainable == ("fc.linear.weight", "fc.linear.bias")
    assert plain.shapes == {"fc.linear.weight": (2, 1024), "fc.linear.bias": (2,)}
    assert {tensor.dtype for tensor in plain.tensors.values()} == {torch.float32}
    trains = {name for name, p in plain.model.named_parameters() if p.requires_grad}
    assert trains == set(plain.trainable)
    assert plain.preprocess == Preprocess(64, 64, *_normalisation(), "bilinear")


def _normalisation() -> tuple[tuple[float, float, float], tuple[float, float, float]]:
    usual = backbones.get(NAME).preprocess("none")
    return usual.mean, usual.std


def test_the_tensors_are_the_models_own() -> None:
    network = build(unfreeze="last:1")
    for name, tensor in network.tensors.items():
        tensor.fill_(0.25)
        assert network.model.get_parameter(name).eq(0.25).all()
        assert dict(network.split.suffix.named_parameters())[name].eq(0.25).all()


def test_loading_overwrites_all_and_keeps_the_callers_own() -> None:
    network = build(unfreeze="last:1")
    given = {name: torch.randn(shape) for name, shape in network.shapes.items()}
    network.load(given)
    assert all(torch.equal(network.tensors[name], given[name]) for name in given)
    network.tensors["fc.linear.bias"].add_(1)
    assert not torch.equal(network.tensors["fc.linear.bias"], given["fc.linear.bias"])


def test_loading_is_all_or_nothing() -> None:
    network = build(unfreeze="last:1")
    first, *_, last = network.trainable
    good = {name: torch.full(shape, 7.0) for name, shape in network.shapes.items()}
    bad = {
        "one missing": {name: good[name] for name in good if name != last},
        "one more": {**good, "extra": torch.zeros(1)},
        "one renamed": {name if name != last else "x": tensor for name, tensor in good.items()},
        "a frozen one too": {**good, "conv1.0.weight": torch.zeros(24, 3, 3, 3)},
        "nothing": {},
        "one of another shape": {**good, last: torch.full((1,), 7.0)},
        "first of another shape": {**good, first: torch.full((1,), 7.0)},
    }
    for how, tensors in bad.items():
        with pytest.raises(ContractError, match="agreed"):
            network.load(tensors)
        own = network.tensors
        assert all(torch.equal(own[name], network.initial[name]) for name in own), how


def test_the_initial_tensors_survive_training() -> None:
    network = build(unfreeze="last:1")
    before = {name: tensor.clone() for name, tensor in network.initial.items()}
    frozen = {
        name: tensor.clone()
        for name, tensor in network.model.state_dict().items()
        if name not in network.trainable
    }
    suffix, generator = network.split.suffix, torch.Generator().manual_seed(0)
    trains = [p for p in suffix.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(trains, lr=0.1, eps=1e-30)
    for _ in range(3):
        with torch.no_grad():
            images = torch.randn(4, 3, 64, 64, generator=generator)
            activation = network.split.prefix(images)
        optimizer.zero_grad()
        cross_entropy(suffix(activation), torch.tensor([0, 1, 0, 0])).backward()
        optimizer.step()
    moved = [name for name in before if not torch.equal(network.tensors[name], before[name])]
    assert moved == list(network.trainable)
    assert all(torch.equal(network.initial[name], before[name]) for name in before)
    network.load(network.initial)
    assert all(torch.equal(network.tensors[name], before[name]) for name in before)
    state = network.model.state_dict()
    assert all(torch.equal(state[name], frozen[name]) for name in frozen)
    assert network.contract.backbone == digest(frozen)


def test_a_new_head_starts_at_zero_and_the_rest_as_loaded(
    weights: tuple[Path, dict[str, torch.Tensor]],
) -> None:
    path, state = weights
    network = build(str(path), unfreeze="last:1")
    for name, tensor in network.initial.items():
        expected = state.get(name, torch.zeros(network.shapes[name]))
        assert torch.equal(tensor, expected)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model": {"backbone": "shuflenet", "weights": "none"}}, "Did you mean 'shufflenet"),
        ({"unfreeze": "last:99"}, "at most last:"),
    ],
)
def test_what_cannot_be_built_is_named(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(StudyError, match=words):
        build(**changes)
