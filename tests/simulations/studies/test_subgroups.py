"""Test patients in groups by a column of their site's manifest."""

import numpy as np
import pytest

from common.errors import StudyError
from common.metrics.metrics import value
from server.runs.results import FEDERATED, read_results
from simulations.engines.base import InProcess
from simulations.sites.virtual_sites import find_site
from simulations.studies import runner
from simulations.studies.runner import Source
from simulations.studies.subgroups import count_groups, describe_run, find_groups, group_values
from tests.builders import make_study, write_images

STUDY = make_study(
    classes=["dark", "light"],
    model={"init": "solved"},
    images={"unreadable": "skip"},
    aggregate={"quorum": 1},
)


@pytest.fixture(autouse=True)
def _own_process(new_process):
    new_process()


def write_hospital(folder, sexes=(), *, told=True):
    """Twelve patients who do not test, and those of `sexes`, who do; two images of each patient.

    Labels of men who test are the wrong ones. The manifest has a column with the sex if `told`.
    """
    sexes = [*["female", "male"] * 6, *sexes]
    rows = []
    for number in range(2 * len(sexes)):
        patient = number // 2
        part = "test" if patient > 11 else "train" if patient else "validation"
        wrong = part == "test" and sexes[patient] == "male"
        label = STUDY.classes[(number + wrong) % 2]
        rows.append((f"{number}.png", label, f"p{patient}", part))

    def paint(number, label):
        light = 40 + 160 * (number % 2)
        return np.random.default_rng(number).integers(light, light + 40, (32, 32, 3), np.uint8)

    write_images(folder, rows, paint)
    manifest = folder / "manifest.csv"
    header, *lines = manifest.read_text().split()
    if told:
        lines = [f"{line},{sexes[number // 2]}" for number, line in enumerate(lines)]
        manifest.write_text("\n".join([f"{header},sex", *lines]))
    return folder


def test_ages_are_cut_into_bands_and_words_are_groups_of_their_own():
    ages = group_values(["75.0", "5", "", "60", "59.5", "40.0", "NaN"])
    assert list(ages.items()) == [
        ("5", "under 40"),
        ("40.0", "40 to 59"),
        ("59.5", "40 to 59"),
        ("60", "60 and over"),
        ("75.0", "60 and over"),
    ]
    assert group_values(["male", "Female", "unknown"]) == {"Female": "female", "male": "male"}
    assert group_values(["1", "0"]) == {"0": "0", "1": "1"}  # codes, not ages
    assert group_values(["", "N/A"]) == {}


def test_each_group_is_judged_by_its_own_images_at_all_sites(tmp_path):
    here = write_hospital(tmp_path / "a", ["male", "Female", "female", "male", "", "Female"])
    there = write_hospital(tmp_path / "b", ["female", "female"], told=False)
    (here / "24.png").write_bytes(b"not an image")  # left out, it must not shift the others
    source, engine = Source(folders=(here, there)), InProcess()
    groups = find_groups(["sex"], source.list_hospitals(STUDY), STUDY)
    (run,) = runner.run_series([STUDY], source, tmp_path / "runs", tmp_path / "cache", engine)
    found = count_groups(run, groups, engine.runtime)["sex"]
    patients = {name: group.patients for name, group in found.items()}
    assert patients == {"female": 3, "male": 2, "unknown": 3}
    right = {name: value(group.counts, "balanced_accuracy") for name, group in found.items()}
    assert right == {"female": 1, "male": 0, "unknown": 1}
    section = describe_run(run, ["sex"], engine.runtime)
    table, note = section.blocks
    assert table.rows == []  # all groups are small
    assert note.text.endswith("not shown: female, male, unknown.")
    together = sum(group.counts.confusion for group in found.values())
    told = read_results(run, 2)[0][FEDERATED].values()
    assert (together == sum(counts.confusion for counts in told)).all()


def test_a_column_that_no_site_has_is_an_error_with_those_there_are(tmp_path):
    here = find_site(write_hospital(tmp_path / "a"))
    there = find_site(write_hospital(tmp_path / "b", told=False))
    with pytest.raises(StudyError, match=r"--by: expected .* got 'sexes'. Did you mean 'sex'\?"):
        find_groups(["sexes"], [here, there], STUDY)
    with pytest.raises(StudyError, match=r"got 'sex'\. No hospital has any"):
        find_groups(["sex"], [there], STUDY)


def test_an_odd_cell_among_ages_is_unknown():
    found = group_values(["35", "50", "70", "90+", "?", "41.5"])
    assert found == {"35": "under 40", "41.5": "40 to 59", "50": "40 to 59", "70": "60 and over"}
    assert group_values(["left", "right", "3"]) == {"3": "3", "left": "left", "right": "right"}
