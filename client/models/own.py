"""A site's own models at the end of a study: the released one fitted to it, and a head of its own.

They are made of its patients without any noise, so they stay in its state folder, also in a private
study. What leaves, if its policy says so, are counts on its test patients. In a private study none
do, and the model is fitted later, by `consilium-client adapt`: the coordinator waits for the reply,
and the time of a fit grows with the patients that it is made of.
"""

import hashlib
import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from safetensors.torch import save

from client.models.released import keep_released, open_released
from client.privacy.rounding import Rounding
from client.session import Session
from client.site import Site
from client.storage import explain_disk_errors
from common.errors import DataError, SiteError
from common.heads.adapting import FITS, Adapted, OwnImages, adapt_head, solve_local
from common.heads.read_out import ReadOut, choose_read_out, list_read_outs
from common.heads.registry import solve_discriminant
from common.heads.sums import Sums, map_features
from common.metrics.counts import Counts, Floats
from common.metrics.metrics import value
from common.metrics.statistics import intervals
from common.model.network import place_head
from common.protocol.final import ADAPTED, LOCAL, FinalReply
from common.protocol.tensors import Tensors
from common.support import files
from common.support.seeds import derive

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
      tensors: Those that travel in its study, by name, though these never do.
      read_out: By which its probabilities are truest on the site's validation images.
      facts: How it was made.
      fits: Whether a fit gained; if not, the tensors are those that were released.
    """

    tensors: Tensors
    read_out: ReadOut
    facts: Mapping[str, Any]
    fits: bool


def finish(
    session: Session, released: Tensors, read_out: ReadOut, solved: tuple[Sums, float] | None
) -> FinalReply:
    """The end of a study at a site: counts, as agreed, and where it trained, a model of its own.

    Args:
      session: Of the site.
      released: The model.
      read_out: Of its probabilities.
      solved: Where it is a solved discriminant: the sums of all sites, and its shrinkage.
    """
    prepared = session.prepared
    site = prepared.site
    keep_released(session, released)
    if not (prepared.study.adapt and site.adapt and site.role == "train"):
        return session.finish(released, read_out)
    if prepared.study.private:
        log.info("to fit the released model to this site: consilium-client adapt, with its name")
        return session.finish(released, read_out)
    adapted = adapt_model(session, released, solved)
    keep_model(session, adapted)
    reply, disclosure = session.finish(released, read_out), session.agreed().disclosure
    if reply.counts is None or not disclosure.adapted:
        return reply
    counts = session.evaluate(adapted.tensors, "test", read_out=adapted.read_out)
    rounding = Rounding(site.secret(), disclosure.base)
    digest = prepared.network.digest(adapted.tensors)
    own = {ADAPTED: (counts, digest), LOCAL: count_local(session)}
    told = {w: rounding.round_counts(c, "test", name) for w, (c, name) in own.items()}
    return FinalReply(counts=replace(reply.counts, own=told))


def fit_later(site: Site, name: str) -> None:
    """Fit the released model of a private study, by name or id, to a site, with nobody waiting.

    Raises:
      SiteError: no model of such a study was kept here.
    """
    session, released = open_released(site, name)
    if not session.prepared.study.private:
        remedy = "Models of other studies lie in state/adapted since their end."
        raise SiteError(site.source, expected="a private study", got=name, remedy=remedy)
    keep_model(session, adapt_model(session, released, None))


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
    return OwnModel(tensors, read_out, facts, fits)


def _fit_solved(session: Session, released: Tensors, total: Sums, shrinkage: float) -> Adapted:
    """Raises `DataError` unless the model was solved from these sums, this site's among them.

    With other sums, the site would be left with a model of the server's making. The error tells of
    its patients, so it has a line in the ledger, and was the end of the study.
    """
    study, network = session.prepared.study, session.prepared.network
    own = _own_images(session, network.find_centre(released))
    where, expected = "sums of all sites", "those of the model, this site's images among them"
    if (own.sums(total.weights).counts > total.counts).any():
        raise DataError(where, expected=expected, got="fewer of a class than are here")
    try:
        again = solve_discriminant(total, shrinkage)
        for name, tensor in place_head(study, again.weight, again.bias).items():
            if not torch.allclose(tensor, released[name], rtol=_ALIKE, atol=_ALIKE):
                raise DataError(where, expected=expected, got="others")
        return adapt_head(total, own, shrinkage, seed=_seed(session))
    except np.linalg.LinAlgError:
        raise DataError(
            where, expected=expected, got="none that a head can be solved from"
        ) from None


def keep_model(session: Session, model: OwnModel) -> None:
    """Write it whole into the state folder, as `load_model` reads it."""
    prepared = session.prepared
    study, network = prepared.study, prepared.network
    network.load(model.tensors)
    state = {name: tensor.contiguous() for name, tensor in network.model.state_dict().items()}
    about = {"study": study.name, "private": False, "note": _NOT_PRIVATE, **model.facts}
    folder = prepared.site.private("adapted") / study.id
    with explain_disk_errors(folder, SiteError):
        folder.mkdir(mode=0o700, exist_ok=True)
        contents: dict[str, str | bytes] = {
            "study.yaml": study.yaml(),
            "about.json": json.dumps(about, indent=1),
            "read_out.json": json.dumps(model.read_out.facts(), indent=1),
            "model.safetensors": save(state),
        }
        for name, content in contents.items():
            files.write(folder / name, content, mode=0o600)
    kept = "the released model, which no fit to this site improved,"
    what = "the model fitted to this site" if model.fits else kept
    log.info("%s is in %s; it is not private, and stays here", what, folder)


def count_local(session: Session) -> tuple[Counts, str]:
    """Test counts of a discriminant of the site's own patients alone, on the backbone as it began.

    Its shrinkage and its read-out are the site's own choice, as it would make it alone. With them
    the SHA-256 of the head: in another study, too, the same head is the same model.
    """
    images, total = session.sum_all_features()
    centre = total / max(images, 1)
    classes = len(session.prepared.study.classes)
    head, _ = solve_local(_own_images(session, centre), classes, seed=_seed(session))

    def logits(part: str) -> tuple[torch.Tensor, torch.Tensor]:
        features = map_features(session.compute_features(part), centre)
        scores = features @ head.weight.T + head.bias
        return torch.from_numpy(scores), session.prepared.examples[part].labels

    seen, labels = logits("validation")
    read_outs = list_read_outs(session.prepared.offer.images.train)
    losses = [Counts.of(seen, labels, each.scores(seen)).loss_sum for each in read_outs]
    tested, labels = logits("test")
    counts = Counts.of(tested, labels, choose_read_out(read_outs, losses).scores(tested))
    whole = b"".join(n.astype("<f4").tobytes() for n in (head.weight, head.bias, centre))
    return counts, hashlib.sha256(whole).hexdigest()


def _own_images(session: Session, centre: Floats | None) -> OwnImages:
    prepared = session.prepared
    views = [map_features(features, centre) for features in session.view_features("train")]
    labels = prepared.examples["train"].labels.numpy()
    return OwnImages(views, labels, prepared.owners.owner.numpy())


def _seed(session: Session) -> int:
    return derive(session.prepared.study.seed, session.prepared.site.name, "folds")


def _fine_tune(session: Session, released: Tensors) -> tuple[Tensors, int]:
    """A few more rounds on the site's own patients, held near the released model.

    How many, its own validation patients say, by AUROC: none, unless it gains beyond noise.
    """
    best, rounds, tensors = released, 0, released
    counts = session.evaluate(released, "validation")
    found = intervals(counts, ["auroc"], seed=_seed(session), draws=200)["auroc"]
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
