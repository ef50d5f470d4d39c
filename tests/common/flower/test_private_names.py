"""flwr's private names, and every change of its private state, live in `common.flower` alone."""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from fnmatch import fnmatchcase
from importlib import import_module

import pytest

from tests.builders import ROOT

ROOM = ROOT / "common" / "flower"
PUBLIC = ("flwr.app", "flwr.clientapp", "flwr.serverapp", "flwr.serverapp.strategy")


def parsed() -> Iterator[tuple[str, ast.Module]]:
    """Every file of a role outside the room: its name and its syntax tree."""
    for role in ("common", "client", "server", "simulations"):
        for path in (ROOT / role).rglob("*.py"):
            if path.parent != ROOM:
                name = path.relative_to(ROOT).as_posix()
                yield name, ast.parse(path.read_text(encoding="utf-8"))


def imports(tree: ast.Module) -> Iterator[tuple[str, str]]:
    """Every module that a file imports, with the name taken from it, if one is."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            yield from ((node.module or "", alias.name) for alias in node.names)
        elif isinstance(node, ast.Import):
            yield from ((alias.name, "") for alias in node.names)


def test_only_one_room_imports_private_names() -> None:
    found = [
        (file, module, name)
        for file, tree in parsed()
        for module, name in imports(tree)
        if module.split(".")[0] == "flwr"
    ]
    assert len(found) > 20
    for file, module, name in found:
        assert module in PUBLIC, f"{file} imports {module}"
        assert name in import_module(module).__all__, f"{file} imports {name} of {module}"


def test_only_one_room_touches_private_state() -> None:
    """A file that knows Flower touches no private attribute but its own."""
    for file, tree in parsed():
        if not any(module.startswith(("flwr", "common.flower")) for module, _ in imports(tree)):
            continue
        for node in ast.walk(tree):
            if not isinstance(node, ast.Attribute) or ast.unparse(node) == "os._exit":
                continue
            own = isinstance(node.value, ast.Name) and node.value.id in ("self", "cls")
            private = node.attr.startswith("_") and not node.attr.endswith("__") and not own
            assert not private, f"{file} touches {ast.unparse(node)}"


def test_every_name_of_the_room_has_a_reason() -> None:
    """In the table at the head of its file, where a star stands for any letters."""
    for path in ROOM.glob("*.py"):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        told = re.findall("`([^`]+)`", ast.get_docstring(tree) or "")
        for module, name in imports(tree):
            if module.startswith("flwr.") and module not in PUBLIC:
                given = any(fnmatchcase(name, one) for one in told)
                assert given, f"{path.name} gives no reason for {module}.{name}"


@pytest.mark.system
def test_a_node_loads_nothing_of_a_coordinator() -> None:
    code = "import sys, common.flower.supernode; sys.exit('sqlalchemy' in sys.modules)"
    assert not subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode


@pytest.mark.system
def test_flower_is_silent_once_it_is_there() -> None:
    code = "import logging, client.app, server.app; print(logging.getLogger('flwr').level)"
    told = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True, text=True
    )
    assert told.stdout.strip() == "50"
