"""Tensors as they travel: float32, of the names and shapes agreed, finite and within ±10⁴."""

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

Shapes = Mapping[str, tuple[int, ...]]
Tensors = dict[str, Tensor]


def to_arrays(tensors: Mapping[str, Tensor]) -> ArrayRecord:
    """Float32 tensors, by name, as Flower sends them."""
    flat = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    return ArrayRecord({name: Array(tensor) for name, tensor in flat.items()})


def from_arrays(arrays: ArrayRecord, shapes: Shapes) -> Tensors:
    """The tensors of a message; raises `ContractError` unless names, shapes and type are as agreed.

    Every value is float32 and finite, and none is beyond ±10⁴.
    """
    if set(arrays) != set(shapes):
        raise ContractError("tensors with other names than agreed")
    return {name: _tensor(arrays[name], shape) for name, shape in shapes.items()}


def _tensor(array: Array, shape: tuple[int, ...]) -> Tensor:
    # Compared, not parsed: a float32 tensor of this shape begins with just these bytes.
    header, data = _header(shape), array.data
    fits = len(data) == len(header) + 4 * math.prod(shape) and data.startswith(header)
    if not fits or array.stype != "numpy.ndarray":
        raise ContractError("a tensor of another type, shape or size than agreed")
    values = np.frombuffer(data, np.float32, offset=len(header)).reshape(shape)
    if not (np.abs(values) <= LARGEST).all():  # nor NaN
        raise ContractError("a tensor with values that are not finite, or beyond ±10⁴")
    return torch.from_numpy(values.copy())


@lru_cache(maxsize=4096)
def _header(shape: tuple[int, ...]) -> bytes:
    file = io.BytesIO()
    described = {"descr": "<f4", "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(file, described)
    return file.getvalue()


def count_bytes(arrays: ArrayRecord) -> int:
    """Bytes that a record of tensors puts on the wire."""
    return sum(len(array.data) for array in arrays.values())
