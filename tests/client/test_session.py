"""A site joins with what it really has, refuses before it looks, and runs rounds whatever is
missing."""

import csv
import gc
import logging
import resource
import subprocess
import sys
import weakref
from collections import Counter
from functools import partial
from importlib.metadata import version

import numpy as np
import pytest
import torch
from flwr.app import Context, Message, RecordDict

from client.consent.cohort import cut_records
from client.consent.proposals import keep_proposal, parse_proposal
from client.data import npz
from client.preparation import Workspace
from client.site import Site
from common.config.yaml import dump
from common.errors import (
    BackboneError,
    ContractError,
    DataError,
    RefusedError,
    SiteError,
    StudyError,
)
from common.flower.messages import identify_task, name_message
from common.protocol.join import JoinRequest
from common.protocol.ledger import LedgerHead
from simulations.sites.pretrain import WEIGHTS
from tests.builders import (
    OPEN,
    ROOT,
    RUNTIME,
    client_app,
    make_site,
    make_study,
    session_of,
    write_images,
)

pytestmark = pytest.mark.numbers

CLASSES = ("dark", "grey", "bright")
HEAD = LedgerHead(count=1, hash="0" * 64, receipt="0" * 64)
LIGHT = {"dark": 20, "grey": 120, "bright": 230}


study = partial(
    make_study,
    name="t",
    classes=CLASSES,
    images={"size": 64},
    train={"rounds": 3, "batch_size": 4},
    holdout={"validation": 0.0, "test": 0.0},
)


def paint(number, label):
    """A square whose brightness is its label's, with some noise."""
    noise = np.random.default_rng(number).integers(-15, 16, (40, 40, 3))
    return (LIGHT.get(label, 0) + noise).clip(0, 255).astype(np.uint8)


def hospital_of(folder, rows, **keys):
    """A hospital from rows of (label, patient, split)."""
    with_split = any(split for *_, split in rows)
    columns = 4 if with_split else 3
    write_images(folder, [(f"{i}.png", *row)[:columns] for i, row in enumerate(rows)], paint)
    return make_site(folder, **keys)


def patients(count, start=0):
    """One image each, every class in turn, no split."""
    return [(CLASSES[i % 3], f"p{i}", "") for i in range(start, start + count)]


def break_images(folder):
    for path in folder.glob("*.png"):
        path.write_bytes(b"not an image")


def run(session, number=1):
    """One whole round: evaluate, train, evaluate what came out."""
    initial = session.prepared.network.initial
    before = session.evaluate(initial, "validation")
    loss = session.train(initial, number, 0.0)
    tensors = {name: tensor.clone() for name, tensor in session.prepared.network.tensors.items()}
    return before, loss, tensors, session.evaluate(tensors, "test")


# --- what it says about itself ---


def test_what_it_joins_with_is_what_the_folder_holds(tmp_path):
    rows = [
        ("dark", "a", "train"),
        ("dark", "a", "train"),
        ("bright", "a", "train"),
        ("bright", "b", "train"),
        ("grey", "c", "validation"),
        ("dark", "d", "test"),
        ("dark", "d", "test"),
        ("bright", "e", "test"),
    ]
    augment = {"views": 3, "ops": ["flip", "rotate"]}
    wanted = study(images={"size": 64, "augment": augment})
    session = session_of(hospital_of(tmp_path, rows), wanted)
    reply = session.join(HEAD, [])
    assert (reply.name, reply.role, reply.ledger) == ("ward", "train", HEAD)
    assert reply.patients.model_dump() == {"train": 2, "validation": 1, "test": 2}
    assert reply.images.model_dump() == {
        "train": (2, 0, 2),
        "validation": (0, 1, 0),
        "test": (2, 0, 1),
    }
    assert reply.contract == session.prepared.network.contract
    assert set(reply.versions.model_dump()) == {"python", "flwr", "torch", "torchvision", "numpy"}
    # Views are not images, and only training has them.
    assert {part: len(data) for part, data in session.prepared.examples.items()} == {
        "train": 4,
        "validation": 1,
        "test": 3,
    }
    assert [data.prepared.views for data in session.prepared.examples.values()] == [3, 1, 1]
    before, _, _, after = run(session)
    assert before.confusion.sum(1).tolist() == [0, 1, 0]
    assert after.confusion.sum(1).tolist() == [2, 0, 1]


