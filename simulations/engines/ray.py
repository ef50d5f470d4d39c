"""Virtual hospitals over Flower's own simulation engine, which works on a Ray cluster."""

import os
import shutil
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from tempfile import TemporaryDirectory
from threading import Event, Timer
from typing import Any, cast

import grpc
from flwr.app import Context, Message
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp

from common.config.study import Study
from common.errors import RunError
from common.flower.messages import ErrorCode
from common.flower.simulation import run_simulation
from server.app import app as server_app
from simulations.engines.base import InProcess
from simulations.engines.ray_site import (
    PACKAGES,
    SitesApp,
    check_machine,
    find_package,
    fingerprint_code,
)

_LOOK = 0.02
"""Seconds between looks for replies."""
_PATIENCE = 5.0
"""Seconds: for a cluster to answer, and for the ServerApp to end where the simulation has."""


class Ray(InProcess):
    """Flower's simulation engine: an actor for each core or, where there are any, each GPU.

    Args:
      address: `host:port` of a Ray cluster that this machine belongs to; None starts one here, for
        as long as the run takes.

    Raises:
      RunError: Ray is not installed.
    """

    def __init__(self, address: str | None = None) -> None:
        try:
            version("ray")
        except PackageNotFoundError:
            where, expected = "--engine ray", "Ray, an optional extra"
            remedy = (
                "In the checkout: .venv/bin/pip install --require-hashes -r constraints-ray.txt"
            )
            raise RunError(where, expected=expected, got="none installed", remedy=remedy) from None
        super().__init__()
        self._address = address

    def prepare(self, site_files: Sequence[Path], study: Study) -> None:
        """Decode every image and run it through the frozen layers here; actors find the results."""
        if self._address is not None:
            _answers(self._address)
        super().prepare(site_files, study)
        self.forget()

    def run(self, site_files: Sequence[Path], folder: Path) -> None:
        """Run from the last finished round on."""
        files = tuple(str(path.resolve()) for path in site_files)
        try:
            with _cluster(self._address):
                _inspect(files)
                _simulate(SitesApp(files, fingerprint_code()), folder)
        except KeyboardInterrupt:
            # Flower's threads may wait for actors that are gone, and Python's end for them.
            end = Timer(_PATIENCE, os._exit, (130,))
            end.daemon = True
            end.start()
            raise


@contextmanager
def _cluster(address: str | None) -> Iterator[None]:
    """Connected to the cluster, or to one of our own; its processes import this very code."""
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    import ray

    if address is not None:
        _answers(address)  # again: preparing may have taken hours
    # Short, as it names sockets; Ray's own files would be left there.
    files = TemporaryDirectory(prefix="ray-", dir="/tmp", ignore_cleanup_errors=True)
    own = {} if address else {"include_dashboard": False, "_temp_dir": files.name}
    with TemporaryDirectory() as code:
        for package in PACKAGES:
            source = find_package(package)
            spared = shutil.ignore_patterns("__pycache__", "*.safetensors")
            shutil.copytree(cast(Path, source), Path(code, package), ignore=spared)
        # A working directory of ours comes before any other place, and keeps this one's out.
        environment = {"working_dir": code, "env_vars": {"FLWR_TELEMETRY_ENABLED": "0"}}
        quiet = {"log_to_driver": False, "logging_level": "CRITICAL"}
        try:
            with warnings.catch_warnings(action="ignore"):  # of changes in later versions of Ray
                ray.init(address or "local", runtime_env=environment, **quiet, **own)
        except (OSError, RuntimeError, ValueError) as ex:
            raise _no_cluster(address, str(ex).strip().split("\n")[0]) from None
    try:
        yield
    finally:
        ray.shutdown()
        files.cleanup()


def _answers(address: str) -> None:
    """Raise `RunError` where no such server does; Ray itself would go on trying for minutes."""
    if os.environ.get("RAY_USE_TLS", "0") != "0":
        return
    channel = grpc.insecure_channel(address, options=[("grpc.enable_http_proxy", 0)])
    try:
        grpc.channel_ready_future(channel).result(timeout=_PATIENCE)
    except grpc.FutureTimeoutError:
        raise _no_cluster(address, f"none in {_PATIENCE:.0f} seconds") from None
    finally:
        channel.close()


