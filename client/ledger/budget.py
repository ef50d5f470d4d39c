"""What may still be spent: by each study its own ε, by all studies together the site's."""

from collections.abc import Sequence

from client.ledger.entries import Entry
from client.ledger.spending import Spending
from client.privacy.accountant import DpEvent
from client.site import Site
from common.config.study import DpSgd, Study
from common.errors import BudgetError


def check_budget(
    entries: Sequence[Entry], site: Site, study: Study, privacy: DpSgd, planned: DpEvent
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
    alone = Spending(entries, privacy.delta).alone(study.id, [planned])
    if alone > privacy.epsilon:
        where, remedy = f"study {study.name}: privacy.epsilon", "It ends here for this site."
        raise _over(where, privacy.epsilon, alone, "PRV", remedy)
    most = site.policy.max_epsilon
    if most is not None:
        account = Spending(entries, site.policy.delta or privacy.delta, most)
        together, bound = account.total([planned], study.id), account.bound(study.id)
        if together > most:
            remedy = "Together with what is spent it is too much; ask for a study that costs less."
            where = f"{site.source}: policy.max_epsilon"
            raise _over(where, most, together, bound, remedy)


def _over(where: str, most: float, needed: float, bound: str, remedy: str) -> BudgetError:
    expected, got = f"ε of at most {most:g}", f"{needed:.2f} by {bound}"
    return BudgetError(where, expected=expected, got=got, remedy=remedy)
