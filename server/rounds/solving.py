"""A head solved from sums over sites, and the strength that validates best over all of them."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import numpy as np
from flwr.app import Message, RecordDict

from common.config.study import Study
from common.errors import ContractError
from common.heads.registry import HEADS, LinearHead
from common.heads.sums import Sums, balance
from common.metrics.counts import Counts, Floats
from common.metrics.metrics import value
from common.model.network import Network, place_head
from common.protocol.sums import (
    CANDIDATES,
    MEANS,
    SUMS,
    CandidatesReply,
    CandidatesRequest,
    MeansReply,
    MeansRequest,
    SumsReply,
    SumsRequest,
)
from common.protocol.tensors import Tensors
from server.rounds.admission import Member
from server.rounds.federation import Federation
from server.runs.results import unite_counts

T = TypeVar("T")


@dataclass(frozen=True)
class Solved:
    """The head that was solved, and how.

    Attributes:
      head: Its name.
      strength: Of its shrinkage or penalty.
      validation: The mean of AUROC and balanced accuracy of each strength, on the validation
        patients of all sites that tell; empty where none does.
      sites: Whose sums are in it, by name.
      total: These sums.
    """

    head: str
    strength: float
    validation: Mapping[float, float | None]
    sites: tuple[str, ...]
    total: Sums

    def facts(self) -> dict[str, Any]:
        """For the run's files."""
        return {
            "head": self.head,
            "strength": self.strength,
            "validation": {f"{strength:g}": told for strength, told in self.validation.items()},
            "sites": list(self.sites),
        }


class AskAll(Protocol):
    """Asks members one question; gives the good replies of a quorum of them, by name."""

    def __call__(
        self,
        kind: str,
        request: RecordDict,
        members: Sequence[Member],
        read: Callable[[Member, RecordDict], T],
    ) -> dict[str, T]:
        """Raise `RunError` if too few answer well."""


class Keep(Protocol):
    """Gives numbers by name: those from before, or else what `make` gives, on disk from then on."""

    def __call__(self, name: str, make: Callable[[], Mapping[str, Floats]]) -> Mapping[str, Floats]:
        """Float64 arrays."""


class Answers(Protocol):
    """What sites tell of their images, asked by messages or read on this machine."""

    def means(self) -> Iterable[tuple[float, Floats]]:
        """The number of images and the sum of their features, of each site."""

    def sums(self, weights: Floats, centre: Floats) -> Mapping[str, Sums]:
        """The sums of each site, by name."""

    def counts(self, heads: Sequence[LinearHead], centre: Floats) -> Sequence[Sequence[Counts]]:
        """How each head does on validation images, of each site that tells."""


def solve_head(
    study: Study,
    images: Sequence[Sequence[float] | None],
    answers: Answers,
    keep: Keep = lambda _, make: make(),
) -> tuple[Solved, Tensors]:
    """How the head of a study was solved, and the tensors that hold it.

    Args:
      study: That names the head.
      images: The training images of each class that each site told.
      answers: Of these sites.
      keep: Gives the question that sums answer, made anew only if it was never asked: a site tells
        no others in a study.
    """

    def make() -> Mapping[str, Floats]:
        return {"centre": _find_centre(study, answers), "weights": choose_weights(study, images)}

    question = keep("centre", make)
    centre = question["centre"]
    sums = answers.sums(question["weights"], centre)
    total = add_sums(sums)
    heads = solve_candidates(study, total)
    strength, validation = choose_strength(study, answers.counts(list(heads.values()), centre))
    solved = Solved(
        head=study.model.solved_head or "",
        strength=strength,
        validation=validation,
        sites=tuple(sums),
        total=total,
    )
    head = heads[strength]
    kept = centre if study.finds_centre else None
    return solved, place_head(study, head.weight, head.bias, kept)


