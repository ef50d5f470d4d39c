"""A site's own models at the end of a study: the released one fitted to it, and a head of its own.

They are made of its patients without any noise, so they stay in its state folder, also in a private
study. What leaves, if its policy says so, are counts on its test patients. In a private study none
do, and the model is fitted later, by `consilium-client adapt`: the coordinator waits for the reply,
and the time of a fit grows with the patients that it is made of.
"""

import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from safetensors.torch import save

from client.models.kept import name_folder
from client.models.local import collect_images, draw_folds, solve_own_head
from client.models.released import KeptModel, keep_released, open_released
from client.models.tested import answer_local, answer_test, compare_answers
from client.privacy.rounding import Rounding
from client.session import Session
from client.site import Site
from client.storage import explain_disk_errors
from common.errors import DataError, SiteError
from common.heads.adapting import FITS, Adapted, adapt_head
from common.heads.read_out import choose_read_out, list_read_outs
from common.heads.registry import solve_discriminant
from common.heads.sums import Sums
from common.metrics.metrics import value
from common.metrics.statistics import intervals
from common.model.network import place_head
from common.protocol.evidence import ADAPTED, FEDERATED, LOCAL, PAIRS, tells_evidence
from common.protocol.final import FinalCounts, FinalReply
from common.protocol.tensors import Tensors
from common.support import files

log = logging.getLogger(__name__)

_ROUNDS = 3
_MU = 0.1
"""Holds a fine-tuned model near the released one (FedProx, Li et al. 2020)."""
_ALIKE = 1e-3
"""How far the numbers of one head may lie apart, solved by two machines."""
_NOT_PRIVATE = (
    "Made of this hospital's patients without any privacy, for its own use: it must not leave."
)


@dataclass(frozen=True, eq=False)
class OwnModel:
    """The released model, fitted to a site.

    Attributes:
      model: The model itself. Its tensors never travel; by its read-out, its probabilities are
        truest on the site's validation images.
      facts: How it was made.
      fits: Whether a fit gained; if not, the tensors are those that were released.
    """

    model: KeptModel
    facts: Mapping[str, Any]
    fits: bool


def finish(session: Session, released: KeptModel, solved: tuple[Sums, float] | None) -> FinalReply:
    """The end of a study at a site: counts, as agreed, and where it trained, a model of its own.

    Args:
      session: Of the site.
      released: The model.
      solved: Where it is a solved discriminant: the sums of all sites, and its shrinkage.
    """
    prepared = session.prepared
    site = prepared.site
    keep_released(session, released)
    if not (prepared.study.adapt and site.adapt and site.role == "train"):
        return session.finish(released.tensors, released.read_out)
    if prepared.study.private:
        log.info("to fit the released model to this site: consilium-client adapt, with its name")
        return session.finish(released.tensors, released.read_out)
    adapted = adapt_model(session, released.tensors, solved)
    keep_model(session, adapted)
    reply = session.finish(released.tensors, released.read_out)
    if reply.counts is None or not session.agreed().disclosure.adapted:
        return reply
    return FinalReply(counts=_add_own(session, reply.counts, released, adapted.model))


def _add_own(
    session: Session, told: FinalCounts, released: KeptModel, adapted: KeptModel
) -> FinalCounts:
    """Beside what is told of the released model, counts of the site's own, and how they compare."""
    prepared, disclosure = session.prepared, session.agreed().disclosure
    local, labels = solve_own_head(session), prepared.examples["test"].labels
    own = {ADAPTED: answer_test(session, adapted), LOCAL: answer_local(session, local)}
    names = {ADAPTED: prepared.network.digest(adapted.tensors), LOCAL: local.digest}
    rounding = Rounding(prepared.site.secret(), disclosure.base)
    counts = {
        way: rounding.round_counts(answer.count(labels), "test", names[way])
        for way, answer in own.items()
    }
    if not tells_evidence(disclosure, prepared.offer.patients.test):
        return replace(told, own=counts)
    answers = {FEDERATED: answer_test(session, released), **own}
    return replace(told, own=counts, evidence=compare_answers(session, answers, PAIRS))


def fit_later(site: Site, name: str) -> None:
    """Fit the released model of a private study, by name or id, to a site, with nobody waiting.

    Raises:
      SiteError: no model of such a study was kept here.
    """
    session, released = open_released(site, name)
    if not session.prepared.study.private:
        remedy = "Models of other studies lie in state/adapted since their end."
        raise SiteError(site.source, expected="a private study", got=name, remedy=remedy)
    keep_model(session, adapt_model(session, released.tensors, None))


