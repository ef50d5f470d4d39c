"""Admission of sites to a study, and the reasons for refusals. A reply is hostile until checked."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from common.config.study import Study
from common.model.contract import Contract
from common.protocol.join import JoinReply
from common.protocol.ledger import LedgerHead, LedgerReply
from server.rounds.ledger_heads import ROLLED_BACK


@dataclass(frozen=True)
class Member:
    """A site that joined."""

    node: int
    reply: JoinReply

    @property
    def name(self) -> str:
        """The site's own name, unique in the study."""
        return self.reply.name

    @property
    def trains(self) -> bool:
        """Whether it takes part in rounds."""
        return self.reply.role == "train"

    @property
    def gives_sums(self) -> bool:
        """Whether it tells sums of features, for a head that is solved from them."""
        return self.trains and self.reply.disclosure.sums != "none"

    @property
    def scores(self) -> bool:
        """Whether it tells how each round's model does on its validation patients."""
        return self.trains and self.reply.disclosure.metrics == "every_round"


def admit_sites(
    replies: Mapping[int, JoinReply], names: Mapping[int, str], study: Study, contract: Contract
) -> tuple[list[Member], dict[str, str]]:
    """Admit the sites whose replies hold to the study.

    Args:
      replies: The replies of sites to the question to join, by node.
      names: The name that each node was admitted by; empty where it has none.
      study: The study to join.
      contract: The server's own contract.

    Returns:
      The members, sorted by name; and the reasons why other sites are not members, by name.
    """
    members: list[Member] = []
    refusals: dict[str, str] = {}
    for node, reply in sorted(replies.items(), key=lambda item: (item[1].name, item[0])):
        member, admitted = Member(node, reply), names[node]
        if admitted and member.name != admitted:
            refusals[admitted] = "it does not go by the name that it was admitted by"
        elif why := _refuse_reply(member, study, contract):
            refusals[member.name] = why
        elif members and member.name == members[-1].name:  # they come sorted by name
            refusals[name_node(node, names)] = f"the name {member.name} is taken"
        elif _trains_on_nothing(member, study):
            refusals[member.name] = "it has nothing to train on"
        else:
            members.append(member)
    return members, refusals


def name_node(node: int, names: Mapping[int, str]) -> str:
    """Return the name that a node was admitted by, or else its number."""
    return names.get(node) or f"node {node}"


def _refuse_reply(member: Member, study: Study, contract: Contract) -> str:
    """Say why this reply does not hold to the study; the text is empty if it does."""
    reply, private = member.reply, study.private
    untold = private or reply.disclosure.counts == "none"
    if differ := contract.differences(reply.contract):
        return f"its {', '.join(differ)} differ from ours"
    if any(len(told) != len(study.classes) for told in reply.images.all if told is not None):
        return "it counts other classes than the study has"
    if (reply.images.train is None) != untold or (private and member.scores):
        return "it does not tell what this study lets it tell"
    if reply.disclosure.adapted and (private or not (study.adapt and member.trains)):
        return "it tells of models of its own that this study has none of"
    if reply.enrolled and not (private and member.trains):
        return "it declares patients that nobody asked for"
    return ""


def _trains_on_nothing(member: Member, study: Study) -> bool:
    exact, images = member.reply.disclosure.base == 1, member.reply.images.train
    return member.trains and exact and images == (0,) * len(study.classes)


def find_short_ledgers(
    members: Sequence[Member], before: Mapping[str, LedgerHead]
) -> dict[str, str]:
    """Find members whose ledgers go no further than when they last joined; the reasons, by name.

    Joining adds a line, so a ledger must go further by now.
    """
    again = [member for member in members if member.name in before]
    short = [m.name for m in again if m.reply.ledger.count <= before[m.name].count]
    return dict.fromkeys(short, ROLLED_BACK)


def find_changed_ledgers(
    replies: Mapping[str, LedgerReply], before: Mapping[str, LedgerHead]
) -> dict[str, str]:
    """Find members whose ledgers hold another line where they once ended; the reasons, by name."""
    changed = [name for name, told in replies.items() if told.hash != before[name].hash]
    return dict.fromkeys(changed, ROLLED_BACK)
