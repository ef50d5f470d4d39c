"""The private names of flwr 1.41 that we rely on.

A flwr that has not all of them is refused in fixed words: Flower sends the text of a failed import
to the server, and Python's own names paths.
"""

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import version
from typing import NamedTuple


@contextmanager
def pinned() -> Iterator[None]:
    """Around imports of private names of flwr: what lacks one is a wrong flwr, in fixed words."""
    installed = "none"
    try:
        installed = version("flwr")
        if not installed.startswith("1.41."):
            raise ImportError
        yield
    except ImportError as ex:
        lacks = f" without {ex.name}" if (ex.name or "").startswith("flwr") else ""
        remedy = "pip install 'flwr>=1.41,<1.42'"
        text = f"flwr: expected >=1.41,<1.42, got {installed}{lacks}. {remedy}"
        raise ImportError(text) from None


with pinned():
    from flwr.app import Error, Message, RecordDict
    from flwr.app.message import remove_content_from_message
    from flwr.clientapp.typing import ClientAppCallable
    from flwr.common.constant import SUPERLINK_NODE_ID, ErrorCode, Status
    from flwr.common.serde import (
        message_from_proto,
        message_to_proto,
        recorddict_from_proto,
        recorddict_to_proto,
    )
    from flwr.proto.message_pb2 import Message as ProtoMessage
    from flwr.proto.message_pb2 import ObjectTree
    from flwr.proto.node_pb2 import NodeInfo
    from flwr.proto.recorddict_pb2 import RecordDict as ProtoRecordDict
    from flwr.supercore.inflatable.inflatable_object import (
        get_all_nested_objects,
        get_object_tree,
        iterate_object_tree,
        no_object_id_recompute,
    )
    from flwr.supercore.inflatable.inflatable_utils import inflate_object_from_contents
    from flwr.supercore.run import Run
    from flwr.supercore.task_identity import TaskIdentity

__all__ = [
    "APP",
    "RELEASE",
    "RELEASE_HEADER",
    "SUPERLINK_NODE_ID",
    "ClientAppCallable",
    "ErrorCode",
    "NodeInfo",
    "ObjectTree",
    "Parcel",
    "ProtoMessage",
    "Run",
    "Status",
    "TaskIdentity",
    "error_reply",
    "from_bytes",
    "message_from_proto",
    "message_to_proto",
    "names_in",
    "pack",
    "pinned",
    "recorddict_from_proto",
    "recorddict_to_proto",
    "same_release",
    "spoiled",
    "to_bytes",
    "unpack",
]

# What matters of it we say ourselves; its lines may quote statements, keys and tensors.
logging.getLogger("flwr").setLevel(logging.CRITICAL)

APP = "consilium/consilium"
"""What a run of ours is called in Flower."""
RELEASE = "0.1.0"
"""As in pyproject.toml; both sides must have the same major and minor number."""
RELEASE_HEADER = "consilium-release"
"""In which either side says what it runs."""


def same_release(theirs: str) -> bool:
    """Whether a release of Consilium and this one understand each other."""
    return theirs.split(".")[:2] == RELEASE.split(".")[:2]


def error_reply(message: Message, reason: str) -> Message:
    """A reply that says no, with a public code as its only text."""
    return Message(Error(ErrorCode.CLIENT_APP_RAISED_EXCEPTION, reason), reply_to=message)


def spoiled(letter: Message, reason: str) -> Message:
    """A reply whose content cannot be had, as one that says no."""
    letter.__dict__["_error"] = Error(ErrorCode.MESSAGE_UNAVAILABLE, reason)
    return letter


def to_bytes(record: RecordDict) -> bytes:
    """A record as it travels: equal records give equal bytes."""
    data: bytes = recorddict_to_proto(record).SerializeToString(deterministic=True)
    return data


def from_bytes(data: bytes) -> RecordDict:
    """The record that `to_bytes` gave, which gives these very bytes again."""
    return recorddict_from_proto(ProtoRecordDict.FromString(data))


class Parcel(NamedTuple):
    """A message as it travels between machines: a letter, and objects that travel one by one."""

    letter: ProtoMessage
    tree: ObjectTree
    objects: Mapping[str, bytes]
    """By SHA-256."""


def pack(message: Message) -> Parcel:
    """A message ready to travel; from here on its id is the hash of its content."""
    with no_object_id_recompute():
        message.metadata.__dict__["_message_id"] = message.object_id
        parts = get_all_nested_objects(message)
        return Parcel(
            letter=message_to_proto(remove_content_from_message(message)),
            tree=get_object_tree(message),
            objects={name: part.deflate() for name, part in parts.items()},
        )


def names_in(tree: ObjectTree) -> list[str]:
    """The objects of a message, by SHA-256, each once."""
    return list(dict.fromkeys(part.object_id for part in iterate_object_tree(tree)))


def unpack(identity: str, objects: Mapping[str, bytes]) -> Message:
    """The message of this id, from all of its objects; raises `ValueError` if they do not fit."""
    message = inflate_object_from_contents(identity, dict(objects))
    if not isinstance(message, Message):
        raise ValueError("expected a message, got another object")
    message.metadata.__dict__["_message_id"] = identity
    return message
