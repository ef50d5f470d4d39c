"""A private study, whole: real apps, messages and ledgers; ε by an independent accountant."""

import json
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from dp_accounting import GaussianDpEvent, NeighboringRelation, PoissonSampledDpEvent
from dp_accounting.pld import PLDAccountant
from flwr.app import ConfigRecord, MessageType, RecordDict
from PIL import Image
from safetensors.torch import load_file

from client.admin.lost import list_lost_releases
from client.consent.agreement import Agreement
from client.consent.proposals import keep_proposal
from client.ledger.adoption import adopt_ledger, salvage_ledger
from client.ledger.entries import Reserved, Sealed, Sent, list_events
from client.ledger.ledger import read_ledger
from client.privacy import dp_sgd
from client.privacy.accountant import DpEvent
from client.privacy.noise import Entropy
from client.site import Site
from common.config.study import Study
from common.config.yaml import dump
from common.errors import RunError, StudyError
from common.protocol.join import JoinRequest
from common.protocol.round import make_round_config
from common.protocol.tensors import to_arrays
from server.app import app as server_app
from server.runs.results import read_results
from server.runs.run_folder import RunFolder
from simulations.engines.base import InProcess
from simulations.engines.grid import InProcessGrid, simulate_run
from simulations.sites import virtual_sites
from simulations.studies import runner
from tests.builders import (
    FULL_BATCH,
    PHANTOM_CLASSES,
    PHANTOMS,
    RUNTIME,
    client_app,
    create_run,
    edit_site,
    find_phantoms,
    make_study,
    write_sites,
)

pytestmark = pytest.mark.numbers

DELTA = 1e-5


@pytest.fixture(autouse=True)
def _own_process(new_process: Any) -> None:
    new_process()


study = partial(
    make_study,
    name="private",
    classes=PHANTOM_CLASSES,
    model={"unit_features": True},
    train={"rounds": 3, **FULL_BATCH},
    privacy={
        "mechanism": "dp_sgd",
        "epsilon": 4.0,
        "delta": DELTA,
        "spare_rounds": 1,
    },
)


def settle(wanted: Study, phantoms: Path, folder: Path, **policies: dict[str, Any]) -> list[Path]:
    """Site files of the four phantoms in a run folder; some with a policy of their own."""
    files = create_run(find_phantoms(phantoms), wanted, folder, folder.parent / "cache")
    for path in files:
        if policy := policies.get(path.parent.name):
            edit_site(path, policy=policy)
    return files


def entries(site_file: Path) -> list[Any]:
    return read_ledger(Site.read(site_file).state)


def by_google(events: tuple[DpEvent, ...]) -> float:
    either = NeighboringRelation.ADD_OR_REMOVE_ONE
    accountant = PLDAccountant(either, value_discretization_interval=1e-4)
    for s in events:
        step = PoissonSampledDpEvent(s.sample_rate, GaussianDpEvent(s.noise_multiplier))
        accountant.compose(step, s.steps)
    return float(accountant.get_epsilon(DELTA))


class Coordinator:
    """Asks one site whatever it wants."""

    def __init__(self, site_file: Path, wanted: Study) -> None:
        self.study, self.site_file = wanted, site_file
        self.grid = InProcessGrid(client_app, [site_file])

    def send(self, content: RecordDict, kind: str) -> Any:
        (node,) = self.grid.get_node_ids()
        (reply,) = self.grid.send_and_receive([self.grid.create_message(content, kind, node, "0")])
        return reply

    def join(self) -> Any:
        return self.send(JoinRequest(proposal=self.study.proposal()).record(), "query")

    def round(self, number: int = 1, scale: float = 0.0) -> Any:
        network = RUNTIME.open_session(self.site_file, self.study.id).prepared.network
        tensors = {name: torch.full(shape, scale) for name, shape in network.shapes.items()}
        config = {**make_round_config(self.study.id), "server-round": number}
        record = RecordDict({"arrays": to_arrays(tensors), "config": ConfigRecord(config)})
        return self.send(record, MessageType.TRAIN)


def arrays(reply: Any) -> dict[str, np.ndarray]:
    return {name: array.numpy() for name, array in reply.content.array_records["arrays"].items()}


