"""Files that are whole or absent, even after a power cut."""

import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from common.errors import ConsiliumError


def write(path: Path, content: bytes | str, mode: int = 0o644, *, durable: bool = True) -> None:
    """Replace `path` by `content` in one step; if `durable`, on disk before returning."""
    with _part(path, content, mode, durable) as part:
        part.replace(path)
    if durable:
        sync(path.parent)


def create(path: Path, content: bytes | str, mode: int = 0o644) -> None:
    """Write `path` unless it is there; of two writers at once the first wins, for both."""
    with _part(path, content, mode, True) as part, suppress(FileExistsError):
        path.hardlink_to(part)
    sync(path.parent)


def make_private(folder: Path, where: object, error: type[ConsiliumError]) -> Path:
    """Make a folder, with its parents, that only this user can look into; returns it.

    Raises:
      error: it was there, and is open to others. `where` says which folder it is.
    """
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    check_private(folder, where, error)
    return folder


def check_private(path: Path, where: object, error: type[ConsiliumError]) -> None:
    """Raise `error`, with its remedy, if other users have any right to a file or a folder."""
    rights = path.stat().st_mode & 0o777
    if os.name == "posix" and rights & 0o077:
        kind, right = ("folder", 700) if path.is_dir() else ("file", 600)
        expected, got = f"a {kind} closed to other users", f"mode {rights:03o}"
        raise error(where, expected=expected, got=got, remedy=f"chmod {right} {path}")


def held(lock: Path) -> bool:
    """Whether a process holds a lock file; makes none where there is none."""
    if not lock.exists():
        return False
    try:
        with FileLock(lock, timeout=0):
            return False
    except Timeout:
        return True


@contextmanager
def _part(path: Path, content: bytes | str, mode: int, durable: bool) -> Iterator[Path]:
    """The whole content in a file beside `path`, gone afterwards."""
    data = content.encode() if isinstance(content, str) else content
    part = path.parent / f".{path.name}.{uuid.uuid4().hex[:8]}.part"
    try:
        with os.fdopen(os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "wb") as file:
            file.write(data)
            if durable:
                file.flush()
                os.fsync(file.fileno())
        yield part
    finally:
        part.unlink(missing_ok=True)


def sync(folder: Path) -> None:
    """Make a rename durable; a system that cannot open folders does without."""
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError:
        return
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
