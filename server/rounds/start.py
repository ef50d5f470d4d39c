"""The start of a study: the backbone as loaded, or the model that an earlier run released."""

import hashlib
import logging
from typing import Any

from common.config.study import Study
from common.model.network import Network, assemble
from common.protocol.tensors import Tensors
from server.rounds.strategies import Aggregator
from server.runs.run_folder import RunFolder

log = logging.getLogger(__name__)


def check_start(study: Study) -> None:
    """Raise the errors now that would otherwise stop the server later, if they need no site.

    Raises:
      StudyError: the study cannot be run as it is.
      BackboneError: its weights are missing or belong to another architecture.
    """
    network = assemble(study, study.model.weights)
    Aggregator(study, tuple(network.shapes))
    load_first_tensors(study, network)
    if idle := _list_idle(study):
        use = (
            "only a site that fits the model by training goes by" if study.adapt else "nothing uses"
        )
        log.warning("%s: no round trains (train.rounds: 0), so %s this", ", ".join(idle), use)


def _list_idle(study: Study) -> list[str]:
    """The keys of training that a study without rounds changes all the same."""
    train = study.train
    return [
        f"train.{key}"
        for key, field in type(train).model_fields.items()
        if not train.rounds and key != "rounds" and getattr(train, key) != field.default
    ]


def load_first_tensors(study: Study, network: Network) -> Tensors:
    """Load the tensors of round 1: as assembled, or those of the run that `model.init` names.

    Raises:
      StudyError: that run is unfinished, not private where this study is, or of another backbone,
        classes, holdout or seed. With another holdout it would have trained on patients that this
        study tests on; in a simulation the seed decides who they are.
    """
    if study.model.init_run is None:
        return dict(network.initial)
    folder = RunFolder(study.model.init_run)
    last = folder.read_last() if (folder.path / "report.json").exists() else None
    if last is None:
        raise study.error("model.init", expected="a finished run", got=study.model.init)
    ours = {**_kinship(study), "weights": describe_weights(study)}
    theirs = {**_kinship(folder.study), "weights": folder.read_facts()["weights"]}
    differ = [key for key in ours if ours[key] != theirs[key]]
    if differ:
        expected, got = "a run of the same " + ", ".join(ours), f"another {', '.join(differ)}"
        raise study.error("model.init", expected=expected, got=got)
    if study.private and not folder.study.private:
        expected, got = "a private run, as this study is", "one without privacy"
        remedy = "Its model may hold what no noise of this study takes back."
        raise study.error("model.init", expected=expected, got=got, remedy=remedy)
    if folder.study.private:
        log.warning("the ε of %s adds to this study's: the same patients trained it", folder.path)
    _, tensors = last.released
    deeper = [name for name in tensors if name not in network.shapes]
    if deeper:
        expected = "a run that trained no deeper than this study"
        remedy = "Choose a model.unfreeze at least as deep as that run's."
        raise study.error("model.init", expected=expected, got=f"{deeper[0]}", remedy=remedy)
    return {**network.initial, **tensors}


def _kinship(study: Study) -> dict[str, Any]:
    return {
        "backbone": study.model.backbone,
        "classes": study.classes,
        "unit_features": study.model.unit_features,
        "image size": study.images.size,
        "holdout": study.holdout,
        "seed": study.seed,
    }


def describe_weights(study: Study) -> dict[str, str]:
    """Describe the backbone's weights by name, and by SHA-256 where they are a file."""
    path = study.model.weights_file
    if path is None:
        return {"name": study.model.weights}
    with path.open("rb") as file:
        return {"name": path.name, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}
