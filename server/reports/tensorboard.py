"""Events for TensorBoard: training loss and validation figures, as rounds finish.

They are a view of `metrics.jsonl`, the record. A process that goes on with a run writes all rounds
that are finished anew, into a file of its own, which tells TensorBoard to drop what earlier ones
said: a killed process leaves no gap, and nothing twice.
"""

import logging
import time
from collections.abc import Iterable, Mapping
from typing import Any

from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary
from torch.utils.tensorboard import RecordWriter

from common.errors import RunError
from server.reports.points import list_points
from server.runs.run_folder import RunFolder

log = logging.getLogger(__name__)


class Events:
    """The events of one run, in `tensorboard/` of its folder.

    Where they cannot be written, that is said once and the run goes on: it loses nothing else.
    Torch's SummaryWriter would write from a thread, which meets a full disk with a traceback, and
    put this machine's name into the file's.
    """

    def __init__(self, folder: RunFolder, *, by_site: bool) -> None:
        """Write the rounds that are finished; with `by_site`, those of each site as well."""
        # TensorBoard wants "tfevents" in the name, and reads files in the order of names.
        self._path = folder.path / "tensorboard" / f"events.out.tfevents.{time.time_ns()}"
        self._by_site, self._writable = by_site, True
        self._select = folder.study.select
        forget = SessionLog(status=SessionLog.START)
        self._append([Event(file_version="brain.Event:2"), Event(session_log=forget)])
        self.add(folder.read_history())

    def add(self, lines: Iterable[Mapping[str, Any]]) -> None:
        """Write lines of `metrics.jsonl`, whose rounds are finished."""
        points = list_points(lines, self._select, by_site=self._by_site)
        self._append(
            Event(step=step, summary=Summary(value=[Summary.Value(tag=tag, simple_value=value)]))
            for tag, step, value in points
        )

    def _append(self, events: Iterable[Event]) -> None:
        if not self._writable:
            return
        try:
            self._path.parent.mkdir(exist_ok=True)
            with self._path.open("ab") as file:
                records = RecordWriter(file)
                for event in events:
                    event.wall_time = time.time()
                    records.write(event.SerializeToString())
        except OSError as ex:
            self._writable = False
            where, remedy = self._path.parent, "The run goes on without."
            expected, got = "a folder for TensorBoard's events", ex.strerror
            log.warning("%s", RunError(where, expected=expected, got=got, remedy=remedy))