def test_a_phantom_hospital_is_cut_by_patient_and_learns(phantoms, tmp_path):
    root = phantoms / "north"
    with (root / "manifest.csv").open() as file:
        table = list(csv.DictReader(file))
    data = {"format": "manifest", "root": str(root)}
    content = {
        "name": "north",
        "data": data,
        "state": "state",
        "weights": str(WEIGHTS.parent),
        "policy": OPEN,
    }
    (tmp_path / "site.yaml").write_text(dump(content))
    wanted = study(
        classes=["clear", "nodule", "consolidation", "effusion"],
        model={"backbone": "shufflenet_v2_x0_5", "weights": f"elsewhere/{WEIGHTS.name}"},
        train={"rounds": 3, "local_epochs": 8, "lr": 3e-3},
        holdout={"validation": 0.2, "test": 0.3},
    )
    session = session_of(Site.read(tmp_path / "site.yaml"), wanted)
    reply = session.join(HEAD, [])
    assert sum(reply.patients.model_dump().values()) == len({row["patient"] for row in table})
    total = Counter(row["label"] for row in table)
    summed = np.sum(list(reply.images.model_dump().values()), axis=0)
    assert dict(zip(wanted.classes, summed.tolist(), strict=True)) == total
    parts = cut_records(session.prepared.site, wanted)
    ids = [{r.patient for r in part} for part in (parts.train, parts.validation, parts.test)]
    assert len(ids[0] | ids[1] | ids[2]) == sum(map(len, ids))
    assert tuple(map(len, ids)) == session.prepared.offer.patients.all
    start = session.evaluate(session.prepared.network.initial, "train")
    session.train(session.prepared.network.initial, 1, 0.0)
    tensors = {name: tensor.clone() for name, tensor in session.prepared.network.tensors.items()}
    end = session.evaluate(tensors, "train")
    assert end.n == start.n == sum(reply.images.train)
    assert end.loss_sum < 0.85 * start.loss_sum


# --- odd sites ---


def test_one_patient_is_enough(tmp_path):
    session = session_of(hospital_of(tmp_path, [("grey", "only", "")]), study())
    assert session.join(HEAD, []).patients.model_dump() == {
        "train": 1,
        "validation": 0,
        "test": 0,
    }
    before, loss, tensors, after = run(session)
    assert (before.n, after.n) == (0, 0)
    assert loss == pytest.approx(np.log(3), rel=1e-4)
    assert any(not torch.equal(tensors[n], session.prepared.network.initial[n]) for n in tensors)


def test_a_part_without_patients_has_no_counts(tmp_path):
    rows = [("dark", "a", "train"), ("bright", "b", "train"), ("grey", "c", "test")]
    session = session_of(hospital_of(tmp_path, rows), study())
    assert session.join(HEAD, []).images.validation == (0, 0, 0)
    before, _, _, after = run(session)
    assert (before.n, after.n) == (0, 1)


def test_nobody_to_train_on_is_refused_with_a_remedy(tmp_path):
    held_out = hospital_of(tmp_path, [("dark", "a", "test"), ("grey", "b", "validation")])
    with pytest.raises(DataError, match=r"training patient, got 0.*role: evaluate"):
        session_of(held_out, study())
    all_broken = hospital_of(tmp_path / "broken", patients(3))
    break_images(tmp_path / "broken")
    with pytest.raises(DataError, match=r"training patient, got 0"):
        session_of(all_broken, study(images={"size": 64, "unreadable": "skip"}))


def test_a_class_nobody_has_here_is_fine(tmp_path):
    rows = [("dark", "a", ""), ("bright", "b", ""), ("dark", "c", "")]
    how = {"rounds": 3, "imbalance": "weighted"}
    session = session_of(hospital_of(tmp_path, rows), study(train=how))
    assert session.join(HEAD, []).images.train == (2, 0, 1)
    _, loss, tensors, _ = run(session)
    assert np.isfinite(loss)
    assert all(tensor.isfinite().all() for tensor in tensors.values())


