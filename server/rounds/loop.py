"""The resumable round loop around a Flower strategy."""

import json
import logging
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from flwr.app import Message, MessageType, RecordDict
from flwr.serverapp import Grid

from common.errors import RunError
from common.heads.read_out import ReadOut
from common.metrics.counts import Counts
from common.metrics.metrics import METRICS, value
from common.model.contract import Versions
from common.model.network import assemble
from common.protocol.evidence import OWN
from common.protocol.final import FinalCounts, FinalReply, FinalRequest, Solved
from common.protocol.round import RoundReply, make_round_config
from common.protocol.sums import size_sums
from common.protocol.tensors import count_bytes, to_arrays
from common.support.seeds import derive
from server.reports.progress import Joined, Reporter
from server.rounds.admission import Member
from server.rounds.choosing import choose_best, is_stalled
from server.rounds.federation import Federation
from server.rounds.judging import Judged, judge_model
from server.rounds.ledger_heads import LedgerHeads
from server.rounds.private_head import AskedForNoise, solve_private_head
from server.rounds.solving import AskedSites, solve_head
from server.rounds.start import describe_weights, load_first_tensors
from server.rounds.strategies import Aggregator
from server.runs.results import Outcome, unite_counts
from server.runs.run_folder import Best, Checkpoint, RunFolder

log = logging.getLogger(__name__)

T = TypeVar("T")

# An exchange that fails the quorum this often ends the run; it can be resumed.
_ATTEMPTS = 3
_HIDES_A_SITE = 3
"""Sites in a sum, at least, for other sites to see it."""