def adapt_model(session: Session, released: Tensors, solved: tuple[Sums, float] | None) -> OwnModel:
    """Fit the released model to a site; where that gains nothing, it is the released one.

    Args:
      session: Of the site.
      released: The model.
      solved: Where it is a solved discriminant: the sums of all sites, and its shrinkage.
    """
    if solved is None:
        tensors, rounds = _fine_tune(session, released)
        facts: dict[str, Any] = {"fitted": "by training on", "rounds": rounds}
        fits = rounds > 0
    else:
        adapted = _fit_solved(session, released, *solved)
        study, head = session.prepared.study, adapted.head
        tensors = released | (place_head(study, head.weight, head.bias) if head else {})
        auroc = {"federated": adapted.scores[FITS[0]], "this": adapted.scores[adapted.fit]}
        fitted = {"fitted": "by its own class means", **adapted.fit._asdict()}
        facts = {**fitted, "cross-validated AUROC": auroc}
        fits = adapted.head is not None
    read_outs = list_read_outs(session.prepared.offer.images.train)
    read_out = choose_read_out(read_outs, list(session.judge(tensors, read_outs).losses))
    return OwnModel(KeptModel(tensors, read_out), facts, fits)


def _fit_solved(session: Session, released: Tensors, total: Sums, shrinkage: float) -> Adapted:
    """Raises `DataError` unless the model was solved from these sums, this site's among them.

    With other sums, the site would be left with a model of the server's making. The error tells of
    its patients, so it has a line in the ledger, and was the end of the study.
    """
    study, network = session.prepared.study, session.prepared.network
    own = collect_images(session, network.find_centre(released))
    where, expected = "sums of all sites", "those of the model, this site's images among them"
    if (own.sums(total.weights).counts > total.counts).any():
        raise DataError(where, expected=expected, got="fewer of a class than are here")
    try:
        again = solve_discriminant(total, shrinkage)
        for name, tensor in place_head(study, again.weight, again.bias).items():
            if not torch.allclose(tensor, released[name], rtol=_ALIKE, atol=_ALIKE):
                raise DataError(where, expected=expected, got="others")
        return adapt_head(total, own, shrinkage, seed=draw_folds(session))
    except np.linalg.LinAlgError:
        raise DataError(
            where, expected=expected, got="none that a head can be solved from"
        ) from None


def keep_model(session: Session, own: OwnModel) -> None:
    """Write it whole into the state folder, as `load_model` reads it."""
    prepared = session.prepared
    study, network = prepared.study, prepared.network
    network.load(own.model.tensors)
    state = {name: tensor.contiguous() for name, tensor in network.model.state_dict().items()}
    about = {"study": study.name, "private": False, "note": _NOT_PRIVATE, **own.facts}
    prepared.site.private("adapted")
    folder = name_folder(prepared.site, study)
    with explain_disk_errors(folder, SiteError):
        folder.mkdir(mode=0o700, exist_ok=True)
        contents: dict[str, str | bytes] = {
            "study.yaml": study.yaml(),
            "about.json": json.dumps(about, indent=1),
            "read_out.json": json.dumps(own.model.read_out.facts(), indent=1),
            "model.safetensors": save(state),
        }
        for name, content in contents.items():
            files.write(folder / name, content, mode=0o600)
    kept = "the released model, which no fit to this site improved,"
    what = "the model fitted to this site" if own.fits else kept
    log.info("%s is in %s; it is not private, and stays here", what, folder)


def _fine_tune(session: Session, released: Tensors) -> tuple[Tensors, int]:
    """A few more rounds on the site's own patients, held near the released model.

    How many, its own validation patients say, by AUROC: none, unless it gains beyond noise.
    """
    best, rounds, tensors = released, 0, released
    counts = session.evaluate(released, "validation")
    found = intervals(counts, ["auroc"], seed=draw_folds(session), draws=200)["auroc"]
    if found is None:
        return released, 0
    least = found.value + (found.high - found.low) / 3.92  # a standard error
    for number in range(1, _ROUNDS + 1):
        session.train(tensors, number, _MU)
        tensors = {n: t.clone() for n, t in session.prepared.network.tensors.items()}
        score = value(session.evaluate(tensors, "validation"), "auroc")
        if score is not None and score > least:
            best, rounds, least = tensors, number, score
    return best, rounds