def test_a_private_study_spends_what_it_promised_and_tells_nothing_beside(phantoms, tmp_path):
    wanted = study()
    files = settle(wanted, phantoms, tmp_path / "run")
    simulate_run(server_app, client_app, files, tmp_path / "run")
    for path in files:
        lines = entries(path)
        states = [type(line) for line in lines if getattr(line, "release", None)]
        assert states == [Sent, *[Reserved, Sealed, Sent] * 3, Sent]
        told = {name for line in lines if isinstance(line, Sent) for name in line.contents.metrics}
        assert not {name for name in told if "loss" in name and "loss_sum" not in name}
        joined = lines[1].contents.metrics
        assert "patients.test" in joined
        assert {"patients.train", "images.train"}.isdisjoint(joined)
        spent = list_events(lines)
        assert sum(s.steps for s in spent) == 3  # of four, one of them spare
        whole = tuple(DpEvent(s.noise_multiplier, s.sample_rate, 4) for s in spent[:1])
        assert 3.9 < by_google(whole) <= 4.0
    folder = RunFolder(tmp_path / "run")
    results, facts = read_results(folder.path, len(wanted.classes))
    assert facts["released_round"] == 3
    last, model = (
        load_file(folder.path / "last.safetensors"),
        load_file(folder.path / "model.safetensors"),
    )
    assert all(torch.equal(model[name], tensor) for name, tensor in last.items())
    assert any(tensor.any() for tensor in last.values())
    lines = folder.read_history()
    assert {line["train_loss"] for line in lines} == {None}
    assert {line["auroc"] for line in lines if line["model_round"] < 3} == {None}
    assert set(results["federated"]) == set(PHANTOMS)


def test_the_same_study_twice_never_gives_the_same_model(phantoms, tmp_path, new_process):
    """Whoever knows the study's seed cannot repeat, and so not subtract, what was drawn."""
    replies = []
    for name in ("one", "other"):
        files = settle(study(), phantoms, tmp_path / name)
        coordinator = Coordinator(files[0], study())
        coordinator.join()
        replies.append(arrays(coordinator.round()))
        new_process()
    one, other = replies
    for name in one:
        assert np.isclose(one[name], other[name]).mean() < 1e-2  # a few by chance


def test_a_question_asked_again_is_free_and_another_is_not(phantoms, tmp_path, new_process):
    files = settle(study(), phantoms, tmp_path / "run")
    coordinator = Coordinator(files[0], study())
    coordinator.join()
    first = arrays(coordinator.round())
    new_process()
    again = arrays(coordinator.round())
    assert all((first[name] == again[name]).all() for name in first)
    assert len(list_events(entries(files[0]))) == 1
    asked = [coordinator.round(1, scale) for scale in (0.1, 0.2, 0.3, 0.4, 0.5)]
    assert [reply.has_error() for reply in asked] == [False, False, False, True, True]
    assert {reply.error.reason for reply in asked if reply.has_error()} == {"budget"}
    assert len(list_events(entries(files[0]))) == 4  # three rounds and a spare one, and never more
    assert not coordinator.round().has_error()  # what was sealed is free, the budget spent


def test_who_cannot_pay_stays_out_and_the_study_goes_on(phantoms, tmp_path):
    wanted = study(aggregate={"quorum": 3})
    poor = {"max_epsilon": 4.0, "delta": DELTA}
    files = settle(wanted, phantoms, tmp_path / "run", north=poor)
    (north,) = [path for path in files if path.parent.name == "north"]
    before = study(seed=5)
    earlier = Coordinator(north, before)
    earlier.join()
    assert not earlier.round().has_error()
    simulate_run(server_app, client_app, files, tmp_path / "run")
    results, _ = read_results(tmp_path / "run", len(wanted.classes))
    assert set(results["federated"]) == {"east", "south", "west"}
    told = (tmp_path / "run" / "run.yaml").read_text()
    assert "its privacy budget does not suffice" in told
    assert len(list_events(entries(north))) == 1


def test_a_server_killed_before_its_checkpoint_gets_the_sealed_replies(
    phantoms, tmp_path, new_process, monkeypatch
):
    wanted, run = study(), tmp_path / "run"
    files = settle(wanted, phantoms, run)

    def killed(self, checkpoint, save=RunFolder.save_last):
        if checkpoint.round == 2:
            raise KeyboardInterrupt
        save(self, checkpoint)

    with monkeypatch.context() as patch:
        patch.setattr(RunFolder, "save_last", killed)
        with pytest.raises(KeyboardInterrupt):
            simulate_run(server_app, client_app, files, run)
    before = {path: [e.contents for e in entries(path) if isinstance(e, Sealed)] for path in files}
    assert {len(sealed) for sealed in before.values()} == {2}
    new_process()
    simulate_run(server_app, client_app, files, run)
    for path in files:
        assert len(list_events(entries(path))) == 3
        sent = [e.contents for e in entries(path) if isinstance(e, Sent) and e.release.privacy]
        assert [contents in before[path] for contents in sent] == [True, True, True, False]
        assert sent[1] == sent[2]


