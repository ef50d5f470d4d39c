"""A study does nothing at a hospital until a person there says yes to that very study."""

import threading
import time
from functools import partial

import pytest

from client.cli import main as cli
from client.consent.approval import find_approval, keep_decision, list_approvals
from client.ledger.ledger import read_ledger
from client.site import Site
from common.errors import RunError, SiteError
from common.protocol.backbone import BACKBONE, BackbonePart
from common.protocol.join import JoinRequest
from server.reports.progress import Reporter
from server.rounds import federation
from server.rounds.loop import Run
from server.runs.run_folder import RunFolder
from simulations.engines.grid import InProcessGrid
from tests.builders import RUNTIME, client_app, edit_site, make_study
from tests.client.consent.test_limits import CLASSES, Coordinator, hospital

study = partial(make_study, name="skin", classes=CLASSES, train={"rounds": 2, "local_steps": 1})


@pytest.fixture(autouse=True)
def _own_process():
    yield
    RUNTIME.close_sites()
    RUNTIME.close_sessions()


def asking(folder, **policy):
    """A hospital whose person is asked."""
    return hospital(folder, approve="ask", **policy)


def say(site_file, name, decision):
    site = Site.read(site_file)
    keep_decision(site, find_approval(site, name), decision)


def test_who_waits_looks_at_no_patient_and_tells_nothing(tmp_path, caplog):
    """Ninety-six studies told ninety-six things of a hospital where nobody was asked."""
    path = asking(tmp_path)
    (tmp_path / "manifest.csv").write_text("not even read")
    coordinator = Coordinator(path)
    for _ in range(3):
        assert coordinator.join(study()) == "waiting"
    assert len(read_ledger(tmp_path / "state")) == 1  # the line of its making
    assert not (tmp_path / "state/cache").exists()
    assert coordinator.ask(_piece(study().id), BACKBONE).error.reason == "contract"
    told = [record.message for record in caplog.records if "waits for" in record.message]
    assert told == [
        f"study skin ({study().id}) waits for a person's yes or no: "
        f"consilium-client approve {path} {study().id}"
    ]


def _piece(study_id):
    return BackbonePart(study=study_id, sha256="0" * 64, size=9, offset=0, data=b"x").record()


def test_a_yes_is_to_one_study_as_it_was_sent(tmp_path):
    path = asking(tmp_path)
    coordinator = Coordinator(path)
    assert coordinator.join(study()) == "waiting"
    say(path, "skin", "approved")
    for other in (
        study(train={"rounds": 3, "local_steps": 1}),
        study(seed=1),
        study(model={"unfreeze": "all"}),
    ):
        assert coordinator.join(other) == "waiting"
    assert coordinator.join(study()) is None
    assert not isinstance(coordinator.round(study()), str)
    kept = tmp_path / f"state/approvals/{study().sha256}.json"
    assert kept.stat().st_mode & 0o777 == 0o600
    assert len(kept.stem) == 64  # 16 digits could be met by a study made for it


def test_a_yes_to_one_study_cannot_be_moved_to_another(tmp_path):
    path = asking(tmp_path)
    coordinator = Coordinator(path)
    coordinator.join(study())
    say(path, "skin", "approved")
    other = study(seed=1)
    folder = tmp_path / "state/approvals"
    (folder / f"{study().sha256}.json").rename(folder / f"{other.sha256}.json")
    assert coordinator.join(other) == "site"
    with pytest.raises(SiteError, match=r"expected a study as it was sent.*Delete it"):
        list_approvals(Site.read(path))


def test_a_no_looks_like_any_refusal_and_can_come_at_any_time(tmp_path, caplog):
    path = asking(tmp_path)
    coordinator = Coordinator(path)
    coordinator.join(study())
    say(path, study().id, "declined")
    assert coordinator.join(study()) == "refused"
    say(path, study().id, "approved")
    assert coordinator.join(study()) is None
    assert not isinstance(coordinator.round(study()), str)
    say(path, "skin", "declined")
    assert coordinator.round(study(), 2) == "refused"
    assert "A yes takes it back: consilium-client approve" in caplog.text


