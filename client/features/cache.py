"""The cache: all stores of prepared images in one folder, and which of them go.

What is deleted is only made again when a study needs it. Nothing is deleted that is not ours:
files by another name stay, in a store's folder too.
"""

import json
import logging
import os
import re
import time
from collections.abc import Collection, Mapping
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from client.features.store import ABOUT, Store, count_rows
from client.storage import explain_disk_errors
from common.errors import DataError
from common.support import files
from common.support.terminal import size

log = logging.getLogger(__name__)

_DAY = 86400
_FOLDER = re.compile(r"[0-9a-f]{24}")
_FILE = rf"(?:[0-9a-f]{{64}}\.safetensors|{re.escape(ABOUT)})"
_OURS = re.compile(rf"{_FILE}|\.{_FILE}\.[0-9a-f]{{8}}\.part")


@dataclass(frozen=True)
class Kept:
    """One store as it was found.

    Attributes:
      folder: Named by the store's spec.
      about: What it holds, in words for a person, and the day it was created.
      bytes: Of all files in it that are ours.
      used: When a study last used it.
    """

    folder: Path
    about: Mapping[str, str]
    bytes: int
    used: datetime

    @property
    def rows(self) -> int:
        """How many rows its shards hold now."""
        return sum(count_rows(path) for path in _ours(self.folder) if path.suffix == ".safetensors")


def list_stores(cache: Path) -> list[Kept]:
    """Every store in the folder `cache`, the one used longest ago first.

    Raises:
      DataError: the folder cannot be read.
    """
    with explain_disk_errors(cache, DataError):
        found = [_look(folder) for folder in _folders(cache)]
    return sorted((kept for kept in found if kept), key=lambda kept: kept.used)


def prune_stores(
    cache: Path, *, limit: int | None, days: int | None, keep: Collection[Path] = ()
) -> list[Kept]:
    """Delete stores unused for `days`, then those used longest ago until all fit into `limit`.

    Files that an interrupted process left half-written go after a day. What cannot be deleted is
    logged and stays.

    Args:
      cache: The folder of all stores.
      limit: Bytes, or None for no limit.
      days: Days without use, or None for ever.
      keep: Folders of the stores in use, which stay whatever they take.

    Returns:
      The stores that were deleted.

    Raises:
      DataError: the cache cannot be read.
    """
    with explain_disk_errors(cache, DataError):
        for folder in _folders(cache):
            _sweep(folder)
    if limit is None and days is None:
        return []
    found = list_stores(cache)
    total = sum(kept.bytes for kept in found)
    in_use = {folder.resolve() for folder in keep}
    deleted = []
    for kept in found:
        full = limit is not None and total > limit
        old = days is not None and kept.used.timestamp() < time.time() - days * _DAY
        if (full or old) and kept.folder.resolve() not in in_use and _try_delete(kept):
            total -= kept.bytes
            deleted.append(kept)
    if limit is not None and total > limit:
        text = "prepared images in use take %s, more than the %s that cache.limit_gb allows: %s"
        log.warning(text, size(total), size(limit), cache)
    return deleted


def purge_stores(cache: Path) -> list[Kept]:
    """Delete every store; returns what there was.

    Raises:
      DataError: something cannot be deleted.
    """
    found = list_stores(cache)
    with explain_disk_errors(cache, DataError):
        for kept in found:
            _delete(kept.folder)
    return found


def forget_rows(cache: Path, names: Collection[str]) -> int:
    """Remove these rows from every store, as `Store.forget` does; returns how many there were.

    Raises:
      DataError: a file cannot be read or rewritten.
    """
    return sum(Store(kept.folder).forget(names) for kept in list_stores(cache))


def _folders(cache: Path) -> list[Path]:
    with suppress(FileNotFoundError):
        found = [path for path in cache.iterdir() if _FOLDER.fullmatch(path.name)]
        return [path for path in found if path.is_dir() and not path.is_symlink()]
    return []


def _ours(folder: Path) -> dict[Path, os.stat_result]:
    """The files in a store's folder that are ours; another process may delete any meanwhile."""
    found = {}
    with suppress(FileNotFoundError):
        for path in folder.iterdir():
            if _OURS.fullmatch(path.name):
                with suppress(FileNotFoundError):
                    found[path] = path.lstat()
    return found


def _look(folder: Path) -> Kept | None:
    """The store in `folder`, if it is one."""
    found = _ours(folder)
    if not found:
        return None
    about = folder / ABOUT
    used = found[about].st_mtime if about in found else max(s.st_mtime for s in found.values())
    return Kept(
        folder=folder,
        about=_about(about),
        bytes=sum(stat.st_size for stat in found.values()),
        used=datetime.fromtimestamp(used),
    )


def _about(path: Path) -> dict[str, str]:
    try:
        told = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    return {key: str(value) for key, value in told.items()} if isinstance(told, dict) else {}


def _sweep(folder: Path) -> None:
    """Delete what was left half-written a day ago."""
    for path in folder.glob(".*.part"):
        with suppress(FileNotFoundError):
            if _OURS.fullmatch(path.name) and path.lstat().st_mtime < time.time() - _DAY:
                path.unlink()


def _try_delete(kept: Kept) -> bool:
    try:
        _delete(kept.folder)
    except OSError as ex:
        log.warning("prepared images cannot be deleted: %s", ex)
        return False
    log.info(
        "deleted %s of prepared images, last used on %s: %s",
        size(kept.bytes),
        kept.used.date(),
        kept.folder.name,
    )
    return True


def _delete(folder: Path) -> None:
    # What says that it is a store goes last: an interrupted deletion can be taken up again.
    for path in sorted(_ours(folder), key=lambda path: path.name == ABOUT):
        path.unlink(missing_ok=True)
    files.sync(folder)
    with suppress(OSError):  # somebody has put something else there, or it is gone already
        folder.rmdir()
