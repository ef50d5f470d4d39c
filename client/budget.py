"""What may still be spent: by each study its own ε, by all studies together the site's."""

from collections.abc import Sequence

from client.account import Account
from client.accountant import Segment
from client.entries import Entry
from client.site import Site
from common.errors import BudgetError, complaint
from common.study import DpSgd, Study


def afford(
    entries: Sequence[Entry], site: Site, study: Study, privacy: DpSgd, planned: Segment
) -> None:
    """Return if a site can pay for further steps of a study, on top of what it has spent.

    Args:
      entries: Of its ledger.
      site: Its policy limits all studies together: `max_epsilon` at `delta`.
      study: The one that asks.
      privacy: What that study promised.
      planned: The steps.

    Raises:
      BudgetError: the study would spend more than it promised, or the site more than it allows.
      RefusedError: ε cannot be bounded.
    """
    alone = Account(entries, privacy.delta).epsilon([planned], study.id)
    if alone > privacy.epsilon:
        where, remedy = f"study {study.name}: privacy.epsilon", "It ends here for this site."
        raise _over(where, privacy.epsilon, alone, remedy)
    most = site.policy.max_epsilon
    if most is not None:
        together = Account(entries, site.policy.delta or privacy.delta).epsilon([planned])
        if together > most:
            remedy = "Together with what is spent it is too much; ask for a study that costs less."
            raise _over(f"{site.source}: policy.max_epsilon", most, together, remedy)


def _over(where: str, most: float, needed: float, remedy: str) -> BudgetError:
    expected = f"ε of at most {most:g}"
    return BudgetError(complaint(where, expected=expected, got=f"{needed:.2f}", remedy=remedy))
