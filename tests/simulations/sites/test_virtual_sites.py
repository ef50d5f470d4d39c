"""One machine that plays many hospitals."""

import pytest

from client.data.records import Format
from common.errors import SiteError
from simulations.sites import virtual_sites
from tests.builders import PHANTOM_CLASSES, make_study, write_site, write_sites

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
