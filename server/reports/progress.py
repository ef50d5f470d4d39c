"""What a person sees of a run: progress while it goes, then tables, pictures and files."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.table import Table
from rich.text import Text
from safetensors.torch import save
from torch import nn

from common.config.study import Study
from common.metrics.metrics import METRICS, Counts, value
from common.protocol.join import JoinReply
from common.support.terminal import console, size, table
from server.reports import plots
from server.runs.results import (
    FEDERATED,
    Outcome,
    Results,
    calibration_error,
    left_out,
    overall,
    sensitivities,
    sites_of,
    union,
    write_results,
)
from server.runs.run_folder import RunFolder

_COLUMNS = ("accuracy", "balanced_accuracy", "f1", "auroc")
_FEW = 6


def note(results: Results, withheld: Mapping[str, str]) -> str:
    """What to print under a table: the sites that overall leaves out, and who withheld what."""
    lines = []
    if names := ", ".join(left_out(results)):
        lines.append(f"overall leaves out {names}: not every way of training has figures for it")
    if withheld:
        told = "; ".join(f"{site}: {what}" for site, what in sorted(withheld.items()))
        lines.append(f"withheld by sites: {told}")
    return "\n".join(lines)


@dataclass(frozen=True, kw_only=True)
class Joined:
    """Who takes part in a run, and what a round of it sends.

    Attributes:
      replies: What each member told about itself, by name.
      refusals: Why other nodes are not members, by name.
      resumed: The last finished round; 0 at the beginning.
      sent: Bytes that each site sends in a round.
      whole: Bytes of the whole model.
    """

    replies: Sequence[JoinReply]
    refusals: Mapping[str, str]
    resumed: int
    sent: int
    whole: int


class Reporter:
    """Shows one run and writes its files."""

    def __init__(self, folder: RunFolder) -> None:
        self._folder, self._study = folder, folder.study

    def joined(self, joined: Joined) -> None:
        """The sites that take part, and those that do not."""
        from server.reports.tensorboard import Events  # what it needs is slow to import

        names = ", ".join(reply.name for reply in joined.replies)
        start = f", going on after round {joined.resumed}" if joined.resumed else ""
        sites = f": {len(joined.replies)} sites ({names}){start}"
        console.print(Text.assemble((self._study.name, "bold"), sites))
        sent, whole = size(joined.sent), size(joined.whole)
        share = f"{sent} travel each way per site and round; the model has {whole}"
        console.print(f"  unfreeze: {self._study.model.unfreeze}: {share}", style="dim")
        for name, why in joined.refusals.items():
            console.print(f"  {name} does not take part: {why}", style="yellow")
        self._events = Events(self._folder, by_site=len(joined.replies) <= _FEW)

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
        write_results(self._folder, {FEDERATED: outcome.test}, **facts)

    def _pictures(self, outcome: Outcome, history: Sequence[Mapping[str, Any]]) -> None:
        keys = dict.fromkeys((self._study.select, "auroc"))
        rows = [
            {name: x[name] for name in ("round", "model_round", "site")}
            | {"loss": x["train_loss"]}
            | {key: x[key] for key in keys if key != "loss"}
            for x in history
        ]
        plots.curves(rows, self._folder.path / "curves.png")
        total = union(outcome.test.values(), len(self._study.classes))
        plots.confusion(total, self._study.classes, self._folder.path / "confusion.png")


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
        return [*(value(counts, name) for name in _COLUMNS), calibration_error(counts)]

    return (
        _table(results, withheld, len(classes), metrics, figures_of),
        _table(results, withheld, len(classes), classes, sensitivities),
    )


def _table(
    results: Results,
    withheld: Iterable[str],
    classes: int,
    columns: Sequence[str],
    figures_of: Callable[[Counts], list[float | None]],
) -> Table:
    shown = table("site", "images", "trained", *columns, left=("site", "trained"))
    sites = sorted(sites_of(results) | set(withheld))
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
