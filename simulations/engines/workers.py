"""Virtual hospitals shared among resident worker processes of this machine.

A hospital always goes to the same worker, where its session, its prepared images and its ledger
stay open. A worker uses one core.
"""

import logging
import os
import signal
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from multiprocessing import get_context, parent_process, resource_tracker
from multiprocessing.connection import Connection, wait
from pathlib import Path
from pickle import PickleError
from threading import Thread
from traceback import format_exc
from typing import Any

import torch

from client.runtime import Runtime
from common.config.study import Study
from common.errors import RunError
from server.app import app as server_app
from simulations.engines.base import InProcess
from simulations.engines.grid import RemoteGrid, SiteMessage, serve_run

Job = tuple[Callable[..., Any], *tuple[Any, ...]]
"""A method of the `InProcess` that a worker holds, and its arguments."""

_SPAWN = get_context("spawn")  # a fork would copy locked locks, and a GPU in use


class Workers:
    """An `Engine` of so many worker processes, or as many as hospitals if those are fewer.

    They start when first needed, and end with this process, however it ends. When one is killed,
    all end in a `RunError`; what was finished is kept.
    """

    def __init__(self, count: int) -> None:
        self._count = count
        self.runtime = Runtime()
        self._workers: list[_Worker] = []

    def prepare(self, site_files: Sequence[Path], study: Study) -> None:
        """Decode every image and run it through the frozen layers; the first error ends it."""
        shared = self._shared(site_files)
        jobs = [[(InProcess.prepare, [path], study) for path in own] for own in shared]
        self._do(jobs, "Start again; prepared images are kept")

    def run(self, site_files: Sequence[Path], folder: Path) -> None:
        """Run from the last finished round on; the server works in this process."""
        shared = [frozenset(own) for own in self._shared(site_files)]

        def carry(messages: Sequence[SiteMessage]) -> Iterator[bytes]:
            each = [[message for message in messages if message.site in own] for own in shared]
            return self._results([map(_answering, own) for own in each], f"--resume {folder}")

        serve_run(server_app, RemoteGrid(carry, site_files), folder)

    def forget(self) -> None:
        """Close the sessions of every worker."""
        self._do([[(InProcess.forget,)]] * len(self._workers), "Start again")

    def close(self) -> None:
        """End every worker now, whatever it does; others start when needed."""
        for worker in self._workers:
            worker.end()
        self._workers = []

    def _shared(self, site_files: Sequence[Path]) -> list[Sequence[Path]]:
        """The sites of each worker, the same whenever these sites are given."""
        count = min(self._count, len(site_files))
        while len(self._workers) < count:
            self._workers.append(_Worker())
        return [site_files[i::count] for i in range(count)]

    def _do(self, jobs: Sequence[Iterable[Job]], go_on: str) -> None:
        for _ in self._results(jobs, go_on):
            pass

    def _results(self, jobs: Sequence[Iterable[Job]], go_on: str) -> Iterator[Any]:
        """Results as they come: every worker does its own jobs, one after the other.

        Args:
          jobs: The jobs of each worker.
          go_on: The remedy if a worker is killed.
        """
        try:
            yield from _all_done(dict(zip(self._workers, map(iter, jobs), strict=False)))
        except _KilledError:
            self.close()
            expected, got = "workers that stay until the end", "one that was killed"
            remedy = f"{go_on}, with fewer --workers if memory ran out."
            raise RunError("--workers", expected=expected, got=got, remedy=remedy) from None
        except BaseException:
            self.close()
            raise


class _KilledError(Exception):
    """A worker is no more."""


class _Worker:
    """One process, and the line to it."""

    def __init__(self) -> None:
        self.line, theirs = _SPAWN.Pipe()
        self._process = _SPAWN.Process(target=_work, args=(theirs,), daemon=True)
        with _deaf():
            self._process.start()
        theirs.close()

    def ask(self, job: Job) -> None:
        """Start a job."""
        try:
            self.line.send(job)
        except ConnectionError:
            raise _KilledError from None

    def hear(self) -> Any:
        """Receive the next message: a log record, an error, or a result."""
        try:
            return self.line.recv()
        except (EOFError, ConnectionError):
            raise _KilledError from None

    def end(self) -> None:
        """Kill it; whatever it does may be killed at any time."""
        self._process.kill()
        self._process.join()
        self.line.close()


def _all_done(jobs: dict[_Worker, Iterator[Job]]) -> Iterator[Any]:
    busy: set[_Worker] = set()

    def run_next(worker: _Worker) -> None:
        busy.discard(worker)
        if job := next(jobs[worker], None):
            worker.ask(job)
            busy.add(worker)

    for worker in jobs:
        run_next(worker)
    while busy:
        ready = wait([worker.line for worker in busy])
        for worker in [worker for worker in busy if worker.line in ready]:
            match worker.hear():
                case logging.LogRecord() as record:
                    _log(record)
                case Exception() as error:
                    raise error
                case result:
                    run_next(worker)
                    yield result


def _log(record: logging.LogRecord) -> None:
    """Log a record as if it had been made in this process."""
    logger = logging.getLogger(record.name)
    if logger.isEnabledFor(record.levelno):
        logger.handle(record)


@contextmanager
def _deaf() -> Iterator[None]:
    """Keep Ctrl-C from processes that start meanwhile: this one hears it, and ends them."""
    resource_tracker.ensure_running()  # which would unblock it
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


# --- in the worker ---


def _work(line: Connection) -> None:
    """Do one job after the other; what is logged goes along the line."""
    Thread(target=_leave_with_parent, daemon=True).start()
    torch.set_num_threads(1)
    engine = InProcess()
    logging.getLogger().addHandler(_Told(line))
    logging.getLogger().setLevel(logging.INFO)  # the process that shows it shows less
    with suppress(EOFError, ConnectionError):
        while True:
            work, *arguments = line.recv()
            try:
                result = work(engine, *arguments)
            except Exception as ex:
                ex.add_note(f"In a worker:\n{format_exc()}")
                result = ex
            try:
                line.send(result)
            except (PickleError, TypeError, AttributeError):  # an error made of what cannot travel
                line.send(RuntimeError("\n".join(result.__notes__)))


class _Told(logging.Handler):
    """Sends what is logged along the line, to the process that shows it."""

    def __init__(self, line: Connection) -> None:
        super().__init__()
        self._line = line

    def emit(self, record: logging.LogRecord) -> None:
        self.format(record)  # which keeps the traceback as text: what it is made of may not travel
        record.msg, record.args, record.exc_info = record.getMessage(), None, None
        self._line.send(record)


def _leave_with_parent() -> None:
    """End this process when the process that started it has gone."""
    if parent := parent_process():
        wait([parent.sentinel])
        os._exit(1)


def _answering(message: SiteMessage) -> Job:
    return InProcess.answer, message.site, message.to_bytes()
