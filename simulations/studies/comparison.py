"""Ways of training on the same test patients: what sites tell of each, and how they compare.

What a site does not tell a federation is not told here either, so that all ways know the same.
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from client.models.released import KeptModel, read_whole
from client.models.tested import Answer, answer_test, compare_answers
from client.session import Session
from common.metrics.counts import Counts
from common.protocol.evidence import tells_evidence
from server.runs.results import Results, make_facts

MOST_CROSSED = 20
"""Of more sites, models are not tried at each other's: pairs grow as the square."""


class Comparison:
    """Models of several ways of training on the test patients of sites.

    Args:
      sessions: Of all sites; those that tell no figures are left out.

    Attributes:
      results: Counts by way and site, as coarse as each site discloses them.
      cross: Where there are few sites, counts by the site whose patients alone trained a model,
        and the site that tested it.
    """

    def __init__(self, sessions: Sequence[Session]) -> None:
        told = [s for s in sessions if s.prepared.offer.disclosure.metrics != "none"]
        self._sessions = {session.prepared.site.name: session for session in told}
        self._answers: dict[str, dict[str, Answer]] = defaultdict(dict)
        self.results: Results = {}
        self.cross: Results = {}

    def test(self, way: str, model: KeptModel, sites: Sequence[str] | None = None) -> None:
        """Test one model of a way, at all sites or some; adds to `results`."""
        self.results.setdefault(way, {}).update(self._tell(model, sites))
        for name, session in self._choose(sites).items():
            self._answers[name][way] = answer_test(session, model)

    def test_elsewhere(self, trained_at: str, model: KeptModel) -> None:
        """Test a model of one site's patients at every site; adds to `cross`."""
        if len(self._sessions) <= MOST_CROSSED:
            self.cross[trained_at] = self._tell(model, None)

    def add_told(
        self, way: str, told: Mapping[str, Counts], folders: Mapping[Session, Path]
    ) -> None:
        """Add a way whose counts sites have told; adds to `results`.

        Args:
          way: Of training.
          told: The counts of each site.
          folders: Where the model of each session's study, and of its site, is kept whole.
        """
        self.results[way] = dict(told)
        for session, folder in folders.items():
            if (name := session.prepared.site.name) in told:
                answer = answer_test(session, read_whole(folder, session))
                self._answers[name][way] = answer

    def _choose(self, sites: Sequence[str] | None) -> dict[str, Session]:
        return {n: s for n, s in self._sessions.items() if sites is None or n in sites}

    def _tell(self, model: KeptModel, sites: Sequence[str] | None) -> dict[str, Counts]:
        chosen = self._choose(sites)
        told = {
            n: s.tell(model.tensors, "test", read_out=model.read_out) for n, s in chosen.items()
        }
        return {name: counts for name, (counts,) in told.items()}

    def facts(self, pairs: Sequence[tuple[str, str]]) -> dict[str, Any]:
        """How ways compare in pairs, by patient, at each site that tells exact scores; and `cross`.

        Args:
          pairs: Of ways.
        """
        evidence = {
            name: compare_answers(session, self._answers[name], pairs)
            for name, session in self._sessions.items()
            if tells_evidence(session.prepared.disclosure, session.prepared.offer.patients.test)
        }
        return make_facts(evidence, self.cross)
