"""How far a site's ledger goes, and the question for one line of it."""

import re
from dataclasses import dataclass
from typing import Annotated

from flwr.app import ConfigRecord, RecordDict
from pydantic import Field, StrictInt, ValidationError

from common.config.study import Sha256
from common.config.yaml import Section
from common.errors import ContractError
from common.protocol.fields import (
    CONFIG,
    COUNT,
    HASH,
    LEDGER_HEAD,
    check_parts,
    get_part,
    get_value,
)

LEDGER = "query.ledger"
"""The type of the message that asks for a line of a site's ledger; Flower's name for it."""


class LedgerHead(Section):
    """How far a site's ledger of releases goes."""

    count: Annotated[StrictInt, Field(ge=1)]
    """Its number of lines."""
    hash: Sha256
    """Of the last of them, which covers all before it."""
    receipt: Sha256
    """By which the site knows that it told this, when a server gives it back."""

    def record(self) -> ConfigRecord:
        """As Flower sends it, in a message of other things."""
        return ConfigRecord(self.model_dump())


@dataclass(frozen=True)
class LedgerRequest:
    """Asks a site for the hash of one line of its ledger, to see that it was not rolled back."""

    count: int
    """The line, from 1."""

    def record(self) -> RecordDict:
        """As Flower sends it."""
        return RecordDict({CONFIG: ConfigRecord({COUNT: self.count})})

    @classmethod
    def read(cls, record: RecordDict) -> "LedgerRequest":
        """Back from Flower; raises `ContractError`."""
        check_parts(record, CONFIG)
        config = get_part(record.config_records, CONFIG)
        if set(config) != {COUNT} or (count := get_value(record, CONFIG, COUNT, int)) < 1:
            raise ContractError("a line before the first")
        return cls(count)


@dataclass(frozen=True)
class LedgerReply:
    """The hash of that line."""

    hash: str | None
    """None where the ledger does not go so far."""

    def record(self) -> RecordDict:
        """As Flower sends it."""
        return RecordDict({CONFIG: ConfigRecord({HASH: self.hash or ""})})

    @classmethod
    def read(cls, record: RecordDict) -> "LedgerReply":
        """Back from Flower; raises `ContractError`."""
        check_parts(record, CONFIG)
        config, told = get_part(record.config_records, CONFIG), get_value(record, CONFIG, HASH, str)
        if set(config) != {HASH} or not re.fullmatch(r"([0-9a-f]{64})?", told):
            raise ContractError("a hash that is none")
        return cls(told or None)


def read_ledger_head(record: RecordDict) -> LedgerHead:
    """The ledger's head that came with a message; raises `ContractError` if it is none."""
    told = get_part(record.config_records, LEDGER_HEAD)
    try:
        return LedgerHead.model_validate(dict(told))
    except ValidationError:
        raise ContractError("a ledger that is none") from None
