"""Images into the suffix's input: decoded once, through the frozen prefix once, then kept.

The store is named by everything a row depends on beside its image; the row by its view and an HMAC
of the image's SHA-256. So more images, other holdouts and other studies of one prefix find what is
there, and who has the image but not the cache's secret cannot tell whether it is.
"""

import hashlib
import hmac
import json
import logging
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from itertools import chain, groupby, islice
from pathlib import Path
from typing import Self, TypeVar

import torch
from torch import Tensor, nn

from client.data.records import Image
from client.features.precision import fix_numerics
from client.features.prefix import BATCH, CacheDecision, Prefix
from client.features.store import Rows, Store, Stores
from client.site import Keep
from client.storage import read_secret
from common.config.study import Augment, Dtype
from common.errors import DataError
from common.model.contract import digest
from common.model.images import Preprocess, view
from common.model.network import Network

log = logging.getLogger(__name__)

A = TypeVar("A")
B = TypeVar("B")

_CPU = torch.device("cpu")
_SHARD = 512
_SHARD_BYTES = 64_000_000
_SHARD_SECONDS = 30.0
_QUIET = 5.0


@dataclass(frozen=True, kw_only=True)
class FeatureSpec:
    """How a row is made from an image.

    Attributes:
      prefix: Frozen part of the backbone: float32 [n, 3, crop, crop] → activations [n, …].
      preprocess: From an image to the backbone's input.
      dtype: What the prefix computes in, and its activations are kept in.
      batch: Images that pass the prefix at once; 1 where patients are protected from each other.
      activations: Whether rows are activations; otherwise they are uint8 pixels [3, crop, crop].
      device: Where rows are made, and kept for training where they fit.
      name: What a person calls it.
    """

    prefix: nn.Module
    preprocess: Preprocess
    dtype: Dtype = "float32"
    batch: int = BATCH
    activations: bool = True
    device: torch.device = _CPU
    name: str = ""

    @classmethod
    def of(
        cls, network: Network, dtype: Dtype, keep: Keep = "auto", *, private: bool = False
    ) -> Self:
        """The spec for a study's network; says what is kept, and why."""
        decision = CacheDecision.of(network.split, network.preprocess, dtype)
        frozen = not isinstance(network.split.prefix, nn.Identity)
        activations = frozen and (decision.pays if keep == "auto" else keep == "activations")
        at = f"activations of {network.backbone} at {network.split.at}"
        kept = at if activations else "pixels"
        if frozen:
            log.info("keeping %s. Activations: %s", kept, decision)
        return cls(
            prefix=network.split.prefix,
            preprocess=network.preprocess,
            dtype=dtype if frozen else "float32",
            batch=1 if private else BATCH,
            activations=activations,
            device=next(network.model.parameters()).device,
            name=kept,
        )

    @cached_property
    def key(self) -> str:
        """Names the store: equal keys give equal rows."""
        parts = [repr(self.preprocess)]
        if self.activations:
            # Its text has the layers' settings, such as strides, and how they are connected.
            parts += [digest(self.prefix.state_dict()), str(self.prefix), self.dtype]
            parts += [str(self.batch), *_maker(self.device)]  # on another, rounding differs
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:24]

    @cached_property
    def fast(self) -> Prefix:
        """The prefix as it is run."""
        return Prefix(self.prefix, self.preprocess, self.dtype, self.batch)

    @property
    def about(self) -> dict[str, str]:
        """What the store holds, in words for a person."""
        dtype = self.dtype if self.activations else "uint8"
        side = f"{self.preprocess.crop} pixels"
        return {"rows": self.name, "size": side, "type": dtype}

    def rows(self, pixels: Sequence[Tensor]) -> Tensor:
        """Rows as stored, from uint8 images [3, crop, crop]."""
        batch = torch.stack(list(pixels)).to(self.device)
        return (self.fast(batch) if self.activations else batch).cpu()

    def front(self) -> nn.Module:
        """What a batch of rows still needs before the suffix."""
        return nn.Identity() if self.activations else self.fast


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
    """One row to make: which image, which view, the row's name, and the seed of its view."""

    image: int
    view: int
    name: str
    seed: int


def prepare_images(
    images: Sequence[Image],
    *,
    spec: FeatureSpec,
    augment: Augment,
    cache: Path,
    stores: Stores,
    skip_unreadable: bool,
) -> tuple[Prepared, list[int]]:
    """Rows for `images`, computing those the cache does not have.

    Args:
      images: In any order; twice the same is one row.
      spec: How a row is made.
      augment: Which views each image has beside itself.
      cache: The folder of all stores.
      stores: Those that this process has open.
      skip_unreadable: Leave unreadable images out, with a warning.

    Returns:
      The rows, and the positions of the images that could be read.

    Raises:
      DataError: images that cannot be read, named and counted, unless they are to be skipped.
    """
    store = stores.open(cache / spec.key, spec.about)
    bad: dict[int, str] = {}
    digests = list(_digests(images, bad))
    name = make_namer(cache)
    # Views are drawn from the image itself: the same in every cache, so that runs can be repeated.
    jobs = [
        _Job(i, v, _row(name(digests[i]), augment.ops, v), seed=int(digests[i][:12], 16) + v)
        for i in range(len(images))
        if i not in bad
        for v in range(augment.views)
    ]
    if store.missing([job.name for job in jobs]):
        store.refresh()
    todo = {jobs[j].name: jobs[j] for j in store.missing([job.name for job in jobs])}
    _fill(store, images, list(todo.values()), spec, augment.ops, bad)
    for j in store.missing([job.name for job in jobs]):  # one that failed fails wherever it is
        where, got = images[jobs[j].image].name, "the bytes of another that is not"
        failed = DataError(where, expected="a readable image", got=got)
        bad.setdefault(jobs[j].image, str(failed))
    _complain(images, bad, skip_unreadable)
    rows = store.rows([job.name for job in jobs if job.image not in bad], spec.device)
    kept = [i for i in range(len(images)) if i not in bad]
    return Prepared(rows, augment.views, spec.front()), kept


