"""The first question anyone asks: does federating beat training alone, and what would pooling do?

Both baselines use the study's own trainer and rounds, without a federation; as there, the last
model counts.
`local` trains at each site on that site's patients alone, `pooled` on those of all sites together.
What a site does not tell a federation is not told here either, so that all ways know the same.
"""

import logging
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch

from client.features.precision import fix_numerics
from client.runtime import Runtime
from client.session import Session
from client.training import trainer
from client.training.dataset import Examples
from common.config.study import Study
from common.errors import RefusedError
from common.heads.registry import LinearHead
from common.heads.sums import Sums
from common.metrics.metrics import Counts, Floats
from common.protocol.tensors import Tensors
from common.support.seeds import derive
from server.rounds.solving import solve_head
from server.rounds.start import load_first_tensors
from server.runs.results import Results

log = logging.getLogger(__name__)


def train_baselines(study: Study, site_files: Sequence[Path], runtime: Runtime) -> Results:
    """Test counts per site of local and pooled training, on the federation's own test patients.

    As coarse as the site discloses them; sites that disclose none are left out.
    """
    sessions = []
    for path in site_files:
        with suppress(RefusedError):  # it took no part in the federation either
            sessions.append(runtime.open_session(path, study.id))
    training = [session for session in sessions if session.prepared.site.role == "train"]
    local: dict[str, Counts] = {}
    for session in training:
        log.info("local: %s", session.prepared.site.name)
        model = _alone(study, [session], session.prepared.site.name)
        local |= _tested([session], model)
    log.info("pooled: %d sites", len(training))
    model = _alone(study, training, "pooled")
    return {"local": local, "pooled": _tested(sessions, model)}


def _tested(sessions: Sequence[Session], model: Tensors) -> dict[str, Counts]:
    return {
        session.prepared.site.name: session.tell(model, "test")[0]
        for session in sessions
        if session.prepared.offer.disclosure.metrics != "none"
    }


def _alone(study: Study, sessions: Sequence[Session], name: str) -> Tensors:
    """Train on the patients of `sessions` as one site; the tensors after the last round."""
    network = sessions[0].prepared.network
    plan, first = study.train, load_first_tensors(study, network)
    if study.model.solved_head is not None:
        # Of these sites' sums alone, its strength chosen by their own validation patients.
        images = [session.prepared.offer.images.train for session in sessions]
        first |= solve_head(study, images, _OpenSites(sessions))[1]
    if study.model.head != "linear":
        return first
    if plan.local_steps:  # as many steps as these sites take in a round of the federation
        plan = plan.model_copy(update={"local_steps": plan.local_steps * len(sessions)})
    examples = _joined([session.prepared.examples["train"] for session in sessions])
    network.load(first)
    for number in range(1, plan.rounds + 1):
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


@dataclass(frozen=True)
class _OpenSites:
    """What sites that are open on this machine answer where a head is solved."""

    sessions: Sequence[Session]

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