class AskedSites:
    """The answers of the sites of a study, by messages.

    Args:
      study: The study.
      network: Of the study.
      federation: The sites that joined.
      ask_all: Asks what every site that trains must answer.
    """

    def __init__(
        self, study: Study, network: Network, federation: Federation, ask_all: AskAll
    ) -> None:
        self._study, self._width = study, network.width
        self._federation, self._ask_all = federation, ask_all

    @property
    def images(self) -> list[Sequence[float] | None]:
        """Training images of each class, as each site told; for less where its weight is capped."""
        shares = self._federation.shares
        told = [(m.reply.images.train, shares[m.name]) for m in self._federation.giving]
        return [None if n is None else [share * count for count in n] for n, share in told]

    def means(self) -> Iterable[tuple[float, Floats]]:
        """Raises `RunError` if fewer sites than the quorum told them."""

        def read(member: Member, record: RecordDict) -> MeansReply:
            reply = MeansReply.read(record, self._width)
            if reply.images > _most_images(member).sum():
                raise ContractError("the sum of more images than it told at join")
            return reply

        request = MeansRequest(self._study.id).record()
        told = self._ask_all(MEANS, request, self._federation.giving, read)
        shares = self._federation.shares
        return [(shares[n] * reply.images, shares[n] * reply.total) for n, reply in told.items()]

    def sums(self, weights: Floats, centre: Floats) -> Mapping[str, Sums]:
        """Raises `RunError` if fewer sites than the quorum told them."""

        def read(member: Member, record: RecordDict) -> Sums:
            sums = SumsReply.read(record, self._width, weights).sums
            if (sums.counts > _most_images(member)).any():
                raise ContractError("sums of more images than it told at join")
            return sums

        request = SumsRequest(study=self._study.id, centre=centre, weights=weights).record()
        told = self._ask_all(SUMS, request, self._federation.giving, read)
        shares = self._federation.shares
        return {name: sums.scaled(shares[name]) for name, sums in told.items()}

    def counts(self, heads: Sequence[LinearHead], centre: Floats) -> Sequence[Sequence[Counts]]:
        """Of every site that tells its figures each round."""
        request = CandidatesRequest.of(self._study.id, heads, centre).record()
        judges = [member for member in self._federation.training if member.scores]
        told, _ = self._federation.ask(
            judges,
            [Message(request, member.node, CANDIDATES) for member in judges],
            lambda member, record: CandidatesReply.read(record, len(heads), member.reply),
        )
        return [reply.counts for reply in told.values()]


def _most_images(member: Member) -> Floats:
    """Training images of each class that a site can have, by what it told at join, if it did."""
    told = member.reply.images.train
    return np.array(np.inf if told is None else told) + (member.reply.disclosure.base - 1.0)


def _find_centre(study: Study, answers: Answers) -> Floats:
    """The study's own feature mean [d], or that of all sites' images; float32, as it travels."""
    if study.model.feature_mean is not None:
        mean = np.array(study.model.feature_mean)
    else:
        told = list(answers.means())
        total = np.sum([total for _, total in told], axis=0)
        mean = total / max(sum(images for images, _ in told), 1)
    return np.asarray(mean.astype(np.float32), np.float64)


def choose_weights(study: Study, images: Sequence[Sequence[float] | None]) -> Floats:
    """The weight of an image of each class [K], the same at every site.

    The study's own, where it has any; else classes are balanced by the training images that sites
    tell at join.
    """
    if study.train.class_weights:
        own: Floats = np.array(study.train.class_weights, np.float64)
        return np.asarray(own / own.max(), np.float64)
    counts: Floats = np.zeros(len(study.classes))
    for told in images:
        counts = counts + np.array(told or 0, np.float64)
    return balance(counts if counts.any() else np.ones(len(study.classes)))


def add_sums(sums: Mapping[str, Sums]) -> Sums:
    """The sums of all sites together, added in the order of names."""
    first, *rest = (sums[name] for name in sorted(sums))
    return sum(rest, first)


def solve_candidates(study: Study, total: Sums) -> dict[float, LinearHead]:
    """The head of each strength, from the sums over all sites."""
    kind = HEADS[study.model.solved_head or ""]
    return {strength: kind.solve(total, strength) for strength in kind.strengths}


def choose_strength(
    study: Study, told: Sequence[Sequence[Counts]]
) -> tuple[float, dict[float, float | None]]:
    """The strength that validates best over the patients of all sites.

    By the mean of AUROC and balanced accuracy, whatever the study selects: a few dozen patients of
    rare classes tell strengths better apart by both than by one.

    Args:
      study: That names the head.
      told: Of each site that tells, the counts of each strength.

    Returns:
      The strength, the default one where no site tells; and how each does.
    """
    kind, classes = HEADS[study.model.solved_head or ""], len(study.classes)
    if not told:
        return kind.default, {}
    scores = {
        strength: _judge(unite_counts((site[i] for site in told), classes))
        for i, strength in enumerate(kind.strengths)
    }
    known = {strength: score for strength, score in scores.items() if score is not None}
    if not known:
        return kind.default, scores
    most = max(known.values())
    good = [strength for strength, score in known.items() if score == most]
    return (kind.default if kind.default in good else good[0]), scores


def _judge(counts: Counts) -> float | None:
    """How well a head ranks and decides: the mean of AUROC and balanced accuracy."""
    ranks, decides = value(counts, "auroc"), value(counts, "balanced_accuracy")
    return None if ranks is None or decides is None else (ranks + decides) / 2
