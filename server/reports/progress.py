"""What a person sees of a run: progress while it goes, then tables, pictures and files."""

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.table import Table
from rich.text import Text
from safetensors.torch import save
from torch import nn

from common.config.study import Study
from common.errors import RunError
from common.metrics.metrics import METRICS, Counts, sensitivity, value
from common.metrics.statistics import calibration
from common.support.terminal import console, size, table
from server.reports import plots as figures
from server.rounds.federation import Federation
from server.runs.run_folder import RunFolder

FEDERATED = "federated"
_COLUMNS = ("accuracy", "balanced_accuracy", "f1", "auroc")
_FEW = 6


Results = dict[str, dict[str, Counts]]
"""Way of training (federated, local, pooled) → site → counts on its test patients."""


@dataclass(frozen=True)
class Outcome:
    """The released model: after how many rounds, and its counts on each site's test patients."""

    study: Study
    round: int
    test: dict[str, Counts]
    withheld: dict[str, str]
    """What sites do not tell, in words; only those that withhold something."""


def union(counts: Iterable[Counts], classes: int) -> Counts:
    """Counts of all sites together."""
    return sum(counts, Counts.zero(classes))


def overall(results: Results, classes: int) -> dict[str, Counts]:
    """Of each way of training, the union of the sites that all ways have figures for."""
    shared = sorted(_sites(results) - set(left_out(results)))
    return {way: union((sites[name] for name in shared), classes) for way, sites in results.items()}


def left_out(results: Results) -> list[str]:
    """The sites that `overall` leaves out, since not every way of training has figures for them."""
    return sorted(n for n in _sites(results) if any(n not in way for way in results.values()))


def note(results: Results, withheld: Mapping[str, str]) -> str:
    """What to print under a table: the sites that overall leaves out, and who withheld what."""
    lines = []
    if names := ", ".join(left_out(results)):
        lines.append(f"overall leaves out {names}: not every way of training has figures for it")
    if withheld:
        told = "; ".join(f"{site}: {what}" for site, what in sorted(withheld.items()))
        lines.append(f"withheld by sites: {told}")
    return "\n".join(lines)


def _sites(results: Results) -> set[str]:
    return {name for sites in results.values() for name in sites}


class Reporter:
    """Shows one run and writes its files."""

    def __init__(self, folder: RunFolder) -> None:
        self._folder, self._study = folder, folder.study

    def joined(self, federation: Federation, *, resumed: int, sent: int, whole: int) -> None:
        """The sites that take part, and those that do not.

        Args:
          federation: Joined.
          resumed: The last finished round, 0 at the beginning.
          sent: Bytes each site sends in a round.
          whole: Bytes of the whole model.
        """
        from server.reports.tensorboard import Events  # what it needs is slow to import

        names = ", ".join(member.name for member in federation.members)
        start = f", going on after round {resumed}" if resumed else ""
        sites = f": {len(federation.members)} sites ({names}){start}"
        console.print(Text.assemble((self._study.name, "bold"), sites))
        share = f"{size(sent)} travel each way per site and round; the model has {size(whole)}"
        console.print(f"  unfreeze: {self._study.model.unfreeze}: {share}", style="dim")
        for name, why in federation.refusals.items():
            console.print(f"  {name} does not take part: {why}", style="yellow")
        self._events = Events(self._folder, by_site=len(federation.members) <= _FEW)

    def round(self, lines: Sequence[Mapping[str, Any]], seconds: float) -> None:
        """One line of progress; the site lines come first, the overall line last."""
        self._events.add(lines)
        *sites, overall = lines
        label = METRICS[self._study.select].label
        text = [f"round {overall['round']:>3}/{self._study.train.rounds}"]
        text.append(
            f"loss {_figure(overall['train_loss'])}  {label} {_score(self._study, overall)}"
        )
        shown = sites if len(sites) <= _FEW else ()
        text += [f"{x['site']} {_figure(x['train_loss'])} {_score(self._study, x)}" for x in shown]
        cost = f"{size(overall['bytes'] / max(len(sites), 1))} per site, {seconds:.1f} s"
        line = Text("  │ ").join([*map(Text, text), Text(cost, style="dim")])
        console.print(line, soft_wrap=True)

    def finished(self, outcome: Outcome, model: nn.Module) -> None:
        """Write the released model, the report and the pictures."""
        tensors = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
        self._folder.write("model.safetensors", save(tensors))
        history = self._folder.history()
        self._events.add(x for x in history if x["round"] == history[-1]["round"])
        self._pictures(outcome, history)
        # The report comes last: with it the run counts as finished.
        facts = {"released_round": outcome.round, "withheld": outcome.withheld}
        save_results(self._folder, {FEDERATED: outcome.test}, **facts)

    def _pictures(self, outcome: Outcome, history: Sequence[Mapping[str, Any]]) -> None:
        keys = dict.fromkeys((self._study.select, "auroc"))
        rows = [
            {name: x[name] for name in ("round", "model_round", "site")}
            | {"loss": x["train_loss"]}
            | {key: x[key] for key in keys if key != "loss"}
            for x in history
        ]
        figures.curves(rows, self._folder.path / "curves.png")
        total = union(outcome.test.values(), len(self._study.classes))
        figures.confusion(total, self._study.classes, self._folder.path / "confusion.png")


