"""The frozen prefix's activations, computed once per image and kept on disk.

A store is a folder named by everything its rows depend on; a row is named by its image's SHA-256.
Rows come in immutable shards, each named by the SHA-256 of its own bytes: a pass that is interrupted
keeps the shards it finished, two processes can write side by side, and a damaged shard is noticed
and redone. What is kept is patient data: it can be inverted into something like the image.
"""

import hashlib
import json
import logging
import os
import time
import uuid
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from client.data.records import Image
from common.contract import digest
from common.errors import DataError
from common.images import Preprocess, view

log = logging.getLogger(__name__)

_BATCH = 32
_SHARD = 512
_QUIET = 5.0
_IN_MEMORY = 1 << 30
# A prefix whose activations take more room than this many images is not worth caching.
_WORTH = 2.0


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How a row is made from an image.

    Attributes:
      prefix: Frozen part of the backbone: float32 [n, 3, crop, crop] → activations [n, …].
      preprocess: From an image to the backbone's input.
      ops: Augmentations of the views; view 0 is the image itself.
    """

    prefix: nn.Module
    preprocess: Preprocess
    ops: tuple[str, ...]

    @cached_property
    def caches_activations(self) -> bool:
        """Whether rows are activations; otherwise rows are uint8 pixels [3, crop, crop]."""
        if isinstance(self.prefix, nn.Identity):
            return False
        pixels = torch.zeros(1, 3, self.preprocess.crop, self.preprocess.crop, dtype=torch.uint8)
        return self._run(pixels, self.prefix).nbytes <= _WORTH * pixels.nbytes

    @cached_property
    def key(self) -> str:
        """Names the store: equal keys give equal rows."""
        parts = [repr(self.preprocess), *self.ops]
        if self.caches_activations:
            parts += [digest(self.prefix.state_dict()), str(getattr(self.prefix, "code", ""))]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:24]

    def _run(self, pixels: Tensor, module: nn.Module) -> Tensor:
        device = next((p.device for p in module.parameters()), torch.device("cpu"))
        inputs = self.preprocess.normalise(pixels.to(device))
        with torch.inference_mode():
            # Convolutions run up to twice as fast on this layout.
            output: Tensor = module(inputs.contiguous(memory_format=torch.channels_last))
        return output.cpu().contiguous()

    def rows(self, images: Sequence[Tensor], activations: bool) -> Tensor:
        """Rows of decoded uint8 images, as stored."""
        pixels = torch.stack(list(images))
        return self._run(pixels, self.prefix) if activations else pixels


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
    """One folder of rows made by one recipe."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._folder = folder
        self._shards: set[str] = set()
        self._places: dict[str, tuple[Tensor, int]] = {}

    def refresh(self) -> None:
        """Take in shards that were written since, by this process or another."""
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
        except (SafetensorError, OSError, ValueError, KeyError) as ex:
            log.warning("A damaged cache file is set aside and made again: %s (%s)", path, ex)
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
        part = self._folder / f".{uuid.uuid4().hex}.part"
        with os.fdopen(os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
            file.write(data)
        part.replace(path)
        self._open(path)

    def rows(self, names: Sequence[str]) -> Rows:
        """The rows with these names, which must be there."""
        return Rows([self._places[name] for name in names])


@lru_cache(maxsize=8)
def open_store(folder: Path) -> Store:
    """The store in `folder`; one per process, so that many virtual sites share it."""
    return Store(folder)


@dataclass(frozen=True)
class Prepared:
    """Images ready to train on: rows, and what is left to run on each batch.

    Attributes:
      rows: `views` rows per image, those of one image side by side.
      front: What a batch of rows still needs before the suffix, without gradients.
    """

    rows: Rows
    views: int
    front: nn.Module


class _Front(nn.Module):
    """Pixels → activations, for rows that are pixels."""

    def __init__(self, preprocess: Preprocess, prefix: nn.Module) -> None:
        super().__init__()
        self.preprocess, self.prefix = preprocess, prefix

    def forward(self, pixels: Tensor) -> Tensor:
        output: Tensor = self.prefix(self.preprocess.normalise(pixels))
        return output


def prepare(
    images: Sequence[Image], *, recipe: Recipe, views: int, cache: Path, skip_unreadable: bool
) -> tuple[Prepared, list[int]]:
    """Rows for `images`, computing those the cache does not have.

    Returns:
      The rows, and the positions of the images that could be read.

    Raises:
      DataError: images that cannot be read, named and counted, unless they are to be skipped.
    """
    activations = recipe.caches_activations
    store = open_store(cache / recipe.key)
    store.refresh()
    bad: dict[int, str] = {}
    names = list(_digests(images, bad))
    wanted = [i for i in range(len(images)) if i not in bad]
    jobs = [(i, v, f"{names[i]}/{v}") for i in wanted for v in range(views)]
    todo = [jobs[j] for j in store.missing([name for _, _, name in jobs])]
    if todo:
        log.info("preparing %d images, once; they are kept in %s", len(todo), cache)
    _fill(store, images, todo, recipe, activations, bad)
    _complain(images, bad, skip_unreadable)
    kept = [i for i in range(len(images)) if i not in bad]
    rows = store.rows([f"{names[i]}/{v}" for i in kept for v in range(views)])
    front = nn.Identity() if activations else _Front(recipe.preprocess, recipe.prefix)
    return Prepared(rows, views, front), kept


def _digests(images: Sequence[Image], bad: dict[int, str]) -> Iterator[str]:
    for i, image in enumerate(images):
        try:
            yield image.digest()
        except DataError as ex:
            bad[i] = str(ex)
            yield ""


def _fill(
    store: Store,
    images: Sequence[Image],
    todo: Sequence[tuple[int, int, str]],
    recipe: Recipe,
    activations: bool,
    bad: dict[int, str],
) -> None:
    """Compute the missing rows, shard by shard, with decoding on all cores."""

    def pixels(job: tuple[int, int, str]) -> Tensor | str:
        i, number, name = job
        try:
            square = recipe.preprocess.pixels(images[i].pixels())
        except DataError as ex:
            return str(ex)
        seed = int(name[:12], 16) + number
        return view(square, recipe.ops, seed) if number else square

    told = time.monotonic()
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for start in range(0, len(todo), _SHARD):
            jobs = todo[start : start + _SHARD]
            names: list[str] = []
            rows: list[Tensor] = []
            for first in range(0, len(jobs), _BATCH):
                batch = jobs[first : first + _BATCH]
                decoded = list(pool.map(pixels, batch))
                good = [
                    (j, p) for j, p in zip(batch, decoded, strict=True) if isinstance(p, Tensor)
                ]
                bad |= {j[0]: p for j, p in zip(batch, decoded, strict=True) if isinstance(p, str)}
                if good:
                    rows.append(recipe.rows([p for _, p in good], activations))
                    names.extend(job[2] for job, _ in good)
                if time.monotonic() - told > _QUIET:
                    told = time.monotonic()
                    log.info("  prepared %d of %d", start + first + len(batch), len(todo))
            if names:
                store.add(names, torch.cat(rows))


def _complain(images: Sequence[Image], bad: dict[int, str], skip: bool) -> None:
    if not bad:
        return
    shown = "; ".join(bad[i] for i in sorted(bad)[:3])
    text = f"{len(bad)} of {len(images)} images cannot be read: {shown}"
    text += "; …" if len(bad) > 3 else ""
    if not skip:
        raise DataError(f"{text}. Repair or remove them, or set images.unreadable: skip.")
    log.warning("%s. They are left out.", text)
