"""One machine that plays many hospitals."""

import pytest

from client.consent.cohort import count_patients, cut_records
from client.consent.exclusions import exclude_patient
from client.data.records import Format
from client.site import Site
from common.errors import DataError, SiteError
from simulations.sites import virtual_sites
from tests.builders import PHANTOM_CLASSES, make_study, write_images, write_site, write_sites

CONTENT = {"classes": PHANTOM_CLASSES, "model": {"backbone": "squeezenet1_0"}}


def test_hospitals_of_one_machine_compute_alike(phantoms, tmp_path):
    """Local and pooled training put the hospitals' prepared images together."""
    found = []
    for name, keep in (("north", "images"), ("south", "auto")):
        data = {"format": "manifest", "root": str(phantoms / name)}
        path = write_site(tmp_path / name, name=name, data=data, keep=keep)
        found.append(virtual_sites.find_site(path))
    study = make_study(**CONTENT)
    with pytest.raises(SiteError, match=r"same keep and threads.*auto/1 and images/1"):
        write_sites(found, study, tmp_path / "run", tmp_path / "cache")
    assert not (tmp_path / "run").exists()
    write_sites(found[:1], study, tmp_path / "run", tmp_path / "cache")


def test_the_records_of_a_pool_are_listed_once(phantoms, monkeypatch):
    listed, records = [], Format.records

    def counted(data, classes):
        listed.append(data.root)
        return records(data, classes)

    monkeypatch.setattr(Format, "records", counted)
    study = make_study(**CONTENT)
    found = virtual_sites.cut_pool(phantoms / "north", study, spec="iid", sites=3)
    planned = virtual_sites.plan_sites(found, study)
    assert listed == [(phantoms / "north").resolve()]
    everyone = records(found[0].data, study.classes)
    assert sum(sum(map(sum, plan.images.values())) for plan in planned) == len(everyone)


@pytest.mark.parametrize("end", ["\u2028", "\x0c", "\x85", "\x1c"])
def test_a_pool_is_planned_as_its_clients_read_it(tmp_path, end):
    """An id may hold what Unicode takes for the end of a line: it stays one patient's."""
    ids = [f"P{i // 2}" + f"{end}x" * (i % 6 == 0) for i in range(40)]
    write_images(tmp_path / "pool", [(f"i{i}.png", "abc"[i % 3], p) for i, p in enumerate(ids)])
    study = make_study(holdout={"test": 0.3, "validation": 0.2})
    planned = virtual_sites.plan_sites(
        virtual_sites.cut_pool(tmp_path / "pool", study, spec="iid", sites=4), study
    )
    files = virtual_sites.write_sites(planned, study, tmp_path / "run", tmp_path / "cache")
    trained = [cut_records(Site.read(file), study).train for file in files]
    assert [count_patients(records) for records in trained] == [plan.training for plan in planned]
    assert sum(plan.training for plan in planned)


def test_an_id_of_two_lines_is_refused(tmp_path):
    write_images(tmp_path / "pool", [("a.png", "a", "P1\nx"), ("b.png", "b", "P2")])
    with pytest.raises(DataError, match="ids of one line, got 1 rows"):
        virtual_sites.cut_pool(tmp_path / "pool", make_study(), spec="iid", sites=1)


def test_whoever_a_hospital_forgot_is_left_out_of_its_simulations_too(tmp_path):
    """A patient who withdrew was trained on again by whoever simulated from the real site file."""
    home = tmp_path / "real"
    rows = [(f"{i}.png", PHANTOM_CLASSES[i % 2], f"p{i // 2}") for i in range(20)]
    write_images(home, rows)
    real = Site.read(write_site(home, name="real"))
    for patient in ("p3", "p7"):
        exclude_patient(real, patient)
    wanted = make_study(classes=PHANTOM_CLASSES, holdout={"validation": 0.3, "test": 0.3})
    (plan,) = virtual_sites.plan_sites([virtual_sites.find_site(home)], wanted)
    assert sum(sum(counts) for counts in plan.images.values()) == 16
    (path,) = virtual_sites.write_sites([plan], wanted, tmp_path / "run", tmp_path / "cache")
    virtual = Site.read(path)
    parts = cut_records(virtual, wanted)
    used = {r.patient for r in (*parts.train, *parts.validation, *parts.test)}
    assert used == {f"p{i}" for i in range(10)} - {"p3", "p7"}
    assert count_patients(parts.train) == plan.training
    # By its own secret: the list of one tells nothing about the other's.
    lists = [(site.state / "forgotten").read_text().split() for site in (real, virtual)]
    assert len(lists[1]) == 2
    assert not set(lists[0]) & set(lists[1])
