"""The resumable round loop around a Flower strategy."""

import logging
import random
import time
from pathlib import Path
from typing import Any

from flwr.app import Message, MessageType
from flwr.serverapp import Grid

from common import wire
from common.contract import fingerprint
from common.errors import RunError, complaint
from common.metrics import METRICS, Counts, better, value
from common.network import Network, assemble
from common.seeds import derive
from common.study import Study
from common.wire import FinalReply, FinalRequest, RoundReply, Tensors
from server.checkpoint import Checkpoint, RunFolder
from server.federation import Federation, Member
from server.report import Outcome, Reporter
from server.strategies import Aggregator

log = logging.getLogger(__name__)

# Rounds that fail the quorum this often in a row end the run; it can be resumed.
_ATTEMPTS = 3


class Run:
    """One study on one set of sites, from join to report."""

    def __init__(self, grid: Grid, folder: RunFolder, reporter: Reporter) -> None:
        self._folder, self._report = folder, reporter
        self._study = study = folder.study
        self._network = network = assemble(study, study.model.weights)
        self._federation = Federation(grid, study, network)
        self._aggregator = Aggregator(study, network.trainable)
        self._last = self._restore()
        self._best = folder.best()

    def _restore(self) -> Checkpoint:
        """The last finished round, or the beginning."""
        last = self._folder.last()
        if last is None:
            tensors = _initial(self._study, self._network)
            last = Checkpoint(round=0, tensors=tensors, state={})
        self._folder.forget_after(last.round)
        self._aggregator.restore(last.state)
        return last

    def go(self) -> Outcome:
        """Join, train whatever rounds are left, evaluate, report."""
        self._federation.join()
        self._folder.write_facts(self._facts())
        self._report.joined(self._federation, resumed=self._last.round)
        while self._last.round < self._study.train.rounds and not self._stalled():
            self._round(self._last.round + 1)
        return self._finish()

    def _facts(self) -> dict[str, Any]:
        members = self._federation.members
        sites = {m.name: m.reply.model_dump(mode="json", exclude={"contract"}) for m in members}
        return {
            "fingerprint": fingerprint(self._network.contract),
            "contract": self._network.contract,
            "sites": sites,
            "refused": self._federation.refusals,
        }

    def _stalled(self) -> bool:
        """Whether the select metric has not improved for `patience` scored models."""
        patience, best = self._study.train.patience, self._best
        scored = self._last.round - 1
        return bool(patience and best and scored - best.round >= patience)

    def _round(self, number: int) -> None:
        began = time.monotonic()
        cohort = self._cohort(number)
        replies = self._replies(number, cohort)
        weights = {member.name: float(member.reply.weight) for member in cohort}
        counts = sum((r.counts for r in replies.values()), Counts.zero(len(self._study.classes)))
        self._keep_if_best(self._last, counts)
        updates = [(reply.tensors, weights[name]) for name, reply in replies.items()]
        merged = self._aggregator.merge(number, updates)
        lines = _lines(number, replies, counts, weights)
        self._folder.log(lines)
        state = self._aggregator.state()
        self._last = Checkpoint(round=number, tensors=merged, state=state)
        self._folder.save_last(self._last)
        self._report.round(lines, seconds=time.monotonic() - began)

    def _cohort(self, number: int) -> list[Member]:
        """The sites of a round: all, or a sample that depends on the seed and round alone."""
        training = self._federation.training
        aggregate = self._study.aggregate
        size = max(round(len(training) * aggregate.fraction), min(aggregate.quorum, len(training)))
        drawn = random.Random(derive(self._study.seed, number, "cohort"))  # noqa: S311
        return sorted(drawn.sample(training, size), key=lambda member: member.name)

    def _replies(self, number: int, cohort: list[Member]) -> dict[str, RoundReply]:
        """Good replies of at least a quorum; the round is asked again where too few come."""
        shapes, classes = self._network.shapes, len(self._study.classes)
        quorum = self._study.aggregate.quorum
        for _ in range(_ATTEMPTS):
            messages = self._aggregator.requests(
                number,
                self._last.tensors,
                wire.round_config(self._study.id),
                [member.node for member in cohort],
            )
            good, bad = self._federation.ask(
                cohort,
                messages,
                lambda member, record: RoundReply.read(
                    record, shapes, member.reply.weight, classes
                ),
            )
            if len(good) >= quorum:
                return good
            log.warning("round %d: %d of %d good replies, asked again", number, len(good), quorum)
        reasons = "; ".join(f"{name}: {why}" for name, why in bad.items())
        expected, got = f"{quorum} good replies (aggregate.quorum)", f"{len(good)} ({reasons})"
        remedy = f"Mend the sites, then go on with --resume {self._folder.path}."
        raise RunError(complaint(f"round {number}", expected=expected, got=got, remedy=remedy))

    def _keep_if_best(self, model: Checkpoint, counts: Counts) -> None:
        score = value(counts, self._study.select)
        if self._best is None or better(self._study.select, score, self._best.score):
            self._best = Checkpoint(round=model.round, tensors=model.tensors, state={}, score=score)
            self._folder.save_best(self._best)

    def _finish(self) -> Outcome:
        best = self._best or self._last
        request = FinalRequest(
            study=self._study.id,
            last=wire.to_arrays(self._last.tensors),
            best=wire.to_arrays(best.tensors),
        )
        members, classes = self._federation.members, len(self._study.classes)
        messages = [Message(request.record(), m.node, MessageType.EVALUATE) for m in members]
        replies, _ = self._federation.ask(
            members, messages, lambda _, record: FinalReply.read(record, classes)
        )
        if not replies:
            expected, got = "at least one answer to the last message", "none"
            remedy = f"Go on with --resume {self._folder.path}."
            raise RunError(complaint("evaluation", expected=expected, got=got, remedy=remedy))
        validation = sum((r.validation_last for r in replies.values()), Counts.zero(classes))
        self._keep_if_best(self._last, validation)
        chosen = self._best or self._last
        test = {
            name: reply.test_last if chosen is not best else reply.test_best
            for name, reply in replies.items()
        }
        self._network.load(chosen.tensors)
        outcome = Outcome(study=self._study, round=chosen.round, test=test)
        self._report.finished(outcome, self._network.model)
        return outcome


