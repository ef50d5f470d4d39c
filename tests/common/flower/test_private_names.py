"""flwr's private names live in `common.flower` alone, and still do what we rely on."""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from flwr.app import ConfigRecord, Message, RecordDict
from flwr.serverapp.strategy import FedAvgM

from common.flower import messages, superlink, supernode
from common.flower.strategies import read_carried, write_carried
from tests.builders import ROOT

ROLES = ("common", "client", "server", "simulations")
PUBLIC = {
    "flwr.app",
    "flwr.clientapp",
    "flwr.serverapp",
    "flwr.serverapp.strategy",
    "flwr.simulation",
}


def flower_imports(folder: Path) -> Iterator[tuple[str, str]]:
    """Every module of flwr that a file below `folder` imports, with the file."""
    for path in folder.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            name = path.relative_to(ROOT).as_posix()
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("flwr"):
                yield name, node.module or ""
            if isinstance(node, ast.Import):
                yield from ((name, a.name) for a in node.names if a.name.startswith("flwr"))


def test_only_one_room_imports_private_names() -> None:
    found = [
        x
        for role in ("common", "client", "server", "simulations")
        for x in flower_imports(ROOT / role)
    ]
    private = [(file, module) for file, module in found if module not in PUBLIC]
    assert len(private) > 20
    assert not [one for one in private if not one[0].startswith("common/flower/")]


def test_only_one_room_writes_private_state() -> None:
    """As attributes of Flower's objects by another way than a name: the eight known writes."""
    for role in ROLES:
        for path in (ROOT / role).rglob("*.py"):
            text = path.read_text(encoding="utf-8")
            if path.parent.name != "flower":
                found = re.search(r'__dict__\["_[a-z]|TaskIdentity\.|SQLITE_PRAGMAS', text)
                assert not found, path


@pytest.mark.parametrize("room", [messages, supernode, superlink])
def test_every_name_that_a_room_offers_is_there(room: object) -> None:
    for name in room.__all__:  # type: ignore[attr-defined]
        assert getattr(room, name) is not None, name


@pytest.fixture
def message() -> Message:
    messages.identify_task(1, 1)
    return Message(RecordDict({"config": ConfigRecord({"x": 1})}), 7, "query")


def test_a_message_takes_the_name_that_its_reply_quotes(message: Message) -> None:
    messages.name_message(message, "m")
    assert message.metadata.message_id == "m"
    assert Message(RecordDict(), reply_to=message).metadata.reply_to_message_id == "m"


def test_a_message_in_pieces_is_the_same_again(message: Message) -> None:
    packed = messages.pack_message(message)
    assert set(messages.list_objects(packed.tree)) == set(packed.objects)
    again = messages.unpack_message(packed.envelope.metadata.message_id, packed.objects)
    assert again.content == message.content
    assert again.metadata.message_id == message.metadata.message_id


def test_what_arrives_is_a_copy_of_what_was_sent(message: Message) -> None:
    messages.name_message(message, "m")
    arrived = messages.copy_as_sent(message)
    assert arrived.content == message.content
    assert arrived.content is not message.content


def test_a_lost_reply_says_so_and_nothing_else(message: Message) -> None:
    lost = messages.mark_lost(Message(RecordDict(), reply_to=message), "run")
    assert lost.has_error()
    assert lost.error.reason == "run"


def test_records_have_one_spelling_in_bytes() -> None:
    one = RecordDict({"a": ConfigRecord({"x": 1, "y": 2}), "b": ConfigRecord({"z": b"\0"})})
    data = messages.record_to_bytes(one)
    assert messages.record_to_bytes(messages.record_from_bytes(data)) == data


def test_the_database_waits_a_minute_for_another_writer() -> None:
    from flwr.supercore import sql_mixin

    assert ("busy_timeout", "60000") in sql_mixin.SQLITE_PRAGMAS


def test_momentum_is_read_and_written_as_the_strategy_keeps_it() -> None:
    strategy = FedAvgM()
    assert not read_carried(strategy, "momentum_vector", ["a"])
    write_carried(strategy, "momentum_vector", {})
    assert strategy.momentum_vector is None


@pytest.mark.system
def test_flower_is_silent_once_it_is_there() -> None:
    code = "import logging, client.app, server.app; print(logging.getLogger('flwr').level)"
    told = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True, text=True
    )
    assert told.stdout.strip() == "50"