def test_a_site_that_declares_no_number_of_patients_is_told_which_key(phantoms, tmp_path, caplog):
    files = settle(study(), phantoms, tmp_path / "run")
    content = Site.read(files[0]).model_dump(mode="json", exclude_none=True)
    del content["data"]["enrolled_patients"]
    files[0].write_text(dump(content))
    assert Coordinator(files[0], study()).join().error.reason == "refused"
    assert "data: expected enrolled_patients, got nothing. Set it to about" in caplog.text


def test_patients_that_come_or_go_change_no_constant_of_the_mechanism(phantoms, tmp_path):
    copy = tmp_path / "phantoms"
    shutil.copytree(phantoms, copy)
    wanted = study(train={"rounds": 3, "local_steps": 2, "batch_size": 3})
    files = settle(wanted, copy, tmp_path / "run")
    first = RUNTIME.open_session(files[0], _sent(files[0], wanted)).prepared.privacy_plan
    content = Site.read(files[0]).model_dump(mode="json", exclude_none=True)
    (tmp_path / "other").mkdir()
    manifest = copy / "east" / "manifest.csv"
    head, *rows = manifest.read_text().splitlines()
    manifest.write_text("\n".join([head, *rows[::2]]) + "\n")
    other = tmp_path / "other" / "site.yaml"
    other.write_text(dump(content | {"state": str(tmp_path / "other" / "state")}))
    assert RUNTIME.open_session(other, _sent(other, wanted)).prepared.privacy_plan == first


def _sent(site_file: Path, wanted: Study) -> str:
    keep_proposal(Site.read(site_file), wanted)
    return wanted.id


def test_too_few_sites_that_can_pay_end_the_study_with_the_reason(phantoms, tmp_path):
    wanted = study(aggregate={"quorum": 4})
    tight = {"max_epsilon": 3.0, "delta": DELTA}
    files = settle(wanted, phantoms, tmp_path / "run", north=tight)
    with pytest.raises(RunError, match=r"4 training sites .*its policy or its data do not let it"):
        simulate_run(server_app, client_app, files, tmp_path / "run")


def test_the_unit_is_the_patient_however_many_images(phantoms, tmp_path, monkeypatch, new_process):
    """One patient of 1 to 9 images moves a round by one clipped gradient; so do 50 copies."""

    def known() -> Entropy:
        entropy = Entropy()
        entropy._key_of_tests_only(bytes(32))  # the same noise, so that the rest can be compared
        return entropy

    monkeypatch.setattr(dp_sgd, "Entropy", known)
    head, *rows = (phantoms / "east" / "manifest.csv").read_text().splitlines()
    owner = {row: row.split(",")[head.split(",").index("patient")] for row in rows}
    number = {p: list(owner.values()).count(p) for p in owner.values()}
    assert min(number.values()) == 1
    assert max(number.values()) > 4
    for patient in (min(number, key=number.__getitem__), max(number, key=number.__getitem__)):
        others = [row for row in rows if owner[row] != patient]
        own = [row for row in rows if owner[row] == patient]
        moved = []
        for name, some in (("with", own), ("without", []), ("copies", own * 50)):
            folder = tmp_path / patient / name / "east"
            shutil.copytree(phantoms / "east", folder)
            # Last in the file: those before are then drawn with the same words of the key.
            (folder / "manifest.csv").write_text("\n".join([head, *others, *_files(folder, some)]))
            wanted = study(holdout={"validation": 0, "test": 0})
            (file,) = write_sites(
                [virtual_sites.find_site(folder)], wanted, folder.parent, tmp_path / "cache"
            )
            content = Site.read(file).model_dump(mode="json", exclude_none=True)
            content["data"]["enrolled_patients"] = 100
            file.write_text(dump(content))
            session = RUNTIME.open_session(file, _sent(file, wanted))
            privacy_plan, initial = session.prepared.privacy_plan, session.prepared.network.initial
            session._train_privately(initial, 1, 0.0, privacy_plan)
            tensors = session.prepared.network.tensors.values()
            moved.append(torch.cat([tensor.flatten() for tensor in tensors]))
            new_process()
        bound = wanted.train.lr * privacy_plan.round.clip_norm / privacy_plan.batch * (1 + 1e-4)
        with_it, without, copies = moved
        assert 0 < (with_it - without).norm() <= bound
        assert (copies - without).norm() <= bound


