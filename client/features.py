"""Images into the suffix's input: decoded once, through the frozen prefix once, then kept.

The store is named by everything a row depends on beside its image; the row by the image's SHA-256
and its view. So more images, other holdouts and other studies of one prefix find what is there.
"""

import hashlib
import json
import logging
import os
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor, nn

from client.data.records import Image
from client.store import Rows, Store, open_store
from common.contract import digest
from common.errors import DataError, complaint
from common.images import Preprocess, view
from common.study import Augment

log = logging.getLogger(__name__)

_BATCH = 32
_SHARD = 512
_QUIET = 5.0
# A prefix whose activations take more room than this many images is not worth caching.
_WORTH = 2.0


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How a row is made from an image.

    Attributes:
      prefix: Frozen part of the backbone: float32 [n, 3, crop, crop] → activations [n, …].
      preprocess: From an image to the backbone's input.
    """

    prefix: nn.Module
    preprocess: Preprocess

    @cached_property
    def keeps_activations(self) -> bool:
        """Whether rows are activations; otherwise rows are uint8 pixels [3, crop, crop]."""
        if isinstance(self.prefix, nn.Identity):
            return False
        pixels = torch.zeros(1, 3, self.preprocess.crop, self.preprocess.crop, dtype=torch.uint8)
        return self._activations(pixels).nbytes <= _WORTH * pixels.nbytes

    @cached_property
    def key(self) -> str:
        """Names the store: equal keys give equal rows."""
        parts = [repr(self.preprocess)]
        if self.keeps_activations:
            parts += [digest(self.prefix.state_dict()), str(getattr(self.prefix, "code", ""))]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:24]

    def rows(self, pixels: Sequence[Tensor]) -> Tensor:
        """Rows as stored, from uint8 images [3, crop, crop]."""
        batch = torch.stack(list(pixels))
        return self._activations(batch) if self.keeps_activations else batch

    def front(self) -> nn.Module:
        """What a batch of rows still needs before the suffix."""
        return nn.Identity() if self.keeps_activations else _Front(self)

    def _activations(self, pixels: Tensor) -> Tensor:
        device = next((p.device for p in self.prefix.parameters()), torch.device("cpu"))
        inputs = self.preprocess.normalise(pixels.to(device))
        with torch.inference_mode():
            # Convolutions run up to twice as fast on this layout.
            output: Tensor = self.prefix(inputs.contiguous(memory_format=torch.channels_last))
        return output.cpu().contiguous()


class _Front(nn.Module):
    """Pixels → activations, for rows that are pixels."""

    def __init__(self, recipe: Recipe) -> None:
        super().__init__()
        self.preprocess, self.prefix = recipe.preprocess, recipe.prefix

    def forward(self, pixels: Tensor) -> Tensor:
        output: Tensor = self.prefix(self.preprocess.normalise(pixels))
        return output


@dataclass(frozen=True)
class Prepared:
    """Images ready to train on.

    Attributes:
      rows: `views` rows per image, those of one image side by side; view 0 is the image itself.
      front: What a batch of rows still needs before the suffix, without gradients.
    """

    rows: Rows
    views: int
    front: nn.Module


@dataclass(frozen=True)
class _Job:
    """One row to make: which image, which view, and the row's name."""

    image: int
    view: int
    name: str


def prepare(
    images: Sequence[Image], *, recipe: Recipe, augment: Augment, cache: Path, skip_unreadable: bool
) -> tuple[Prepared, list[int]]:
    """Rows for `images`, computing those the cache does not have.

    Returns:
      The rows, and the positions of the images that could be read.

    Raises:
      DataError: images that cannot be read, named and counted, unless they are to be skipped.
    """
    store = open_store(cache / recipe.key)
    store.refresh()
    bad: dict[int, str] = {}
    digests = list(_digests(images, bad))
    jobs = [
        _Job(i, v, "/".join((digests[i], *(("+".join(augment.ops), str(v)) if v else ()))))
        for i in range(len(images))
        if i not in bad
        for v in range(augment.views)
    ]
    todo = {jobs[j].name: jobs[j] for j in store.missing([job.name for job in jobs])}
    _fill(store, images, list(todo.values()), recipe, augment.ops, bad)
    for j in store.missing([job.name for job in jobs]):  # one that failed fails wherever it is
        where, got = images[jobs[j].image].name, "the bytes of another that is not"
        bad.setdefault(jobs[j].image, complaint(where, expected="a readable image", got=got))
    _complain(images, bad, skip_unreadable)
    rows = store.rows([job.name for job in jobs if job.image not in bad])
    kept = [i for i in range(len(images)) if i not in bad]
    return Prepared(rows, augment.views, recipe.front()), kept


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
    todo: Sequence[_Job],
    recipe: Recipe,
    ops: tuple[str, ...],
    bad: dict[int, str],
) -> None:
    """Make the missing rows shard by shard, decoding on all cores; adds to `bad` what fails."""

    def pixels(job: _Job) -> Tensor | None:
        try:
            square = recipe.preprocess.pixels(images[job.image].pixels())
        except DataError as ex:
            bad[job.image] = str(ex)
            return None
        seed = int(job.name[:12], 16) + job.view
        return view(square, ops, seed) if job.view else square

    count = len({job.image for job in todo})
    if todo:
        views = f" ({len(todo)} views)" if len(todo) > count else ""
        log.info("preparing %d images%s, once", count, views)
    told = time.monotonic()
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for start in range(0, len(todo), _SHARD):
            names: list[str] = []
            rows: list[Tensor] = []
            for batch in _chunks(todo[start : start + _SHARD], _BATCH):
                decoded = zip(batch, pool.map(pixels, batch), strict=True)
                good = [(job.name, p) for job, p in decoded if p is not None]
                if good:
                    names += [name for name, _ in good]
                    rows.append(recipe.rows([p for _, p in good]))
                if time.monotonic() - told > _QUIET:
                    told = time.monotonic()
                    log.info("  prepared %d of %d", start + len(names), len(todo))
            if names:
                store.add(names, torch.cat(rows))


def _chunks(jobs: Sequence[_Job], size: int) -> Iterator[Sequence[_Job]]:
    for start in range(0, len(jobs), size):
        yield jobs[start : start + size]


def _complain(images: Sequence[Image], bad: dict[int, str], skip: bool) -> None:
    if not bad:
        return
    shown = "; ".join(bad[i] for i in sorted(bad)[:3]) + ("; …" if len(bad) > 3 else "")
    text = f"{len(bad)} of {len(images)} images cannot be read: {shown}"
    if not skip:
        raise DataError(f"{text}. Repair or remove them, or set images.unreadable: skip.")
    log.warning("%s. They are left out.", text)
