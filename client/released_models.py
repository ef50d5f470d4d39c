"""The released model of each study that ended here, kept for what a site does with it later."""

from safetensors.torch import load_file, save

from client.consent.proposals import read_proposal
from client.preparation import Workspace, prepare_site
from client.session import Session
from client.site import Site
from client.storage import explain_disk_errors
from common.errors import SiteError
from common.protocol.tensors import Tensors
from common.support import files


def keep_released(session: Session, released: Tensors) -> None:
    """Keep the released model of a study, which every site is sent."""
    site = session.prepared.site
    path = site.private("released") / f"{session.prepared.study.id}.safetensors"
    with explain_disk_errors(path, SiteError):
        files.write(path, save({n: t.contiguous() for n, t in released.items()}), mode=0o600)


def open_released(site: Site, name: str) -> tuple[Session, Tensors]:
    """Open the last study of this name or id that ended here, and its released model.

    Raises:
      SiteError: none was kept here.
    """
    kept = {path.stem: path for path in sorted(site.state.glob("released/*.safetensors"))}
    studies = [read_proposal(site, study) for study in kept]
    found = [study for study in studies if name in (study.name, study.id)]
    if not found:
        known = ", ".join(f"{study.name} ({study.id})" for study in studies) or "none yet"
        expected = f"a study that has ended here: {known}"
        raise SiteError(site.source, expected=expected, got=name)
    session = Session(prepare_site(site, found[-1], Workspace()))
    return session, load_file(kept[found[-1].id])
