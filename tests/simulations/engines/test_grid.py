"""What fails inside a virtual site is told on this machine, and only here."""

from pathlib import Path

import pytest
from flwr.app import Context, Message, MessageType, RecordDict
from flwr.clientapp import ClientApp

from simulations.engines.grid import InProcessGrid


def test_a_failure_is_logged_and_not_sent(caplog: pytest.LogCaptureFixture) -> None:
    app = ClientApp()

    @app.query()
    def fail(message: Message, context: Context) -> Message:
        raise RuntimeError("patient 17")

    grid = InProcessGrid(app, [Path("site.yaml")])
    (node,) = grid.get_node_ids()
    (reply,) = grid.send_and_receive([Message(RecordDict(), node, MessageType.QUERY)])
    assert reply.has_error()
    assert "patient 17" not in str(reply.error.reason)
    assert "patient 17" in caplog.text