def test_a_policy_that_begins_to_ask_holds_for_what_was_agreed_before(tmp_path):
    path = hospital(tmp_path)
    coordinator = Coordinator(path)
    assert coordinator.join(study()) is None
    edit_site(path, policy={"approve": "ask"})
    assert coordinator.round(study()) == "waiting"
    say(path, "skin", "approved")
    assert not isinstance(coordinator.round(study()), str)


def test_a_coordinator_cannot_fill_a_persons_day(tmp_path, caplog):
    path = asking(tmp_path)
    coordinator = Coordinator(path)
    words = [coordinator.join(study(seed=seed)) for seed in range(22)]
    assert words == ["waiting"] * 20 + ["refused"] * 2
    assert "expected fewer than 20 studies that wait, got 20. Approve or decline" in caplog.text
    assert len(list_approvals(Site.read(path))) == 20
    say(path, study(seed=3).id, "declined")
    assert coordinator.join(study(seed=21)) == "waiting"


# --- how many studies ---


def test_a_month_has_few_new_studies_refused_ones_too(tmp_path, caplog):
    """Which labels are there was asked one bit at a time, a study each."""
    path = hospital(tmp_path, max_studies=3)
    coordinator = Coordinator(path)
    words = []
    for name in ("dark", "light", "grey", "blue", "green"):
        asked = make_study(name=name, classes=[name, "bright"], train={"rounds": 1})
        words.append(coordinator.join(asked))
    lines = read_ledger(tmp_path / "state")
    assert len(lines) == 4  # made, and three that were answered
    assert (
        "policy.max_studies: expected 3 new studies in 30 days, got one more. Wait" in caplog.text
    )
    assert words[3:] == ["refused"] * 2
    known = make_study(name="dark", classes=["dark", "bright"], train={"rounds": 1})
    assert coordinator.join(known) == words[0]  # one that was answered is not new
    RUNTIME.close_sites()
    assert coordinator.join(study()) == "refused"  # nor does the next process forget


def test_that_only_the_backbone_is_lacking_is_an_answer_too(tmp_path):
    """It says that policy, labels and patients are as the study wants them."""
    path = hospital(tmp_path, max_studies=2)
    coordinator = Coordinator(path)
    for seed in range(2):
        coordinator.ask(_lost(seed), "query")
    told = [line.contents.metrics for line in read_ledger(tmp_path / "state")[1:]]
    assert told == [("backbone",)] * 2
    assert coordinator.ask(_lost(2), "query").error.reason == "refused"
    assert not coordinator.ask(_lost(1), "query").has_error()


def _lost(seed):
    asked = study(seed=seed, model={"weights": "lost.pth"})
    return JoinRequest(proposal=asked.proposal()).record()


def test_after_a_month_there_are_new_ones(tmp_path, monkeypatch):
    path = hospital(tmp_path, max_studies=1)
    coordinator = Coordinator(path)
    with monkeypatch.context() as long_ago:
        long_ago.setattr("client.ledger.ledger.write_time", lambda: "2020-01-01T00:00:00Z")
        assert coordinator.join(study(seed=1)) is None
    assert coordinator.join(study(seed=2)) is None
    assert coordinator.join(study(seed=3)) == "refused"
    assert coordinator.join(study(seed=1)) is None


# --- the coordinator waits ---


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(federation, "_AGAIN", 0.05)


def two(folder):
    return [hospital(folder / "a", name="a"), asking(folder / "b", name="b")]


def begin(folder, files, wait, quorum=2):
    """A run on these sites; what it came to, by name of those that joined."""
    run = folder / "run"
    wanted = study(aggregate={"quorum": quorum})
    if not run.exists():
        RunFolder.create(run).write_study(wanted)
    opened = RunFolder.resume(run)
    started = Run(InProcessGrid(client_app, files), opened, Reporter(opened))
    started.run(wait)
    return opened.read_facts()


