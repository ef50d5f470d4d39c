"""The models of a study's end on a site's own test patients, image by image.

None of it leaves as it is: figures, and intervals by patient, are made of it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from client.models.local import LocalModel, compute_local_logits
from client.models.released import KeptModel
from client.session import Session
from common.heads.read_out import ReadOut
from common.metrics.by_patient import Evidence, Tested, compare_ways
from common.metrics.counts import Counts
from common.support.seeds import derive


@dataclass(frozen=True, eq=False)
class Answer:
    """What a model answers on a site's test images.

    Attributes:
      logits: [n, K], on the CPU; the highest decides.
      read_out: Of its probabilities.
    """

    logits: Tensor
    read_out: ReadOut

    def count(self, labels: Tensor) -> Counts:
        """Its counts, given the truth [n]."""
        return Counts.of(self.logits, labels, self.read_out.scores(self.logits))


def answer_test(session: Session, model: KeptModel) -> Answer:
    """Have a model of the study answer on this site's test images."""
    return Answer(session.compute_logits(model.tensors, "test")[0], model.read_out)


def answer_local(session: Session, model: LocalModel) -> Answer:
    """Have the head of this site's own patients do so."""
    return Answer(compute_local_logits(session, model, "test"), model.read_out)


def compare_answers(
    session: Session, answers: Mapping[str, Answer], pairs: Sequence[tuple[str, str]]
) -> Evidence:
    """Compare ways of training in pairs, by patient.

    Args:
      session: Of the site.
      answers: By way, on its test images.
      pairs: Of ways; a pair is left out where one of its ways is not there.
    """
    prepared = session.prepared
    tested = Tested(
        labels=prepared.examples["test"].labels.numpy(),
        patients=prepared.tested.owner.numpy(),
        logits={way: answer.logits.double().numpy() for way, answer in answers.items()},
        scores={way: a.read_out.scores(a.logits).numpy() for way, a in answers.items()},
    )
    there = [pair for pair in pairs if set(pair) <= answers.keys()]
    seed = derive(prepared.study.seed, prepared.site.name, "evidence")
    return compare_ways(tested, prepared.study.select, there, seed=seed)
