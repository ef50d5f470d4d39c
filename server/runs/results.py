"""The results of a run as values: counts on test patients, and the report file that holds them."""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.config.study import Study
from common.errors import ContractError, RunError
from common.metrics.by_patient import Evidence
from common.metrics.calibration import calibration
from common.metrics.counts import Counts
from common.metrics.metrics import (
    METRICS,
    SHARES,
    brier_score,
    class_share,
    macro_average_precision,
    sensitivity,
    value,
)
from common.protocol.evidence import ADAPTED, LOCAL
from common.protocol.evidence import FEDERATED as FEDERATED  # who reads results needs it, too
from server.runs.run_folder import RunFolder

WAYS = (LOCAL, "fedavg", "solved", FEDERATED, ADAPTED, "pooled")
"""Ways of training, in the order in which they are shown."""

READ_OUTS = (
    "two read-outs: of decisions are balanced accuracy, macro F1, sensitivity, specificity, PPV "
    "and NPV; of probabilities are AUROC, average precision, Brier score, calibration and, where "
    "scores are told, accuracy"
)
"""Below tables of several figures: a decision need not be the most probable class."""

Results = dict[str, dict[str, Counts]]
"""Way of training (federated, local, pooled) → site → counts on its test patients."""


@dataclass(frozen=True)
class Weight:
    """The weight of one site.

    Attributes:
      told: The images that the site trains on, as it says, with privacy the patients; None if all
        sites count the same.
      number: The weight itself.
      share: The weight as a share of those of all sites that train.
    """

    told: int | None
    number: float
    share: float

    @property
    def capped(self) -> bool:
        """Whether the site counts for less than it tells."""
        return self.told is not None and self.number < self.told

    def __str__(self) -> str:
        """As the share, and what was told where the weight is less."""
        told = f", capped: it tells {self.told}" if self.capped else ""
        return f"{self.share:.1%}{told}"


@dataclass(frozen=True)
class Outcome:
    """The released model: its number of rounds, and its counts on each site's test patients."""

    study: Study
    round: int
    validation: Counts
    """On the validation patients of all sites that tell scores each round."""
    test: dict[str, Counts]
    own: Results
    """The same of each site's own models, where they are told."""
    evidence: dict[str, Evidence]
    """How these compare, by patient, where sites tell it."""
    withheld: dict[str, str]
    """The figures that a site does not tell, in words; only sites that withhold something."""
    weights: dict[str, Weight]
    """The weights of the sites that trained."""


def sort_ways(results: Results) -> Results:
    """The same results, in the order of `WAYS`."""
    return {way: results[way] for way in sorted(results, key=WAYS.index)}


def unite_counts(counts: Iterable[Counts], classes: int) -> Counts:
    """Add the counts of all sites."""
    return sum(counts, Counts.zero(classes))


def unite_sites(results: Results, classes: int) -> dict[str, Counts]:
    """Unite, for each way of training, the sites that all ways have figures for."""
    shared = sorted(list_sites(results) - set(find_left_out(results)))
    return {
        way: unite_counts((sites[name] for name in shared), classes)
        for way, sites in results.items()
    }


def find_left_out(results: Results) -> list[str]:
    """Find the sites that `unite_sites` leaves out, as a way of training lacks figures for them."""
    return sorted(n for n in list_sites(results) if any(n not in way for way in results.values()))


def describe_gaps(results: Results, withheld: Mapping[str, str]) -> str:
    """Say in words which sites `unite_sites` leaves out, and which figures each site withheld."""
    lines = []
    if names := ", ".join(find_left_out(results)):
        lines.append(f"overall leaves out {names}: not every way of training has figures for it")
    if withheld:
        told = "; ".join(f"{site}: {what}" for site, what in sorted(withheld.items()))
        lines.append(f"withheld by sites: {told}")
    return "\n".join(lines)


def list_sites(results: Results) -> set[str]:
    """List every site that any way of training has figures for."""
    return {name for sites in results.values() for name in sites}


def write_results(folder: RunFolder, results: Results, **facts: Any) -> None:
    """Write `report.json`: every metric, and the counts behind it."""
    results = sort_ways(results)
    together = unite_sites(results, len(folder.study.classes))
    told = {
        way: {
            "overall": {**_metrics(together[way]), "left_out": find_left_out(results)},
            "sites": {
                name: {**_metrics(counts), "counts": counts.sparse()}
                for name, counts in sites.items()
            },
        }
        for way, sites in results.items()
    }
    folder.write("report.json", json.dumps({**facts, "results": told}, indent=1))


def read_results(path: Path, classes: int) -> tuple[Results, dict[str, Any]]:
    """Read `report.json` of a finished run: its results, and the facts beside them.

    Raises:
      RunError: there is none, or a damaged one.
    """
    try:
        report = json.loads((path / "report.json").read_text(encoding="utf-8"))
        results = {
            way: {n: _read_counts(site["counts"], classes) for n, site in told["sites"].items()}
            for way, told in report.pop("results").items()
        }
    except OSError:
        remedy = f"Finish it with --resume {path}."
        expected, got = "a finished run", "no report.json"
        raise RunError(path, expected=expected, got=got, remedy=remedy) from None
    except (ValueError, KeyError, TypeError, AttributeError, ContractError):
        where, expected = path / "report.json", "results as a run writes them"
        raise RunError(where, expected=expected, got="others", remedy="Restore it.") from None
    return results, report


def make_facts(evidence: Mapping[str, Evidence], cross: Results) -> dict[str, Any]:
    """Make facts of `report.json` of how ways compare at sites, and of models tested elsewhere.

    Args:
      evidence: By site.
      cross: Counts by the site that trained a model, and the site that tested it.
    """
    told = {site: found.facts() for site, found in sorted(evidence.items())}
    tested = {
        site: {at: counts.sparse() for at, counts in sorted(sites.items())}
        for site, sites in sorted(cross.items())
    }
    return ({"evidence": told} if told else {}) | ({"cross": tested} if tested else {})


def read_validation(facts: Mapping[str, Any], classes: int) -> Counts:
    """Read from them how the released model validates; of no images where no site tells scores."""
    told = facts.get("validation")
    return _read_counts(told, classes) if told else Counts.zero(classes)


def read_evidence(facts: Mapping[str, Any]) -> dict[str, Evidence]:
    """Read from the facts of a report how ways compare, by site; empty if it is not told."""
    return {site: Evidence.read(told) for site, told in facts.get("evidence", {}).items()}


def read_cross(facts: Mapping[str, Any], classes: int) -> Results:
    """Read from them how the model of each site's patients did at each site; empty if untold."""
    return {
        site: {at: _read_counts(told, classes) for at, told in sites.items()}
        for site, sites in facts.get("cross", {}).items()
    }


def _read_counts(told: Mapping[str, Any], classes: int) -> Counts:
    return Counts.from_sparse(told, classes, scored=not told["noise"])


def _metrics(counts: Counts) -> dict[str, Any]:
    return {
        "images": counts.n,
        **{name: value(counts, name) for name in METRICS},
        "average_precision": macro_average_precision(counts),
        "brier": brier_score(counts),
        "calibration_error": compute_calibration_error(counts),
        **{name: [class_share(counts, k, name) for k in range(counts.classes)] for name in SHARES},
    }


def compute_calibration_error(counts: Counts) -> float | None:
    """Compute the expected calibration error; None where scores were not told."""
    found = calibration(counts)
    return found.error if found else None


def compute_sensitivities(counts: Counts) -> list[float | None]:
    """Compute the sensitivity of each class."""
    return [sensitivity(counts, k) for k in range(counts.classes)]
