"""The sites of one study, and the exchanges with them. Every reply is hostile until checked."""

import logging
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TypeVar

from flwr.app import Message, MessageType, RecordDict
from flwr.serverapp import Grid

from common.config.study import Study
from common.errors import ContractError, RunError
from common.model.network import Network
from common.protocol.backbone import BACKBONE, BackboneHeld
from common.protocol.join import JoinReply, JoinRequest, read_join
from common.protocol.ledger import LEDGER, LedgerHead, LedgerReply, LedgerRequest
from common.support.terminal import escape
from server.rounds.admission import (
    Member,
    admit_sites,
    find_changed_ledgers,
    find_short_ledgers,
    name_node,
)
from server.rounds.weighing import weigh_sites
from server.rounds.weights import BackboneFile
from server.runs.results import Weight

log = logging.getLogger(__name__)

T = TypeVar("T")

_AGAIN = 10.0
"""Seconds until a site is asked again whose hospital has not decided."""

# What the server may say about a site's public code; anything else a site sends is not repeated.
_MEANING = {
    "refused": "its policy or its data do not let it take part",
    "waiting": "it waits for its hospital's approval",
    "site": "its site file or its ledger is wrong",
    "backbone": "it lacks the backbone's weights",
    "study": "it cannot read the study",
    "contract": "it did not accept the message",
    "run": "it could not compute",
    "budget": "its privacy budget does not suffice",
    "internal": "it failed",
}
_WAITS = _MEANING["waiting"]
_SILENT = "it did not answer in time"


