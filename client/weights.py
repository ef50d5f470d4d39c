"""The backbone's weights on this machine: the hospital's own file, or one the coordinator sent."""

import hashlib
import logging
import os
from pathlib import Path

from client.site import Site
from client.storage import explain_disk_errors
from common.config.study import Study
from common.errors import (
    BackboneError,
    ContractError,
    MissingWeightsError,
    RefusedError,
    SiteError,
)
from common.model import backbones
from common.protocol.backbone import BackbonePart
from common.support import files

log = logging.getLogger(__name__)


def find_weights(site: Site, study: Study) -> str:
    """Where this machine has the study's weights: `DEFAULT`, `none` or a path.

    The hospital's own file comes first, then one that was sent; a study names the file only. That
    they are the right weights is for the contract to say.

    Raises:
      MissingWeightsError: it has no copy.
      RefusedError: the policy allows other weights only.
    """
    found = _find(site, study)
    if _allowed(site, study) is not None:
        _check_allowed(site, study, _hash(study, found))
    return found


def _allowed(site: Site, study: Study) -> str | None:
    return (site.policy.backbones or {}).get(study.model.backbone)


def _check_allowed(site: Site, study: Study, sha256: str) -> None:
    allowed = _allowed(site, study)
    if allowed not in (None, sha256):
        where, expected = f"{site.source}: policy.backbones", f"weights with the SHA-256 {allowed}"
        remedy = "Ask the coordinator for those weights, or change policy.backbones."
        raise RefusedError(where, expected=expected, got=sha256, remedy=remedy)


def _hash(study: Study, found: str) -> str:
    """SHA-256 of the file that `find_weights` found; random weights are no file."""
    if found == "none":
        return "none: random ones"
    own = backbones.get(study.model.backbone).own_file
    with (own if found == "DEFAULT" else Path(found)).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _find(site: Site, study: Study) -> str:
    weights = study.model.weights
    here = weights == "DEFAULT" and backbones.get(study.model.backbone).own_file.is_file()
    if weights == "none" or here:
        return weights
    own = site.weights / Path(weights).name if site.weights else None
    if own is not None and own.is_file():
        return str(own)
    if (sent := _sent(site, study)) is not None:
        return str(sent)
    where, expected = f"{site.source}: weights", f"a folder with {Path(weights).name}"
    got, remedy = site.weights or "nothing", "It can be sent at join."
    raise MissingWeightsError(where, expected=expected, got=got, remedy=remedy)


def _sent(site: Site, study: Study) -> Path | None:
    note = site.state / "studies" / f"{study.id}.backbone"
    if not note.is_file():
        return None
    path = _place(site, note.read_text("ascii"))
    return path if path.is_file() else None


def _place(site: Site, sha256: str) -> Path:
    """Where a backbone that was sent is kept; no name from the network, and safetensors alone."""
    return site.state / "weights" / f"{sha256}.safetensors"


def receive_part(site: Site, study: Study, part: BackbonePart) -> int:
    """Keep a piece of the backbone; returns how many bytes there are by now, from the beginning.

    A piece that does not follow on what is there changes nothing: the answer says where to go on.
    The whole is kept only if its SHA-256 is right and its header that of the study's backbone. It
    serves every study with the same weights, and goes when none has them.

    Raises:
      ContractError: it is too large for this backbone, or the whole is not what was announced, or
        no such backbone, and was deleted.
      RefusedError: the policy allows other weights only.
      SiteError: the disk refuses.
    """
    _check_allowed(site, study, part.sha256)
    if part.size > (most := backbones.get(study.model.backbone).largest_sent):
        raise ContractError(f"a backbone of {part.size} bytes, where {most} are plenty")
    folder, whole = site.private("weights"), _place(site, part.sha256)
    growing = whole.with_suffix(".part")
    with explain_disk_errors(folder, SiteError):
        for other in {*folder.glob("*.part")} - {growing}:
            other.unlink()  # one at a time: what was given up does not fill the disk
        held = growing.stat().st_size if growing.is_file() else 0
        if not whole.is_file():
            if part.offset == held:
                with growing.open("ab") as file:
                    file.write(part.data)
                    file.flush()
                    os.fsync(file.fileno())
                held += len(part.data)
            if held < part.size:
                return held
            try:
                _check_whole(growing, study, part.sha256)
            except ContractError:
                growing.unlink()
                raise
            growing.replace(whole)
            log.info("received the backbone: %s", whole)
        notes = site.private("studies")
        files.write(notes / f"{study.id}.backbone", part.sha256, mode=0o600)
        used = {_place(site, note.read_text("ascii")) for note in notes.glob("*.backbone")}
        for other in {*folder.glob("*.safetensors")} - used:
            other.unlink()  # a study has one: a second in its place does not fill the disk
    return part.size


def _check_whole(path: Path, study: Study, sha256: str) -> None:
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != sha256:
        raise ContractError("a backbone whose SHA-256 is another than announced")
    try:
        backbones.get(study.model.backbone).check_sent(path)
    except BackboneError as ex:
        raise ContractError(f"no backbone: {ex}") from None
