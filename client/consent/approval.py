"""What a person at the hospital says to each study, where the site's policy has them asked.

A study waits here as it was sent, under the SHA-256 of its proposal. The answer is to that proposal
alone: one changed digit is another study.
"""

import logging
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal, Self

from client.site import Site
from client.storage import explain_disk_errors
from common.config.study import Study
from common.config.yaml import Section
from common.errors import RefusedError, SiteError, WaitingError
from common.support import files

log = logging.getLogger(__name__)

_MOST = 20
"""So many studies may wait at a time; a coordinator fills neither the disk nor anyone's day."""

Decision = Literal["waiting", "approved", "declined"]


class Approval(Section):
    """A study that was sent here, and what a person said to it."""

    proposal: str
    """The study, exactly as it was sent."""
    asked: str
    """When it was sent first."""
    decision: Decision = "waiting"
    decided: str | None = None
    """When; None while it waits."""

    @property
    def study(self) -> Study:
        """As it was sent."""
        return Study.model_validate_json(self.proposal)

    @classmethod
    def of(cls, study: Study) -> Self:
        """One that waits from now on."""
        return cls(proposal=study.proposal(), asked=_now())


def check_approval(site: Site, study: Study) -> None:
    """Return if a person approved this very study, or the policy has nobody asked.

    A study that is new here waits from now on.

    Raises:
      WaitingError: nobody has decided yet.
      RefusedError: it was declined, or too many wait already.
      SiteError: the disk refuses, or what is kept of it is damaged.
    """
    if site.policy.approve == "policy":
        return
    path = _path(site, study)
    approval = _read(path) if path.is_file() else _begin(site, study)
    where = f"study {study.name} ({study.id})"
    if approval.decision == "waiting":
        expected, got = "a person's yes (policy.approve: ask)", "none yet"
        remedy = f"See consilium-client approve {site.source} {study.id}."
        raise WaitingError(where, expected=expected, got=got, remedy=remedy)
    if approval.decision == "declined":
        remedy = f"A yes takes it back: consilium-client approve {site.source} {study.id}."
        expected, got = "a person's yes (policy.approve: ask)", "a no"
        raise RefusedError(where, expected=expected, got=got, remedy=remedy)


def list_approvals(site: Site) -> list[Approval]:
    """All studies that were sent while a person was to be asked, the oldest first.

    Raises:
      SiteError: the disk refuses, or one is damaged.
    """
    found = [_read(path) for path in (site.state / "approvals").glob("*.json")]
    return sorted(found, key=lambda one: (one.asked, one.proposal))


def find_approval(site: Site, name: str) -> Approval:
    """The one study of that name or id; the one that waits, if another of its name does not.

    Raises:
      SiteError: there is none, or there are several.
    """
    found = [one for one in list_approvals(site) if name in (one.study.name, one.study.id)]
    waiting = [one for one in found if one.decision == "waiting"]
    chosen = waiting if len(found) > 1 and waiting else found
    if len(chosen) != 1:
        got = ", ".join(one.study.id for one in chosen) or "none"
        remedy = "Name it by its id: consilium-client studies lists them."
        raise SiteError(f"study {name}", expected="one that was sent here", got=got, remedy=remedy)
    return chosen[0]


def keep_decision(site: Site, approval: Approval, decision: Decision) -> None:
    """What a person said, on disk before this returns; it may be taken back at any time."""
    update = {"decision": decision, "decided": _now()}
    path = _path(site, approval.study)
    with explain_disk_errors(path, SiteError):
        files.write(path, approval.model_copy(update=update).model_dump_json(indent=1), mode=0o600)


def _begin(site: Site, study: Study) -> Approval:
    waiting = sum(one.decision == "waiting" for one in list_approvals(site))
    if waiting >= _MOST:
        where, expected = f"study {study.name}", f"fewer than {_MOST} studies that wait"
        remedy = "Approve or decline those that consilium-client studies lists."
        raise RefusedError(where, expected=expected, got=waiting, remedy=remedy)
    approval = Approval.of(study)
    path = _path(site, study)
    with explain_disk_errors(path, SiteError):
        files.create(path, approval.model_dump_json(indent=1), mode=0o600)
    command = f"consilium-client approve {site.source} {study.id}"
    log.warning("study %s (%s) waits for a person's yes or no: %s", study.name, study.id, command)
    return approval


def _path(site: Site, study: Study) -> Path:
    return site.private("approvals") / f"{study.sha256}.json"


def _read(path: Path) -> Approval:
    with explain_disk_errors(path, SiteError):
        text = path.read_bytes()
    try:
        approval = Approval.model_validate_json(text)
        if approval.study.sha256 != path.stem:
            raise ValueError
    except ValueError:
        expected, got = "a study as it was sent, and an answer to it", "something else"
        remedy = "Delete it: the study is asked for again, and waits."
        raise SiteError(path, expected=expected, got=got, remedy=remedy) from None
    return approval


def _now() -> str:
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
