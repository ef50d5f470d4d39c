"""The first question anyone asks: does federating beat training alone, and what would pooling do?

Both baselines use the study's own trainer and rounds, without a federation, and release as there.
`local` trains at each site on that site's patients alone, `pooled` on those of all sites together.
"""

import logging
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from client.features.precision import fix_numerics
from client.models.released import KeptModel
from client.runtime import Runtime
from client.session import Session
from client.training import trainer
from client.training.dataset import Examples
from common.config.study import Study
from common.errors import RefusedError
from common.heads.read_out import list_read_outs
from common.heads.registry import HEADS, LinearHead
from common.heads.sums import Sums
from common.metrics.counts import Counts, Floats
from common.model.network import place_head
from common.protocol.tensors import Tensors
from common.support.seeds import derive
from common.support.terminal import describe_left
from server.rounds.choosing import choose_best, is_stalled
from server.rounds.judging import Judged, add_images, unite_judgements
from server.rounds.solving import solve_head
from server.rounds.start import load_first_tensors
from server.runs.run_folder import Best, Checkpoint, RunFolder
from simulations.studies.comparison import Comparison

log = logging.getLogger(__name__)

_QUIET = 5.0
"""Seconds from one line of progress to the next."""


def train_baselines(study: Study, site_files: Sequence[Path], runtime: Runtime) -> Comparison:
    """Local and pooled training, on the federation's own test patients."""
    sessions = open_sessions(study, site_files, runtime)
    training = [session for session in sessions if session.prepared.site.role == "train"]
    comparison = Comparison(sessions)
    for i, session in enumerate(training, 1):
        name = session.prepared.site.name
        log.info("local: %s, site %d of %d", name, i, len(training))
        model = _alone(study, [session], name)
        comparison.test("local", model, [name])
        comparison.test_elsewhere(name, model)
    log.info("pooled: %d sites", len(training))
    comparison.test("pooled", _alone(study, training, "pooled"))
    return comparison


def find_solved(run: RunFolder, site_files: Sequence[Path], runtime: Runtime) -> KeptModel | None:
    """The head that a finished run began with, before any round; None where none was solved."""
    study, solved, last = run.study, run.read_solved(), run.read_last()
    if not solved or last is None:
        return None
    sessions = open_sessions(study, site_files, runtime)
    network = sessions[0].prepared.network
    head = HEADS[solved["head"]].solve(run.read_sums(), solved["strength"])
    found = network.find_centre(last.tensors) if study.finds_centre else None
    model = dict(network.initial) | place_head(study, head.weight, head.bias, found)
    training = [session for session in sessions if session.prepared.site.role == "train"]
    return KeptModel(model, _OpenSites(training).judge(model).read_out)


def open_sessions(study: Study, site_files: Sequence[Path], runtime: Runtime) -> list[Session]:
    """The sessions of the sites that took part."""
    sessions = []
    for path in site_files:
        with suppress(RefusedError):  # it took no part in the federation either
            sessions.append(runtime.open_session(path, study.id))
    return sessions


def _alone(study: Study, sessions: Sequence[Session], name: str) -> KeptModel:
    """Train on the patients of `sessions` as one site would alone.

    By the rules of the federation: it stops early, and releases, by these sites' own validation.
    """
    network, sites = sessions[0].prepared.network, _OpenSites(sessions)
    first = load_first_tensors(study, network)
    if study.model.solved_head is not None:
        # Of these sites' sums alone, its strength chosen by their own validation patients.
        first |= solve_head(study, sites.images, sites)[1]
    last, progress = Checkpoint(round=0, tensors=first, state={}), _Progress(study.train.rounds)
    while last.round < study.train.rounds and not is_stalled(study, last):
        best = _choose(study, last, sites)
        trained = _train(study, sessions, name, last.round + 1, last.tensors)
        last = Checkpoint(round=last.round + 1, tensors=trained, state={}, best=best)
        progress.report_round(last.round)
    _, released = replace(last, best=_choose(study, last, sites)).released
    return KeptModel(released, sites.judge(released).read_out)


def _choose(study: Study, last: Checkpoint, sites: "_OpenSites") -> Best | None:
    if study.model.init != "solved":
        return None
    return choose_best(study, last, sites.judge(last.tensors).counts)


def _train(
    study: Study, sessions: Sequence[Session], name: str, number: int, tensors: Tensors
) -> Tensors:
    """Tensors after one more round on the patients of all these sites."""
    network, plan = sessions[0].prepared.network, study.train
    if plan.local_steps:  # as many steps as these sites take in a round of the federation
        plan = plan.model_copy(update={"local_steps": plan.local_steps * len(sessions)})
    examples = _joined([session.prepared.examples["train"] for session in sessions])
    network.load(tensors)
    with fix_numerics(sessions[0].prepared.site.threads):
        trainer.train(
            network.split.suffix,
            examples,
            plan,
            classes=len(study.classes),
            lr=trainer.learning_rate(plan, number),
            seed=derive(study.seed, name, number, "train"),
            dtype=study.model.precision,
        )
    return {name: tensor.clone() for name, tensor in network.tensors.items()}


class _Progress:
    """Tells now and then how far rounds are, and how long they take yet."""

    def __init__(self, rounds: int) -> None:
        self._rounds, self._seconds = rounds, list[float]()
        self._told = self._last = time.monotonic()

    def report_round(self, number: int) -> None:
        now = time.monotonic()
        self._seconds.append(now - self._last)
        self._last = now
        if number < self._rounds and now - self._told > _QUIET:
            self._told = now
            left = describe_left(self._rounds - number, self._seconds)
            log.info("  round %d of %d, %s", number, self._rounds, left)


@dataclass(frozen=True)
class _OpenSites:
    """What sites that are open on this machine answer where a head is solved, or judged."""

    sessions: Sequence[Session]

    @property
    def images(self) -> list[tuple[int, ...]]:
        """Training images of each class, of each site."""
        return [session.prepared.offer.images.train for session in self.sessions]

    def judge(self, model: Tensors) -> Judged:
        """How a model validates."""
        images = self.images
        read_outs = list_read_outs(add_images(images))
        told = [session.judge(model, read_outs) for session in self.sessions]
        return unite_judgements(read_outs, told, len(images[0]))

    def means(self) -> Iterable[tuple[int, Floats]]:
        return [session.sum_all_features() for session in self.sessions]

    def sums(self, weights: Floats, centre: Floats) -> Mapping[str, Sums]:
        return {s.prepared.site.name: s.sum_features(weights, centre) for s in self.sessions}

    def counts(self, heads: Sequence[LinearHead], centre: Floats) -> Sequence[Sequence[Counts]]:
        pairs = [(torch.from_numpy(head.weight), torch.from_numpy(head.bias)) for head in heads]
        return [session.count_heads(pairs, centre) for session in self.sessions]


def _joined(parts: Sequence[Examples]) -> Examples:
    first, *rest = parts
    for part in rest:
        first = first + part
    return first