class Run:
    """One study on one set of sites, from join to report.

    Args:
      grid: The Flower grid by which sites are reached.
      folder: Of the run.
      reporter: Is told of each step.
      ledgers: The file of how far each site's ledger went, where it is not of this run alone.
    """

    def __init__(
        self, grid: Grid, folder: RunFolder, reporter: Reporter, ledgers: Path | None = None
    ) -> None:
        self._folder, self._reporter = folder, reporter
        self._heads = LedgerHeads(ledgers or folder.path / "ledgers.json")
        self._study = study = folder.study
        self._network = network = assemble(study, study.model.weights)
        self._federation = Federation(grid, study, network, self._heads.read_heads())
        self._aggregator = Aggregator(study, tuple(network.shapes))
        self._last = self._restore()
        overall = (line for line in folder.read_history() if line["site"] is None)
        self._scores: list[float | None] = [line[study.select] for line in overall]
        self._bytes = count_bytes(to_arrays(network.tensors))

    def _restore(self) -> Checkpoint:
        """The last finished round, or the beginning."""
        last = self._folder.read_last()
        if last is None:
            tensors = load_first_tensors(self._study, self._network)
            last = Checkpoint(round=0, tensors=tensors, state={})
        self._folder.forget_rounds_after(last.round)
        self._aggregator.restore_state(last.state)
        return last

    def run(self, wait: float = 0.0) -> Outcome:
        """Join, train whatever rounds are left, evaluate, report.

        Args:
          wait: Seconds that hospitals have to approve the study, where a person decides.
        """
        self._federation.join(wait)
        heads = {member.name: member.reply.ledger for member in self._federation.members}
        self._heads.keep_heads(heads)
        self._folder.write_facts(self._facts())
        whole = sum(tensor.nbytes for tensor in self._network.model.state_dict().values())
        joined = Joined(
            replies=[member.reply for member in self._federation.members],
            refusals=self._federation.refusals,
            resumed=self._last.round,
            weights=self._federation.weights,
            sent=self._bytes,
            whole=whole,
        )
        self._reporter.report_join(joined)
        self._folder.append_journal("joined", sites=[*heads], after=self._last.round)
        self._solve()
        while self._last.round < self._study.train.rounds and not self._stalled():
            self._round(self._last.round + 1)
        return self._finish()

    def _solve(self) -> None:
        """Solve the head before round 1, where the study asks for it; once, also over a resume."""
        if self._study.model.solved_head is None or self._folder.read_last() is not None:
            return
        if self._study.directions:
            self._solve_privately()
            return
        federation = self._federation
        if not federation.giving:
            log.warning("no site tells sums of features: the head starts from zero, not solved")
            return
        sites = AskedSites(self._study, self._network, federation, self._ask_all)
        solved, head = solve_head(self._study, sites.images, sites, self._folder.keep_numbers)
        self._folder.write("solved.json", json.dumps(solved.facts(), indent=1))
        self._folder.save_sums(solved.total)
        self._last = Checkpoint(round=0, tensors=self._last.tensors | head, state={})
        self._folder.save_last(self._last)
        sent = sum(size_sums(len(self._study.classes), self._network.width))
        self._reporter.report_solved(solved.head, solved.strength, len(solved.sites), sent)

    def _solve_privately(self) -> None:
        answers = AskedForNoise(self._study, self._federation, self._ask_all)
        solved = solve_private_head(self._study, answers, self._folder.keep_numbers)
        self._folder.write("solved.json", json.dumps(solved.facts(), indent=1))
        self._last = Checkpoint(round=0, tensors=self._last.tensors | solved.tensors, state={})
        self._folder.save_last(self._last)
        self._reporter.report_private_head(len(solved.sites))

    def _ask_all(
        self,
        kind: str,
        request: RecordDict,
        members: Sequence[Member],
        read: Callable[[Member, RecordDict], T],
    ) -> dict[str, T]:
        """Good replies of a quorum of members to one question, by name."""

        def messages(some: Sequence[Member]) -> list[Message]:
            return [Message(request, member.node, kind) for member in some]

        what, everyone = kind.removeprefix("query."), len(members)
        return self._ask(what, members, everyone, messages, read, enough=everyone)

    def _facts(self) -> dict[str, Any]:
        members = self._federation.members
        sites = {m.name: m.reply.model_dump(mode="json", exclude={"contract"}) for m in members}
        return {
            "fingerprint": self._network.contract.fingerprint,
            "contract": self._network.contract.model_dump(),
            "weights": describe_weights(self._study),
            "versions": Versions.here().model_dump(),
            "sites": sites,
            "refused": self._federation.refusals,
        }

    def _stalled(self) -> bool:
        """Whether the select metric has not improved for `patience` scored models."""
        patience = self._study.train.patience
        if self._last.best:
            return is_stalled(self._study, self._last)
        scores = {number: score for number, score in enumerate(self._scores) if score is not None}
        if not patience or not scores:
            return False
        pick = max if METRICS[self._study.select].higher else min
        return len(self._scores) - 1 - pick(scores, key=scores.__getitem__) >= patience

    def _round(self, number: int) -> None:
        began = time.monotonic()
        replies = self._train(number)
        told = {name: reply.figures for name, reply in replies.items() if reply.figures}
        counts = self._pooled([figures.counts for figures in told.values()])
        self._scores.append(value(counts, self._study.select))
        weight = {name: w.number for name, w in self._federation.weights.items()}
        updates = [(reply.arrays, weight[name]) for name, reply in replies.items()]
        merged = self._aggregator.merge_updates(number, updates)
        lines = [self._line(number, name, reply) for name, reply in replies.items()]
        heads = {name: reply.ledger for name, reply in replies.items()}
        self._heads.keep_heads(heads)
        losses = {name: figures.train_loss for name, figures in told.items()}
        total = sum(weight[name] for name in losses)
        mean = sum(weight[n] * x for n, x in losses.items()) / total if losses else None
        lines.append(_line(number, None, mean, self._bytes * len(replies), counts))
        self._folder.append_history(lines)
        state, best = self._aggregator.save_state(), self._choose(counts)
        self._last = Checkpoint(round=number, tensors=merged, state=state, best=best)
        self._folder.save_last(self._last)
        seconds = time.monotonic() - began
        self._folder.append_journal("round", round=number, seconds=round(seconds, 3))
        self._reporter.report_round(lines, seconds=seconds)

    def _choose(self, counts: Counts) -> Best | None:
        """The best model by now, once the last one was validated; only after a solved head."""
        chooses = self._study.model.init == "solved"
        return choose_best(self._study, self._last, counts) if chooses else None

    def _line(self, number: int, name: str, reply: RoundReply) -> dict[str, Any]:
        figures = reply.figures
        if figures is None:
            return _line(number, name, None, self._bytes, None)
        return _line(number, name, figures.train_loss, self._bytes, figures.counts)

    def _pooled(self, counts: Sequence[Counts]) -> Counts:
        return unite_counts(counts, len(self._study.classes))

    def _train(self, number: int) -> dict[str, RoundReply]:
        """Good replies of a round, by name: from all training sites, or a sample of them.

        The sample depends on the seed and round alone; where one fails, the next takes its place.
        """
        training, aggregate = self._federation.training, self._study.aggregate
        drawn = random.Random(derive(self._study.seed, number, "cohort"))  # noqa: S311
        order = drawn.sample(training, len(training))
        size = max(round(len(training) * aggregate.fraction), aggregate.quorum)

        def messages(members: Sequence[Member]) -> list[Message]:
            config, nodes = make_round_config(self._study.id), [member.node for member in members]
            return self._aggregator.make_requests(number, self._last.tensors, config, nodes)

        def read(member: Member, record: RecordDict) -> RoundReply:
            return RoundReply.read(record, self._network.shapes, member.reply)

        return self._ask(f"round {number}", order, size, messages, read, enough=aggregate.quorum)

    def _ask(
        self,
        what: str,
        order: Sequence[Member],
        size: int,
        messages: Callable[[Sequence[Member]], list[Message]],
        read: Callable[[Member, RecordDict], T],
        *,
        enough: int,
    ) -> dict[str, T]:
        """Good replies of at least a quorum of training sites, sorted by name.

        The first `size` members are asked; while fewer than `enough` answer well, those that failed
        are asked again, and as many others with them.
        """
        quorum, asked = min(self._study.aggregate.quorum, enough), size
        good: dict[str, T] = {}
        for _ in range(_ATTEMPTS):
            missing = sorted((m for m in order[:asked] if m.name not in good), key=lambda m: m.name)
            replies, bad = self._federation.ask(missing, messages(missing), read)
            good |= replies
            for name, why in bad.items():
                self._folder.append_journal("left out", of=what, site=name, why=why)
            if len(good) >= enough:
                break
            asked += len(bad)
            log.warning("%s: %d good replies, %d wanted", what, len(good), enough)
        if sum(member.trains for member in order if member.name in good) >= quorum:
            return dict(sorted(good.items()))
        reasons = "; ".join(f"{name}: {why}" for name, why in bad.items())
        expected, got = f"{quorum} good replies (aggregate.quorum)", f"{len(good)} ({reasons})"
        remedy = f"Mend the sites, then go on with --resume {self._folder.path}."
        raise RunError(what, expected=expected, got=got, remedy=remedy)

    def _finish(self) -> Outcome:
        """Release a model, and evaluate it.

        The last one, whatever its validation: a few dozen images cannot tell one late round from
        another. After a solved head, that one unless rounds made it better beyond noise.
        """
        judged = self._judge()
        released, tensors = self._last.released
        arrays, classes = to_arrays(tensors), len(self._study.classes)
        plain = FinalRequest(study=self._study.id, arrays=arrays, read_out=judged.read_out)
        fitting = replace(plain, solved=self._tell_sums(released))
        gave, shares = self._folder.read_solved_sites(), self._federation.shares
        whole = {name for name in gave if shares.get(name, 1.0) == 1.0}

        def messages(members: Sequence[Member]) -> list[Message]:
            """Sums to the sites alone that are in them, whole: these take off their own."""
            asked = [(fitting if member.name in whole else plain, member) for member in members]
            return [Message(r.record(), m.node, MessageType.EVALUATE) for r, m in asked]

        def read(member: Member, record: RecordDict) -> FinalReply:
            return FinalReply.read(record, classes, self._study.select, member.reply)

        history = self._folder.read_history()
        trained = {line["site"] for line in history if line["round"] <= self._last.round}
        trained |= gave
        # Who was drawn for no round took no part, and answers nothing about its patients.
        members = [m for m in self._federation.members if not m.trains or m.name in trained]
        everyone = len(members)
        replies = self._ask("evaluation", members, everyone, messages, read, enough=everyone)
        told = {name: reply.counts for name, reply in replies.items() if reply.counts}
        validation = self._log_validation(told, released)
        test = {name: counts.test for name, counts in told.items()}
        own = {w: {n: c.own[w] for n, c in told.items() if w in c.own} for w in OWN}
        self._network.load(tensors)
        withheld = {m.name: words for m in members if (words := m.reply.disclosure.withheld)}
        outcome = Outcome(
            study=self._study,
            round=released,
            validation=validation,
            test=test,
            own={way: counts for way, counts in own.items() if counts},
            evidence={n: c.evidence for n, c in told.items() if c.evidence},
            withheld=withheld,
            weights=self._federation.weights,
        )
        self._folder.append_journal("finished", released=released)
        self._reporter.report_end(outcome, self._network.model)
        return outcome

    def _tell_sums(self, released: int) -> Solved | None:
        """What the released head was solved from, for sites to fit it to themselves.

        From fewer than three sites, one would learn another's by taking off its own.
        """
        told = self._folder.read_solved()
        if not (self._study.adapt and released == 0 and told.get("head") == "discriminant"):
            return None
        if len(told["sites"]) < _HIDES_A_SITE:
            words = "sums of fewer than %d sites would tell of one: sites fit by training instead"
            log.info(words, _HIDES_A_SITE)
            return None
        return Solved.of(self._folder.read_sums(), told["strength"])

    def _judge(self) -> Judged:
        """Choose what is released, once the last model is judged, too; and how it is read out.

        A private head is read by the noised number of patients of each class: no site tells more.
        """
        if self._study.directions:
            prior = tuple(self._folder.read_solved()["log_prior"])
            judged = Judged(Counts.zero(len(self._study.classes)), ReadOut(log_prior=prior))
            self._folder.keep_read_out(0, judged.read_out)
            return judged
        judged = judge_model(self._study, self._federation, self._last.tensors)
        if (best := self._choose(judged.counts)) is not self._last.best:
            self._last = replace(self._last, best=best)
            self._folder.save_last(self._last)
        released, tensors = self._last.released
        if released != self._last.round:
            judged = judge_model(self._study, self._federation, tensors)
        read_out = self._folder.keep_read_out(released, judged.read_out)
        self._reporter.report_choice(self._last, read_out)
        return replace(judged, read_out=read_out)

    def _log_validation(self, told: dict[str, FinalCounts], released: int) -> Counts:
        """Log how the released model validates, after the last round; returns all together."""
        number = self._last.round + 1
        there = [member for member in self._federation.training if member.name in told]
        counts = {m.name: told[m.name].validation for m in there}
        pooled = self._pooled([counts[m.name] for m in there if m.scores])
        every = [*counts.items(), (None, pooled)]
        lines = [_line(number, name, None, 0, found, released) for name, found in every]
        self._folder.append_history(lines)
        return pooled


def _line(
    number: int,
    site: str | None,
    train_loss: float | None,
    size: int,
    counts: Counts | None,
    model_round: int | None = None,
) -> dict[str, Any]:
    """One line of `metrics.jsonl`: a round's training, and how the model it began with validates.

    That model had `model_round` rounds; the line after the last round has no training, and is of
    the released model. What a site does not tell is None.
    """
    return {
        "round": number,
        "site": site,
        "train_loss": train_loss,
        "bytes": size,
        "model_round": number - 1 if model_round is None else model_round,
        **{metric: None if counts is None else value(counts, metric) for metric in METRICS},
    }