@pytest.mark.parametrize("split", ["", "train"])
def test_a_site_that_only_evaluates_holds_out_everyone(tmp_path, split):
    rows = [(label, patient, split) for label, patient, _ in patients(7)]
    policy = {"min_patients": 100}  # of training patients: there are none to protect
    session = session_of(hospital_of(tmp_path, rows, role="evaluate", policy=policy), study())
    reply = session.join(HEAD, [])
    assert (reply.role, reply.images.train) == ("evaluate", (0, 0, 0))
    assert reply.patients.model_dump() == {"train": 0, "validation": 0, "test": 7}
    assert session.evaluate(session.prepared.network.initial, "test").n == 7


def test_labels_outside_the_study_are_named_and_counted(tmp_path):
    rows = [("dark", "a", ""), ("blue", "b", ""), ("blue", "c", ""), ("red", "d", "")]
    with pytest.raises(DataError, match=r"dark, grey, bright.*'blue' \(2\), 'red' \(1\)"):
        session_of(hospital_of(tmp_path, rows), study())


# --- refusals come before any image is opened or backbone loaded ---


@pytest.mark.parametrize(
    ("policy", "why"),
    [
        ({"max_epsilon": 1.0, "delta": 1e-5}, "max_epsilon"),
        ({"unfreeze": ["head"]}, "unfreeze"),
        ({"min_patients": 4}, "min_patients"),
    ],
)
def test_policy_refuses_before_it_looks(tmp_path, policy, why):
    hospital = hospital_of(tmp_path, patients(3), policy=policy)
    break_images(tmp_path)
    # Neither could the images be read, nor the weights be found.
    model = {"backbone": "shufflenet_v2_x0_5", "weights": "lost.pth", "unfreeze": "last:1"}
    with pytest.raises(RefusedError, match=why):
        session_of(hospital, study(model=model))
    assert not (hospital.state / "cache").exists()


def test_policy_that_is_met_does_not_refuse(tmp_path):
    policy = {"unfreeze": ["head", "last:1"], "min_patients": 3}
    model = {"backbone": "shufflenet_v2_x0_5", "weights": "none", "unfreeze": "last:1"}
    session = session_of(hospital_of(tmp_path, patients(3), policy=policy), study(model=model))
    assert session.join(HEAD, []).images.train == (1, 1, 1)


@pytest.mark.parametrize("keys", [{}, {"weights": "empty"}])
def test_missing_weights_name_the_sites_own_key(tmp_path, keys):
    (tmp_path / "empty").mkdir()
    hospital = hospital_of(tmp_path, patients(3), **keys)
    break_images(tmp_path)
    model = {"backbone": "shufflenet_v2_x0_5", "weights": "/coordinator/only/lost.pth"}
    with pytest.raises(BackboneError) as refused:
        session_of(hospital, study(model=model))
    text = str(refused.value)
    assert text.startswith(f"{hospital.source}: weights: expected a folder with lost.pth, got ")
    assert "coordinator" not in text
    assert keys.get("weights", "nothing") in text.split("got ")[1]


def test_an_impossible_depth_is_the_studys_mistake(tmp_path):
    model = {"backbone": "shufflenet_v2_x0_5", "weights": "none", "unfreeze": "last:9"}
    with pytest.raises(StudyError, match="last:5"):
        session_of(hospital_of(tmp_path, patients(3)), study(model=model))


# --- unreadable images ---


def test_unreadable_images_are_refused_unless_the_study_skips_them(tmp_path):
    rows = [(label, patient, "test") for label, patient, _ in patients(3)]
    rows += [(label, patient, "train") for label, patient, _ in patients(3, start=3)]
    hospital = hospital_of(tmp_path, rows)
    (tmp_path / "1.png").write_bytes(b"not an image")
    with pytest.raises(DataError, match=r"1 of 3 images.*1\.png"):
        session_of(hospital, study())


