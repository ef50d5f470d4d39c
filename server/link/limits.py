"""What a site may store here: no more than an answer to what it was asked can need."""

import logging

from fastapi import HTTPException

from common.flower.database import LinkState, count_stored, measure_use, read_limit
from common.flower.messages import ObjectTree, list_objects
from common.flower.routes import PushMessagesRequest, PushObjectRequest

log = logging.getLogger(__name__)


class ReplyAccounts:
    """One for each site: how much it may still store of the reply that it is sending.

    Flower counts nothing. A tree that was announced may have any size, and so may its parts.

    Args:
      state: Of the link's database.
      quota: Bytes of that database, of all sites together.
    """

    def __init__(self, state: LinkState, quota: int) -> None:
        self._state, self._quota = state, quota
        self._left: dict[int, tuple[str, int]] = {}
        """Of each site: the session in which it sends, and the bytes it may still send."""
        self._full = False

    def check_announced(self, asked: PushMessagesRequest) -> int:
        """The bytes that the parts of an announced reply may have together.

        Raises:
          HTTPException: it is not one reply of the site that sends it, or too large.
        """
        if not len(asked.messages_list) == len(asked.message_object_trees) == 1:
            raise HTTPException(403)
        told, tree = asked.messages_list[0].metadata, asked.message_object_trees[0]
        if told.src_node_id != asked.node.node_id or not told.reply_to_message_id:
            raise HTTPException(403)
        if asked.messages_list[0].content.ByteSize() or tree.object_id != told.message_id:
            raise HTTPException(403)
        limit = read_limit(self._state, told.reply_to_message_id)
        if limit is None:  # nobody waits for it: Flower stores nothing, and says so
            return 0
        if _has_more_parts(tree, limit.parts):
            self._refuse(asked.node.node_id, f"a reply of more than {limit.parts} parts")
        left = limit.size - count_stored(self._state, list_objects(tree))
        self._check_quota(left)
        return left

    def open(self, site: int, session: str, left: int) -> None:
        """Have a site send the parts of the reply that it announced."""
        self._left[site] = session, left

    def charge(self, asked: PushObjectRequest) -> None:
        """Take a part off what its site may still send; raises `HTTPException` at the end."""
        site = asked.node.node_id
        session, left = self._left.get(site, ("", 0))
        if not session or asked.session_id != session:
            raise HTTPException(410)  # announced to an earlier process, or not at all
        left -= len(asked.object_content)
        if left < 0:
            self._refuse(site, "a reply beyond any answer to what was asked")
        self._left[site] = session, left

    def _check_quota(self, wanted: int) -> None:
        full = measure_use(self._state) + wanted > self._quota
        if full and not self._full:
            remedy = "Stop a run, or raise quota_gb in coordinator.yaml and start again."
            log.error("replies are refused: link.db has reached its quota. %s", remedy)
        self._full = full
        if full:
            raise HTTPException(507)

    def _refuse(self, site: int, what: str) -> None:
        log.warning("refused: %s, from site number %d", what, site)
        raise HTTPException(413)


def _has_more_parts(tree: ObjectTree, most: int) -> bool:
    """Whether a message has more objects than so many; counting ends soon after."""
    waiting, number = [tree], 0
    while waiting and number <= most:
        number += 1
        waiting += waiting.pop().children
    return number > most
