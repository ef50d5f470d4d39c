"""Who trains and who is held out: decided by patient, by a secret of the site.

Every patient has one place in [0, 1), for good, and a study's `holdout` shares say where its parts
begin and end. Studies of equal shares so have equal parts at a site. A study of other shares moves
the patients between the old edges and the new, and no others: one that was a test patient under
`test: 0.3` may train under `test: 0.2`. What was held out in every study is held out only as long
as its shares stay.
"""

import hashlib
import hmac
from collections.abc import Sequence
from dataclasses import dataclass

from client.data.records import Part, Record
from common.config.study import Holdout
from common.errors import DataError


@dataclass(frozen=True)
class Parts:
    """A site's records in three parts that share no patient, each in the given order."""

    train: list[Record]
    validation: list[Record]
    test: list[Record]


def split_records(records: Sequence[Record], holdout: Holdout, secret: bytes) -> Parts:
    """Cut by patient; a split that the data brings along wins over `holdout`.

    A patient's part depends on nothing but its id, the shares and the secret: it stays when
    others join or leave. Test counts from the bottom and validation from the top of [0, 1):
    changing one share moves nobody into or out of the other part. Small sites may get empty parts.

    Raises:
      DataError: some records have a split of their own and some not, or a patient has two.
    """
    parts = _own(records) or {
        patient: _drawn(patient, holdout, secret) for patient in {r.patient for r in records}
    }

    def part(name: Part) -> list[Record]:
        return [record for record in records if parts[record.patient] == name]

    return Parts(part("train"), part("validation"), part("test"))


def _drawn(patient: str, holdout: Holdout, secret: bytes) -> Part:
    # The prefix keeps this draw apart from ids made under the same secret: they must not tell it.
    digest = hmac.digest(secret, b"holdout:" + patient.encode(), hashlib.sha256)
    uniform = (int.from_bytes(digest[:8], "big") >> 11) / 2**53
    if uniform < holdout.test:
        return "test"
    return "validation" if uniform >= 1 - holdout.validation else "train"


def _own(records: Sequence[Record]) -> dict[str, Part]:
    """Each patient's split as the data has it; empty where the data has none."""
    splits: dict[str, set[Part]] = {}
    without = sum(record.split is None for record in records)
    if without == len(records):
        return {}
    if without:
        got = f"{without} of {len(records)} without"
        raise DataError("data: split", expected="one in all rows or in none", got=got)
    for record in records:
        if record.split:
            splits.setdefault(record.patient, set()).add(record.split)
    torn = sum(len(found) > 1 for found in splits.values())
    if torn:
        got = f"{torn} of {len(splits)} patients in two or more"
        remedy = "Move all images of a patient into one split."
        raise DataError("data: split", expected="one per patient", got=got, remedy=remedy)
    return {patient: found.pop() for patient, found in splits.items()}
