"""What a lost ledger may have held: studies that this site agreed to, of which no line is left."""

from collections.abc import Sequence
from contextlib import suppress

from client.consent.agreement import Agreement
from client.consent.proposals import read_proposal
from client.ledger.entries import Adopted, Created, Entry, Release
from client.site import Site
from client.storage import AGREED
from common.errors import ContractError


def list_lost_releases(site: Site, entries: Sequence[Entry]) -> list[Release]:
    """Every private release of the studies that were agreed to and have no line left.

    Joining adds a line. Without it nothing tells how far a study came, so it counts to its end.

    Args:
      site: Whose ledger was lost.
      entries: Those that can still be read.

    Raises:
      SiteError: an agreement cannot be read.
    """
    known = {entry.release.study for entry in entries if not isinstance(entry, Created | Adopted)}
    paths = sorted(site.state.glob(f"studies/*{AGREED}"))
    studies = [path.name.removesuffix(AGREED) for path in paths]
    return [lost for study in studies if study not in known for lost in _list_releases(site, study)]


def _list_releases(site: Site, study: str) -> list[Release]:
    agreed, name = Agreement.kept(site, study), "unknown"
    if agreed is None:
        return []
    with suppress(ContractError):
        name = read_proposal(site, study).name
    plan, end = agreed.privacy_plan, agreed.end
    lost: list[Release] = []
    for query in plan.queries if plan else ():
        one = Release(study=study, name=name, kind=query.kind, privacy=query.release)
        numbers = range(1, query.times + 1) if query.kind == "round" else (None,)
        lost += [one.model_copy(update={"round": number}) for number in numbers]
    if end:
        lost.append(Release(study=study, name=name, kind="final", privacy=end))
    return lost
