"""The released model of each study that ended here, kept for what a site does with it later."""

from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path

from safetensors.torch import load_file, save

from client.consent.proposals import read_proposal
from client.preparation import Workspace, prepare_site
from client.session import Session
from client.site import Site
from client.storage import explain_disk_errors
from common.config.study import Study
from common.errors import ConsiliumError, SiteError
from common.protocol.tensors import Tensors
from common.support import files


def keep_released(session: Session, released: Tensors) -> None:
    """Keep the first model that a study ends with; a server cannot put another in its place."""
    site = session.prepared.site
    path = site.private("released") / f"{session.prepared.study.id}.safetensors"
    with explain_disk_errors(path, SiteError):
        if not path.exists():
            tensors = {name: tensor.contiguous() for name, tensor in released.items()}
            files.write(path, save(tensors), mode=0o600)


def open_released(site: Site, name: str) -> tuple[Session, Tensors]:
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
    return session, load_file(found[-1])


def _read_proposals(site: Site, kept: Sequence[Path]) -> Iterator[tuple[Path, Study]]:
    """The study of each model, but for those of another release, or whose proposal is gone."""
    for path in kept:
        with suppress(ConsiliumError):
            yield path, read_proposal(site, path.stem)
