"""What we rely on in flwr beyond its public names is there, and does what we rely on.

To see what another flwr lacks, where our own packages refuse it:
`python -m pytest --noconftest tests/common/flower/test_contract.py -k "there or takes or has"`.
"""

import ast
import inspect
import ssl
from collections.abc import Iterator
from importlib import import_module
from importlib.metadata import version
from operator import attrgetter
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from fastapi import FastAPI, Request
from fastapi.routing import APIRoute

from common.support import keys

if TYPE_CHECKING:
    from flwr.app import Message

    from common.flower.database import LinkStateFactory

ROOM = Path(__file__).parents[3] / "common" / "flower"
FLWR = f"flwr {version('flwr')}"


def imported() -> Iterator[tuple[str, str, str]]:
    """Every name of flwr that a file of the room imports: file, module, name."""
    for path in sorted(ROOM.glob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("flwr"):
                yield from ((path.name, node.module or "", alias.name) for alias in node.names)


@pytest.mark.parametrize(("file", "module", "name"), list(imported()))
def test_a_name_is_there(file: str, module: str, name: str) -> None:
    try:
        found, why = hasattr(import_module(module), name), ""
    except ImportError as ex:
        found, why = False, f": {ex}"
    assert found, f"{FLWR} has no {module}.{name}, which common/flower/{file} needs{why}"


@pytest.mark.parametrize("room", sorted(path.stem for path in ROOM.glob("[a-z]*.py")))
def test_every_name_that_a_room_offers_is_there(room: str) -> None:
    module = import_module(f"common.flower.{room}")
    for name in getattr(module, "__all__", ()):
        assert getattr(module, name) is not None, name


STATE = "flwr.server.superlink.linkstate:LinkState"
STORE = "flwr.supercore.object_store:ObjectStore"
CLIENT = "flwr.supernode.fleet_http_client:FleetHttpClient"
OBJECTS = "flwr.supercore.inflatable.inflatable_object"
CALLS = [
    # A callable, how many arguments we give it by place (self among them), and which by name.
    (f"{STATE}.create_run", 9, ()),
    (f"{STATE}.get_run_info", 1, ("run_ids",)),
    (f"{STATE}.get_run_info", 1, ("statuses",)),
    (f"{STATE}.cleanup_run", 2, ()),
    (f"{STATE}.stop_run", 2, ()),
    (f"{STATE}.get_tasks", 1, ("run_ids",)),
    (f"{STATE}.claim_task", 2, ()),
    (f"{STATE}.activate_task", 2, ()),
    (f"{STATE}.acknowledge_task_heartbeat", 2, ()),
    (f"{STATE}.start_session", 2, ()),
    (f"{STATE}.store_message_and_object_tree", 4, ()),
    (f"{STATE}.store_object", 5, ()),
    (f"{STATE}.get_object", 3, ()),
    (f"{STATE}.get_message_res", 3, ()),
    (f"{STATE}.delete_messages", 2, ()),
    (f"{STATE}.get_nodes", 2, ()),
    (f"{STATE}.get_node_info", 1, ("node_ids",)),
    (f"{STATE}.get_node_info", 1, ("statuses",)),
    (f"{STATE}.create_node", 5, ("name",)),
    (f"{STATE}.delete_node", 3, ()),
    (f"{STATE}.get_node_id_by_public_key", 2, ()),
    (f"{STORE}.get_object_tree", 2, ()),
    (f"{STORE}.delete", 2, ()),
    ("flwr.server.superlink.linkstate:SqlLinkState.session", 1, ()),
    ("flwr.server.superlink.linkstate:LinkStateFactory.state", 1, ()),
    ("flwr.superlink.config_loader:get_objectstore_linkstate_factories", 2, ()),
    ("flwr.superlink.federation.noop_federation_manager:NoOpFederationManager", 0, ()),
    ("flwr.supercore.error:http_error_translator", 2, ()),
    ("flwr.supercore.error:FlowerError.from_json", 1, ()),
    ("flwr.supercore.utils:uint64_to_int64", 1, ()),
    (CLIENT, 1, ("verify",)),
    (f"{CLIENT}.ActivateNode", 2, ()),
    (f"{CLIENT}.DeactivateNode", 2, ()),
    (f"{CLIENT}.SendNodeHeartbeat", 2, ()),
    (f"{CLIENT}.PullMessages", 2, ()),
    (f"{CLIENT}.PushMessages", 2, ()),
    (f"{CLIENT}.PullObject", 2, ()),
    (f"{CLIENT}.PushObject", 2, ()),
    (f"{CLIENT}.GetRun", 2, ()),
    (f"{CLIENT}.close", 1, ()),
    (f"{OBJECTS}:get_all_nested_objects", 1, ()),
    (f"{OBJECTS}:get_object_tree", 1, ()),
    (f"{OBJECTS}:iterate_object_tree", 1, ()),
    (f"{OBJECTS}:no_object_id_recompute", 0, ()),
    ("flwr.supercore.inflatable.inflatable_utils:inflate_object_from_contents", 2, ()),
    ("flwr.app.message:remove_content_from_message", 1, ()),
    ("flwr.common.serde:message_to_proto", 1, ()),
    ("flwr.common.serde:message_from_proto", 1, ()),
    ("flwr.common.serde:recorddict_to_proto", 1, ()),
    ("flwr.common.serde:recorddict_from_proto", 1, ()),
    ("flwr.supercore.run:Run.create_empty", 0, ("run_id",)),
    ("flwr.simulation:run_simulation", 2, ("num_supernodes", "backend_config")),
]


@pytest.mark.parametrize(("where", "places", "names"), CALLS)
def test_a_callable_takes_what_we_give_it(where: str, places: int, names: tuple[str, ...]) -> None:
    module, _, name = where.partition(":")
    try:
        inspect.signature(attrgetter(name)(import_module(module))).bind(
            *range(places), **dict.fromkeys(names)
        )
    except (ImportError, AttributeError, TypeError) as ex:
        pytest.fail(f"{FLWR}: {where} does not take {places} arguments and {names}: {ex}")


PROTO = "flwr.proto"
PARTS = [
    (f"{PROTO}.fleet_pb2:ActivateNodeRequest", ("public_key", "heartbeat_interval")),
    (f"{PROTO}.fleet_pb2:ActivateNodeResponse", ("node_id",)),
    (f"{PROTO}.fleet_pb2:DeactivateNodeRequest", ("node_id",)),
    (f"{PROTO}.fleet_pb2:PullMessagesRequest", ("node",)),
    (f"{PROTO}.fleet_pb2:PullMessagesResponse", ("messages_list", "message_object_trees")),
    (
        f"{PROTO}.fleet_pb2:PushMessagesRequest",
        ("node", "messages_list", "message_object_trees", "clientapp_runtime_list"),
    ),
    (f"{PROTO}.fleet_pb2:PushMessagesResponse", ("session_id", "objects_to_push")),
    (f"{PROTO}.heartbeat_pb2:SendNodeHeartbeatRequest", ("node", "heartbeat_interval")),
    (f"{PROTO}.heartbeat_pb2:SendNodeHeartbeatResponse", ("success",)),
    (f"{PROTO}.message_pb2:Message", ("metadata", "content", "error")),
    (
        f"{PROTO}.message_pb2:Metadata",
        ("run_id", "message_id", "src_node_id", "dst_node_id", "reply_to_message_id", "ttl"),
    ),
    (f"{PROTO}.message_pb2:Metadata", ("created_at", "message_type")),
    (f"{PROTO}.message_pb2:ObjectTree", ("object_id", "children")),
    (f"{PROTO}.message_pb2:PullObjectRequest", ("node", "run_id", "object_id")),
    (
        f"{PROTO}.message_pb2:PullObjectResponse",
        ("object_found", "object_available", "object_content"),
    ),
    (
        f"{PROTO}.message_pb2:PushObjectRequest",
        ("node", "run_id", "session_id", "object_id", "object_content"),
    ),
    (f"{PROTO}.message_pb2:PushObjectResponse", ("stored",)),
    (f"{PROTO}.node_pb2:Node", ("node_id",)),
    (
        f"{PROTO}.node_pb2:NodeInfo",
        ("node_id", "name", "public_key", "status", "registered_at", "last_deactivated_at"),
    ),
    (f"{PROTO}.run_pb2:GetRunRequest", ("node", "run_id")),
    (f"{PROTO}.run_pb2:Run", ("fab_id", "fab_version", "fab_hash")),
]


@pytest.mark.parametrize(("where", "fields"), PARTS)
def test_a_message_of_the_wire_has_its_fields(where: str, fields: tuple[str, ...]) -> None:
    module, _, name = where.partition(":")
    known = getattr(import_module(module), name).DESCRIPTOR.fields_by_name
    assert not set(fields) - set(known), f"{FLWR}: {where} lost {set(fields) - set(known)}"


SCHEMA = "flwr.supercore.state.schema.linkstate_models"
STORED = "flwr.supercore.state.schema.objectstore_models"
WORDS = [
    (f"{SCHEMA}:MessageIns", ("dst_node_id", "delivered_at", "message_id")),
    (f"{SCHEMA}:MessageRes", ("reply_to_message_id",)),
    (f"{SCHEMA}:Node", ("public_key", "status")),
    (f"{STORED}:StoredObject", ("object_id", "content")),
    (f"{STATE}", ("object_store",)),
    ("flwr.supercore.constant:NodeStatus", ("REGISTERED", "ONLINE", "OFFLINE", "UNREGISTERED")),
    ("flwr.supercore.constant:TaskType", ("SERVER_APP",)),
    ("flwr.common.constant:Status", ("RUNNING", "FINISHED")),
    (
        "flwr.common.constant:ErrorCode",
        ("CLIENT_APP_RAISED_EXCEPTION", "MESSAGE_UNAVAILABLE", "UNKNOWN"),
    ),
    (
        "flwr.supercore.error:ApiErrorCode",
        (
            "FLEET_RUN_STATUS_NOT_ALLOWED",
            "FLEET_GET_RUN_FAILED",
            "FLEET_INVALID_HEARTBEAT_INTERVAL",
            "FLEET_NODE_ACTIVATION_FAILED",
            "RUNTIME_VERSION_INCOMPATIBLE",
        ),
    ),
]


@pytest.mark.parametrize(("where", "words"), WORDS)
def test_a_class_has_its_words(where: str, words: tuple[str, ...]) -> None:
    module, _, name = where.partition(":")
    found = getattr(import_module(module), name)
    lost = [word for word in words if not hasattr(found, word)]
    assert not lost, f"{FLWR}: {where} has no {lost}"


def test_the_router_answers_all_that_a_node_asks() -> None:
    from common.flower.routes import fleet
    from server.link.door import PATHS

    lost = set(PATHS) - {route.path for route in fleet.routes if isinstance(route, APIRoute)}
    assert not lost, f"{FLWR}: the Fleet router has no {lost}"


@pytest.fixture
def factory(tmp_path: Path) -> "LinkStateFactory":
    from common.flower.database import open_factory

    return open_factory(tmp_path / "link.db")


def test_the_router_finds_its_settings(factory: "LinkStateFactory") -> None:
    from flwr.superlink.dependencies.fleet_api import get_fleet_api_type
    from flwr.superlink.dependencies.linkstate import get_linkstate
    from flwr.superlink.routers.fleet.router import get_enable_supernode_auth

    from common.flower.routes import add_routes, read_request

    app = FastAPI()
    add_routes(app, factory)
    request = Request({"type": "http", "app": app})
    assert get_linkstate(request) is factory.state()
    assert get_enable_supernode_auth(request)
    assert get_fleet_api_type(request)
    assert read_request(request) is None


def test_the_database_waits_a_minute_for_another_writer(factory: "LinkStateFactory") -> None:
    from sqlalchemy import text

    with factory.state().session() as session:  # type: ignore[attr-defined]
        assert session.scalar(text("PRAGMA busy_timeout")) == 60_000


def test_the_database_gives_back_what_was_deleted(factory: "LinkStateFactory") -> None:
    from sqlalchemy import text

    from common.flower.database import measure_use, shrink_file

    state = factory.state()
    with state.session() as session:  # type: ignore[attr-defined]
        path = Path(session.connection().engine.url.database)
        session.execute(text("CREATE TABLE large AS SELECT randomblob(20000000) AS data"))
    assert measure_use(state) > 20_000_000
    with state.session() as session:  # type: ignore[attr-defined]
        session.execute(text("DROP TABLE large"))
    assert path.stat().st_size > 20_000_000
    shrink_file(state)
    assert sum(one.stat().st_size for one in path.parent.glob("link.db*")) < 1_000_000


def test_the_key_of_a_removed_site_is_free_again(factory: "LinkStateFactory") -> None:
    from common.flower.database import NOOP_FLWR_AID, free_key

    state, public = factory.state(), keys.pem(keys.new().public_key())
    number = state.create_node(NOOP_FLWR_AID, "", public, 0, name="east")
    free_key(state, public)
    assert state.get_node_id_by_public_key(public) == number  # only of one that was removed
    state.delete_node(NOOP_FLWR_AID, number)
    with pytest.raises(ValueError, match="already in use"):
        state.create_node(NOOP_FLWR_AID, "", public, 0, name="east")
    free_key(state, public)
    assert state.create_node(NOOP_FLWR_AID, "", public, 0, name="east") != number


def test_a_client_follows_no_redirect_and_has_our_hooks() -> None:
    from common.flower.supernode import open_client

    def heard(_: object) -> None:
        """Hears nothing."""

    trust = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    http = open_client("localhost:1", trust, heard, heard)._client
    assert not http.follow_redirects
    assert http.event_hooks == {"request": [heard], "response": [heard]}
    http.close()


@pytest.fixture
def message() -> "Message":
    from flwr.app import ConfigRecord, Message, RecordDict

    from common.flower.messages import identify_task

    identify_task(1, 5)
    return Message(RecordDict({"config": ConfigRecord({"x": 1})}), 7, "query")


def test_a_message_is_of_the_run_that_was_named(message: "Message") -> None:
    assert (message.metadata.run_id, message.metadata.src_node_id) == (5, 1)


def test_a_message_takes_the_name_that_its_reply_quotes(message: "Message") -> None:
    from flwr.app import Message, RecordDict

    from common.flower.messages import name_message

    name_message(message, "m")
    assert message.metadata.message_id == "m"
    assert Message(RecordDict(), reply_to=message).metadata.reply_to_message_id == "m"


def test_a_message_in_pieces_is_the_same_again(message: "Message") -> None:
    from common.flower.messages import list_objects, pack_message, unpack_message

    packed = pack_message(message)
    assert set(list_objects(packed.tree)) == set(packed.objects)
    again = unpack_message(packed.envelope.metadata.message_id, packed.objects)
    assert again.content == message.content
    assert again.metadata.message_id == message.metadata.message_id


def test_what_arrives_is_a_copy_of_what_was_sent(message: "Message") -> None:
    from common.flower.messages import copy_as_sent, name_message

    name_message(message, "m")
    arrived = copy_as_sent(message)
    assert arrived.content == message.content
    assert arrived.content is not message.content


def test_a_lost_reply_says_so_and_nothing_else(message: "Message") -> None:
    from flwr.app import Message, RecordDict

    from common.flower.messages import mark_lost

    lost = mark_lost(Message(RecordDict(), reply_to=message), "run")
    assert lost.has_error()
    assert lost.error.reason == "run"


def test_records_have_one_spelling_in_bytes() -> None:
    from flwr.app import ConfigRecord, RecordDict

    from common.flower.messages import record_from_bytes, record_to_bytes

    one = RecordDict({"a": ConfigRecord({"x": 1, "y": 2}), "b": ConfigRecord({"z": b"\0"})})
    data = record_to_bytes(one)
    assert record_to_bytes(record_from_bytes(data)) == data


def test_momentum_is_read_and_written_as_the_strategy_keeps_it() -> None:
    from flwr.serverapp.strategy import FedAvgM

    from common.flower.strategies import read_carried, write_carried

    strategy = FedAvgM()
    assert not read_carried(strategy, "momentum_vector", ["a"])
    write_carried(strategy, "momentum_vector", {})
    assert strategy.momentum_vector is None


def test_strategies_carry_what_the_registry_says() -> None:
    from server.rounds.strategies import REGISTRY

    for name, entry in REGISTRY.items():
        lost = [word for word in entry.state if not hasattr(entry.make(), word)]
        assert not lost, f"{FLWR}: the strategy {name} has no {lost}"
