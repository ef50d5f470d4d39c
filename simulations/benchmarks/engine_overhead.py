"""The cost of the engine itself, in time and memory, as virtual hospitals grow."""

import resource
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import numpy as np
from rich.progress import track

from client.app import make_app
from client.data.npz import Npz
from client.runtime import Runtime
from client.training import trainer
from common.config.study import Study
from common.errors import StudyError
from common.support.terminal import console, size, table
from server.reports.progress import Joined, Reporter
from server.rounds.loop import Run
from server.runs.run_folder import RunFolder
from simulations.engines.grid import InProcessGrid
from simulations.sites import virtual_sites
from simulations.sites.virtual_sites import VirtualSite

_IMAGES = 24
_IN_KB = 1000 if sys.platform == "darwin" else 1  # there it counts bytes


class Cost(NamedTuple):
    """The cost of one run: join, rounds, report."""

    round: float
    """Wall time of the median round, in ms per site."""
    work: float
    """The time inside train and evaluate, in ms per site and round."""
    whole: float
    """Wall time of the whole run, in s."""
    memory: tuple[int, ...]
    """The most memory that this process ever held, in kB, after each round."""


def show_overhead(sizes: Sequence[int] = (10, 100, 1000), rounds: int = 20) -> None:
    """Print the cost of a run as sites grow, for a head on cached features of a small backbone."""
    first = ("sites", "round", "train + evaluate", "engine", "engine / (train + evaluate)")
    shown = table(*first, "whole run", "memory", left=())
    for sites in track(sizes, "engine", console=console, disable=not console.is_terminal):
        cost = measure_run(sites, rounds)
        own = cost.round - cost.work
        times = (f"{ms:.2f}" for ms in (cost.round, cost.work, own, own / cost.work))
        shown.add_row(str(sites), *times, f"{cost.whole:.1f} s", size(1000 * cost.memory[-1]))
    told = f"milliseconds per site and round; whole runs of {rounds} rounds, from join to report"
    console.print(f"{told}; the most memory until then", style="dim")
    console.print(shown)


def measure_run(sites: int, rounds: int) -> Cost:
    """Measure one run over so many virtual hospitals, whose images are prepared before."""
    content = {
        "name": "engine",
        "classes": ["a", "b"],
        "model": {"backbone": "shufflenet_v2_x0_5", "weights": "none", "init": "zero"},
        "images": {"size": 32},
        "adapt": False,
        "train": {"rounds": rounds, "local_epochs": 1},
    }
    study = Study.parse(content, "bench", StudyError)
    with TemporaryDirectory() as scratch, _quiet(), _clock() as spent:
        folder = RunFolder.create(Path(scratch) / "run")
        folder.write_study(study)
        found = [VirtualSite(name=f"s{i}", data=_data(Path(scratch), i)) for i in range(sites)]
        planned = virtual_sites.plan_sites(found, study)
        files = virtual_sites.write_sites(planned, study, folder.path, Path(scratch) / "cache")
        runtime = Runtime()
        virtual_sites.prepare_sites(files, study, runtime)
        reporter = _Laps(folder, spent)
        began = time.perf_counter()
        Run(InProcessGrid(make_app(runtime), files), folder, reporter).run()
        whole = time.perf_counter() - began
        runtime.close()
    works = [after - before for before, after in pairwise(reporter.works)]
    each = 1000 / sites
    return Cost(each * median(reporter.rounds), each * median(works), whole, tuple(reporter.memory))


class _Laps(Reporter):
    """A reporter that notes the time, the time inside the trainer and the memory of each round."""

    def __init__(self, folder: RunFolder, spent: list[float]) -> None:
        super().__init__(folder)
        self._spent = spent
        self.rounds: list[float] = []
        self.works: list[float] = [0.0]
        self.memory: list[int] = []

    def report_join(self, joined: Joined) -> None:
        super().report_join(joined)
        self._spent[0] = 0.0

    def report_round(self, lines: Sequence[Mapping[str, Any]], seconds: float) -> None:
        super().report_round(lines, seconds)
        self.rounds.append(seconds)
        self.works.append(self._spent[0])
        self.memory.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // _IN_KB)


def _data(folder: Path, seed: int) -> Npz:
    draw = np.random.default_rng(seed)
    arrays: dict[str, Any] = {}
    for split, count in (("train", _IMAGES), ("val", 8), ("test", 8)):
        arrays[f"{split}_images"] = draw.integers(0, 255, (count, 32, 32), np.uint8)
        arrays[f"{split}_labels"] = np.arange(count)[:, None] % 2
    path = folder / f"{seed}.npz"
    np.savez(path, **arrays)
    return Npz(root=path)


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep a run from printing."""
    quiet, console.quiet = console.quiet, True
    try:
        yield
    finally:
        console.quiet = quiet


@contextmanager
def _clock() -> Iterator[list[float]]:
    """Add up the time inside the trainer's two functions."""
    spent = [0.0]

    def timed(work: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            began = time.perf_counter()
            try:
                return work(*args, **kwargs)
            finally:
                spent[0] += time.perf_counter() - began

        return run

    train, evaluate = trainer.train, trainer.evaluate
    trainer.train, trainer.evaluate = timed(train), timed(evaluate)
    try:
        yield spent
    finally:
        trainer.train, trainer.evaluate = train, evaluate
