"""Tensors as they travel: of the names, shapes and type agreed, finite and within bounds."""

import io
import math
from collections.abc import Mapping
from functools import lru_cache

import numpy as np
import torch
from flwr.app import Array, ArrayRecord
from torch import Tensor

from common.errors import ContractError
from common.model.weights import LARGEST

FLOAT32, FLOAT64 = "<f4", "<f8"

Shapes = Mapping[str, tuple[int, ...]]
Tensors = dict[str, Tensor]


def to_arrays(tensors: Mapping[str, Tensor]) -> ArrayRecord:
    """Tensors by name, as Flower sends them."""
    flat = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    return ArrayRecord({name: Array(tensor) for name, tensor in flat.items()})


def from_arrays(
    arrays: ArrayRecord, shapes: Shapes, kind: str = FLOAT32, most: float = LARGEST
) -> Tensors:
    """The tensors of a message; raises `ContractError` unless names, shapes and type are as agreed.

    Args:
      arrays: As they came.
      shapes: As agreed.
      kind: The type of every number, as NumPy spells it.
      most: What no number may be beyond; each must be finite.
    """
    if set(arrays) != set(shapes):
        raise ContractError("tensors with other names than agreed")
    return {name: _tensor(arrays[name], shape, kind, most) for name, shape in shapes.items()}


def _tensor(array: Array, shape: tuple[int, ...], kind: str, most: float) -> Tensor:
    # Compared, not parsed: a tensor of this type and shape begins with just these bytes.
    header, data, size = _header(shape, kind), array.data, np.dtype(kind).itemsize
    fits = len(data) == len(header) + size * math.prod(shape) and data.startswith(header)
    if not fits or array.stype != "numpy.ndarray":
        raise ContractError("a tensor of another type, shape or size than agreed")
    values = np.frombuffer(data, kind, offset=len(header)).reshape(shape)
    if not (np.abs(values) <= most).all():  # nor NaN
        raise ContractError(f"a tensor with values that are not finite, or beyond ±{most:g}")
    return torch.from_numpy(values.copy())


@lru_cache(maxsize=4096)
def _header(shape: tuple[int, ...], kind: str) -> bytes:
    file = io.BytesIO()
    described = {"descr": kind, "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(file, described)
    return file.getvalue()


def count_bytes(arrays: ArrayRecord) -> int:
    """Bytes that a record of tensors puts on the wire."""
    return sum(len(array.data) for array in arrays.values())
