"""The map holds: no two rooms import each other, and reading a site file stays cheap.

`python tests/test_architecture.py` prints it: each room, and the rooms that it imports.
"""

import ast
import re
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.builders import ROOT

ROLES = ("common", "client", "server", "simulations")


def modules() -> dict[str, Path]:
    """Every module by its dotted name, packages by their own."""
    files = [path for role in ROLES for path in (ROOT / role).rglob("*.py")]
    parts = {path: path.relative_to(ROOT).with_suffix("").parts for path in files}
    return {".".join(p[:-1] if p[-1] == "__init__" else p): path for path, p in parts.items()}


def room(module: str) -> str:
    """The room of a module: its folder within the role, or itself where it has none."""
    return ".".join(module.split(".")[:2])


def imported(path: Path, known: dict[str, Path]) -> Iterator[str]:
    """Modules that a file imports, those inside functions among them; not only for types."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    typed = [node for node in ast.walk(tree) if isinstance(node, ast.If)]
    typed = [node for node in typed if ast.unparse(node.test) == "TYPE_CHECKING"]
    unused = {id(inner) for node in typed for inner in ast.walk(node)}
    for node in ast.walk(tree):
        if id(node) in unused:
            continue
        if isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                yield inner if inner in known else node.module
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)


def arrows() -> dict[str, set[str]]:
    """The rooms that each room imports."""
    known = modules()
    found: dict[str, set[str]] = defaultdict(set)
    for module, path in known.items():
        for other in imported(path, known):
            if other in known and room(other) != room(module):
                found[room(module)].add(room(other))
    return found


def test_no_rooms_import_each_other() -> None:
    left = arrows()
    assert len(left) > 20
    while free := [r for r, others in left.items() if not others & left.keys()]:
        for one in free:
            del left[one]
    assert not left, f"these import each other, or each other's importers: {sorted(left)}"


def test_every_room_says_what_it_is_for() -> None:
    folders = [path.parent for role in ROLES for path in (ROOT / role).rglob("*.py")]
    for folder in set(folders):
        text = (folder / "__init__.py").read_text(encoding="utf-8")
        told = ast.get_docstring(ast.parse(text)) or ""
        assert re.search(r"\bways? in\b", told), f"{folder}: say the way in"
        assert re.search(r"\b(Nothing|No|Only|Every|once)\b", told), (
            f"{folder}: say what never happens"
        )


@pytest.mark.system
def test_a_site_file_is_read_without_torch() -> None:
    code = "import sys, client.site; sys.exit(bool({'torch', 'opacus', 'scipy'} & {*sys.modules}))"
    assert not subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode


if __name__ == "__main__":
    for name, others in sorted(arrows().items()):
        print(f"{name:26} → {', '.join(sorted(others))}")  # noqa: T201
