"""Known weaknesses of what is installed, by a local copy of an advisory database; no network.

The copy is a folder of advisories in the OSV format (https://ossf.github.io/osv-schema), one JSON
file each, as the Python Packaging Advisory Database and OSV's own download for PyPI have them.

It exits with 0 if it looked and found none, 1 if it found some, and 2 if it could not look.
"""

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from packaging.utils import canonicalize_name
from packaging.version import InvalidVersion, Version

from tools.sbom import find_installed

NONE, SOME, BLIND = 0, 1, 2


def audit(folder: Path | None) -> tuple[int, list[str]]:
    """Look up what is installed; returns the exit code, and lines for a person."""
    files = sorted(folder.rglob("*.json")) if folder else []
    if not files:
        where = f"no advisories in {folder}" if folder else "no folder of advisories was named"
        return BLIND, [f"could not look: {where}. Run make audit ADVISORIES=<folder>."]
    installed = {name: one.version for name, one in find_installed().items()}
    found, advisories = [], 0
    for path in files:
        try:
            advisory = json.loads(path.read_bytes())
            hits = list(_find_hits(advisory, installed))
        except (ValueError, TypeError, AttributeError, KeyError):
            return BLIND, [f"could not look: {path}: expected an advisory in the OSV format"]
        advisories += 1
        found += [f"{name} {installed[name]}: {advisory['id']}" for name in hits]
    if found:
        return SOME, sorted(found)
    text = f"{len(installed)} packages, {advisories} advisories: none is known to be affected"
    return NONE, [text]


def _find_hits(advisory: dict[str, Any], installed: dict[str, str]) -> Iterator[str]:
    if advisory.get("withdrawn"):
        return
    for affected in advisory.get("affected", []):
        package = affected["package"]
        name = canonicalize_name(package["name"])
        known = package["ecosystem"] == "PyPI" and name in installed
        if known and _is_affected(installed[name], affected):
            yield name


def _is_affected(version: str, affected: dict[str, Any]) -> bool:
    if version in affected.get("versions", []):
        return True
    ranges = [r["events"] for r in affected.get("ranges", []) if r["type"] == "ECOSYSTEM"]
    return any(_is_within(version, events) for events in ranges)


def _is_within(version: str, events: list[dict[str, str]]) -> bool:
    """Whether a version is after an event that introduces the weakness, and before its end."""
    here, inside = Version(version), False
    for event in events:
        for kind, text in event.items():
            place = _parse(text)
            if kind == "introduced" and here >= place:
                inside = True
            elif (kind == "fixed" and here >= place) or (kind == "last_affected" and here > place):
                inside = False
    return inside


def _parse(text: str) -> Version:
    try:
        return Version(text)
    except InvalidVersion:
        raise ValueError(text) from None


if __name__ == "__main__":
    named = [argument for argument in sys.argv[1:] if argument]
    code, lines = audit(Path(named[0]) if named else None)
    sys.stdout.write("\n".join(lines) + "\n")
    sys.exit(code)
