"""The studies that a site was sent, kept on disk, so that rounds need to name only their ids."""

import re
from functools import lru_cache

from client.consent.agreement import Agreement
from client.site import Site
from client.storage import explain_disk_errors
from common.config.study import Study
from common.errors import (
    ContractError,
    SiteError,
    StudyError,
)
from common.support import files


def keep_proposal(site: Site, proposal: str) -> Study:
    """Keep an agreed proposal in the state folder, so that rounds need to name only its id.

    Raises:
      ContractError: the proposal is not a valid study.
    """
    study = _parse(proposal)
    folder = site.private("studies")
    with explain_disk_errors(f"{site.source}: state", SiteError):
        files.write(folder / f"{study.id}.json", proposal, mode=0o600)
    return study


def drop_proposal(site: Site, study: Study) -> None:
    """Delete a proposal that was refused, unless the site agreed to it before."""
    if Agreement.kept(site, study.id) is None:
        (site.private("studies") / f"{study.id}.json").unlink(missing_ok=True)


@lru_cache(maxsize=8)  # all virtual sites of a study share it
def _parse(proposal: str) -> Study:
    try:
        return Study.model_validate_json(proposal)
    except (ValueError, StudyError) as ex:
        raise ContractError(f"the proposal is not a valid study: {ex}") from None


def read_proposal(site: Site, study_id: str) -> Study:
    """A study that this site was sent; raises `ContractError` if it was not."""
    path = site.state / "studies" / f"{study_id}.json"
    # The id is a name from the network: one spelling, no path, no second session.
    if not re.fullmatch(r"[0-9a-f]{16}", study_id) or not path.is_file():
        raise ContractError(f"this site has not joined study {study_id!r}")
    return _parse(path.read_text(encoding="utf-8"))
