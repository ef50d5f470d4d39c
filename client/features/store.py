"""Rows of tensors on disk, by name: the shelf on which prepared images are kept.

Rows come in immutable shards, each named by the SHA-256 of its own bytes: an interrupted pass keeps
the shards it finished, two processes can write side by side, and a damaged shard is noticed,
deleted and made again. Whole stores may be deleted at any time, by any process: who has one open
reads on, and who writes makes the folder anew. What is kept is patient data: it can be inverted
into something like the image.
"""

import hashlib
import json
import logging
import os
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from datetime import date
from itertools import accumulate
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from client.storage import explain_disk_errors
from common.errors import DataError
from common.support import files

log = logging.getLogger(__name__)

ABOUT = "about.json"
"""Beside the shards: what the store holds, for people; last changed when last used."""

_CPU = torch.device("cpu")
_IN_MEMORY = 1 << 30
_AT_ONCE = 8
# Each fails only if others delete the store in that very moment.
_TRIES = 100


class Rows:
    """Rows of one store in the order asked for; read by index, on `device` where they fit."""

    def __init__(self, places: Sequence[tuple[Tensor, int]], device: torch.device = _CPU) -> None:
        self._places, self._device = places, device
        size = sum(shard[row].nbytes for shard, row in places[:1]) * len(places)
        fits = size <= _room(device)
        self._memory = self._gather(range(len(places))).to(device) if fits else None

    def __len__(self) -> int:
        return len(self._places)

    def __add__(self, other: "Rows") -> "Rows":
        return Rows([*self._places, *other._places], self._device)

    def __getitem__(self, indices: Tensor) -> Tensor:
        """Rows [len(indices), …] in the stored type, on the device."""
        if self._memory is not None:
            return self._memory[indices.to(self._device)]
        return self._gather(indices.tolist()).to(self._device)

    def _gather(self, indices: Sequence[int]) -> Tensor:
        if not indices:
            return torch.empty(0)
        return torch.stack([shard[row] for shard, row in (self._places[i] for i in indices)])


def _room(device: torch.device) -> int:
    """Bytes of rows that may stay in memory: on a GPU half of what is free there."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0] // 2
    return _IN_MEMORY


class Store:
    """One folder of rows made by one spec.

    Every method raises `DataError` where the disk is full or a file cannot be opened.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._about: dict[str, str] = {}
        self._shards: set[str] = set()
        self._places: dict[str, tuple[Tensor, int]] = {}

    def use(self, about: Mapping[str, str]) -> None:
        """Note that a study uses the store now and, once, what it holds, in words for a person."""
        self._about = dict(about)
        with explain_disk_errors(self._folder, DataError), suppress(FileNotFoundError):
            self._mark()

    def _mark(self) -> None:
        """Make the folder, and note its use.

        Raises:
          FileNotFoundError: another process deletes the store just now.
        """
        try:
            self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        except FileExistsError:  # it was there, and is gone again
            if self._folder.is_file():
                raise
            raise FileNotFoundError(self._folder) from None
        path = self._folder / ABOUT
        try:
            os.utime(path)
        except FileNotFoundError:
            text = json.dumps({**self._about, "created": f"{date.today()}"}, indent=1)
            files.write(path, text, mode=0o600, durable=False)

    def refresh(self) -> None:
        """Take in shards that were written since, by this process or another."""
        with explain_disk_errors(self._folder, DataError):
            for name in sorted(self._listed() - self._shards):
                self._open(self._folder / name)

    def _listed(self) -> set[str]:
        """Names of all shards: of thousands, each site's preparation asks for them."""
        with suppress(FileNotFoundError), os.scandir(self._folder) as found:
            return {entry.name for entry in found if entry.name.endswith(".safetensors")}
        return set()

    def _paths(self, pattern: str = "*.safetensors") -> list[Path]:
        with suppress(FileNotFoundError):
            return sorted(self._folder.glob(pattern))
        return []

    def _open(self, path: Path) -> bool:
        """Whether the shard was there, and whole; if so, its rows are taken in."""
        found = _read(path)
        if found is None:
            return False
        names, rows = found
        self._shards.add(path.name)
        self._places.update((name, (rows, i)) for i, name in enumerate(names))
        return True

    def missing(self, names: Sequence[str]) -> list[int]:
        """Positions in `names` that have no row yet."""
        return [i for i, name in enumerate(names) if name not in self._places]

    def add(self, names: Sequence[str], rows: Tensor) -> None:
        """Write one shard: complete under its own name, or not at all."""
        with explain_disk_errors(self._folder, DataError):
            for _ in range(_TRIES):
                with suppress(FileNotFoundError):
                    self._mark()
                    if self._open(self._write(names, rows)):
                        return
        expected, got = "a folder to keep files in", "one in which they vanish or are damaged"
        remedy = "See that nothing clears it all the time, and that the disk is sound."
        raise DataError(self._folder, expected=expected, got=got, remedy=remedy)

    def _write(self, names: Sequence[str], rows: Tensor) -> Path:
        data = save({"rows": rows.contiguous()}, {"names": json.dumps(list(names))})
        path = self._folder / f"{hashlib.sha256(data).hexdigest()}.safetensors"
        files.write(path, data, mode=0o600)
        return path

    def rows(self, names: Sequence[str], device: torch.device = _CPU) -> Rows:
        """The rows with these names, which must be there, to be used on `device`."""
        return Rows([self._places[name] for name in names], device)

    def forget(self, names: Collection[str]) -> int:
        """Remove these rows from every file, and those whose name goes on after a `/`.

        Afterwards no file in the folder holds them, even after a power cut. A process that had the
        rows open keeps them, and their room on the disk, until it ends.

        Returns:
          How many rows there were.
        """
        gone, removed = set(names), 0
        with explain_disk_errors(self._folder, DataError):
            for part in self._paths(".*.safetensors.*.part"):
                part.unlink(missing_ok=True)  # whoever is still writing it does so again
            # Until a pass finds nothing: another process may put back what it read before.
            while found := sum(self._strip(path, gone) for path in self._paths()):
                removed += found
            files.sync(self._folder)
        self._shards.clear()
        self._places.clear()
        self.refresh()
        return removed

    def _strip(self, path: Path, gone: set[str]) -> int:
        """Replace one shard by one without the rows `gone`; returns how many it had."""
        found = _read(path)
        if found is None:
            return 0
        names, rows = found
        stay = [i for i, name in enumerate(names) if gone.isdisjoint(_ancestry(name))]
        if len(stay) == len(names):
            return 0
        other = None
        try:
            if stay:
                other = self._write([names[i] for i in stay], rows[stay])
            path.unlink()
        except FileNotFoundError:  # another process was first: what it left counts
            if other:
                other.unlink(missing_ok=True)
        return len(names) - len(stay)


