"""Contenders: each trains in its own way, in a process of its own, one step at a time on command.

Their times can so be taken in turn, and the memory of each is its own.
"""

import multiprocessing
import os
import signal
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

import torch
from torch.utils.data import TensorDataset

from client.app import make_app
from client.data.image_folder import ImageFolder
from client.runtime import Runtime
from client.site import Site
from common.config.study import Study
from common.errors import RunError
from common.protocol.tensors import count_bytes
from common.support.terminal import console
from server.app import app as server_app
from server.runs.run_folder import RunFolder
from simulations.benchmarks.tutorial_baseline import Tutorial
from simulations.engines.grid import simulate_run
from simulations.sites import virtual_sites
from simulations.sites.virtual_sites import VirtualSite

# Where it exists, a server imports the libraries once for all contenders, and does nothing else.
_processes: Any = multiprocessing.get_context("forkserver" if os.name == "posix" else "spawn")
_processes.set_forkserver_preload([__name__])

Lap = Callable[[str], None]
Way = Literal["naive", "frozen", "ours"]


@dataclass(frozen=True, kw_only=True)
class Task:
    """The work of one contender.

    Attributes:
      way: `naive` and `frozen` are tutorials, `ours` is the real thing.
      study: The study, with its backbone, `unfreeze` and rounds.
      images: A folder of images per class, all of them to train on; beside it is room for a run.
      sample: The number of images that an epoch of a tutorial sees.
      repeats: The number of epochs of a tutorial; the real thing runs all of its rounds.
    """

    way: Way
    study: Study
    images: Path
    sample: int
    repeats: int

    @property
    def steps(self) -> int:
        """The number of laps that it takes."""
        return self.study.train.rounds + 4 if self.way == "ours" else 1 + 2 * self.repeats


class Contender:
    """The process of one task.

    Attributes:
      seconds: The seconds of every lap so far, by its label.
      facts: The facts that it told of itself; after `finish`, all of them.
    """

    def __init__(self, task: Task) -> None:
        self.task = task
        self.seconds: dict[str, list[float]] = defaultdict(list)
        self._pipe, theirs = _processes.Pipe()
        self._process = _processes.Process(target=_work, args=(theirs, task), daemon=True)
        self._process.start()
        theirs.close()

    def ready(self) -> None:
        """Wait until it has started, so that no start disturbs another's step."""
        self.facts: dict[str, Any] = self._receive()

    def step(self) -> None:
        """Let it work for one lap, and wait."""
        self._pipe.send(None)
        label, seconds = self._receive()
        self.seconds[label].append(seconds)

    def finish(self) -> None:
        """Hear the rest of its facts, after its last lap."""
        self._pipe.send(None)
        self.facts |= self._receive()

    def stop(self) -> None:
        """End it, whatever it is doing."""
        self._process.kill()
        self._process.join()

    def _receive(self) -> Any:
        try:
            return self._pipe.recv()
        except EOFError:
            what = f"{self.task.study.model.backbone}, {self.task.way}"
            remedy = "Its last words are above; with none, it ran out of memory."
            got = "a process that ended"
            raise RunError(what, expected="a step", got=got, remedy=remedy) from None


def count_turns(contenders: Sequence[Contender]) -> int:
    """Count the turns that a race of these takes."""
    return max(contender.task.steps for contender in contenders)


def race_contenders(contenders: Sequence[Contender]) -> Iterator[None]:
    """Let them take turns until all are finished, evenly spread for those with fewer steps.

    Yields before every turn.
    """
    total = count_turns(contenders)
    try:
        for contender in contenders:
            contender.ready()
        for turn in range(total):
            yield
            for contender in contenders:
                steps = contender.task.steps
                if turn * steps // total < (turn + 1) * steps // total:
                    contender.step()
        for contender in contenders:
            contender.finish()
    finally:
        for contender in contenders:
            contender.stop()


