"""Files that are whole or absent, even after a power cut."""

import os
import uuid
from pathlib import Path


def write(path: Path, content: bytes | str, mode: int = 0o644) -> None:
    """Replace `path` by `content` in one step, on disk before returning."""
    data = content.encode() if isinstance(content, str) else content
    part = path.parent / f".{path.name}.{uuid.uuid4().hex[:8]}.part"
    try:
        with os.fdopen(os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    except OSError:
        part.unlink(missing_ok=True)
        raise
    _sync(path.parent)


def _sync(folder: Path) -> None:
    """Make a rename durable; a system that cannot open folders does without."""
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError:
        return
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
