"""What may still be spent: by each study its own ε, by all studies together the site's.

And how many new studies may be looked at.
"""

from collections.abc import Collection, Mapping, Sequence
from datetime import UTC, datetime, timedelta

from client.ledger.entries import TIME, Entry, list_events
from client.ledger.spending import Spending
from client.privacy.accountant import DpEvent
from client.site import Site
from common.config.study import Private, Study
from common.errors import BudgetError, RefusedError

_MONTH = timedelta(days=30)


def check_budget(
    entries: Sequence[Entry], site: Site, study: Study, privacy: Private, planned: Sequence[DpEvent]
) -> None:
    """Return if a site can pay for further steps of a study, on top of what it has spent.

    Args:
      entries: Of its ledger.
      site: Its policy limits all studies together: `max_epsilon` at `delta`.
      study: The one that asks.
      privacy: What that study promised.
      planned: These steps.

    Raises:
      BudgetError: the study would spend more than it promised, or the site more than it allows.
      RefusedError: ε cannot be bounded.
    """
    alone = Spending(entries, privacy.delta).alone(study.id, planned)
    if alone > privacy.epsilon:
        where, remedy = f"study {study.name}: privacy.epsilon", "It ends here for this site."
        raise _over(where, privacy.epsilon, privacy.delta, alone, "PRV", remedy)
    most = site.policy.max_epsilon
    if most is not None:
        delta = site.policy.delta or privacy.delta
        account = Spending(entries, delta, most)
        together, bound = account.total(planned, study.id), account.bound(study.id)
        if together > most:
            remedy = "Together with what is spent it is too much; ask for a study that costs less."
            where = f"{site.source}: policy.max_epsilon"
            raise _over(where, most, delta, together, bound, remedy)


def check_times(entries: Sequence[Entry], study: Study, kind: str, most: int) -> None:
    """Return if a query of a private study may be answered once more.

    Args:
      entries: Of the ledger.
      study: The one that asks.
      kind: Of the query.
      most: How often it is planned, the spare rounds among them.

    Raises:
      BudgetError: it was drawn for so often already.
    """
    done = len(list_events(entries, study.id, (kind,)))
    if done >= most:
        where, expected = f"study {study.name}: {kind}", f"{most} answers, as planned"
        remedy = "What was sealed is sent again; run the study anew for another question."
        raise BudgetError(where, expected=expected, got="one more", remedy=remedy)


def check_studies(began: Mapping[str, str], site: Site, study: Study) -> None:
    """Return if a site may look at its patients for one more study, or knows this one.

    Whether it takes part tells a bit of them each time, whatever the answer is.

    Args:
      began: When the site first answered whether it takes part, by study.
      site: Whose policy limits the number.
      study: The one that asks.

    Raises:
      RefusedError: there were as many new ones within a month as the policy allows.
    """
    most, since = site.policy.max_studies, (datetime.now(UTC) - _MONTH).strftime(TIME)
    recent = sum(time > since for time in began.values())
    if most is not None and study.id not in began and recent >= most:
        where, expected = f"{site.source}: policy.max_studies", f"{most} new studies in 30 days"
        remedy = "Wait, or change policy.max_studies."
        raise RefusedError(where, expected=expected, got="one more", remedy=remedy)


def check_noise_once(sealed: Collection[str], study: Study) -> None:
    """Return if the counts at the end of a study may be noised: those of no end were sealed before.

    What was sealed may have been sent. Other noise on the same counts would be a second answer, and
    many would average it out. What was reserved alone, as by a process that was killed, never left.

    Args:
      sealed: Keys of the sealed ends of the study.
      study: That ends.

    Raises:
      BudgetError: an end was sealed, and is lost or was about something else.
    """
    if sealed:
        where, expected = f"study {study.name}: its end", "the reply that was sealed"
        remedy = "Run it again under another name or seed."
        raise BudgetError(where, expected=expected, got="none, or another question", remedy=remedy)


def _over(
    where: str, most: float, delta: float, needed: float, bound: str, remedy: str
) -> BudgetError:
    expected, got = f"ε of at most {most:g} at δ = {delta:g}", f"{needed:.4g} by {bound}"
    return BudgetError(where, expected=expected, got=got, remedy=remedy)
