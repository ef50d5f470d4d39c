"""The released model of each study that ended here, kept for what a site does with it later."""

import json
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from client.consent.proposals import read_proposal
from client.preparation import Workspace, prepare_site
from client.session import Session
from client.site import Site
from client.storage import explain_disk_errors
from common.config.study import Study
from common.errors import ConsiliumError, RunError, SiteError
from common.heads.read_out import AS_IT_IS, ReadOut
from common.model.description import read_description
from common.protocol.tensors import Tensors
from common.support import files

_READ_OUT = "read_out"


@dataclass(frozen=True, eq=False)
class KeptModel:
    """A model of a study, as it is kept.

    Attributes:
      tensors: Those that travel in its study; the others are the backbone's.
      read_out: Of its probabilities.
    """

    tensors: Tensors
    read_out: ReadOut = AS_IT_IS


def keep_released(session: Session, released: KeptModel) -> None:
    """Keep the first model that a study ends with; a server cannot put another in its place."""
    site = session.prepared.site
    path = site.private("released") / f"{session.prepared.study.id}.safetensors"
    with explain_disk_errors(path, SiteError):
        if not path.exists():
            tensors = {name: tensor.contiguous() for name, tensor in released.tensors.items()}
            about = {_READ_OUT: json.dumps(released.read_out.facts())}
            files.write(path, save(tensors, about), mode=0o600)


def read_released(site: Site, study_id: str) -> KeptModel:
    """Read the model that a study ended with here; `SiteError` if none can be read."""
    path = site.state / "released" / f"{study_id}.safetensors"
    try:
        with safe_open(path, framework="pt") as file:
            about = json.loads((file.metadata() or {}).get(_READ_OUT, "null"))
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as ex:
        raise SiteError(path, expected="the model that a study ended with", got=ex) from None
    read_out = ReadOut(about["temperature"], tuple(about["log_prior"])) if about else AS_IT_IS
    return KeptModel(tensors, read_out)


def read_whole(folder: Path, session: Session) -> KeptModel:
    """Read a whole model that `load_model` reads as well, for a session of its study.

    Raises:
      RunError: there is none, or a damaged one.
    """
    path = folder / "model.safetensors"
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in session.prepared.network.shapes}
    except (SafetensorError, OSError) as ex:
        raise RunError(path, expected="a model of the study", got=ex) from None
    return KeptModel(tensors, read_description(folder).read_out)


def open_released(site: Site, name: str) -> tuple[Session, KeptModel]:
    """Open the last study of this name, or that of this id, that ended here, and its model.

    Raises:
      SiteError: none was kept here.
    """
    kept = sorted(site.state.glob("released/*.safetensors"), key=lambda path: path.stat().st_mtime)
    studies = dict(_read_proposals(site, kept))
    found = [path for path, study in studies.items() if name in (study.name, study.id)]
    if not found:
        known = ", ".join(f"{s.name} ({s.id})" for s in studies.values()) or "none yet"
        expected = f"a study that has ended here: {known}"
        raise SiteError(site.source, expected=expected, got=name)
    session = Session(prepare_site(site, studies[found[-1]], Workspace()))
    return session, read_released(site, found[-1].stem)


def _read_proposals(site: Site, kept: Sequence[Path]) -> Iterator[tuple[Path, Study]]:
    """The study of each model, but for those of another release, or whose proposal is gone."""
    for path in kept:
        with suppress(ConsiliumError):
            yield path, read_proposal(site, path.stem)