def save_results(folder: RunFolder, results: Results, **facts: Any) -> None:
    """Write `report.json`: every metric, and the counts behind it."""
    together = overall(results, len(folder.study.classes))
    told = {
        way: {
            "overall": {**_metrics(together[way]), "left_out": left_out(results)},
            "sites": {
                name: {**_metrics(counts), "counts": counts.sparse()}
                for name, counts in sites.items()
            },
        }
        for way, sites in results.items()
    }
    folder.write("report.json", json.dumps({**facts, "results": told}, indent=1))


def load_results(path: Path, classes: int) -> tuple[Results, dict[str, Any]]:
    """Read `report.json` of a finished run: its results, and the facts beside them."""
    try:
        report = json.loads((path / "report.json").read_text(encoding="utf-8"))
    except OSError:
        remedy = f"Finish it with --resume {path}."
        expected, got = "a finished run", "no report.json"
        raise RunError(path, expected=expected, got=got, remedy=remedy) from None
    told = report.pop("results")
    results = {
        way: {
            name: Counts.from_sparse(
                site["counts"], classes, scored=bool(site["counts"]["positive"])
            )
            for name, site in result["sites"].items()
        }
        for way, result in told.items()
    }
    return results, report


def _metrics(counts: Counts) -> dict[str, Any]:
    return {
        "images": counts.n,
        **{name: value(counts, name) for name in METRICS},
        "calibration_error": _calibration_error(counts),
        "sensitivity": sensitivities(counts),
    }


def _calibration_error(counts: Counts) -> float | None:
    found = calibration(counts)
    return found.error if found else None


def show_results(
    results: Results, classes: Sequence[str], withheld: Mapping[str, str], where: Path
) -> None:
    """Print the tables of a finished run."""
    tables = results_tables(results, classes, withheld)
    for title, shown in zip(("test images", "sensitivity per class"), tables, strict=True):
        console.print(f"\n{title}", style="bold")
        console.print(shown)
        if below := note(results, withheld):
            console.print(below, style="dim")
    console.print(f"\nrun folder: {where}")


def results_tables(
    results: Results, classes: Sequence[str], withheld: Mapping[str, str]
) -> tuple[Table, Table]:
    """Per site and overall, one row for each way of training: metrics, and sensitivities.

    A site that withheld everything has a row of dashes.
    """
    metrics = [*(METRICS[name].label for name in _COLUMNS), "calibration error"]

    def figures_of(counts: Counts) -> list[float | None]:
        return [*(value(counts, name) for name in _COLUMNS), _calibration_error(counts)]

    return (
        _table(results, withheld, len(classes), metrics, figures_of),
        _table(results, withheld, len(classes), classes, sensitivities),
    )


def sensitivities(counts: Counts) -> list[float | None]:
    """Sensitivity of each class."""
    return [sensitivity(counts, k) for k in range(counts.classes)]


def _table(
    results: Results,
    withheld: Iterable[str],
    classes: int,
    columns: Sequence[str],
    figures_of: Callable[[Counts], list[float | None]],
) -> Table:
    shown = table("site", "images", "trained", *columns, left=("site", "trained"))
    sites = sorted(_sites(results) | set(withheld))
    rows = [(site, {w: s[site] for w, s in results.items() if site in s}, "") for site in sites]
    rows.append(("overall", overall(results, classes), "bold"))
    for site, ways, style in rows:
        if not ways:
            shown.add_row(site, *[_figure(None)] * (len(columns) + 2), style=style)
        for i, (way, counts) in enumerate(ways.items()):
            first = ("", "") if i else (site, str(counts.n))
            shown.add_row(*first, way, *map(_figure, figures_of(counts)), style=style)
    return shown


def _score(study: Study, line: Mapping[str, Any]) -> str:
    return _figure(line[study.select])


def _figure(number: float | None) -> str:
    return "–" if number is None else f"{number:.3f}"
