"""What all sites of a study must share, hashed part by part so that a difference can be named."""

import hashlib
import json
from collections.abc import Mapping

from torch import Tensor

from common import wire
from common.images import Preprocess


def digest(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 over names, shapes, types and values, in the order of names."""
    sha = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        sha.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}\n".encode())
        sha.update(tensor.numpy().tobytes())
    return sha.hexdigest()


def contract(
    *,
    study: str,
    frozen: Mapping[str, Tensor],
    shapes: Mapping[str, tuple[int, ...]],
    preprocess: Preprocess,
) -> dict[str, str]:
    """The parts of the contract.

    Args:
      study: The proposal's id, which covers the classes in their order.
      frozen: Every tensor that stays as loaded: the prefix and all buffers.
      shapes: The tensors that travel.
      preprocess: How an image becomes the backbone's input.
    """
    return {
        "study": study,
        "backbone": digest(frozen),
        "suffix": _hash({name: list(shape) for name, shape in shapes.items()}),
        "preprocessing": _hash(repr(preprocess)),
        "wire": str(wire.VERSION),
    }


def fingerprint(parts: Mapping[str, str]) -> str:
    """One short name for a whole contract: 16 hex digits."""
    return _hash(dict(parts))[:16]


def differences(ours: Mapping[str, str], theirs: Mapping[str, str]) -> list[str]:
    """Names of the parts that differ."""
    return sorted(
        part for part in ours.keys() | theirs.keys() if ours.get(part) != theirs.get(part)
    )


def _hash(value: object) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
