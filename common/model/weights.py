"""Pretrained weights: a checkpoint, from a file or from torchvision, onto a model, key by key."""

import re
import zipfile
from collections.abc import Iterable
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path
from typing import Any, Self

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from common.errors import BackboneError

# Older torchvision releases wrote these names; their published files still carry them.
RENAMED = (
    (re.compile(r"(denselayer\d+\.(?:norm|relu|conv))\.([12]\.)"), r"\1\2"),
    (re.compile(r"\.mlp\.linear_1\."), ".mlp.0."),
    (re.compile(r"\.mlp\.linear_2\."), ".mlp.3."),
)

LARGEST, LARGEST_VARIANCE = 1e4, 1e6
"""Bounds of every number that is read or received, to either side, and of variances in checkpoints.

Published weights are within ±60, but noise that protects a handful of patients reaches thousands.
"""


LARGEST_HEADER = 2**20
"""Bytes of the header of a safetensors file that is sent; those of backbones have a tenth."""

_DTYPES = {"F32": torch.float32, "I64": torch.int64}
"""What backbones are made of, as safetensors names it."""


def read(path: Path) -> dict[str, Tensor]:
    """The tensors in a checkpoint file; no code in it is ever run.

    Args:
      path: In the format of safetensors, or what `torch.save(model.state_dict(), path)` writes.
        One whose name ends in `.safetensors` is read as that, whatever it holds.

    Raises:
      BackboneError: the file is missing, damaged, or not a mapping of names to tensors, or would
        unpack to more than it takes.
    """
    expected = "a state dict in a .pth, .pt or .safetensors file"
    try:
        with path.open("rb") as file:
            begins = file.read(9)
        # A file of safetensors begins with 8 bytes of a length, then JSON.
        if path.suffix == ".safetensors" or begins.endswith(b"{"):
            return _modern(load_file(path))
        _check_packing(path)
        content = torch.load(path, map_location="cpu", weights_only=True)
    except BackboneError:
        raise
    except OSError as ex:
        remedy = "A study's paths start at its own folder; DEFAULT takes torchvision's own weights."
        raise BackboneError(path, expected=expected, got=ex.strerror, remedy=remedy) from None
    # A damaged file can fail anywhere in the readers, with nearly any class.
    except Exception:
        got = "one that is damaged, incomplete or not only tensors"
        raise BackboneError(path, expected=expected, got=got) from None
    if not isinstance(content, dict) or not all(isinstance(t, Tensor) for t in content.values()):
        remedy = "Save it by torch.save(model.state_dict(), path)."
        got = f"a {type(content).__name__} of other things"
        raise BackboneError(path, expected=expected, got=got, remedy=remedy)
    return _modern(content)


def _check_packing(path: Path) -> None:
    """Refuse an archive whose parts are larger than itself; `torch.save` compresses nothing."""
    if not zipfile.is_zipfile(path):
        return
    with zipfile.ZipFile(path) as archive:
        unpacked = sum(part.file_size for part in archive.infolist())
    if unpacked > (whole := path.stat().st_size):
        got = f"{unpacked} packed into {whole}"
        remedy = "Save it by torch.save(model.state_dict(), path)."
        raise BackboneError(path, expected="as many bytes as it holds", got=got, remedy=remedy)


def read_outline(path: Path) -> dict[str, Tensor]:
    """The names, shapes and types of the tensors in a safetensors file, without their numbers.

    Only the header is read. It must describe every byte of the file once.

    Raises:
      BackboneError: it does not, or is not one of a backbone.
    """
    expected = "a backbone as a file of safetensors"
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
        if length > LARGEST_HEADER:
            raise BackboneError(path, expected=expected, got=f"a header of {length} bytes")
        with safe_open(path, framework="pt") as file:
            parts = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
            told = {name: (part.get_shape(), part.get_dtype()) for name, part in parts.items()}
    except (SafetensorError, OSError) as ex:
        raise BackboneError(path, expected=expected, got=ex) from None
    if other := {dtype for _, dtype in told.values()} - _DTYPES.keys():
        raise BackboneError(path, expected=" or ".join(_DTYPES), got=", ".join(sorted(other)))
    return {
        name: torch.empty(shape, dtype=_DTYPES[dtype], device="meta")
        for name, (shape, dtype) in told.items()
    }


def download(weights: Any) -> dict[str, Tensor]:
    """The tensors of one member of a torchvision weights enum, from its cache or its site.

    Raises:
      BackboneError: the download failed or its hash is wrong.
    """
    try:
        state = weights.get_state_dict(check_hash=True, map_location="cpu", weights_only=True)
    except (OSError, HTTPException, RuntimeError) as ex:
        remedy = "Fetch the file on another machine and name it in model.weights."
        where = f"weights {weights}"
        expected = f"a download of {weights.url}"
        raise BackboneError(where, expected=expected, got=ex, remedy=remedy) from None
    return _modern(state)


def _modern(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {_rename(key): tensor for key, tensor in state.items()}


def _rename(key: str) -> str:
    for old, new in RENAMED:
        key = old.sub(new, key)
    return key


@dataclass(frozen=True)
class Fit:
    """How a checkpoint fits a model: the tensors that do, and the keys that do not."""

    tensors: dict[str, Tensor]
    missing: tuple[str, ...]
    unexpected: tuple[str, ...]
    misshaped: tuple[str, ...]

    @classmethod
    def of(cls, state: dict[str, Tensor], model: nn.Module, ignore: tuple[str, ...]) -> Self:
        """Compare `state` with `model`, leaving out the keys that start with one of `ignore`."""
        given = {key: tensor for key, tensor in state.items() if not key.startswith(ignore)}
        wanted = {k: t for k, t in model.state_dict().items() if not k.startswith(ignore)}
        shared = [key for key in wanted if key in given]
        good = [key for key in shared if _same_kind(given[key], wanted[key])]
        # BatchNorm's batch counter is absent from old checkpoints and used by no evaluation.
        missing = [k for k in wanted if k not in given and not k.endswith("num_batches_tracked")]
        return cls(
            tensors={key: given[key].to(wanted[key].dtype).contiguous() for key in good},
            missing=tuple(missing),
            unexpected=tuple(key for key in given if key not in wanted),
            misshaped=tuple(key for key in shared if key not in good),
        )

    @property
    def exact(self) -> bool:
        """Whether every tensor of the model, and nothing else, was given."""
        return not (self.missing or self.unexpected or self.misshaped)

    def __str__(self) -> str:
        kinds = {
            "missing": self.missing,
            "unexpected": self.unexpected,
            "mis-shaped": self.misshaped,
        }
        return ", ".join(_count(kind, keys) for kind, keys in kinds.items() if keys)


def find_absurd(state: dict[str, Tensor]) -> list[str]:
    """Names of tensors that no training leaves so: not finite, or far beyond any published one.

    Those reach ±60; variances, which are never negative, 500.
    """
    return [name for name, tensor in state.items() if not _plain(name, tensor)]


def _plain(name: str, tensor: Tensor) -> bool:
    if not tensor.is_floating_point() or not tensor.numel():
        return True
    low, high = tensor.aminmax()  # NaN if there is one
    if name.endswith("running_var"):
        return float(low) >= 0.0 and float(high) <= LARGEST_VARIANCE
    return float(low) >= -LARGEST and float(high) <= LARGEST


def _same_kind(given: Tensor, wanted: Tensor) -> bool:
    return given.shape == wanted.shape and given.is_floating_point() == wanted.is_floating_point()


def _count(kind: str, keys: Iterable[str]) -> str:
    first, *more = keys
    return f"{1 + len(more)} {kind} (such as {first})"
