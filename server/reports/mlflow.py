"""The same figures as TensorBoard's events, and the final ones, in a run on an MLflow server.

MLflow keeps whatever it is given, also twice. So a process that goes on with a run asks first what
is there, and gives what is missing: a killed process leaves no gap, and nothing twice. What goes
there are figures and settings of the study; no site's file, no model, no path, no name of a person.
"""

import json
import logging
import os
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from common.config.study import Study
from common.errors import RunError
from common.metrics.metrics import METRICS, value
from server.reports.points import Point, list_points
from server.runs.results import Results, unite_sites
from server.runs.run_folder import RunFolder

if TYPE_CHECKING:
    from mlflow import MlflowClient

log = logging.getLogger(__name__)

_WHERE = "coordinator.yaml: mlflow"
_NAME = "mlflow"
"""The file of the run folder by which its run is known at MLflow: no other run has that text."""
_TAG = "consilium.run"
_AT_ONCE = 1000
_LONGEST = 500
"""Characters of a parameter's value; of longer ones, MLflow gets the beginning."""


def check_mlflow() -> None:
    """Return if MLflow is installed; raises `RunError` otherwise."""
    if find_spec("mlflow") is None:
        remedy = (
            "pip install 'consilium[mlflow]'; "
            "in the checkout pip install --require-hashes -r constraints-mlflow.txt"
        )
        expected, got = "MLflow, an optional extra", "none installed"
        raise RunError(_WHERE, expected=expected, got=got, remedy=remedy)


class MlflowRun:
    """One run at MLflow, which goes on as the run of a folder does.

    Where MLflow does not answer, that is said once, and the run goes on without: it loses nothing
    else. The next process that goes on with the run gives MLflow what it lacks.
    """

    def __init__(self, folder: RunFolder, uri: str, *, by_site: bool) -> None:
        """Give MLflow the study, and the rounds that are finished; `by_site` as in `list_points`.

        Args:
          folder: Of the run.
          uri: Of an MLflow server, or `sqlite:///` and a file.
          by_site: Whether each site's figures are shown, too.
        """
        self._study, self._by_site, self._answers = folder.study, by_site, True
        self._told: set[tuple[str, int]] = set()
        self._try(lambda: self._open(folder, uri))
        self.add(folder.read_history())

    def add(self, lines: Iterable[Mapping[str, Any]]) -> None:
        """Give it lines of `metrics.jsonl`, whose rounds are finished."""
        points = list_points(lines, self._study.select, by_site=self._by_site)
        self._try(lambda: self._log(points))

    def finish(self, released: int, results: Results) -> None:
        """Give it the figures on test patients, and end the run there.

        Args:
          released: The round of the model that is released.
          results: By way of training and site.
        """
        self._try(lambda: self._log(self._list_results(released, results)))
        self._try(lambda: self._client.set_terminated(self._run, "FINISHED"))

    def _list_results(self, released: int, results: Results) -> Iterator[Point]:
        together = unite_sites(results, len(self._study.classes))
        for way, sites in results.items():
            shown = {"": together[way]}
            if self._by_site:
                shown |= {f"/{name}": counts for name, counts in sites.items()}
            for of, counts in shown.items():
                for name, metric in METRICS.items():
                    if (figure := value(counts, name)) is not None:
                        yield Point(f"test {metric.label}/{way}{of}", released, figure)

    def _open(self, folder: RunFolder, uri: str) -> None:
        """Find the run, or begin it."""
        from mlflow.entities import Param

        self._client = client = connect_mlflow(uri)
        kept = client.get_experiment_by_name(self._study.name)
        experiment = kept.experiment_id if kept else client.create_experiment(self._study.name)
        own = _identify(folder)
        found = client.search_runs([experiment], f"tags.`{_TAG}` = '{own}'")
        called = folder.path.resolve().name
        run = (
            found[0] if found else client.create_run(experiment, tags={_TAG: own}, run_name=called)
        )
        self._run = run.info.run_id
        client.update_run(self._run, status="RUNNING")
        if not run.data.params:
            params = [Param(*pair) for pair in _list_parameters(self._study)]
            client.log_batch(self._run, params=params, synchronous=True)
        for tag in run.data.metrics:
            history = client.get_metric_history(self._run, tag)
            self._told |= {(tag, metric.step) for metric in history}

    def _log(self, points: Iterable[Point]) -> None:
        from mlflow.entities import Metric

        now = time.time_ns() // 1_000_000
        new = {(p.tag, p.step): p.value for p in points if (p.tag, p.step) not in self._told}
        metrics = [Metric(tag, value, now, step) for (tag, step), value in new.items()]
        for start in range(0, len(metrics), _AT_ONCE):
            some = metrics[start : start + _AT_ONCE]
            self._client.log_batch(self._run, metrics=some, synchronous=True)
        self._told |= new.keys()

    def _try(self, work: Callable[[], None]) -> None:
        if not self._answers:
            return
        try:
            work()
        except Exception as ex:  # MLflow raises what its server, database and network raise
            self._answers = False
            # Its text may hold the password of the address.
            got = type(ex.__context__ or ex).__name__
            expected, remedy = "MLflow to take the figures", "The run goes on without."
            log.warning("%s", RunError(_WHERE, expected=expected, got=got, remedy=remedy))


def connect_mlflow(uri: str) -> "MlflowClient":
    """Make a client that tells nobody else anything, and waits seconds at most."""
    os.environ.update(MLFLOW_DISABLE_TELEMETRY="true", DO_NOT_TRACK="true")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")
    from mlflow import MlflowClient

    for name in ("mlflow", "alembic"):
        logging.getLogger(name).setLevel(logging.WARNING)
    return MlflowClient(tracking_uri=uri)


def _identify(folder: RunFolder) -> str:
    path = folder.path / _NAME
    if not path.is_file():
        folder.write(_NAME, uuid.uuid4().hex)
    return path.read_text("utf-8")


def _list_parameters(study: Study) -> Iterator[tuple[str, str]]:
    """The study as sites are shown it: its keys, with dots, and their values."""

    def flatten(key: str, content: object) -> Iterator[tuple[str, str]]:
        if isinstance(content, Mapping):
            for name, inner in content.items():
                yield from flatten(f"{key}.{name}" if key else name, inner)
        elif content is not None:
            yield key, str(content)[:_LONGEST]

    proposal = json.loads(study.proposal())
    del proposal["card"]  # prose, for the run's report
    return flatten("", proposal)