class Federation:
    """The joined sites of a study, sorted by name, and the exchanges with them.

    Args:
      grid: The Flower grid by which sites are reached.
      study: The study that sites are asked to join.
      network: The study's network.
      ledgers: The last line of each site's ledger when it last joined, by name.
    """

    def __init__(
        self, grid: Grid, study: Study, network: Network, ledgers: Mapping[str, LedgerHead]
    ) -> None:
        self._grid, self._study, self._network = grid, study, network
        self._ledgers = ledgers
        self._names: dict[int, str] = {}
        self.members: list[Member] = []
        self.refusals: dict[str, str] = {}
        """The reasons why nodes that answered are not members, by name."""

    @property
    def training(self) -> list[Member]:
        """The members that train."""
        return [member for member in self.members if member.trains]

    @property
    def giving(self) -> list[Member]:
        """The members that tell sums of features."""
        return [member for member in self.members if member.gives_sums]

    @property
    def weights(self) -> dict[str, Weight]:
        """The weight of each training site in the average."""
        return weigh_sites(self.training, self._study.aggregate.max_weight)

    @property
    def shares(self) -> dict[str, float]:
        """For how much an image of each training site counts in sums: 1, or less if capped."""
        return {
            name: w.number / w.told if w.capped and w.told else 1.0
            for name, w in self.weights.items()
        }

    def join(self, wait: float = 0.0) -> None:
        """Propose the study to every connected node.

        Args:
          wait: The seconds in which sites are asked again that wait for their hospital's approval,
            and others that connect meanwhile are asked, too.

        Raises:
          RunError: fewer training sites joined than the study's quorum.
        """
        replies, failures = self._propose_until(time.monotonic() + wait)
        self.refusals = {name_node(node, self._names): why for node, why in failures.items()}
        contract = self._network.contract
        self.members, refusals = admit_sites(replies, self._names, self._study, contract)
        self.refusals |= refusals
        self._check_ledgers()
        quorum = self._study.aggregate.quorum
        if len(self.training) < quorum:
            expected = f"{quorum} training sites (aggregate.quorum)"
            got = f"{len(self.training)} of {len(self._names)} sites{_because(self.refusals)}"
            remedy = "Approvals are kept: go on with run --resume." * (_WAITS in failures.values())
            raise RunError("join", expected=expected, got=got, remedy=remedy)

    def _propose_until(self, limit: float) -> tuple[dict[int, JoinReply], dict[int, str]]:
        """Ask nodes to join until none of them waits for a person, or time is over."""
        replies: dict[int, JoinReply] = {}
        failures: dict[int, str] = {}
        while True:
            self._names |= {info.node_id: info.name for info in self._grid.get_nodes()}
            undecided = {node for node, why in failures.items() if why == _WAITS}
            nodes = sorted(self._names.keys() - replies.keys() - failures.keys() | undecided)
            joined, failed = self._propose(nodes)
            replies, failures = replies | joined, failures | failed
            failures = {node: why for node, why in failures.items() if node not in replies}
            waiting = {node for node, why in failures.items() if why == _WAITS}
            left = limit - time.monotonic()
            if not waiting or left <= 0:
                return replies, failures
            if waiting != undecided:
                names = ", ".join(sorted(name_node(node, self._names) for node in waiting))
                log.info("waiting %.0f s for the approval of %s", left, names)
            time.sleep(min(_AGAIN, left))

    def _propose(self, nodes: Sequence[int]) -> tuple[dict[int, JoinReply], dict[int, str]]:
        """Ask nodes to join; sites without a copy of the backbone get one, and are asked again."""
        messages = [self._proposal(node) for node in nodes]
        told, failures = self._exchange(messages, lambda _, record: read_join(record))
        replies = {node: reply for node, reply in told.items() if reply is not None}
        if lacking := [node for node in told if node not in replies]:
            served, unserved = self._send_backbone(lacking)
            messages = [self._proposal(node) for node in served]
            again, still = self._exchange(messages, lambda _, record: JoinReply.read(record))
            replies, failures = replies | again, failures | unserved | still
        return replies, failures

    def _proposal(self, node: int) -> Message:
        """The question to join, with what the site last told of its ledger."""
        known = self._ledgers.get(self._names[node])
        request = JoinRequest(proposal=self._study.proposal(), known=known)
        return Message(request.record(), node, MessageType.QUERY)

    def _send_backbone(self, nodes: Sequence[int]) -> tuple[list[int], dict[int, str]]:
        """Send the backbone in pieces; returns the nodes that have all of it, and failures."""
        backbone = BackboneFile(self._study)
        pieces = dict.fromkeys(nodes, backbone.announce())
        done: list[int] = []
        failures: dict[int, str] = {}
        said = ""
        while pieces:
            messages = [Message(p.record(), node, BACKBONE) for node, p in pieces.items()]
            held, bad = self._exchange(messages, lambda _, record: BackboneHeld.read(record))
            stuck = [
                node
                for node, now in held.items()
                if not pieces[node].offset + bool(pieces[node].data) <= now.bytes <= backbone.size
            ]
            failures |= bad | dict.fromkeys(stuck, "it did not take the backbone")
            done += [node for node, now in held.items() if now.bytes == backbone.size]
            growing = {n: now for n, now in held.items() if n not in failures and n not in done}
            if growing and (text := _progress(growing, backbone.size)) != said:
                log.info("sending the backbone: %s", text)
                said = text
            pieces = {node: backbone.cut_part(now) for node, now in growing.items()}
        return done, failures

    def _check_ledgers(self) -> None:
        """Leave out every member whose ledger no longer holds all that it held when it last joined.

        A member whose ledger goes further is asked for the hash at that place.
        """
        before = self._ledgers
        short = find_short_ledgers(self.members, before)
        asked = [m for m in self.members if m.name in before and m.name not in short]
        messages = [
            Message(LedgerRequest(before[m.name].count).record(), m.node, LEDGER) for m in asked
        ]
        replies, failures = self.ask(asked, messages, lambda _, record: LedgerReply.read(record))
        out = short | failures | find_changed_ledgers(replies, before)
        self.refusals |= out
        self.members = [member for member in self.members if member.name not in out]

    def ask(
        self,
        members: Sequence[Member],
        messages: Iterable[Message],
        read: Callable[[Member, RecordDict], T],
    ) -> tuple[dict[str, T], dict[str, str]]:
        """Send one message to each member and read the replies.

        Args:
          members: The members to ask.
          messages: One message for each of them.
          read: Turns a reply's content into a value; raises `ContractError` on anything odd.

        Returns:
          The good replies by site name, in the order of names; and the reason for every other.
        """
        by_node = {member.node: member for member in members}
        replies, failures = self._exchange(
            messages, lambda node, record: read(by_node[node], record)
        )
        bad = {by_node[node].name: why for node, why in failures.items() if node in by_node}
        for name, why in sorted(bad.items()):
            log.warning("%s is left out: %s", name, why)
        good = {by_node[node].name: reply for node, reply in replies.items()}
        return dict(sorted(good.items())), dict(sorted(bad.items()))

    def _exchange(
        self, messages: Iterable[Message], read: Callable[[int, RecordDict], T]
    ) -> tuple[dict[int, T], dict[int, str]]:
        sent = list(messages)
        timeout = self._study.aggregate.round_timeout
        replies = list(self._grid.send_and_receive(sent, timeout=timeout))
        # An error about a node that is gone comes from the SuperLink, so the source does not tell.
        asked = {m.metadata.message_id: m.metadata.dst_node_id for m in sent}
        good: dict[int, T] = {}
        bad = dict.fromkeys(asked.values(), _SILENT)
        for reply in replies:
            node = asked.pop(reply.metadata.reply_to_message_id, None)
            if node is None:
                log.warning("a reply that nobody asked for is left out")
            elif reply.has_error():
                bad[node] = _MEANING.get(reply.error.reason or "", _MEANING["internal"])
            else:
                try:
                    good[node] = read(node, reply.content)
                except ContractError as ex:
                    bad[node] = escape(f"it sent {ex}")
        return good, {node: why for node, why in bad.items() if node not in good}


def _progress(held: Mapping[int, BackboneHeld], size: int) -> str:
    tenths = 10 * sum(there.bytes for there in held.values()) // (size * len(held))
    return f"{10 * tenths} % of {size / 1e6:.0f} MB to {len(held)} sites"


def _because(reasons: dict[str, str]) -> str:
    if not reasons:
        return ""
    told = "; ".join(f"{name}: {why}" for name, why in reasons.items())
    return f" ({told}). The log of each site says more"