def choose_device() -> torch.device:
    """Choose the device of contenders: the accelerator if there is one, as for sites."""
    return torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")


def _work(pipe: Connection, task: Task) -> None:
    """The contender's process."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to answer
    console.quiet = True
    began = 0.0

    def turn() -> None:
        nonlocal began
        try:
            pipe.recv()
        except EOFError:  # the parent was stopped
            sys.exit()
        began = time.perf_counter()

    def lap(label: str) -> None:
        if choose_device().type != "cpu":
            torch.accelerator.synchronize()
        pipe.send((label, time.perf_counter() - began))
        turn()

    pipe.send({"memory at start": _peak_memory()})
    turn()
    facts = _ours(task, lap) if task.way == "ours" else _tutorial(task, lap)
    pipe.send({**facts, "memory": _peak_memory()})


def _tutorial(task: Task, lap: Lap) -> dict[str, Any]:
    tutorial = Tutorial(task.study, choose_device())
    images = tutorial.load_images(ImageFolder(root=task.images).records(task.study.classes))
    lap("decode")
    sample = TensorDataset(*images[: task.sample])
    for _ in range(task.repeats):
        tutorial.train_epoch(sample)
        lap("epoch")
        sent = tutorial.exchange_model() + tutorial.exchange_model()
        lap("exchange")
    return {"bytes": sent}


def _ours(task: Task, lap: Lap) -> dict[str, Any]:
    """A whole study of one hospital, from a cold cache, through the real apps."""
    study, data = task.study, ImageFolder(root=task.images)
    records = data.records(study.classes)
    one = records[0].patient
    with TemporaryDirectory(dir=task.images.parent) as scratch:
        folder, runtime = Path(scratch) / "run", Runtime()
        RunFolder.create(folder).write_study(study)
        # What a study costs before its first image is paid at a hospital with one image.
        # On all cores, as the tutorials are.
        threads = torch.get_num_threads()
        site = Site(
            name="b", data=data, state=Path("state"), threads=threads, policy=virtual_sites.OPEN
        )
        found = [
            VirtualSite(name="a", data=data, patients=(one,), site=site, listed=records),
            VirtualSite(name="b", data=data, site=site, listed=records),
        ]
        planned = virtual_sites.plan_sites(found, study)
        first, hospital = virtual_sites.write_sites(planned, study, folder, Path(scratch) / "cache")
        virtual_sites.prepare_sites([first], study, runtime)
        lap("open")
        virtual_sites.prepare_sites([hospital], study, runtime)
        lap("cache")
        session = runtime.open_session(hospital, study.id)
        watched = _Watched(make_app(runtime), lap, study.train.rounds)
        simulate_run(server_app, watched.app, [hospital], folder)
        lap("finish")
    spec = session.prepared.spec
    return {"bytes": watched.bytes, "activations": spec.activations, "dtype": spec.dtype}


class _Watched:
    """The real ClientApp; a round ends where the next message arrives."""

    def __init__(self, client: Any, lap: Lap, rounds: int) -> None:
        self._client = client
        self._lap, self._labels = lap, iter(["join", *["round"] * rounds])
        self.bytes = 0
        self.app: Any = self._answer  # called as Flower's own class is

    def _answer(self, message: Any, context: Any) -> Any:
        kind = message.metadata.message_type
        if not kind.startswith("query"):
            self._lap(next(self._labels))
        reply = self._client(message, context)
        if kind == "train":
            self.bytes = _payload(message) + _payload(reply)
        return reply


def _payload(message: Any) -> int:
    return sum(count_bytes(arrays) for arrays in message.content.array_records.values())


def _peak_memory() -> int | None:
    """Bytes at most held by this process: on the GPU if it has one; None where nothing tells."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    status = Path("/proc/self/status")  # getrusage would count the parent's memory too
    if not status.exists():
        return None
    peak = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
    return int(peak.split()[1]) * 1024