def _files(folder: Path, rows: list[str]) -> list[str]:
    """These rows, each with a file of its own."""
    named = []
    for i, row in enumerate(rows):
        image, rest = row.split(",", 1)
        with Image.open(folder / image) as picture:
            changed = picture.point(lambda p, shade=i // 50: max(p - shade, 0))
        changed.save(folder / f"copy{i}.png")
        named.append(f"copy{i}.png,{rest}")
    return named


def test_a_ledger_that_was_adopted_gives_no_study_its_budget_again(phantoms, tmp_path, new_process):
    """What was spent before may have been spent on the very study that goes on."""
    files = settle(study(), phantoms, tmp_path / "run")
    coordinator = Coordinator(files[0], study())
    coordinator.join()
    assert not coordinator.round().has_error()
    new_process()
    adopt_ledger(Site.read(files[0]).state, 3.5, DELTA / 2)
    assert not coordinator.round().has_error()  # its line was read: sealed bytes go out again
    assert coordinator.round(2).error.reason == "budget"
    other = Coordinator(files[0], study(seed=5))  # a study that begins now has all of its own
    other.join()
    replies = [other.round(1, scale) for scale in (0.0, 0.1, 0.2, 0.3, 0.4)]
    assert [reply.has_error() for reply in replies] == [False] * 4 + [True]


def test_a_deleted_ledger_gives_no_budget_back_either(phantoms, tmp_path, new_process):
    """Before, `ledger-adopt --epsilon 0` restored all of it, whatever had been agreed to."""
    files = settle(study(), phantoms, tmp_path / "run")
    coordinator = Coordinator(files[0], study())
    coordinator.join()
    assert not coordinator.round().has_error()
    new_process()
    site = Site.read(files[0])
    for path in site.state.glob("ledger.*"):
        path.unlink()
    for _ in range(2):  # the second time nothing is counted again
        lost = list_lost_releases(site, salvage_ledger(site.state).entries)
        adopt_ledger(site.state, 0.0, 0.0, lost)
        plan = Agreement.kept(site, study().id).privacy_plan
        assert len(list_events(entries(files[0]))) == plan.queries[0].times
    assert coordinator.round(2).error.reason == "budget"


def test_whatever_patients_decide_about_a_join_is_recorded(phantoms, tmp_path):
    """A label that one patient has is one bit about that patient: it leaves a line."""
    files = settle(study(), phantoms, tmp_path / "run")
    wanted = study(classes=["clear", "nodule", "consolidation"])
    assert Coordinator(files[0], wanted).join().error.reason == "refused"
    (line,) = [entry for entry in entries(files[0]) if isinstance(entry, Sent)]
    assert (line.release.study, line.release.kind) == (wanted.id, "join")
    assert line.contents.metrics == ("refused",)
    assert not (Site.read(files[0]).state / "studies" / f"{wanted.id}.json").exists()


def test_other_shares_held_out_are_refused_to_later_studies(phantoms, tmp_path, new_process):
    files = settle(study(), phantoms, tmp_path / "run")
    first = Coordinator(files[0], study())
    assert not first.join().has_error()
    assert not first.round().has_error()
    new_process()
    wanted = study(holdout={"validation": 0.4, "test": 0.1})
    assert Coordinator(files[0], wanted).join().error.reason == "refused"
    assert not Coordinator(files[0], study(seed=9)).join().has_error()


def test_a_private_study_never_trains_by_an_agreement_without_protection(phantoms, tmp_path):
    files = settle(study(), phantoms, tmp_path / "run")
    coordinator = Coordinator(files[0], study())
    coordinator.join()
    path = Site.read(files[0]).state / "studies" / f"{study().id}.agreement.json"
    bare = json.loads(path.read_text()) | {"protection": None}
    path.write_text(json.dumps(bare))
    RUNTIME.close_sessions()
    assert coordinator.round().has_error()
    assert not [e for e in entries(files[0]) if isinstance(e, Sent) and e.release.kind == "round"]


def test_a_private_study_begins_with_no_model_that_was_trained_openly(phantoms, tmp_path):
    found = [phantoms / name for name in PHANTOMS]
    source = runner.Source(folders=tuple(found))
    openly, private = tmp_path / "open.yaml", tmp_path / "private.yaml"
    same = {"train": {"rounds": 1}, "model": {**study().model.model_dump(), "weights": "none"}}
    openly.write_text(dump(json.loads(study(**same, privacy={"mechanism": "none"}).proposal())))
    private.write_text(dump(json.loads(study(train={"rounds": 1}).proposal())))

    def run(file: Path, folder: str, *changes: str, compare: bool = False) -> None:
        runner.run_study(
            file,
            source,
            tmp_path / folder,
            changes=changes,
            seeds=(),
            compare=compare,
            cache=tmp_path / "cache",
            engine=InProcess(),
        )

    run(openly, "open")
    run(private, "private")
    with pytest.raises(StudyError, match=r"model.init: expected a private run.*got one without"):
        run(private, "second", f"model.init={tmp_path / 'open'}")
    run(private, "third", f"model.init={tmp_path / 'private'}")
    with pytest.raises(StudyError, match="--compare: expected a study without privacy"):
        run(private, "fourth", compare=True)
