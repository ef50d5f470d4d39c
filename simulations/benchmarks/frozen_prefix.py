"""The worth of running the frozen prefix once: the real thing beside two tutorials, in one run."""

import json
import logging
import os
import platform
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from PIL import Image
from rich.progress import track
from rich.table import Table

from common.config.study import Study
from common.errors import StudyError
from common.model import backbones
from common.support.terminal import console, size, table
from simulations.benchmarks.contenders import (
    Contender,
    Task,
    Way,
    choose_device,
    count_turns,
    race_contenders,
)
from simulations.benchmarks.flops import count_operations, measure_product

log = logging.getLogger(__name__)

_TASKS: tuple[tuple[Way, str], ...] = (
    ("naive", "all"),
    ("frozen", "head"),
    ("ours", "head"),
    ("frozen", "last:1"),
    ("ours", "last:1"),
)
_BATCH = 32
_SHARE = 4
_PRODUCTS = 5


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The backbones, images and rounds to measure."""

    backbones: tuple[str, ...]
    images: int
    side: int
    """The side of an image, in pixels."""
    rounds: int
    repeats: int
    """Epochs that each tutorial is timed on."""

    @property
    def sample(self) -> int:
        """Images in such an epoch: about a quarter, in whole batches."""
        return self.images // _SHARE // _BATCH * _BATCH or min(self.images, _BATCH)

    def study(self, backbone: str, unfreeze: str) -> Study:
        """The study of every contender: no patient is held out, all images train."""
        content = {
            "name": "bench",
            "classes": ["a", "b"],
            "model": {
                "backbone": backbone,
                "weights": "none",
                "unfreeze": unfreeze,
                "init": "zero",
            },
            "images": {"size": self.side},
            # Random weights: a small rate keeps them from running away; times are the same.
            "adapt": False,
            "train": {"rounds": self.rounds, "optimizer": "sgd", "lr": 1e-4, "batch_size": _BATCH},
            "holdout": {"validation": 0, "test": 0},
        }
        return Study.parse(content, "bench", StudyError)


@dataclass(frozen=True, kw_only=True)
class Row:
    """One way of training one backbone."""

    backbone: str
    trains: str
    way: str
    round_seconds: float
    study_seconds: float
    naive_ratio: float
    """Study seconds of `naive` over those of this one."""
    frozen_ratio: float | None
    """Study seconds of the `frozen` that trains as much over those of this one."""
    memory: int | None
    """The most bytes that its process held."""
    wire: int
    """Bytes of tensors in a round, both ways."""
    gflops: float
    """10⁹ FLOP/s over a whole round."""
    peak_share: float
    """The share of the machine's float32 peak."""


@dataclass(frozen=True, kw_only=True)
class Caching:
    """The one pass of `ours` over all images: reading, decoding, prefix, writing."""

    backbone: str
    trains: str
    seconds: float
    images_per_second: float
    gflops: float
    dtype: str
    peak_share: float
    """The share of the machine's peak in `dtype`."""


@dataclass(frozen=True, kw_only=True)
class Results:
    """The whole result of the benchmark."""

    machine: dict[str, Any]
    plan: Plan
    rows: list[Row]
    caching: list[Caching]

    def to_json(self) -> str:
        """Write the results as JSON, in seconds, bytes and 10⁹ FLOP/s."""
        return json.dumps(asdict(self), indent=2)


def measure_ways(plan: Plan) -> Results:
    """Measure everything; at full size this takes minutes.

    Raises:
      StudyError: a backbone that is not registered, or cannot take images of this size.
    """
    for name in plan.backbones:
        backbones.get(name).check_size(plan.side)
    peaks: dict[str, float] = {}
    contenders: list[Contender] = []
    with TemporaryDirectory() as scratch:
        images = Path(scratch) / "images"
        _draw(images, plan)
        for name in plan.backbones:
            contenders += _race_ways(plan, name, images, peaks)
    for dtype in {c.facts.get("dtype", "float32") for c in contenders} - set(peaks):
        peaks[dtype] = max(measure_product(dtype) for _ in range(_PRODUCTS))
    rows: list[Row] = []
    caching: list[Caching] = []
    for name in plan.backbones:
        group = [c for c in contenders if c.task.study.model.backbone == name]
        rows += _rows(plan, group, peaks["float32"])
        caching += [_caching(plan, c, peaks) for c in group if c.task.way == "ours"]
    return Results(machine=_machine(contenders, peaks), plan=plan, rows=rows, caching=caching)


def _race_ways(plan: Plan, backbone: str, images: Path, peaks: dict[str, float]) -> list[Contender]:
    """Run all contenders of one backbone; the machine's peak is taken in turn with them."""
    log.info("%s", backbone)
    contenders = [
        Contender(
            Task(
                way=way,
                study=plan.study(backbone, unfreeze),
                images=images,
                sample=plan.sample,
                repeats=plan.repeats,
            )
        )
        for way, unfreeze in _TASKS
    ]
    laps = track(
        race_contenders(contenders),
        backbone,
        total=count_turns(contenders),
        console=console,
        disable=not console.is_terminal,
    )
    for _ in laps:
        peaks["float32"] = max(peaks.get("float32", 0.0), measure_product("float32"))
    return contenders


