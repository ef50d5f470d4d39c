"""The studies that a site was sent, kept on disk, so that rounds need to name only their ids."""

import re
from functools import lru_cache

from client.consent.agreement import Agreement
from client.site import Site
from client.storage import explain_disk_errors
from common.config.study import Study
from common.errors import ContractError, SiteError, StudyError
from common.support import files


def keep_proposal(site: Site, study: Study) -> None:
    """Keep a proposal in the state folder, so that rounds need to name only its id.

    Raises:
      ContractError: another study of the same id is there; what was agreed to is not replaced.
      SiteError: the disk refuses.
    """
    path, proposal = site.private("studies") / f"{study.id}.json", study.proposal()
    with explain_disk_errors(f"{site.source}: state", SiteError):
        if not path.is_file():
            files.write(path, proposal, mode=0o600)
        elif path.read_text(encoding="utf-8") != proposal:
            raise ContractError(f"a second study with the id {study.id}")


def drop_proposal(site: Site, study: Study) -> None:
    """Delete a proposal that was refused, unless the site agreed to it before."""
    if Agreement.kept(site, study.id) is None:
        (site.private("studies") / f"{study.id}.json").unlink(missing_ok=True)


@lru_cache(maxsize=8)  # all virtual sites of a study share it
def parse_proposal(proposal: str) -> Study:
    """The study that a proposal is; raises `ContractError` if it is none, or written otherwise."""
    try:
        study = Study.model_validate_json(proposal)
    except (ValueError, StudyError) as ex:
        raise ContractError(f"the proposal is not a valid study: {ex}") from None
    if study.proposal() != proposal:  # its hash would not be that of the study
        raise ContractError("the proposal is not written as this version writes it")
    return study


def read_proposal(site: Site, study_id: str) -> Study:
    """A study that this site was sent; raises `ContractError` if it was not."""
    path = site.state / "studies" / f"{study_id}.json"
    # The id is a name from the network: one spelling, no path, no second session.
    if not re.fullmatch(r"[0-9a-f]{16}", study_id) or not path.is_file():
        raise ContractError(f"this site has not joined study {study_id!r}")
    return parse_proposal(path.read_text(encoding="utf-8"))
