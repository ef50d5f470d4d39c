"""How a study ended at a site, as values: its models on its own test patients, and its ledger."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from client.ledger.entries import Entry, Sent
from client.ledger.ledger import read_ledger
from client.ledger.spending import Spending, list_sent
from client.models.kept import name_folder
from client.models.local import solve_own_head
from client.models.released import KeptModel, read_whole
from client.models.tested import answer_local, answer_test, compare_answers
from client.preparation import PreparedSite
from client.session import Session
from common.metrics.by_patient import Evidence
from common.metrics.counts import Counts
from common.protocol.evidence import ADAPTED, FEDERATED, LOCAL, PAIRS


@dataclass(frozen=True, eq=False)
class SiteOutcome:
    """The end of a study at a site.

    Attributes:
      prepared: The site, prepared for the study.
      counts: On its test patients, by way of training.
      evidence: How these ways compare; None without test images.
      entries: Of its ledger.
    """

    prepared: PreparedSite
    counts: Mapping[str, Counts]
    evidence: Evidence | None
    entries: Sequence[Entry]

    @property
    def way(self) -> str:
        """The way of training by which the site is served: adapted, where one is kept."""
        return ADAPTED if ADAPTED in self.counts else FEDERATED

    @property
    def sent(self) -> list[Sent]:
        """What left in this study."""
        return list_sent(self.entries, self.prepared.study.id)

    @property
    def spending(self) -> Spending:
        """What all studies of the site spent."""
        policy = self.prepared.site.policy
        return Spending.of(self.entries, policy.delta, policy.max_epsilon)


def collect_outcome(session: Session, released: KeptModel) -> SiteOutcome:
    """Test the models of a study on the site's own test patients; nothing of it is told.

    The released one, and where a model that was fitted to the site is kept, this and a head of its
    own patients alone.

    Args:
      session: Of the site.
      released: The model that the study ended with here.
    """
    prepared = session.prepared
    answers = {FEDERATED: answer_test(session, released)}
    folder = name_folder(prepared.site, prepared.study)
    if folder.is_dir():
        answers[ADAPTED] = answer_test(session, read_whole(folder, session))
        answers[LOCAL] = answer_local(session, solve_own_head(session))
    labels = prepared.examples["test"].labels
    return SiteOutcome(
        prepared=prepared,
        counts={way: answer.count(labels) for way, answer in answers.items()},
        evidence=compare_answers(session, answers, PAIRS) if len(labels) else None,
        entries=read_ledger(prepared.site.state),
    )