def _initial(study: Study, network: Network) -> Tensors:
    """The first tensors: as assembled, or the best of the run named by `model.init`."""
    if study.model.init is None:
        return dict(network.initial)
    best = RunFolder(Path(study.model.init)).best()
    shapes = {} if best is None else {name: tuple(t.shape) for name, t in best.tensors.items()}
    wrong = [name for name, shape in shapes.items() if network.shapes.get(name) != shape]
    if best is None or wrong:
        expected = "a run of the same backbone and classes that trained no deeper than this study"
        got = f"{study.model.init} ({wrong[0]} does not fit)" if wrong else "no best model there"
        raise study.error("model.init", expected=expected, got=got)
    return {**network.initial, **best.tensors}


def _lines(
    number: int, replies: dict[str, RoundReply], counts: Counts, weights: dict[str, float]
) -> list[dict[str, Any]]:
    """A round's lines of `metrics.jsonl`: one per site, then the overall one."""
    lines: list[dict[str, Any]] = [
        {
            "round": number,
            "site": name,
            "train_loss": reply.train_loss,
            "bytes": wire.payload(wire.to_arrays(reply.tensors)),
            **{metric: value(reply.counts, metric) for metric in METRICS},
        }
        for name, reply in replies.items()
    ]
    total = sum(weights[name] for name in replies)
    train_loss = sum(weights[n] * r.train_loss for n, r in replies.items()) / total
    figures = {metric: value(counts, metric) for metric in METRICS}
    overall = {"site": None, "train_loss": train_loss, "bytes": sum(x["bytes"] for x in lines)}
    return [*lines, {"round": number, **overall, **figures}]
