"""A virtual hospital in whichever process of a Ray cluster is free.

Imports nothing of ours until it is certain whose code goes by that name there.
"""

import hashlib
import logging
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from flwr.app import Context, Message

if TYPE_CHECKING:
    from flwr.clientapp import ClientApp

    from client.runtime import Runtime

PACKAGES = ("common", "client", "server", "simulations")
"""The packages that a hospital's process imports."""

_KEPT = 8
"""Sessions at most that a process keeps: each holds a network."""


@dataclass(frozen=True)
class SitesApp:
    """The client app of all hospitals, for Flower's actors; Flower numbers hospitals from 0.

    Any actor may get any hospital's next message, so none keeps a hospital's ledger open. Sessions
    may stay: what changes in a run after the join, they are told or read from the ledger.
    """

    site_files: tuple[str, ...]
    code: str
    """The fingerprint of the code that may answer; see `fingerprint_code`."""

    def __call__(self, message: Message, context: Context) -> Message:
        """Answer for the hospital; texts of errors go to its own log, in its state folder."""
        if fingerprint_code() != self.code:
            raise ImportError("this process has imported other code than the simulation's")
        from simulations.engines.grid import answer_message

        app, runtime = open_resident()
        site_file = self.site_files[int(context.node_config["partition-id"])]
        context.node_config["site"] = site_file
        try:
            with _log_of(Path(site_file)):
                return answer_message(app, message, context)
        finally:
            runtime.close_sites()
            runtime.close_sessions(beyond=_KEPT)


@cache
def open_resident() -> "tuple[ClientApp, Runtime]":
    """Open the app and the runtime of this process: Flower's actors keep nothing for us."""
    from client.app import make_app
    from client.runtime import Runtime

    runtime = Runtime()
    return make_app(runtime), runtime


@contextmanager
def _log_of(site_file: Path) -> Iterator[None]:
    """Log into the hospital's state folder meanwhile, as a real hospital does."""
    from client.site import Site
    from common.support.terminal import log_to

    logging.getLogger("client").setLevel(logging.INFO)
    file = log_to(Site.read(site_file).private("logs") / "client.log")
    try:
        yield
    finally:
        logging.getLogger().removeHandler(file)
        file.close()


def find_package(package: str) -> Path | None:
    """Find the folder that this process imports a package from, if any; imports nothing."""
    spec = find_spec(package)
    places = list(spec.submodule_search_locations or ()) if spec else []
    return Path(places[0]) if places else None


@cache
def fingerprint_code() -> str:
    """Compute the SHA-256 over the sources of the packages as this process finds them."""
    total = hashlib.sha256()
    for folder in filter(None, map(find_package, PACKAGES)):
        for path in sorted(folder.rglob("*.py")):
            name = f"{folder.name}/{path.relative_to(folder).as_posix()}"
            total.update(f"{name} {hashlib.sha256(path.read_bytes()).hexdigest()}\n".encode())
    return total.hexdigest()


def check_machine(site_files: Sequence[str]) -> tuple[str, list[str]]:
    """Tell, on one machine of a cluster, its code's fingerprint and the files it cannot read."""
    return fingerprint_code(), [file for file in site_files if not os.access(file, os.R_OK)]