def _row(name: str, ops: tuple[str, ...], view: int) -> str:
    return f"{name}/{'+'.join(ops)}/{view}" if view else name


def make_namer(cache: Path) -> Callable[[str], str]:
    """What names an image's rows in the folder `cache`, from its digest.

    Keyed by a secret of that folder, drawn once from the operating system: sites that share a cache
    share rows, and nobody without the secret can tell of which images they are.

    Raises:
      DataError: the secret cannot be made or read.
    """
    key = read_secret(cache / "secret", DataError, "Delete it: images are then prepared anew.")
    return lambda digest: hmac.digest(key, digest.encode(), "sha256").hex()


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
    spec: FeatureSpec,
    ops: tuple[str, ...],
    bad: dict[int, str],
) -> None:
    """Make the missing rows shard by shard, on all cores; adds to `bad` what fails.

    Each batch has a core of its own: shared, its numbers would depend on how many there are. A
    shard is whole after so many rows, bytes or seconds: an interruption costs no more than that.
    """
    cores = torch.get_num_threads()

    def squares(jobs: Sequence[_Job]) -> list[tuple[str, Tensor]]:
        """One image, decoded once, in every view that is missing."""
        image = jobs[0].image
        try:
            square = images[image].square(spec.preprocess)
        except DataError as ex:
            bad[image] = str(ex)
            return []
        return [(job.name, _viewed(square, job, ops)) for job in jobs]

    def made(batch: Sequence[tuple[str, Tensor]]) -> tuple[list[str], Tensor]:
        return [name for name, _ in batch], spec.rows([pixels for _, pixels in batch])

    by_image = [list(jobs) for _, jobs in groupby(todo, lambda job: job.image)]
    if todo:
        views = f" ({len(todo)} views)" if len(todo) > len(by_image) else ""
        log.info("preparing %d images%s, once", len(by_image), views)
    names: list[str] = []
    rows: list[Tensor] = []
    done, told, kept = 0, time.monotonic(), time.monotonic()
    with fix_numerics(threads=1):
        pixels = chain.from_iterable(_ahead(squares, by_image, cores, 2 * BATCH))
        at_once = cores if spec.device.type == "cpu" else 1
        for new, part in _ahead(made, _batched(pixels, BATCH), at_once, at_once):
            names, rows = [*names, *new], [*rows, part]
            done, now = done + len(new), time.monotonic()
            full = len(names) >= _SHARD or sum(part.nbytes for part in rows) >= _SHARD_BYTES
            if full or now - kept > _SHARD_SECONDS:
                store.add(names, torch.cat(rows))
                names, rows, kept = [], [], now
            if now - told > _QUIET:
                told = now
                log.info("  prepared %d of %d", done, len(todo))
    if names:
        store.add(names, torch.cat(rows))


def _maker(device: torch.device) -> list[str]:
    """What computes: its kind of processor, and the library."""
    cpu = torch.backends.cpu.get_cpu_capability()
    unit = torch.cuda.get_device_name(device) if device.type == "cuda" else cpu
    return [device.type, unit, torch.__version__]


def _viewed(square: Tensor, job: _Job, ops: tuple[str, ...]) -> Tensor:
    return view(square, ops, job.seed) if job.view else square


def _ahead(work: Callable[[A], B], items: Iterable[A], cores: int, most: int) -> Iterator[B]:
    """`work` on each item, in order, on so many cores, at most so many ahead of who reads."""
    with ThreadPoolExecutor(cores, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        waiting: deque[Future[B]] = deque()
        for item in items:
            waiting.append(pool.submit(work, item))
            if len(waiting) > most:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def _batched(items: Iterable[A], size: int) -> Iterator[list[A]]:
    rest = iter(items)
    while batch := list(islice(rest, size)):
        yield batch


def _complain(images: Sequence[Image], bad: dict[int, str], skip: bool) -> None:
    if not bad:
        return
    shown = "; ".join(bad[i] for i in sorted(bad)[:3]) + ("; …" if len(bad) > 3 else "")
    text = f"{len(bad)} of {len(images)} images cannot be read: {shown}"
    if not skip:
        raise DataError(f"{text}. Repair or remove them, or set images.unreadable: skip.")
    log.warning("%s. They are left out.", text)