def test_skipping_keeps_each_row_beside_its_label(tmp_path, caplog):
    hospital = hospital_of(tmp_path, patients(14))
    for i in (0, 3, 4, 10, 13):
        (tmp_path / f"{i}.png").write_bytes(b"not an image")
    images = {"size": 64, "unreadable": "skip", "augment": {"views": 3, "ops": ["flip"]}}
    # With everything unfrozen rows are pixels: their brightness tells their label.
    model = {"backbone": "shufflenet_v2_x0_5", "weights": "none", "unfreeze": "all"}
    with caplog.at_level(logging.WARNING):
        session = session_of(hospital, study(images=images, model=model))
    assert "5 of 14 images" in caplog.text
    data = session.prepared.examples["train"]
    assert len(data) == 9
    for i, label in enumerate(data.labels.tolist()):
        for view in range(3):
            light = data.prepared.rows[torch.tensor([3 * i + view])].float().mean()
            assert abs(light - LIGHT[CLASSES[label]]) < 20
    reply = session.join(HEAD, [])
    assert reply.patients.train == 9
    assert reply.images.train == (3, 2, 4)


def test_skipped_images_do_not_count_towards_the_policys_least(tmp_path):
    hospital = hospital_of(tmp_path, patients(5), policy={"min_patients": 4})
    skip = study(images={"size": 64, "unreadable": "skip"})
    (tmp_path / "0.png").write_bytes(b"not an image")
    assert session_of(hospital, skip).join(HEAD, []).patients.train == 4
    (tmp_path / "1.png").write_bytes(b"not an image")
    with pytest.raises(RefusedError, match=r"min_patients.*got 3"):
        session_of(hospital, skip)


# --- rounds ---


def test_a_round_is_repeatable_and_starts_from_what_was_sent(tmp_path):
    holdout = {"validation": 0.2, "test": 0.2}
    session = session_of(hospital_of(tmp_path, patients(20)), study(holdout=holdout))
    _, loss, tensors, _ = run(session)
    session.train(tensors, 2, 0.0)  # must not matter
    _, again, same, _ = run(session)
    _, _, other, _ = run(session, number=2)
    assert again == loss
    assert all(torch.equal(tensors[name], same[name]) for name in tensors)
    assert any(not torch.equal(tensors[name], other[name]) for name in tensors)


def test_sites_draw_their_own_order(tmp_path):
    rows = patients(9)
    (tmp_path / "one").mkdir()
    one = session_of(hospital_of(tmp_path / "one", rows), study())
    other = session_of(hospital_of(tmp_path / "other", rows, name="clinic"), study())
    first, second = run(one)[2], run(other)[2]
    assert any(not torch.equal(first[name], second[name]) for name in first)


def test_the_learning_rate_follows_the_schedule(tmp_path):
    how = {"rounds": 2, "optimizer": "sgd", "momentum": 0.0, "lr": 0.1, "schedule": "cosine"}
    session = session_of(hospital_of(tmp_path, patients(4)), study(train=how))
    bias = next(name for name in session.prepared.network.initial if name.endswith("bias"))
    start = session.prepared.network.initial[bias]
    moves = [(run(session, number)[2][bias] - start).norm().item() for number in (1, 2)]
    assert moves[1] == pytest.approx(moves[0] / 2, rel=1e-3)


def test_what_is_kept_may_be_the_hospitals_choice(tmp_path):
    results = {}
    for keep, dtype in (("activations", torch.float32), ("images", torch.uint8)):
        hospital = hospital_of(tmp_path / keep, patients(8), keep=keep)
        session = session_of(hospital, study(model={"backbone": "resnet18", "weights": "none"}))
        assert session.prepared.examples["train"].prepared.rows[torch.tensor([0])].dtype == dtype
        results[keep] = run(session)
    (_, loss, cached, _), (_, other, computed, _) = results["activations"], results["images"]
    assert loss == other
    for name, tensor in cached.items():
        assert torch.equal(tensor, computed[name])


