"""Flower's messages: as bytes, in pieces, with an error in place of content.

| private name | why |
|---|---|
| `*_to_proto`, `*_from_proto` | the exact bytes of a reply are recorded, and sent again |
| `Message`, `RecordDict` (of `flwr.proto`) | those bytes are theirs |
| `ObjectTree`, `*_object_tree` | between machines a message travels as objects named by SHA-256 |
| `get_all_nested_objects`, `inflate_object_from_contents` | a message to such objects, and back |
| `no_object_id_recompute` | otherwise Flower hashes an object each time it is named |
| `remove_content_from_message` | the envelope of a message travels before its objects |
| `Metadata._message_id` | no public name sets it, and a reply is matched to its question by it |
| `Message._content`, `Message._error` | what arrives is what was sent, with other content |
| `TaskIdentity` | Flower refuses to make a message in a process without one |
| `ClientAppCallable`, `Run`, `NodeInfo` | types of what Flower calls, and gives |
| `Status`, `ErrorCode`, `SUPERLINK_NODE_ID` | codes, and the sender of a server's messages |
"""

import copy
import logging
import math
from collections.abc import Iterable, Mapping
from typing import NamedTuple

from common.flower.compat import require_flwr

with require_flwr():
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

# What matters of it we say ourselves; its lines may quote statements, keys and tensors.
logging.getLogger("flwr").setLevel(logging.CRITICAL)

__all__ = [
    "SUPERLINK_NODE_ID",
    "ClientAppCallable",
    "ErrorCode",
    "MessageLimit",
    "NodeInfo",
    "ObjectTree",
    "Packed",
    "ProtoMessage",
    "Run",
    "Status",
    "copy_as_sent",
    "identify_task",
    "limit_message",
    "list_objects",
    "make_error_reply",
    "mark_lost",
    "message_from_bytes",
    "message_from_proto",
    "message_to_bytes",
    "message_to_proto",
    "name_message",
    "pack_message",
    "record_from_bytes",
    "record_to_bytes",
    "recorddict_from_proto",
    "recorddict_to_proto",
    "unpack_message",
]


def identify_task(task_id: int, run_id: int) -> None:
    """Make messages of this process those of a ServerApp in a run, as Flower's own processes do."""
    TaskIdentity.task_id, TaskIdentity.run_id = task_id, run_id
    TaskIdentity.node_id = SUPERLINK_NODE_ID


def name_message(message: Message, name: str) -> None:
    """Give a message the id that its reply will quote."""
    message.metadata.__dict__["_message_id"] = name


def make_error_reply(message: Message, reason: str) -> Message:
    """A reply that says no, with a public code as its only text."""
    return Message(Error(ErrorCode.CLIENT_APP_RAISED_EXCEPTION, reason), reply_to=message)


def mark_lost(envelope: Message, reason: str) -> Message:
    """A reply whose content cannot be had, as one that says no."""
    envelope.__dict__["_error"] = Error(ErrorCode.MESSAGE_UNAVAILABLE, reason)
    return envelope


def copy_as_sent(message: Message) -> Message:
    """The message as it would arrive over a network."""
    if message.has_error():
        return message
    arrived = copy.copy(message)
    arrived.__dict__["_content"] = recorddict_from_proto(recorddict_to_proto(message.content))
    return arrived


def message_to_bytes(message: Message) -> bytes:
    """A whole message as it travels to another process of this machine."""
    data: bytes = message_to_proto(message).SerializeToString()
    return data


def message_from_bytes(data: bytes) -> Message:
    """The message that `message_to_bytes` gave."""
    return message_from_proto(ProtoMessage.FromString(data))


def record_to_bytes(record: RecordDict) -> bytes:
    """A record as it travels: equal records give equal bytes."""
    data: bytes = recorddict_to_proto(record).SerializeToString(deterministic=True)
    return data


def record_from_bytes(data: bytes) -> RecordDict:
    """The record that `record_to_bytes` gave, which gives these very bytes again."""
    return recorddict_from_proto(ProtoRecordDict.FromString(data))


_CHUNK, _HEAD = 5 * 2**20, 1024
"""Bytes in which Flower cuts arrays, and plenty for the head and name of each object."""


class Packed(NamedTuple):
    """A message as it travels between machines: an envelope, and objects that travel one by one."""

    envelope: ProtoMessage
    tree: ObjectTree
    objects: Mapping[str, bytes]
    """By SHA-256."""


def pack_message(message: Message) -> Packed:
    """A message ready to travel; from here on its id is the hash of its content."""
    with no_object_id_recompute():
        name_message(message, message.object_id)
        parts = get_all_nested_objects(message)
        return Packed(
            envelope=message_to_proto(remove_content_from_message(message)),
            tree=get_object_tree(message),
            objects={name: part.deflate() for name, part in parts.items()},
        )


class MessageLimit(NamedTuple):
    """How large a message may be as it travels."""

    size: int
    """Bytes of all objects together."""
    parts: int
    """Objects."""


_BESIDE = MessageLimit(size=2**20, parts=64)


def limit_message(arrays: Iterable[int]) -> MessageLimit:
    """The limit of a message with arrays of at most these sizes in bytes, and a little beside."""
    sizes = list(arrays)
    parts = sum(1 + math.ceil(size / _CHUNK) for size in sizes) + _BESIDE.parts
    return MessageLimit(size=sum(sizes) + parts * _HEAD + _BESIDE.size, parts=parts)


def list_objects(tree: ObjectTree) -> list[str]:
    """The objects of a message, by SHA-256, each once."""
    return list(dict.fromkeys(part.object_id for part in iterate_object_tree(tree)))


def unpack_message(identity: str, objects: Mapping[str, bytes]) -> Message:
    """The message of this id, from all of its objects; raises `ValueError` if they do not fit."""
    message = inflate_object_from_contents(identity, dict(objects))
    if not isinstance(message, Message):
        raise ValueError("expected a message, got another object")
    name_message(message, identity)
    return message
