"""Everything that a finished run knows of itself, read from its folder."""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import cached_property
from pathlib import Path
from typing import Any

from common.config.study import Study
from common.errors import StudyError
from common.metrics.by_patient import Evidence
from common.metrics.counts import Counts
from common.protocol.evidence import ADAPTED
from server.runs.results import (
    FEDERATED,
    Results,
    read_cross,
    read_evidence,
    read_results,
    read_validation,
    unite_sites,
)
from server.runs.run_folder import RunFolder

Line = Mapping[str, Any]


@dataclass(frozen=True)
class Happened:
    """When a run was at work, and what went wrong.

    Attributes:
      began: When sites first joined; None in runs without a journal.
      ended: When the model was released.
      starts: How often sites were asked to join: once, and once more for each resume.
      seconds: Of the rounds, together.
      left_out: How often each site was left out of an exchange, by site and reason.
    """

    began: datetime | None
    ended: datetime | None
    starts: int
    seconds: float
    left_out: Mapping[tuple[str, str], int]


@dataclass(frozen=True)
class RunFacts:
    """A finished run, as values.

    Attributes:
      folder: Its folder.
      study: Its study, as sites were shown it: without paths of this machine.
      results: Counts on test patients by way of training and site.
      told: What stands beside the results in `report.json`.
      facts: What was said at join: sites, contract, versions, refusals.
      history: The lines of `metrics.jsonl`.
      journal: The lines of `journal.jsonl`.
      solved: How a head was solved, and from whose sums; empty where none was.
      audit: The largest ε that attacks on the same study show, where there was an audit.
    """

    folder: Path
    study: Study
    results: Results
    told: Line
    facts: Line
    history: Sequence[Line]
    journal: Sequence[Line]
    solved: Line
    audit: float | None = None

    @cached_property
    def united(self) -> Mapping[str, Counts]:
        """Counts on the test patients of all sites together, by way of training."""
        return unite_sites(self.results, len(self.study.classes))

    @cached_property
    def sites(self) -> Mapping[str, Any]:
        """What each member said of itself when it joined, by name."""
        found: Mapping[str, Any] = self.facts.get("sites", {})
        return found

    @cached_property
    def evidence(self) -> Mapping[str, Evidence]:
        """Comparisons on the same patients, by the sites that tell them."""
        return read_evidence(self.told)

    @cached_property
    def validation(self) -> Counts:
        """The released model on validation patients; of no images where no site tells scores."""
        return read_validation(self.told, len(self.study.classes))

    @cached_property
    def cross(self) -> Results:
        """The model of each site alone on test patients of all sites, where they were compared."""
        return read_cross(self.told, len(self.study.classes))

    def withheld(self, name: str) -> str:
        """What a site withholds, in words."""
        words: str = self.told.get("withheld", {}).get(name, "nothing")
        return words

    @property
    def external(self) -> bool:
        """Whether the figures are of hospitals that took no part in the run."""
        return "external" in self.told

    @property
    def released(self) -> str:
        """Which model was released, in words."""
        number = self.told.get("released_round", 0)
        return f"the model of round {number}" if number else "the solved head"

    @property
    def own_way(self) -> str:
        """The way of training by which sites are served: adapted, where they fitted it."""
        return ADAPTED if ADAPTED in self.results else FEDERATED

    @cached_property
    def happened(self) -> Happened:
        """When the run was at work, and what went wrong."""
        times = {what: self._times(what) for what in ("joined", "finished")}
        rounds = {x["round"]: x["seconds"] for x in self.journal if x["what"] == "round"}
        out = ((x["site"], x["why"]) for x in self.journal if x["what"] == "left out")
        return Happened(
            began=min(times["joined"], default=None),
            ended=max(times["finished"], default=None),
            starts=len(times["joined"]),
            seconds=sum(rounds.values()),
            left_out=Counter(out),
        )

    def _times(self, what: str) -> list[datetime]:
        return [datetime.fromisoformat(x["time"]) for x in self.journal if x["what"] == what]


def read_facts(folder: RunFolder, audit: float | None = None) -> RunFacts:
    """Read a finished run; raises `RunError` if it is not finished."""
    study = Study.parse(json.loads(folder.study.proposal()), str(folder.path), StudyError)
    results, told = read_results(folder.path, len(study.classes))
    return RunFacts(
        folder=folder.path,
        study=study,
        results=results,
        told=told,
        facts=folder.read_facts(),
        history=folder.read_history(),
        journal=folder.read_journal(),
        solved=folder.read_solved(),
        audit=audit,
    )