def test_a_run_waits_for_a_yes(tmp_path, quick, caplog):
    files = two(tmp_path)
    caplog.set_level("INFO")
    site = Site.read(files[1])

    def nod():
        for _ in range(200):
            if list_approvals(site):
                return say(files[1], "skin", "approved")
            time.sleep(0.1)
        return None

    person = threading.Thread(target=nod)
    person.start()
    facts = begin(tmp_path, files, wait=30)
    person.join()
    assert set(facts["sites"]) == {"a", "b"}
    assert not facts["refused"]
    assert "for the approval of node 1001" in caplog.text


def test_a_run_that_waited_long_enough_begins_with_a_quorum(tmp_path, quick):
    facts = begin(tmp_path, two(tmp_path), wait=0.1, quorum=1)
    assert set(facts["sites"]) == {"a"}
    assert facts["refused"] == {"node 1001": "it waits for its hospital's approval"}


def test_a_run_that_was_stopped_finds_the_yes_in_place(tmp_path, quick):
    files = two(tmp_path)
    told = (
        r"1 of 2 sites \(node 1001: it waits for its hospital's approval\).*go on with run --resume"
    )
    with pytest.raises(RunError, match=told):
        begin(tmp_path, files, wait=0.1)
    say(files[1], "skin", "approved")
    assert set(begin(tmp_path, files, wait=0)["sites"]) == {"a", "b"}


# --- the commands ---


@pytest.fixture
def command(run_main, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("common.support.terminal.console._width", 500)
    return partial(run_main, cli.main)


def test_a_person_sees_what_it_would_do_cost_and_tell_and_decides(command, tmp_path):
    path = asking(tmp_path, max_epsilon=8.0, delta=1e-5)
    private = {"mechanism": "dp_sgd", "epsilon": 2.0, "delta": 1e-5}
    wanted = study(privacy=private)
    assert "No study was sent" in command("studies", path)[1]
    coordinator = Coordinator(path)
    assert coordinator.join(wanted) == "waiting"
    code, text = command("studies", path)
    assert code == 0
    assert f"skin   {wanted.id}" in text
    assert "waits for yes or no" in text
    code, text = command("approve", path, "skin", typed="n\n")
    assert code == 1
    for told in (
        f"study          skin ({wanted.id}), of dark, bright\n",
        "trains         head of shufflenet_v2_x0_5, weights none, float32\n",
        "rounds         2 of 1 step\n",
        "images         32 pixels wide, 1 view of each that trains\n",
        "held out       15% for validation, 20% for the test\n",
        "training here  ",
        "disk           up to about 184.3 kB of prepared images\n",
        "asked for      ε 2 at δ = 1e-05\n",
        "ε by PRV at δ = 1e-05",
        "of max_epsilon 8\n",
        "leaves         each round 2 tensors of 2,050 numbers (8.2 kB)",
        "agreed         the policy has nothing against it\n",
        wanted.sha256,
        "Nothing was changed. To say no: consilium-client decline",
    ):
        assert told in text
    assert coordinator.join(wanted) == "waiting"
    assert command("approve", path, wanted.id, typed="y\n")[0] == 0
    assert coordinator.join(wanted) is None
    assert "yes, 20" in command("studies", path)[1]
    assert command("decline", path, "skin")[0] == 0
    assert coordinator.join(wanted) == "refused"


def test_what_the_policy_refuses_is_said_before_the_question(command, tmp_path):
    path = asking(tmp_path, min_images=50)
    Coordinator(path).join(study())
    text = command("approve", path, "skin", typed="n\n")[1]
    assert "refused        " in text
    assert "policy.min_images: expected" in text
    assert "Approved, but refused" in command("approve", path, "skin", typed="y\n")[1]


def test_a_name_that_is_none_or_several_is_said(command, tmp_path):
    path = asking(tmp_path)
    coordinator = Coordinator(path)
    code, text = command("approve", path, "skin", "--yes")
    assert code == 1
    assert "study skin: expected one that was sent here, got none" in text
    for seed in (0, 1):
        coordinator.join(study(seed=seed))
    code, text = command("approve", path, "skin", "--yes")
    assert code == 1
    assert all(study(seed=seed).id in text for seed in (0, 1))
    command("decline", path, study(seed=0).id)
    assert command("approve", path, "skin", "--yes")[0] == 0
    assert coordinator.join(study(seed=1)) is None
