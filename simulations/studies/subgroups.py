"""What a released model does for groups of test patients: by sex, age or another column.

The simulation reads the hospitals' own data for it: no message of a study tells of groups.
"""

import re
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from client.data.records import Record
from client.runtime import Runtime
from client.site import Site
from common.config.study import Study
from common.errors import StudyError, did_you_mean
from common.metrics.counts import Counts
from common.metrics.metrics import METRICS
from common.metrics.statistics import intervals
from common.model.inference import load_model
from common.page.blocks import Block, Section, Table, Text
from common.page.tables import format_estimate
from server.runs.results import FEDERATED, read_results
from server.runs.run_folder import RunFolder
from simulations.sites import virtual_sites
from simulations.sites.virtual_sites import VirtualSite

LEAST = 10
"""A group of fewer test patients has figures too rough to show."""
UNKNOWN = "unknown"
"""The group of patients whose site has no such column, or no value in it."""

_NO_VALUE = ("", "na", "n/a", "nan", "none", UNKNOWN)
_NUMBER = re.compile(r"-?\d+(\.\d+)?")
_CUTS = (40, 60)
_BANDS = ("under 40", "40 to 59", "60 and over")

Groups = Mapping[str, Mapping[str, str]]
"""By column, the group of each known value, in the order in which groups are shown."""


@dataclass(frozen=True)
class Subgroup:
    """Some test patients, and what a model did on their images; sites add up."""

    patients: int
    counts: Counts

    def __add__(self, other: "Subgroup") -> "Subgroup":
        return Subgroup(self.patients + other.patients, self.counts + other.counts)


def find_groups(
    columns: Sequence[str], hospitals: Sequence[VirtualSite], study: Study
) -> dict[str, dict[str, str]]:
    """Find the groups in these columns, the same for all hospitals.

    Raises:
      StudyError: no hospital has such a column.
    """
    return _find(columns, [r for h in hospitals for r in h.listed or h.data.records(study.classes)])


def describe_run(run: Path, columns: Sequence[str], runtime: Runtime) -> Section:
    """Describe how the released model of a simulated run does for groups of test patients.

    Groups of fewer than LEAST patients are named, and not shown.

    Raises:
      StudyError: no hospital of the run has such a column.
    """
    study = RunFolder(run).study
    sites = map(Site.read, virtual_sites.find_site_files(run))
    records = [record for site in sites for record in site.data.records(study.classes)]
    found = count_groups(run, _find(columns, records), runtime)
    blocks = [block for column, groups in found.items() for block in _tabulate(column, groups)]
    return Section("Groups of patients", blocks)


def _tabulate(column: str, groups: Mapping[str, Subgroup]) -> Iterator[Block]:
    shown = {name: group for name, group in groups.items() if group.patients >= LEAST}
    names = ("accuracy", "balanced_accuracy", "auroc")
    rows = [
        [name, str(group.patients), str(group.counts.n)]
        + [
            format_estimate(intervals(group.counts, names, seed=0, draws=200)[metric])
            for metric in names
        ]
        for name, group in shown.items()
    ]
    heads = (column, "patients", "images", *(METRICS[name].label for name in names))
    yield Table(heads, rows, caption=f"The released model by {column}; 95 % intervals, by image")
    if few := [name for name, group in groups.items() if group.patients and name not in shown]:
        yield Text(f"Fewer than {LEAST} test patients, so not shown: {', '.join(few)}.", "note")


def _find(columns: Sequence[str], records: Iterable[Record]) -> dict[str, dict[str, str]]:
    rows = [record.columns for record in records]
    known = {name for row in rows for name in row}
    for column in columns:
        if column not in known:
            expected = "a column of a manifest, besides image, label, patient and split"
            remedy = did_you_mean(column, known) if known else "No hospital has any."
            raise StudyError("--by", expected=expected, got=repr(column), remedy=remedy)
    return {name: group_values({row[name] for row in rows if name in row}) for name in columns}


def group_values(values: Iterable[str]) -> dict[str, str]:
    """The group of each value that is known: a band of age, or the value itself in small letters.

    Where most values are numbers, the others are unknown. Numbers that are all in one band are
    taken for codes, such as 0 and 1.
    """
    known = sorted((v for v in values if v.lower() not in _NO_VALUE), key=str.lower)
    numbers = sorted((v for v in known if _NUMBER.fullmatch(v)), key=float)
    bands = {v: _BANDS[bisect_right(_CUTS, float(v))] for v in numbers}
    banded = 2 * len(numbers) > len(known) and len(set(bands.values())) > 1
    return bands if banded else {v: v.lower() for v in known}


def count_groups(run: Path, groups: Groups, runtime: Runtime) -> dict[str, dict[str, Subgroup]]:
    """Evaluate the model that a finished run released on each group of test patients, all sites.

    Sites that tell no figures are left out, as they are elsewhere.
    """
    study, model = RunFolder(run).study, load_model(run)
    classes, state = len(study.classes), model.network.state_dict()
    told = read_results(run, classes)[0][FEDERATED]
    nobody = Subgroup(0, Counts.zero(classes))
    found = {
        c: dict.fromkeys([*group_of.values(), UNKNOWN], nobody) for c, group_of in groups.items()
    }
    for site_file in virtual_sites.find_site_files(run):
        if site_file.parent.name not in told:
            continue
        session = runtime.open_session(site_file, study.id)
        tensors = {name: state[name] for name in session.prepared.network.shapes}
        records = session.prepared.list_records("test")
        for column, group_of in groups.items():
            members: dict[str, list[int]] = defaultdict(list)
            for at, record in enumerate(records):
                members[group_of.get(record.columns.get(column, ""), UNKNOWN)].append(at)
            for name, rows in members.items():
                counts = session.evaluate(tensors, "test", torch.tensor(rows), model.read_out)
                patients = len({records[at].patient for at in rows})
                found[column][name] += Subgroup(patients, counts)
    runtime.close_sessions()
    return found
