"""What a site agreed to at join, kept on disk; everything after that obeys it."""

from collections.abc import Set
from typing import Literal, Self

from pydantic import Field

from client.consent.approval import check_approval
from client.privacy.parameters import PrivateRelease
from client.privacy.plan import PrivacyPlan
from client.site import Site
from client.storage import AGREED, explain_disk_errors
from common.config.study import Study
from common.config.yaml import Section
from common.errors import ContractError, DataError, RefusedError, SiteError
from common.protocol.disclosure import Disclosure
from common.protocol.fields import ByPart
from common.support import files


class Agreement(Section):
    """What a site agreed to when it joined a study; everything after that obeys it."""

    study: str
    """Its id."""
    role: Literal["train", "evaluate"]
    disclosure: Disclosure
    privacy_plan: PrivacyPlan | None = Field(alias="protection")
    """None: it does not train, or trains without differential privacy."""
    end: PrivateRelease | None
    """How counts of held-out patients are noised; None: they are rounded, or exact."""
    patients: ByPart[int]
    """How many take part, exactly; never told unless `disclosure` says so."""
    images: ByPart[tuple[int, ...]]
    """How many of each class take part, exactly."""
    records: tuple[str, ...]
    """Who may take part: `name_record` of all that did when this site first joined, sorted."""

    @classmethod
    def kept(cls, site: Site, study: str) -> Self | None:
        """What this site agreed to; None if it has not joined that study.

        Raises:
          SiteError: the file cannot be read, or is damaged.
        """
        path = site.state / "studies" / f"{study}{AGREED}"
        with explain_disk_errors(path, SiteError):
            text = path.read_bytes() if path.is_file() else None
        try:
            return None if text is None else cls.model_validate_json(text)
        except ValueError:
            remedy = "Restore it from a backup: it says who takes part in the study."
            expected, got = "an agreement as written", "something else"
            raise SiteError(path, expected=expected, got=got, remedy=remedy) from None

    def keep(self, site: Site) -> None:
        """Write it into the state folder; on disk before this returns."""
        path = site.private("studies") / f"{self.study}{AGREED}"
        with explain_disk_errors(path, SiteError):
            files.write(path, self.model_dump_json(indent=1, by_alias=True), mode=0o600)


def check_agreement(
    site: Site, study: Study, agreed: Agreement | None, offer: Agreement
) -> Agreement:
    """The agreement of a site, if it still holds.

    Args:
      site: As its file says now.
      study: That a message asks about.
      agreed: At join; None if the site has not joined.
      offer: What the site would agree to now.

    Raises:
      ContractError: the site has not joined the study.
      WaitingError: it is to be approved now, and nobody has decided.
      RefusedError: its policy now allows it to tell less than it agreed to.
      DataError: other patients take part than it joined with.
    """
    if agreed is None:
        raise ContractError(f"this site has not joined study {study.id!r}")
    if agreed.role == "train" and bool(agreed.privacy_plan) != study.private:
        raise ContractError("an agreement about another kind of privacy than the study's")
    check_approval(site, study)  # a yes can be taken back
    remedy = "It can take part again when the coordinator resumes the run."
    if not agreed.disclosure.within(offer.disclosure):
        where, expected = f"{site.source}: policy.disclose", "what was agreed at join"
        raise RefusedError(where, expected=expected, got="less", remedy=remedy)
    if (agreed.role, agreed.images, agreed.patients) != (offer.role, offer.images, offer.patients):
        where, expected = f"{site.source}: data", "the patients that it joined with"
        raise DataError(where, expected=expected, got="fewer, or another role", remedy=remedy)
    return agreed


def check_end(
    study: Study,
    agreed: Agreement,
    received: str,
    *,
    rounds: Set[str],
    took_part: bool,
    ends: Set[str],
) -> None:
    """Return if counts of held-out patients may be told of a model.

    Noise and rounding bound what one answer tells. So a study ends with one model, and a site that
    trains answers only after a round of its own. Where it tells its figures in every round, the
    models of these rounds are no news.

    Args:
      study: That ends.
      agreed: At join.
      received: SHA-256 of the model.
      rounds: SHA-256 of the models that this site trained in the study.
      took_part: Whether it trained one, or gave its sums for a solved head.
      ends: SHA-256 of the models that it was asked about at the end, by now.

    Raises:
      ContractError: the site trained no round, or the study ended with another model.
    """
    where, remedy = f"study {study.name}", "Run it again under another name or seed."
    if agreed.role == "train" and not took_part:
        expected = "a round of this site before the end"
        raise ContractError(where, expected=expected, got="none", remedy=remedy)
    known = rounds if agreed.disclosure.metrics == "every_round" else frozenset()
    if {received} - known and ends - known - {received}:
        expected = "the model that it ended with before"
        raise ContractError(where, expected=expected, got="another", remedy=remedy)
