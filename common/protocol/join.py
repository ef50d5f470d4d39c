"""The first message: the study proposed, and what a site agrees to and tells of itself."""

from dataclasses import dataclass
from typing import Annotated, Literal, Self

from flwr.app import ConfigRecord, RecordDict
from pydantic import Field, StrictInt, ValidationError, model_validator

from common.config.study import Name
from common.config.yaml import Section
from common.errors import ContractError
from common.model.contract import Contract, Versions
from common.protocol.disclosure import Disclosure
from common.protocol.fields import (
    CONFIG,
    JSON,
    LACKS,
    LEDGER_HEAD,
    ByPart,
    Count,
    check_parts,
    get_value,
)
from common.protocol.ledger import LedgerHead, read_ledger_head


@dataclass(frozen=True, kw_only=True)
class JoinRequest:
    """What the server proposes, once, before the first round."""

    proposal: str
    """The study as canonical JSON."""
    known: LedgerHead | None = None
    """What the site last told this server of its ledger, so that it notices a rollback itself."""

    def record(self) -> RecordDict:
        """As Flower sends it."""
        record = RecordDict({CONFIG: ConfigRecord({JSON: self.proposal})})
        if self.known is not None:
            record[LEDGER_HEAD] = self.known.record()
        return record

    @classmethod
    def read(cls, record: RecordDict) -> "JoinRequest":
        """Back from Flower; raises `ContractError`."""
        knows = LEDGER_HEAD in record
        check_parts(record, CONFIG, *([LEDGER_HEAD] if knows else []))
        known = read_ledger_head(record) if knows else None
        return cls(proposal=get_value(record, CONFIG, JSON, str), known=known)


class JoinReply(Section):
    """What a site agrees to, and what it says about itself."""

    name: Name
    role: Literal["train", "evaluate"]
    contract: Contract
    disclosure: Disclosure
    """What the site tells, here and later."""
    patients: ByPart[Count | None]
    """How many, in each part; None where the site does not tell."""
    images: ByPart[tuple[Count, ...] | None]
    """How many of each class, in each part; None where the site does not tell."""
    enrolled: Annotated[StrictInt, Field(ge=1, le=10**9)] | None
    """Under privacy, about how many patients train: a constant of the site's; None if untold."""
    ledger: LedgerHead
    versions: Versions

    @model_validator(mode="after")
    def _tells_what_it_says(self) -> Self:
        disclosure = self.disclosure
        told = list(zip(self.patients.all, self.images.all, strict=True))
        if any((patients is None) != (images is None) for patients, images in told):
            raise ValueError("expected both patients and images of a part, or neither")
        there = [patients is not None for patients in self.patients.all]
        # Under privacy training patients are not told, whatever else is.
        if there[1:] != [disclosure.tells_held_out] * 2 or there[0] > disclosure.tells:
            raise ValueError("expected the parts that it says it tells")
        numbers = [n for patients, images in told for n in (patients or 0, *(images or ()))]
        if any(n % disclosure.base for n in numbers):
            raise ValueError("expected numbers as coarse as it says")
        if disclosure != disclosure.resolved(private=False):
            raise ValueError("expected no metrics without counts")
        return self

    def record(self) -> RecordDict:
        """As Flower sends it."""
        return RecordDict({CONFIG: ConfigRecord({JSON: self.model_dump_json()})})

    @classmethod
    def read(cls, record: RecordDict) -> "JoinReply":
        """Back from Flower; raises `ContractError`."""
        check_parts(record, CONFIG)
        try:
            return cls.model_validate_json(get_value(record, CONFIG, JSON, str))
        except ValidationError as ex:
            raise ContractError(f"a join reply with {ex.error_count()} misfits") from None


def lack_backbone() -> RecordDict:
    """What a site answers to a proposal if it has no copy of the backbone."""
    return RecordDict({CONFIG: ConfigRecord({LACKS: "backbone"})})


def read_join(record: RecordDict) -> JoinReply | None:
    """The answer to a proposal; None if the site lacks the backbone. Raises `ContractError`."""
    if dict(record.config_records.get(CONFIG, {})) == {LACKS: "backbone"}:
        check_parts(record, CONFIG)
        return None
    return JoinReply.read(record)