def _no_cluster(address: str | None, got: str) -> RunError:
    where = f"--ray-address {address}" if address else "--engine ray"
    remedy = f"This machine must be part of it: ray start --address={address}" if address else ""
    expected = "a Ray cluster that answers"
    return RunError(where, expected=expected, got=got, remedy=remedy)


def _inspect(site_files: tuple[str, ...]) -> None:
    """Raise `RunError` unless every machine runs this code and reaches the hospitals."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    machines = [node for node in ray.nodes() if node["Alive"]]
    task = ray.remote(num_cpus=0, max_retries=0)(check_machine)
    there = [NodeAffinitySchedulingStrategy(node["NodeID"], soft=False) for node in machines]
    asked = [task.options(scheduling_strategy=one).remote(site_files) for one in there]
    for machine, reference in zip(machines, asked, strict=True):
        where = f"Ray on {machine['NodeManagerAddress']}"
        try:
            code, lacking = ray.get(reference)
        except ray.exceptions.RayError as ex:
            expected, got = "Consilium's own code", str(ex).strip().splitlines()[-1]
            raise RunError(where, expected=expected, got=got) from None
        if code != fingerprint_code():
            expected, got = "Consilium's own code", "another common, client, server or simulations"
            remedy = "Start the command, and the cluster, in a folder without such packages."
            raise RunError(where, expected=expected, got=got, remedy=remedy)
        if lacking:
            expected, got = f"to read {lacking[0]}", "no such file"
            remedy = "Keep data, --out and --cache where every machine of the cluster finds them."
            raise RunError(where, expected=expected, got=got, remedy=remedy)


def _simulate(hospitals: SitesApp, folder: Path) -> None:
    """Flower runs the ServerApp in a thread of its own; it has ended when this returns."""
    over, ended, bound = Event(), Event(), ServerApp()

    @bound.main()
    def main(grid: Grid, context: Context) -> None:
        context.run_config["run"] = str(folder)
        try:
            server_app(cast(Grid, _Patient(grid, over)), context)
        finally:
            ended.set()

    try:
        run_simulation(
            bound,
            cast(ClientApp, hospitals),
            num_supernodes=len(hospitals.site_files),
            backend_config={"client_resources": _share()},
        )
    finally:
        over.set()
        ended.wait(_PATIENCE)


def _share() -> dict[str, Any]:
    """The share of each actor: a core and, where the cluster has any, a GPU."""
    import ray

    there = ray.cluster_resources()
    if there.get("CPU", 0) < 1:
        expected, remedy = "at least one core", "Start it with --num-cpus."
        raise RunError("Ray", expected=expected, got="none", remedy=remedy)
    return {"num_cpus": 1, "num_gpus": 1 if there.get("GPU", 0) >= 1 else 0}


class _Patient:
    """Flower's grid, but virtual hospitals are never late: they only wait for a free actor.

    Args:
      grid: Flower's own.
      over: Set when nobody will reply any more.
    """

    def __init__(self, grid: Grid, over: Event) -> None:
        self._grid, self._over = grid, over

    def __getattr__(self, name: str) -> Any:
        return getattr(self._grid, name)

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> list[Message]:
        """Replies of all hospitals, however long they take."""
        waiting, replies = set(self._grid.push_messages(messages)), list[Message]()
        while waiting:
            if self._over.wait(_LOOK):
                raise RunError("the simulation has ended")
            replies += (arrived := list(self._grid.pull_messages(waiting)))
            if any(r.has_error() and r.error.code == ErrorCode.UNKNOWN for r in arrived):
                # Flower would give the dead actor message after message, and fail each.
                expected, got = "actors that stay until the end", "one that was killed"
                remedy = "Go on with --resume, and more memory if that ran out."
                raise RunError("Ray", expected=expected, got=got, remedy=remedy)
            waiting -= {reply.metadata.reply_to_message_id for reply in arrived}
        return replies
