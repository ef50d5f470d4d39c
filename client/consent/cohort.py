"""Whose images take part in a study at this site, and in which part."""

from collections.abc import Sequence

from client.consent.exclusions import remaining
from client.data.records import Record
from client.data.splits import Parts, split
from client.site import Site
from common.config.study import Study

PARTS = ("train", "validation", "test")


def cut(site: Site, study: Study) -> Parts:
    """The site's records, cut by patient; at a site that only evaluates, all are test patients."""
    records = remaining(site, site.data.records(study.classes))
    if site.role == "evaluate":
        return Parts(train=[], validation=[], test=records)
    return split(records, study.holdout, site.secret())


def patients(records: Sequence[Record]) -> int:
    """How many patients these records belong to."""
    return len({record.patient for record in records})
