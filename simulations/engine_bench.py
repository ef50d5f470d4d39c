"""What the engine itself costs: wall time of a round beside the time inside train and evaluate."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from rich.progress import track

from client import trainer
from client.app import app as client_app
from client.data.npz import Npz
from common.errors import StudyError
from common.study import Study
from common.terminal import console, table
from server.app import app as server_app
from server.checkpoint import RunFolder
from simulations import hospitals
from simulations.grid import simulate
from simulations.hospitals import Hospital

_FEW, _MANY, _REPEATS = 2, 12, 3
_WHOLE = 100, 50
_IMAGES = 24


def show(sites: tuple[int, ...] = (4, 20, 100)) -> None:
    """Print milliseconds per site and round, for a head on a small backbone.

    The difference between a run of many rounds and one of few leaves out joining and reporting.
    """
    columns = ("sites", "round", "train + evaluate", "engine", "engine / (train + evaluate)")
    shown = table(*columns, left=())
    for count in track(sites, "engine", console=console, disable=not console.is_terminal):
        wall, work = _cost(count)
        own = wall - work
        shown.add_row(str(count), f"{wall:.2f}", f"{work:.2f}", f"{own:.2f}", f"{own / work:.2f}")
    console.print(f"milliseconds per site and round, median of {_REPEATS}", style="dim")
    console.print(shown)
    count, rounds = _WHOLE
    wall, _ = _time(count, rounds, seed=0)
    whole = f"{count} virtual hospitals × {rounds} rounds head-only on cached features"
    console.print(f"{whole}: {wall:.1f} s, a whole run from join to report")


def _cost(sites: int) -> tuple[float, float]:
    """Wall time of a round and the part inside train and evaluate, in ms per site."""
    walls, works = [], []
    for repeat in range(_REPEATS):
        few, many = (_time(sites, rounds, seed=repeat) for rounds in (_FEW, _MANY))
        scale = 1000 / (sites * (_MANY - _FEW))
        walls.append((many[0] - few[0]) * scale)
        works.append((many[1] - few[1]) * scale)
    return median(walls), median(works)


def _time(sites: int, rounds: int, seed: int) -> tuple[float, float]:
    """Seconds of one whole run, and of those inside train and evaluate."""
    content = {
        "name": "engine",
        "classes": ["a", "b"],
        "model": {"backbone": "shufflenet_v2_x0_5", "weights": "none"},
        "images": {"size": 32},
        "train": {"rounds": rounds, "local_epochs": 1},
        "seed": seed,
    }
    study = Study.parse(content, "bench", StudyError)
    with TemporaryDirectory() as scratch, _quiet(), _clock() as spent:
        folder = Path(scratch) / "run"
        RunFolder.claim(folder).begin(study)
        found = [Hospital(name=f"s{i}", data=_data(Path(scratch), i)) for i in range(sites)]
        files = hospitals.settle(found, study, folder, Path(scratch) / "cache")
        hospitals.prepare(files, study)
        spent[0] = 0.0
        began = time.perf_counter()
        simulate(server_app, client_app, files, folder)
        return time.perf_counter() - began, spent[0]


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
    """What a run would print is not of interest."""
    quiet, console.quiet = console.quiet, True
    try:
        yield
    finally:
        console.quiet = quiet


@contextmanager
def _clock() -> Iterator[list[float]]:
    """Adds up the time inside the trainer's two functions."""
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