def test_what_it_computes_in_is_the_studys_choice(tmp_path):
    model = {"backbone": "shufflenet_v2_x0_5", "weights": str(WEIGHTS), "unfreeze": "last:1"}
    contracts, trained = {}, {}
    for dtype in ("float32", "bfloat16"):
        hospital = hospital_of(tmp_path / dtype, patients(8), weights=str(WEIGHTS.parent))
        session = session_of(hospital, study(model=model | {"precision": dtype}))
        contracts[dtype] = session.join(HEAD, []).contract
        row = session.prepared.examples["train"].prepared.rows[torch.tensor([0])]
        assert row.dtype == getattr(torch, dtype)
        trained[dtype] = run(session)[2]
    moved = 0.0
    for name, tensor in trained["bfloat16"].items():
        assert tensor.dtype == torch.float32
        moved = max(moved, (tensor - trained["float32"][name]).abs().max().item())
    assert 0 < moved < 0.05
    assert contracts["float32"].differences(contracts["bfloat16"]) == ["study"]


def test_a_device_that_cannot_compute_in_the_studys_precision_refuses(tmp_path):
    hospital = hospital_of(tmp_path, patients(3), device="mps")
    model = {"backbone": "shufflenet_v2_x0_5", "weights": "none", "precision": "bfloat16"}
    with pytest.raises(RefusedError) as refused:
        session_of(hospital, study(model=model))
    expected = f"{hospital.source}: device: expected one that computes in bfloat16, got mps. Write"
    assert str(refused.value).startswith(expected)


def test_a_second_opening_computes_nothing(tmp_path):
    hospital = hospital_of(tmp_path, patients(6))
    first = session_of(hospital, study())
    shards = {p: p.stat().st_mtime_ns for p in hospital.cache_folder.rglob("*.safetensors")}
    again = session_of(hospital, study())
    assert {p: p.stat().st_mtime_ns for p in hospital.cache_folder.rglob("*.safetensors")} == shards
    indices = torch.arange(6)
    rows = [s.prepared.examples["train"].prepared.rows[indices] for s in (first, again)]
    assert torch.equal(*rows)


# --- studies it joined ---


def test_an_agreed_study_is_remembered_across_processes(tmp_path):
    hospital, wanted = hospital_of(tmp_path, patients(3)), study()
    keep_proposal(hospital, wanted)
    RUNTIME.close_sessions()
    session = RUNTIME.open_session(tmp_path / "site.yaml", wanted.id)
    assert session.prepared.study.id == wanted.id
    assert RUNTIME.open_session(tmp_path / "site.yaml", wanted.id) is session
    (kept,) = (tmp_path / "state" / "studies").iterdir()
    assert kept.stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize("spelling", ["zz/{}", "./{}", "../studies/{}", "{}\n", " {}", "{}.json/"])
def test_a_study_has_one_spelling(tmp_path, spelling):
    hospital, wanted = hospital_of(tmp_path, patients(3)), study()
    keep_proposal(hospital, wanted)
    (tmp_path / "state" / "studies" / "zz").mkdir()
    with pytest.raises(ContractError, match="not joined"):
        RUNTIME.open_session(tmp_path / "site.yaml", spelling.format(wanted.id))
    RUNTIME.open_session(tmp_path / "site.yaml", wanted.id)


def test_a_session_keeps_no_image(tmp_path):
    """A pool of arrays is in memory once, and not at all when the next is opened."""
    random = np.random.default_rng(0)
    arrays = {}
    for split in ("train", "val", "test"):
        arrays[f"{split}_images"] = random.integers(0, 256, (6, 40, 40), dtype=np.uint8)
        arrays[f"{split}_labels"] = np.arange(6) % 3
    np.savez(tmp_path / "pool.npz", **arrays)
    hospital = hospital_of(tmp_path, patients(3), data={"format": "npz", "root": "pool.npz"})
    pool = weakref.ref(hospital.data.records(CLASSES)[0].image.array.base)
    session = session_of(hospital, study())
    assert pool() is not None
    npz._arrays.cache_clear()
    gc.collect()
    assert pool() is None
    assert session.join(HEAD, []).patients.train == 6