def _ancestry(name: str) -> Sequence[str]:
    """`a/b/c` → `a`, `a/b`, `a/b/c`."""
    return list(accumulate(name.split("/"), "{}/{}".format))


def _read(path: Path) -> tuple[list[str], Tensor] | None:
    """Names and rows of a shard; None, and the file deleted, where it is not as it was written."""
    try:
        with path.open("rb") as file:
            intact = hashlib.file_digest(file, "sha256").hexdigest() == path.stem
        if not intact:
            raise SafetensorError("not the bytes that were written")
        with safe_open(path, framework="pt") as shard:
            return json.loads(shard.metadata()["names"]), shard.get_tensor("rows")
    except FileNotFoundError:  # another process deleted it first
        return None
    except (SafetensorError, ValueError, KeyError, TypeError) as ex:
        log.warning("A damaged cache file is deleted, its rows made again: %s (%s)", path, ex)
        path.unlink(missing_ok=True)
        return None
    except RuntimeError as ex:  # torch opens the file once more, by its name
        if path.exists():
            raise OSError(f"{path}: {ex}") from None
        return None


def count_rows(path: Path) -> int:
    """Rows in a shard, by its header alone; 0 where it is gone or damaged."""
    try:
        with safe_open(path, framework="pt") as shard:
            rows: int = shard.get_slice("rows").get_shape()[0]
            return rows
    except (OSError, SafetensorError, RuntimeError):
        return 0


class Stores:
    """The stores that one process has open, so that its sites share them; a few at most."""

    def __init__(self) -> None:
        self._open: dict[Path, Store] = {}

    def open(self, folder: Path, about: Mapping[str, str]) -> Store:
        """The store in `folder`, for a study that uses it now.

        Args:
          folder: Made on demand.
          about: What it holds, in words for a person; kept from the first time on.
        """
        store = self._open.pop(folder, None) or Store(folder)
        self._open[folder] = store
        if len(self._open) > _AT_ONCE:
            del self._open[next(iter(self._open))]
        store.use(about)
        return store
