"""The private names of flwr 1.41 that we rely on, and the switches that keep it quiet.

A flwr that has not all of them is refused in fixed words: Flower sends the text of a failed import
to the server, and Python's own names paths.
"""

import logging
import os
from importlib.metadata import version

from common.errors import complaint

# Read by flwr when it is imported: no telemetry, no update check, no package installation.
os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")
os.environ.setdefault("FLWR_DISABLE_UPDATE_CHECK", "1")
os.environ.setdefault("FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION", "1")

_installed = "none"
try:
    _installed = version("flwr")
    if not _installed.startswith("1.41."):
        raise ImportError
    from flwr.app import Error, Message, RecordDict
    from flwr.clientapp.typing import ClientAppCallable
    from flwr.common.constant import SUPERLINK_NODE_ID, ErrorCode
    from flwr.common.serde import recorddict_from_proto, recorddict_to_proto
    from flwr.proto.recorddict_pb2 import RecordDict as ProtoRecordDict
    from flwr.supercore.run import Run
    from flwr.supercore.task_identity import TaskIdentity
except ImportError:
    remedy = "pip install 'flwr>=1.41,<1.42'"
    raise ImportError(
        complaint("flwr", expected=">=1.41,<1.42", got=_installed, remedy=remedy)
    ) from None

__all__ = [
    "SUPERLINK_NODE_ID",
    "ClientAppCallable",
    "ErrorCode",
    "Run",
    "TaskIdentity",
    "error_reply",
    "from_bytes",
    "recorddict_from_proto",
    "recorddict_to_proto",
    "to_bytes",
]

logging.getLogger("flwr").setLevel(logging.ERROR)


def error_reply(message: Message, reason: str) -> Message:
    """A reply that says no, with a public code as its only text."""
    return Message(Error(ErrorCode.CLIENT_APP_RAISED_EXCEPTION, reason), reply_to=message)


def to_bytes(record: RecordDict) -> bytes:
    """A record as it travels: equal records give equal bytes."""
    data: bytes = recorddict_to_proto(record).SerializeToString(deterministic=True)
    return data


def from_bytes(data: bytes) -> RecordDict:
    """The record that `to_bytes` gave, which gives these very bytes again."""
    return recorddict_from_proto(ProtoRecordDict.FromString(data))
