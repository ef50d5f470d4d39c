"""What Flower's grids do alike where there is one run only."""

from flwr.app import Message, RecordDict
from flwr.serverapp import Grid

from common.flower.messages import Run


class OneRunGrid(Grid):
    """A grid that knows its run from the beginning."""

    def set_run(self, run: Run) -> None:
        """It is set already."""

    def create_message(
        self,
        content: RecordDict,
        message_type: str,
        dst_node_id: int,
        group_id: str,
        ttl: float | None = None,
    ) -> Message:
        """As Flower's own grids do."""
        return Message(content, dst_node_id, message_type, ttl=ttl, group_id=group_id)
