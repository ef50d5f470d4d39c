"""A private head: solved from two sums over training patients, to which each site adds noise."""

import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass
from statistics import median_low
from typing import Any

import numpy as np

from common.config.study import Study
from common.heads.read_out import LARGEST_PRIOR, ReadOut
from common.heads.whitening import (
    Noised,
    Whitening,
    find_basis,
    solve_prototypes,
    whiten,
)
from common.metrics.counts import MOST, Floats
from common.model import backbones
from common.model.network import place_head, place_whitening
from common.protocol.noised import (
    MOMENTS,
    PROTOTYPES,
    NoisedReply,
    NoisedRequest,
    count_numbers,
)
from common.protocol.tensors import Tensors, to_arrays
from common.support.seeds import derive
from server.rounds.federation import Federation
from server.rounds.solving import AskAll, Keep

log = logging.getLogger(__name__)

_MOST_PATIENTS, _MOST_NOISE = 3.0, 2.0
"""The longest sum that is believed: rows of so many times the patients declared, and the noise."""
_TEMPERATURE = 2.0
"""A head of noised sums is too sure. Chosen on other holdouts than those of the figures shown."""


@dataclass(frozen=True)
class PrivateHead:
    """How a private head was solved.

    Attributes:
      sites: Whose sums are in it, by name.
      tensors: All that it is made of.
      read_out: Of its probabilities, by the noised numbers of patients.
    """

    sites: tuple[str, ...]
    tensors: Tensors
    read_out: ReadOut

    def facts(self) -> dict[str, Any]:
        """For the run's files."""
        return {"head": "private", "sites": list(self.sites), **self.read_out.facts()}


class AskedForNoise:
    """The answers of the sites of a study, by messages; noise is in each.

    Args:
      study: The study.
      federation: The sites that joined.
      ask_all: Asks what every site that trains must answer.
    """

    def __init__(self, study: Study, federation: Federation, ask_all: AskAll) -> None:
        self._study, self._federation, self._ask_all = study, federation, ask_all

    def ask(self, kind: str, whitening: Whitening) -> Mapping[str, Noised]:
        """The sum of each site, by name, of a row of each patient.

        Raises:
          RunError: fewer sites than the quorum told them.
        """
        arrays = to_arrays(place_whitening(self._study, whitening))
        size = count_numbers(kind, len(self._study.classes), self._study.directions or 0)
        request = NoisedRequest(study=self._study.id, arrays=arrays).record()
        told = self._ask_all(
            kind,
            request,
            self._federation.training,
            lambda _, record: NoisedReply.read(record, size).sums,
        )
        declared = {m.name: m.reply.enrolled for m in self._federation.training}
        shares = self._federation.shares
        return {n: s.scaled(shares[n]) for n, s in _leave_out_lies(told, declared).items()}


def _leave_out_lies(
    told: Mapping[str, Noised], declared: Mapping[str, int | None]
) -> Mapping[str, Noised]:
    """The sums that can be: noise is the same at all sites, and rows are as many as patients."""
    usual = median_low(sums.deviation for sums in told.values())
    good: dict[str, Noised] = {}
    for name, sums in told.items():
        size, patients = len(sums.numbers), declared[name] or MOST
        longest = _MOST_PATIENTS * patients + _MOST_NOISE * usual * math.sqrt(size)
        if not math.isclose(sums.deviation, usual, rel_tol=1e-3):
            log.warning("%s is left out: its noise is not what the study asks for", name)
        elif np.linalg.norm(sums.numbers) > longest:
            log.warning("%s is left out: it sums far more patients than it declared", name)
        else:
            good[name] = sums
    return good


def solve_private_head(study: Study, answers: AskedForNoise, keep: Keep) -> PrivateHead:
    """Ask for moments, whiten by them, ask for prototypes, and solve.

    Args:
      study: With a private head.
      answers: Of its sites.
      keep: What is asked must stay the same over a resume, to the last bit: any other question
        would cost a site's ε once more.
    """
    basis = keep("basis", lambda: {"basis": _find_basis(study)})["basis"]

    def make() -> Mapping[str, Floats]:
        found = whiten(basis, add_noised(answers.ask(MOMENTS, Whitening.begin(basis))))
        return {"centre": found.centre, "matrix": found.matrix}

    kept = keep("whitening", make)
    whitening = Whitening(basis, kept["centre"], kept["matrix"])
    told = answers.ask(PROTOTYPES, whitening)
    head, counts = solve_prototypes(add_noised(told), len(study.classes))
    shares = np.log(counts / counts.sum()).clip(-LARGEST_PRIOR, 0.0)
    tensors = place_whitening(study, whitening) | place_head(study, head.weight, head.bias)
    read_out = ReadOut(temperature=_TEMPERATURE, log_prior=tuple(shares.tolist()))
    return PrivateHead(tuple(told), tensors, read_out)


def _find_basis(study: Study) -> Floats:
    backbone, seed = backbones.get(study.model.backbone), derive(study.seed, "basis")
    classifier = backbone.read_classifier(study.model.weights)
    known = None if classifier is None else classifier.double().numpy()
    return find_basis(known, backbone.width, study.directions or 0, seed)


def add_noised(sums: Mapping[str, Noised]) -> Noised:
    """The sums of all sites together, added in the order of names."""
    ordered = [sums[name] for name in sorted(sums)]
    numbers: Floats = np.sum([each.numbers for each in ordered], axis=0)
    return Noised(numbers, math.hypot(*(each.deviation for each in ordered)))
