"""The progress of a run on the terminal, and the plots and files at its end."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from rich.text import Text
from safetensors.torch import save
from torch import nn

from common.heads.read_out import AS_IT_IS, ReadOut
from common.metrics.metrics import METRICS
from common.protocol.join import JoinReply
from common.support.names import shorten_names
from common.support.terminal import console, describe_left, size
from server.reports import plots
from server.reports.tables import count_images
from server.reports.titles import count_validation, title_run
from server.runs.results import (
    FEDERATED,
    Outcome,
    Weight,
    make_facts,
    unite_counts,
    write_results,
)
from server.runs.run_folder import Checkpoint, RunFolder

_FEW = 6
_SHORTEST = 8
_RULE = "  │ "


@dataclass(frozen=True, kw_only=True)
class Joined:
    """The members of a run, and the size of the messages in a round.

    Attributes:
      replies: The reply of each member to the question to join, by name.
      refusals: The reasons why other nodes are not members, by name.
      weights: The weight of each site that trains, by name.
      resumed: The last finished round; 0 at the beginning.
      sent: Bytes that each site sends in a round.
      whole: Bytes of the whole model.
    """

    replies: Sequence[JoinReply]
    refusals: Mapping[str, str]
    weights: Mapping[str, Weight]
    resumed: int
    sent: int
    whole: int


class Reporter:
    """Shows one run and writes its files.

    Args:
      folder: Of the run.
      mlflow: The address of an MLflow server that is given the figures, too; None is none.
    """

    def __init__(self, folder: RunFolder, mlflow: str | None = None) -> None:
        self._folder, self._study = folder, folder.study
        self._seconds: list[float] = []
        self._mlflow_uri = mlflow

    def report_join(self, joined: Joined) -> None:
        """Print the sites that take part, and those that do not."""
        from server.reports.mlflow import MlflowRun  # what they need is slow to import
        from server.reports.tensorboard import Events

        names = ", ".join(reply.name for reply in joined.replies)
        start = f", going on after round {joined.resumed}" if joined.resumed else ""
        sites = f": {len(joined.replies)} sites ({names}){start}"
        console.print(Text.assemble((self._study.name, "bold"), sites))
        sent, whole = size(joined.sent), size(joined.whole)
        per = "site and round" if self._study.train.rounds else "site"
        share = f"{sent} travel each way per {per}; the model has {whole}"
        console.print(f"  unfreeze: {self._study.model.unfreeze}: {share}", style="dim")
        few, capped = len(joined.weights) <= _FEW, any(w.capped for w in joined.weights.values())
        if told := "; ".join(f"{n} {w}" for n, w in joined.weights.items() if few or w.capped):
            style = "yellow" if capped else "dim"
            console.print(f"  weights in the average: {told}", style=style)
        for name, why in joined.refusals.items():
            console.print(f"  {name} does not take part: {why}", style="yellow")
        by_site = len(joined.replies) <= _FEW
        self._events = Events(self._folder, by_site=by_site)
        uri = self._mlflow_uri
        self._mlflow = MlflowRun(self._folder, uri, by_site=by_site) if uri else None

    def report_solved(self, head: str, strength: float, sites: int, sent: int) -> None:
        """Print that a head was solved."""
        told = f"{head}, strength {strength:g}, from the sums of {sites} sites ({size(sent)} each)"
        console.print(f"  solved: {told}", style="dim")

    def report_private_head(self, sites: int) -> None:
        """Print that a private head was solved."""
        directions = self._study.directions
        told = f"from two noised sums of {sites} sites, in {directions} directions of features"
        console.print(f"  solved: a discriminant, {told}", style="dim")

    def report_choice(self, checkpoint: Checkpoint, read_out: ReadOut) -> None:
        """Print which model is released, and why, and how its probabilities are read."""
        if read_out != AS_IT_IS:
            prior = " and the share of each class" if any(read_out.log_prior) else ""
            told = f"temperature {read_out.temperature:.2g}{prior}, for the least loss"
            console.print(
                f"  probabilities: {told} in validation; decisions: as they are", style="dim"
            )
        best, label = checkpoint.best, METRICS[self._study.select].label
        if best is None:
            return
        what = f"the model of round {best.round}" if best.round else "the solved head"
        told = f"released: {what}, {label} {best.score:.3f} ± {best.noise:.3f} in validation"
        if more := checkpoint.round - best.round:
            told += f"; {more} more rounds made it no better beyond that"
        console.print(f"  {told}", style="dim")

    def report_round(self, lines: Sequence[Mapping[str, Any]], seconds: float) -> None:
        """Print one line of progress; `lines` has the sites first and the overall line last."""
        self._seconds.append(seconds)
        self._show_figures(lines)
        *sites, overall = lines
        number, rounds = overall["round"], self._study.train.rounds
        left = f", {describe_left(rounds - number, self._seconds)}" if number < rounds else ""
        parts = [f"round {number:>3}/{rounds}", self._describe(overall)]
        cost = f"{seconds:.1f} s{left}"
        scores = {x["site"]: s for x in sites if (s := x[self._study.select]) is not None}
        room = console.width - len(_RULE.join([*parts, cost]))
        if told := fit_scores(scores if len(sites) <= _FEW else {}, room - len(_RULE)):
            parts.append(told)
        line = Text(_RULE).join([*map(Text, parts), Text(cost, style="dim")])
        console.print(line, soft_wrap=True)

    def _describe(self, overall: Mapping[str, Any]) -> str:
        loss, score = overall["train_loss"], overall[self._study.select]
        if loss is None and score is None:
            return "figures of rounds are withheld"
        label = METRICS[self._study.select].label
        validation = "no validation image" if score is None else f"{label} {score:.3f}"
        return validation if loss is None else f"loss {loss:.3f}  {validation}"

    def report_end(self, outcome: Outcome, model: nn.Module) -> None:
        """Write the released model, the report and the plots."""
        tensors = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
        self._folder.write("model.safetensors", save(tensors))
        history = self._folder.read_history()
        self._show_figures([x for x in history if x["round"] == history[-1]["round"]])
        self._write_plots(outcome, history)
        results = {**outcome.own, FEDERATED: outcome.test}
        if self._mlflow:
            self._mlflow.finish(outcome.round, results)
        # The report comes last: with it the run counts as finished.
        weights = {n: {**asdict(w), "capped": w.capped} for n, w in outcome.weights.items()}
        facts = {
            "released_round": outcome.round,
            "withheld": outcome.withheld,
            "site_weights": weights,
            "validation": outcome.validation.sparse(),
            **make_facts(outcome.evidence, {}),
        }
        write_results(self._folder, results, **facts)

    def _show_figures(self, lines: Sequence[Mapping[str, Any]]) -> None:
        """Show figures of finished rounds to whoever draws them."""
        self._events.add(lines)
        if self._mlflow:
            self._mlflow.add(lines)

    def _write_plots(self, outcome: Outcome, history: Sequence[Mapping[str, Any]]) -> None:
        keys = dict.fromkeys((self._study.select, "auroc"))
        rows = [
            {name: x[name] for name in ("round", "model_round", "site")}
            | {"loss": x["train_loss"]}
            | {key: x[key] for key in keys if key != "loss"}
            for x in history
        ]
        run, path = self._folder, self._folder.path
        images = f"{count_validation(run)} validation images"
        title = title_run(run, "training and validation, by round", outcome.round, images)
        plots.plot_curves(rows, path / "curves.png", title)
        total = unite_counts(outcome.test.values(), len(self._study.classes))
        silent = ", ".join(sorted(set(outcome.withheld) - set(outcome.test)))
        images = f"{count_images(total)} of {len(outcome.test)} sites"
        images += f", withheld by {silent}" if silent else ""
        title = title_run(run, "who is taken for whom", outcome.round, images)
        plots.plot_confusion(total, self._study.classes, path / "confusion.png", title)


def fit_scores(scores: Mapping[str, float], room: int) -> str:
    """The score of each site in so many characters, by its name or what tells it from the others.

    Nothing where there is no room for that.
    """
    longest = max(map(len, scores), default=0)
    for width in range(max(longest, _SHORTEST), _SHORTEST - 1, -1):
        names = shorten_names(scores, width)
        told = "  ".join(f"{names[site]} {score:.3f}" for site, score in scores.items())
        if len(told) <= room:
            return told
    return ""
