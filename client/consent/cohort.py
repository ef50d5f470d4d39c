"""Whose images take part in a study at this site, and in which part."""

import hashlib
import hmac
from collections.abc import Sequence

from client.consent.agreement import Agreement
from client.consent.exclusions import drop_excluded
from client.consent.holdout import read_holdout
from client.data.records import Record
from client.data.splits import Parts, split_records
from client.site import Site
from common.config.study import Study

PARTS = ("train", "validation", "test")


def cut_records(site: Site, study: Study) -> Parts:
    """The site's records, cut by patient; at a site that only evaluates, all are test patients.

    But for those that it trained on with privacy, when its role was another: ε is theirs.
    """
    records = drop_excluded(site, site.data.records(study.classes))
    if site.role == "train":
        return split_records(records, study.holdout, site.secret())
    if (drawn := read_holdout(site)) is not None:
        trained = {r.patient for r in split_records(records, drawn, site.secret()).train}
        records = [record for record in records if record.patient not in trained]
    return Parts(train=[], validation=[], test=records)


def list_cohort(site: Site, study: Study, agreed: Agreement | None) -> dict[str, list[Record]]:
    """The records that take part, by part: those that the site joined with, if it has joined."""
    cut = cut_records(site, study)
    found = {part: list(getattr(cut, part)) for part in PARTS}
    if agreed is None:
        return found
    joined, secret = set(agreed.records), site.secret()
    return {
        part: [r for r in records if name_record(r, part, site, secret) in joined]
        for part, records in found.items()
    }


def count_patients(records: Sequence[Record]) -> int:
    """How many patients these records belong to."""
    return len({record.patient for record in records})


def count_by_class(records: Sequence[Record], study: Study) -> list[int]:
    """How many patients have images of each class."""
    classes = range(len(study.classes))
    return [count_patients([r for r in records if r.label == k]) for k in classes]


def name_record(record: Record, part: str, site: Site, secret: bytes) -> str:
    """Names an image of a patient in a part, with its label, to nobody without the secret.

    Wherever the data is mounted; another label or part is another name.
    """
    name = record.image.name.removeprefix(str(site.data.root))
    text = "\0".join((part, record.patient, name, str(record.label)))
    return hmac.digest(secret, b"record:" + text.encode(), hashlib.sha256).hex()[:32]