@pytest.mark.parametrize("name", ["0123456789abcdef", "", "../../site", "../secret"])
def test_a_study_never_joined_is_not_opened(tmp_path, name):
    hospital_of(tmp_path, patients(3))
    with pytest.raises(ContractError, match="not joined"):
        RUNTIME.open_session(tmp_path / "site.yaml", name)


@pytest.mark.parametrize("proposal", ["", "{}", "[1]", '{"name": "x", "extra": 1}'])
def test_a_proposal_that_is_no_study_is_refused(proposal):
    with pytest.raises(ContractError, match="not a valid study"):
        parse_proposal(proposal)


def test_a_proposal_has_one_spelling():
    """What a person approves is known by the hash of its bytes."""
    wanted = study()
    assert parse_proposal(wanted.proposal()).sha256 == wanted.sha256
    for other in (f" {wanted.proposal()}", wanted.proposal().replace('":', '": ')):
        with pytest.raises(ContractError, match="not written as this version writes it"):
            parse_proposal(other)


def test_another_study_with_the_same_id_replaces_nothing(tmp_path, monkeypatch):
    """64 bits are few for whoever may choose both studies."""
    hospital, wanted = hospital_of(tmp_path, patients(3)), study()
    keep_proposal(hospital, wanted)
    other = study(train={"rounds": 9})
    monkeypatch.setattr(type(other), "id", property(lambda _: hospital_id))
    hospital_id = (next((tmp_path / "state/studies").iterdir())).stem
    with pytest.raises(ContractError, match=f"a second study with the id {hospital_id}"):
        keep_proposal(hospital, other)
    assert (tmp_path / f"state/studies/{hospital_id}.json").read_text() == wanted.proposal()


def test_a_state_folder_that_cannot_be_made_is_the_sites_mistake(tmp_path):
    (tmp_path / "file").touch()
    hospital = hospital_of(tmp_path, patients(3), state="file/state")
    with pytest.raises(SiteError, match=r"site\.yaml: state"):
        session_of(hospital, study())


def test_a_full_disk_is_the_sites_mistake(tmp_path):
    hospital = hospital_of(tmp_path, patients(3))
    hospital.private("studies")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (16, hard))
    try:
        with pytest.raises(SiteError, match=r"site\.yaml: state: .*Free space"):
            keep_proposal(hospital, study())
        with pytest.raises(SiteError, match=r"secret: .*Free space"):
            hospital.secret()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert [path.name for path in hospital.state.iterdir()] == ["studies"]


# --- what leaves the machine when something fails ---


@pytest.mark.parametrize("node", [{}, {"site": 5}, {"site": "/data/DOE_JOHN/site.yaml"}])
def test_only_a_code_leaves_a_node_without_a_site_file(node):
    identify_task(1, 1)
    message = Message(JoinRequest(proposal=study().proposal()).record(), 1, "query")
    name_message(message, "m")
    reply = client_app(message, Context(1, 1, node, RecordDict(), {}))
    assert reply.has_error()
    assert reply.error.reason == "site"


UNFIT = {
    "1.43.0": "import importlib.metadata as m; m.version = lambda name: '1.43.0'",
    f"{version('flwr')} without flwr.supercore.run": "import flwr.supercore.run as m; del m.Run",
    f"{version('flwr')} without flwr.app": "import flwr.app as m; del m.Context, m.Error",
}


@pytest.mark.system
@pytest.mark.parametrize("got", UNFIT)
def test_an_unfit_flwr_is_refused_in_fixed_words(got):
    """Flower sends the text of a failed import to the server."""
    code = f"{UNFIT[got]}\ntry:\n import client.app\nexcept Exception as ex: print(repr(ex))"
    told = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout.strip()
    remedy = "pip install 'flwr>=1.41,<1.43'"
    assert told == f"ImportError({f'flwr: expected >=1.41,<1.43, got {got}. {remedy}'!r})"


def test_the_sites_of_a_process_share_one_network():
    workspace, wanted = Workspace(), study()
    first = workspace.network(wanted, "none")
    assert workspace.network(study(), "none") is first
    assert workspace.network(study(seed=1), "none") is not first
