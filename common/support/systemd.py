"""Units of systemd."""

from pathlib import Path


def quoted(path: Path) -> str:
    """A path in a unit: a space, a percent sign or a dollar would mean something there."""
    text = str(path).replace("\\", "\\\\").replace('"', '\\"')
    return '"' + text.replace("%", "%%").replace("$", "$$") + '"'