def _rows(plan: Plan, group: Sequence[Contender], peak: float) -> Iterable[Row]:
    studies = {(c.task.way, _trains(c)): _study_seconds(plan, c) for c in group}
    for contender in group:
        way, trains, facts = contender.task.way, _trains(contender), contender.facts
        seconds, study = _round_seconds(plan, contender), studies[way, trains]
        before, after = count_operations(contender.task.study)
        again = way != "ours" or not facts["activations"]
        gflops = plan.images * (before * again + after) / seconds / 1e9
        frozen = studies.get(("frozen", trains))
        yield Row(
            backbone=contender.task.study.model.backbone,
            trains=trains,
            way=way,
            round_seconds=seconds,
            study_seconds=study,
            naive_ratio=studies["naive", "all"] / study,
            frozen_ratio=frozen / study if frozen else None,
            memory=facts["memory"],
            wire=facts["bytes"],
            gflops=gflops,
            peak_share=gflops / peak,
        )


def _caching(plan: Plan, contender: Contender, peaks: dict[str, float]) -> Caching:
    facts, (seconds,) = contender.facts, contender.seconds["cache"]
    before, _ = count_operations(contender.task.study)
    gflops = plan.images * before * facts["activations"] / seconds / 1e9
    return Caching(
        backbone=contender.task.study.model.backbone,
        trains=_trains(contender),
        seconds=seconds,
        images_per_second=plan.images / seconds,
        gflops=gflops,
        dtype=facts["dtype"],
        peak_share=gflops / peaks[facts["dtype"]],
    )


def _trains(contender: Contender) -> str:
    return contender.task.study.model.unfreeze


def _round_seconds(plan: Plan, contender: Contender) -> float:
    """Median; of a tutorial, its epochs scaled from the sample to all images."""
    seconds = contender.seconds
    if contender.task.way == "ours":
        return median(seconds["round"])
    return median(seconds["epoch"]) * plan.images / plan.sample + median(seconds["exchange"])


def _study_seconds(plan: Plan, contender: Contender) -> float:
    """Add up the laps of a study; for a tutorial, one decoding and as many median rounds."""
    if contender.task.way == "ours":
        return sum(map(sum, contender.seconds.values()))
    return contender.seconds["decode"][0] + plan.rounds * _round_seconds(plan, contender)


def _machine(contenders: Sequence[Contender], peaks: dict[str, float]) -> dict[str, Any]:
    where = choose_device()
    name = torch.cuda.get_device_name() if where.type == "cuda" else where.type
    return {
        "device": name,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "system": platform.platform(),
        "torch": torch.__version__,
        "peak_gflops": peaks,
        "memory_at_start": max((c.facts["memory at start"] or 0) for c in contenders),
    }


def _draw(folder: Path, plan: Plan) -> None:
    """Smooth random images as JPEG files, in a folder per class."""
    draw = np.random.default_rng(0)
    coarse = max(plan.side // 8, 1)
    for i in range(plan.images):
        path = folder / "ab"[i % 2] / f"{i:06}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        small = Image.fromarray(draw.integers(0, 255, (coarse, coarse, 3), np.uint8))
        small.resize((plan.side, plan.side)).save(path, quality=90)


def show_results(results: Results) -> None:
    """Print both tables, and how their figures came about."""
    for text in _caption(results):
        console.print(text, style="dim")
    console.print(_table(results.rows))
    console.print("\nthe pass of ours over all images, once: read, decode, prefix, write")
    console.print(_caching_table(results.caching))


def _caption(results: Results) -> Iterable[str]:
    plan, machine = results.plan, results.machine
    peaks = ", ".join(f"{dtype} {peak:.0f}" for dtype, peak in machine["peak_gflops"].items())
    yield (
        f"{machine['device']}, {machine['threads']} threads, torch {machine['torch']}; "
        f"peak of a matrix product, GFLOP/s: {peaks}"
    )
    yield (
        f"{plan.images} images of {plan.side} pixels, all to train on, SGD, batches of {_BATCH}, "
        "one epoch a round, random weights"
    )
    yield (
        "naive: everything trains and travels. frozen: only what trains travels, the whole model "
        "runs in every epoch. ours: the prefix runs once."
    )
    yield (
        f"A study has {plan.rounds} rounds. Ours was run whole, from a cold cache. Of naive and "
        f"frozen, {plan.repeats} epochs of {plan.sample} images were timed and scaled: a study is "
        "one decoding and so many median rounds, without server."
    )
    yield (
        "memory: peak of a process of its own, of it at most "
        f"{size(machine['memory_at_start'])} for Python and libraries; ours includes the server"
    )


def _table(rows: Sequence[Row]) -> Table:
    left = ("backbone", "trains", "way")
    right = ("s / round", "s / study", "× naive", "× frozen", "memory", "sent / round", "GFLOP/s")
    shown = table(*left, *right, "of fp32 peak", left=left)
    for i, row in enumerate(rows):
        first = not i or rows[i - 1].backbone != row.backbone
        if first:
            shown.add_section()
        shown.add_row(
            row.backbone if first else "",
            row.trains,
            row.way,
            _figure(row.round_seconds),
            _figure(row.study_seconds),
            _figure(row.naive_ratio),
            _figure(row.frozen_ratio),
            "–" if row.memory is None else size(row.memory),
            size(row.wire),
            _figure(row.gflops),
            f"{row.peak_share:.1%}",
            style="bold" if row.way == "ours" else "",
        )
    return shown


def _caching_table(rows: Sequence[Caching]) -> Table:
    right = ("s", "images / s", "GFLOP/s", "of its peak")
    left = "backbone", "trains", "precision"
    shown = table(*left, *right, left=left)
    for row in rows:
        shown.add_row(
            row.backbone,
            row.trains,
            row.dtype,
            _figure(row.seconds),
            _figure(row.images_per_second),
            _figure(row.gflops),
            f"{row.peak_share:.0%}",
        )
    return shown


def _figure(number: float | None) -> str:
    """Three digits, as far as they are before the point or behind it."""
    if number is None:
        return "–"
    return f"{number:,.0f}" if number >= 100 else f"{number:.3g}"
