"""What all sites of a study must share, hashed part by part so that a difference can be named."""

import hashlib
import json
import platform
from collections.abc import Mapping
from importlib.metadata import version
from typing import Annotated, Self

from pydantic import Field
from torch import Tensor

from common.config.yaml import Section
from common.model.images import Preprocess

PROTOCOL = "7"
"""Raised whenever a message between server and site changes."""

Hash = Annotated[str, Field(pattern=r"^[0-9a-f]{1,64}$")]
Version = Annotated[str, Field(pattern=r"^[0-9A-Za-z.+_-]{1,40}$")]


class Contract(Section):
    """The parts of the contract, each a hash."""

    study: Hash
    """The proposal's id, which covers the classes in their order."""
    backbone: Hash
    """Every tensor that stays as loaded: the prefix and all buffers."""
    suffix: Hash
    """Names and shapes of the tensors that travel."""
    preprocessing: Hash
    """How an image becomes the backbone's input."""
    protocol: Hash

    @classmethod
    def of(
        cls,
        *,
        study: str,
        frozen: Mapping[str, Tensor],
        shapes: Mapping[str, tuple[int, ...]],
        preprocess: Preprocess,
    ) -> Self:
        """The contract of a study as this machine assembled it."""
        return cls(
            study=study,
            backbone=digest(frozen),
            suffix=_hash({name: list(shape) for name, shape in shapes.items()}),
            preprocessing=_hash(repr(preprocess)),
            protocol=PROTOCOL,
        )

    @property
    def fingerprint(self) -> str:
        """One short name for the whole contract: 16 hex digits."""
        return _hash(self.model_dump())[:16]

    def differences(self, other: "Contract") -> list[str]:
        """Names of the parts that differ."""
        return [
            part for part in type(self).model_fields if getattr(self, part) != getattr(other, part)
        ]


class Versions(Section):
    """What runs on a machine: shown, not enforced."""

    python: Version
    flwr: Version
    torch: Version
    torchvision: Version
    numpy: Version

    @classmethod
    def here(cls) -> Self:
        """Of this machine."""
        names = ("flwr", "torch", "torchvision", "numpy")
        return cls(python=platform.python_version(), **{name: version(name) for name in names})


def digest(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 over names, shapes, types and values, in the order of names."""
    sha = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        sha.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}\n".encode())
        sha.update(tensor.numpy().tobytes())
    return sha.hexdigest()


def _hash(value: object) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
