"""An audit: an honest study keeps below its ε, and one that is broken is found out."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from client import session
from client.cli.main import main as client
from client.models.membership import find_members
from client.privacy.noise import Entropy
from common.errors import RefusedError, RunError, StudyError
from common.heads.whitening import count_moments, count_prototypes
from common.support.terminal import console
from simulations.engines.audited import AUDIT
from simulations.sites import phantom
from simulations.studies.audit import audit_study, read_audit
from simulations.studies.runner import Source
from tests.builders import FULL_BATCH, PHANTOM_CLASSES, PHANTOMS, ROOT, make_study

MODEL = {"weights": str(ROOT / "simulations/sites/phantom_backbone.safetensors"), "init": None}
HEAD = {
    "classes": PHANTOM_CLASSES,
    "images": {"size": 64},
    "model": MODEL,
    "train": {"rounds": 0},
    "privacy": {"preset": "head", "epsilon": 1.0, "delta": 1e-5, "directions": 16},
}
ROUNDS = {
    "classes": PHANTOM_CLASSES,
    "images": {"size": 64},
    "model": MODEL | {"init": "zero", "unit_features": True},
    "train": {"rounds": 5, **FULL_BATCH},
    "privacy": {"mechanism": "dp_sgd", "epsilon": 1.0, "delta": 1e-5},
}


@pytest.fixture(autouse=True)
def _own_process(new_process):
    new_process()


@pytest.fixture(scope="module")
def many(tmp_path_factory):
    """Hospitals with patients enough to throw coins about."""
    folder = tmp_path_factory.mktemp("many")
    phantom.write_phantoms(folder, patients=240)
    return folder


def audit(many, folder, *, content=HEAD, epsilons=(1.0,), seeds=(0,), canaries=120):
    audit_study(
        make_study(**content),
        Source(folders=tuple(many / name for name in PHANTOMS)),
        folder,
        epsilons=epsilons,
        seeds=seeds,
        canaries=canaries,
        cache=many.parent / "cache",
    )
    return json.loads((folder / AUDIT).read_text())["bounds"]


@pytest.fixture
def broken(monkeypatch):
    """Makes every site add so much of its noise only, and forget to check it."""
    whole = Entropy.gaussians

    def add_only(share):
        def less(self, shapes):
            return [(n.double() * share).trunc().to(torch.int64) for n in whole(self, shapes)]

        monkeypatch.setattr(Entropy, "gaussians", less)
        monkeypatch.setattr(session, "check_noise", lambda plan: None)

    return add_only


def test_an_honest_head_keeps_its_promise(many, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(console, "width", 200)
    seeds = (0, 1, 2)  # of so many coins none but a broken promise is guessed so well
    found = audit(many, tmp_path / "audit", seeds=seeds)["ε = 1"]
    assert set(found) == {"model", "sums"}
    for bound in found.values():
        assert bound["canaries"] > 200
        assert max(bound["epsilon"], bound["gaussian"]) < 1.0 < bound["gaussian_ceiling"]
    out = " ".join(capsys.readouterr().out.split())
    assert "None is above the ε of its study" in out
    assert (tmp_path / "audit" / "audit.png").stat().st_size > 5_000
    shown = read_audit(tmp_path / "audit")["ε = 1"]
    assert shown == max(bound["gaussian"] for bound in found.values())
    before = (tmp_path / "audit" / AUDIT).read_bytes()
    audit(many, tmp_path / "audit", seeds=seeds)  # what is there is only read
    assert (tmp_path / "audit" / AUDIT).read_bytes() == before


@pytest.mark.parametrize(("content", "share"), [(HEAD, 0.0), (HEAD, 0.1), (ROUNDS, 0.0)])
def test_a_broken_site_is_found_out(many, tmp_path, capsys, monkeypatch, broken, content, share):
    monkeypatch.setattr(console, "width", 200)
    broken(share)
    found = audit(many, tmp_path / "audit", content=content)["ε = 1"]["sums"]
    assert found["gaussian"] > 1.0
    assert "ABOVE WHAT WAS PROMISED" in capsys.readouterr().out


@pytest.mark.parametrize("kind", ["moments", "prototypes"])
def test_a_single_sum_without_noise_is_found_out(many, tmp_path, monkeypatch, broken, kind):
    noise_rows = session.noise_rows
    sizes = {"moments": count_moments(16), "prototypes": count_prototypes(4, 16)}

    def leave_out(rows, release, size, entropy=None):
        with monkeypatch.context() as patch:
            if size == sizes[kind]:
                patch.setattr(Entropy, "gaussians", lambda self, shapes: map(_no_noise, shapes))
            return noise_rows(rows, release, size, entropy)

    monkeypatch.setattr(session, "noise_rows", leave_out)
    found = audit(many, tmp_path / "audit")["ε = 1"]["sums"]
    assert found["gaussian"] > 1.0


def _no_noise(shape):
    return torch.zeros(shape, dtype=torch.int64)


def test_patients_who_count_several_times_are_found_out(many, tmp_path, monkeypatch):
    make_rows = session.make_rows
    monkeypatch.setattr(
        session, "make_rows", lambda *a: [r for r in make_rows(*a) for _ in "1234567890"]
    )
    found = audit(many, tmp_path / "audit")["ε = 1"]["sums"]
    assert found["gaussian"] > 1.0


def test_a_site_that_tells_nothing_hides_nobody_else(many, tmp_path, capsys, broken, monkeypatch):
    broken(0.0)
    tell = session.Session.tell_noised

    def refuse(self, kind, whitening):
        if self.prepared.site.name == "west":
            raise RefusedError("west", expected="a question", got="this one")
        return tell(self, kind, whitening)

    monkeypatch.setattr(session.Session, "tell_noised", refuse)
    found = audit(many, tmp_path / "audit")["ε = 1"]["sums"]
    assert found["gaussian"] > 1.0
    assert "told no sums that were looked at: west" in capsys.readouterr().out


def test_an_audit_that_is_stopped_begins_anew(many, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(session, "noise_rows", _stop)
        with pytest.raises(KeyboardInterrupt):
            audit(many, tmp_path / "audit")
    assert audit(many, tmp_path / "audit")["ε = 1"]["sums"]["canaries"] > 60


def _stop(*_):
    raise KeyboardInterrupt


def test_without_privacy_sums_give_everybody_away(many, tmp_path):
    content = {key: value for key, value in HEAD.items() if key != "privacy"}
    content["model"] = MODEL | {"head": "discriminant"}
    found = audit(many, tmp_path / "audit", content=content, epsilons=(None,))["no privacy"]
    assert found["sums"]["right"] == found["sums"]["canaries"]
    assert found["sums"]["epsilon"] == found["sums"]["ceiling"]


def test_a_site_attacks_the_model_itself(many, tmp_path, run_main):
    audit(many, tmp_path / "audit")
    (site,) = tmp_path.rglob("sites/north/site.yaml")
    (kept,) = site.parent.glob("state/released/*.safetensors")
    (kept.parent / f"{'0' * 16}.safetensors").write_bytes(b"of another release")
    code, out = run_main(client, "audit", site, "study")
    assert code == 0
    assert f"study           {kept.stem}" in out
    assert "0.500 is chance" in out
    assert "held out" in out
    code, out = run_main(client, "audit", site, "another")
    assert code == 1
    assert f"expected a study that has ended here: study ({kept.stem}), got another" in out
    tensors = load_file(kept)
    save_file({name: tensor * torch.nan for name, tensor in tensors.items()}, kept)
    code, out = run_main(client, "audit", site, kept.stem)
    assert code == 1
    assert "expected finite losses on every patient, got some that are not" in out


def test_members_are_found_by_a_threshold_of_their_class_and_no_more_often_than_by_chance():
    rng = np.random.default_rng(3)
    labels = np.repeat([0, 1, 2], [400, 400, 10])
    members = rng.random(810) < 0.5
    spread = np.where(labels == 0, 8.0, 1.0)  # a hard class among members must not look like some
    sought, found = find_members(rng.standard_normal(810) * spread, labels, members)
    assert sought == (members & (labels < 2)).sum()
    assert 0.01 < found / sought < 0.1
    sought, found = find_members(np.where(members, 1.0, 0.0), labels, members)
    assert found == sought


def test_what_cannot_be_audited(many, tmp_path):
    with pytest.raises(RunError, match="expected an audit, got none"):
        read_audit(tmp_path)
    plain = {"classes": PHANTOM_CLASSES}
    with pytest.raises(StudyError, match="privacy: expected a mechanism, got none"):
        audit(many, tmp_path / "audit", content=plain)
    audit(many, tmp_path / "audit")
    next((tmp_path / "audit").rglob(f"seed-0/{AUDIT}")).unlink()
    with pytest.raises(RunError, match="got one that was interrupted"):
        audit(many, tmp_path / "audit")
