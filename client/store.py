"""Rows of tensors on disk, by name: the shelf on which prepared images are kept.

Rows come in immutable shards, each named by the SHA-256 of its own bytes: an interrupted pass keeps
the shards it finished, two processes can write side by side, and a damaged shard is noticed,
deleted and made again. What is kept is patient data: it can be inverted into something like the
image.
"""

import hashlib
import json
import logging
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from client.disk import usable
from common import files
from common.errors import DataError

log = logging.getLogger(__name__)

_IN_MEMORY = 1 << 30


class Rows:
    """Rows of one store in the order asked for; read by index, in memory where they fit."""

    def __init__(self, places: Sequence[tuple[Tensor, int]]) -> None:
        self._places = places
        size = sum(shard[row].nbytes for shard, row in places[:1]) * len(places)
        self._memory = self._gather(range(len(places))) if size <= _IN_MEMORY else None

    def __len__(self) -> int:
        return len(self._places)

    def __add__(self, other: "Rows") -> "Rows":
        return Rows([*self._places, *other._places])

    def __getitem__(self, indices: Tensor) -> Tensor:
        """Rows [len(indices), …] in the stored type."""
        if self._memory is not None:
            return self._memory[indices]
        return self._gather(indices.tolist())

    def _gather(self, indices: Sequence[int]) -> Tensor:
        if not indices:
            return torch.empty(0)
        return torch.stack([shard[row] for shard, row in (self._places[i] for i in indices)])


class Store:
    """One folder of rows made by one recipe.

    Every method raises `DataError` where the disk is full or a file cannot be opened.
    """

    def __init__(self, folder: Path) -> None:
        with usable(folder, DataError):
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._folder = folder
        self._shards: set[str] = set()
        self._places: dict[str, tuple[Tensor, int]] = {}

    def refresh(self) -> None:
        """Take in shards that were written since, by this process or another."""
        with usable(self._folder, DataError):
            for path in sorted(self._folder.glob("*.safetensors")):
                if path.name not in self._shards:
                    self._open(path)

    def _open(self, path: Path) -> None:
        try:
            with path.open("rb") as file:
                intact = hashlib.file_digest(file, "sha256").hexdigest() == path.stem
            if not intact:
                raise SafetensorError("not the bytes that were written")
            with safe_open(path, framework="pt") as shard:
                rows = shard.get_tensor("rows")
                names = json.loads(shard.metadata()["names"])
        except FileNotFoundError:  # another process found it damaged first
            return
        except (SafetensorError, ValueError, KeyError, TypeError) as ex:
            log.warning("A damaged cache file is deleted, its rows made again: %s (%s)", path, ex)
            path.unlink(missing_ok=True)
            return
        self._shards.add(path.name)
        self._places.update((name, (rows, i)) for i, name in enumerate(names))

    def missing(self, names: Sequence[str]) -> list[int]:
        """Positions in `names` that have no row yet."""
        return [i for i, name in enumerate(names) if name not in self._places]

    def add(self, names: Sequence[str], rows: Tensor) -> None:
        """Write one shard: complete under its own name, or not at all."""
        data = save({"rows": rows.contiguous()}, {"names": json.dumps(list(names))})
        path = self._folder / f"{hashlib.sha256(data).hexdigest()}.safetensors"
        with usable(self._folder, DataError):
            files.write(path, data, mode=0o600)
            self._open(path)

    def rows(self, names: Sequence[str]) -> Rows:
        """The rows with these names, which must be there."""
        return Rows([self._places[name] for name in names])


@lru_cache(maxsize=8)
def open_store(folder: Path) -> Store:
    """The store in `folder`; one per process, so that many virtual sites share it."""
    return Store(folder)
