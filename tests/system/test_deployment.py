"""A coordinator and hospitals as processes over TLS: whatever is killed, the study ends well."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from dp_accounting import GaussianDpEvent, NeighboringRelation, PoissonSampledDpEvent
from dp_accounting.pld import PLDAccountant
from safetensors.torch import load_file

from client.ledger.entries import Reserved, Sealed, Sent, list_events
from client.ledger.ledger import read_ledger
from client.ledger.spending import Spending
from client.site import Site
from common.config.study import Study
from server.app import app as server_app
from simulations.demo import loopback
from simulations.demo.loopback import Loopback, wait_until
from simulations.engines.grid import simulate_run
from tests.builders import (
    CONFIGS,
    OPEN,
    PHANTOM_CLASSES,
    client_app,
    create_run,
    find_phantoms,
    make_study,
)

pytestmark = pytest.mark.numbers

NAMES = ("east", "north", "south")
PRIVATE = {"mechanism": "dp_sgd", "epsilon": 4.0, "delta": 1e-5}


study = partial(
    make_study,
    name="together",
    classes=PHANTOM_CLASSES,
    train={"rounds": 3, "local_epochs": 1, "batch_size": 8},
    holdout={"validation": 0.2, "test": 0.2},
    aggregate={"quorum": 2, "round_timeout": 120},
)


SKIN = ("rosendahl", "vidir_modern", "vidir_molemax", "vienna_dias")


def deployed(folder: Path, wanted: Study, phantoms: Path) -> Loopback:
    return Loopback(folder, wanted, find_phantoms(phantoms, NAMES))


def simulated(folder: Path, wanted: Study, phantoms: Path) -> dict[str, torch.Tensor]:
    """The last tensors of the same study in this process."""
    files = create_run(find_phantoms(phantoms, NAMES), wanted, folder, folder / "cache")
    simulate_run(server_app, client_app, files, folder)
    return load_file(folder / "last.safetensors")


class Run:
    """A run that a coordinator began in a deployment."""

    def __init__(self, world: Loopback, path: Path | None = None) -> None:
        self.world, self.path = world, path or world.folder / "the-run"
        self.process = world.start_run(str(world.study), "--out", str(self.path))

    def resume(self) -> None:
        self.process = self.world.start_run("--resume", str(self.path))

    def lines(self) -> list[dict[str, Any]]:
        path = self.path / "metrics.jsonl"
        text = path.read_text("utf-8") if path.exists() else ""
        return [json.loads(line) for line in text.splitlines() if line.endswith("}")]

    def rounds(self, site: str | None = None) -> set[int]:
        """The rounds that trained, or those in which a site did."""
        return {x["round"] for x in self.lines() if x["site"] == site and x["bytes"]}

    def reached(self, number: int) -> None:
        wait_until(lambda: self.rounds() >= {number} or self.process.poll() is not None, 120)

    def ended(self) -> None:
        assert self.process.wait(180) == 0, self.world.read_output("run")

    def read_last(self) -> dict[str, torch.Tensor]:
        return load_file(self.path / "last.safetensors")


def by_google(events: Any) -> float:
    either = NeighboringRelation.ADD_OR_REMOVE_ONE
    accountant = PLDAccountant(either, value_discretization_interval=1e-4)
    for s in events:
        step = PoissonSampledDpEvent(s.sample_rate, GaussianDpEvent(s.noise_multiplier))
        accountant.compose(step, s.steps)
    return float(accountant.get_epsilon(1e-5))


def everybody(world: Loopback) -> None:
    world.start_link()
    for name in world.sites:
        world.start_hospital(name)


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert set(one) == set(other)
    for name, tensor in one.items():
        assert torch.equal(tensor, other[name]), name


def test_a_run_waits_for_a_person_is_stopped_and_finds_the_yes(
    phantoms: Path, tmp_path: Path
) -> None:
    """`approve` is said while the hospital's client is at work, and the run is none."""
    wanted = study(train={"rounds": 1, "local_steps": 1})
    with Loopback(tmp_path / "world", wanted, find_phantoms(phantoms, ("east", "north"))) as world:
        asked = world.sites["north"]
        loopback.change_site_file(asked, policy=OPEN | {"approve": "ask"})
        everybody(world)
        run = Run(world)
        waiting = "for the approval of north"
        wait_until(lambda: waiting in world.read_output("run"), 120)
        assert not run.lines()
        run.process.send_signal(signal.SIGINT)
        assert run.process.wait(60)
        site = Site.read(asked)
        assert len(read_ledger(site.state)) == 1
        told = [sys.executable, "-c", "from client.cli.main import main; main()"]
        done = subprocess.run(
            [*told, "approve", str(asked), "together", "--yes"], capture_output=True, check=False
        )
        assert done.returncode == 0, done.stderr
        assert b"training here" in done.stdout
        run.resume()
        run.ended()
        assert run.rounds("north") == {1}
        assert "consilium-client approve" in world.read_output("north")


def noted(world: Loopback, name: str) -> bool:
    """Whether a hospital is answering a message."""
    return any(Site.read(world.sites[name]).state.glob("link/*/letter"))


def spent(world: Loopback, name: str) -> int:
    """How many private rounds the ledger of a hospital holds."""
    return len(list_events(read_ledger(Site.read(world.sites[name]).state)))


def test_a_head_solved_over_tls_is_the_one_a_simulation_solves(phantoms, tmp_path):
    """Its sums are larger than any question: a message has the room that was asked for."""
    wanted = study(
        model={"backbone": "squeezenet1_0", "head": "discriminant", "init": None},
        train={"rounds": 0},
    )
    with deployed(tmp_path / "real", wanted, phantoms) as world:
        everybody(world)
        states = {name: Site.read(world.sites[name]).state for name in NAMES}
        (states["south"] / "reports").write_text("in the way of its page")
        run = Run(world)
        run.ended()
        same(run.read_last(), simulated(tmp_path / "simulated", wanted, phantoms))
        told = json.loads((run.path / "solved.json").read_text())
        assert told["sites"] == list(NAMES)
        kinds = [e.release.kind for e in read_ledger(states["east"]) if isinstance(e, Sent)]
        assert kinds == ["join", "means", "sums", "candidates", "validate", "final"]
        page = states["east"] / "reports" / f"{wanted.id}.html"
        wait_until(page.exists, 60)  # once nobody waits for the hospital any more
        assert "It stays here." in page.read_text("utf-8")
        wait_until(lambda: "no page of study" in world.read_output("south"), 60)


@pytest.mark.slow
def test_a_private_head_over_tls_spends_two_lines(phantoms, tmp_path):
    wanted = study(
        model={"init": None},
        train={"rounds": 0},
        privacy={"preset": "head", "epsilon": 4.0, "delta": 1e-5},
    )
    with deployed(tmp_path / "real", wanted, phantoms) as world:
        everybody(world)
        run = Run(world)
        run.ended()
        assert json.loads((run.path / "solved.json").read_text())["sites"] == list(NAMES)
        for name in NAMES:
            entries = read_ledger(Site.read(world.sites[name]).state)
            kinds = [e.release.kind for e in entries if isinstance(e, Sent)]
            assert kinds == ["join", "moments", "prototypes", "final"]
            assert Spending(entries, 1e-5).total() <= 4.0


def test_over_tls_comes_out_what_a_simulation_gives(phantoms, tmp_path):
    wanted = study()
    with deployed(tmp_path / "real", wanted, phantoms) as world:
        everybody(world)
        run = Run(world)
        run.ended()
        assert (run.path / "model.safetensors").exists()
        assert "test images" in world.read_output("run")
        same(run.read_last(), simulated(tmp_path / "simulation", wanted, phantoms))


@pytest.mark.slow
def test_a_hospital_killed_at_work_answers_when_it_is_back(phantoms, tmp_path):
    wanted = study(train={"rounds": 4, "local_epochs": 40, "batch_size": 2})
    with deployed(tmp_path / "real", wanted, phantoms) as world:
        everybody(world)
        run = Run(world)
        run.reached(1)
        wait_until(lambda: noted(world, "north"), 60)
        world.kill_process("north")
        world.start_hospital("north")
        run.ended()
        assert all(run.rounds(name) == {1, 2, 3, 4} for name in NAMES)
        same(run.read_last(), simulated(tmp_path / "simulation", wanted, phantoms))


@pytest.mark.slow
def test_a_hospital_killed_between_sealing_and_sending_spends_nothing_twice(phantoms, tmp_path):
    wanted = study(train={"rounds": 3}, privacy=PRIVATE | {"spare_rounds": 0})
    with deployed(tmp_path / "real", wanted, phantoms) as world:
        everybody(world)
        run = Run(world)
        wait_until(lambda: spent(world, "east") >= 1, 120)
        link = world.running["link"]
        state = Site.read(world.sites["north"]).state

        def sealed() -> bool:
            return any(isinstance(entry, Sealed) for entry in read_ledger(state))

        wait_until(sealed, 60)
        os.killpg(link.pid, signal.SIGSTOP)  # nothing more leaves
        world.kill_process("north")
        before = spent(world, "north")
        os.killpg(link.pid, signal.SIGCONT)
        world.start_hospital("north")
        run.ended()
        assert before <= spent(world, "north") == 3
        assert run.rounds("north") == {1, 2, 3}


@pytest.mark.slow
def test_a_link_killed_in_a_round_is_only_a_pause(phantoms, tmp_path):
    wanted = study(train={"rounds": 4, "local_epochs": 20, "batch_size": 2})
    with deployed(tmp_path / "real", wanted, phantoms) as world:
        everybody(world)
        run = Run(world)
        run.reached(1)
        wait_until(lambda: noted(world, "south"), 60)
        world.kill_process("link")
        world.start_link()
        run.ended()
        same(run.read_last(), simulated(tmp_path / "simulation", wanted, phantoms))


@pytest.mark.slow
@pytest.mark.parametrize("privacy", [{"mechanism": "none"}, PRIVATE | {"spare_rounds": 0}])
def test_a_run_killed_in_a_round_goes_on_where_it_was(phantoms, tmp_path, privacy):
    train = {"rounds": 4} if privacy["mechanism"] == "dp_sgd" else {"rounds": 4, "local_epochs": 9}
    wanted = study(train=train, privacy=privacy)
    with deployed(tmp_path / "real", wanted, phantoms) as world:
        everybody(world)
        run = Run(world)
        run.reached(2)
        wait_until(lambda: noted(world, "east") or run.process.poll() is not None, 60)
        world.kill_process("run")
        run.resume()
        run.ended()
        if wanted.private:  # sealed replies, sent again for free
            assert [spent(world, name) for name in NAMES] == [4, 4, 4]
        else:
            same(run.read_last(), simulated(tmp_path / "simulation", wanted, phantoms))


@pytest.mark.slow
def test_a_hospital_that_is_gone_for_three_rounds_is_missed_and_welcome_back(phantoms, tmp_path):
    wanted = study(train={"rounds": 100, "local_epochs": 1, "batch_size": 8})
    with deployed(tmp_path / "real", wanted, phantoms) as world:
        everybody(world)
        run = Run(world)
        run.reached(1)
        world.kill_process("north")
        wait_until(lambda: len(run.rounds() - run.rounds("north")) >= 3, 120)
        world.start_hospital("north")
        back = max(run.rounds())
        wait_until(lambda: max(run.rounds("north"), default=0) > back, 60)
        assert run.process.poll() is None


@pytest.mark.slow
def test_a_straggler_is_not_waited_for_beyond_the_rounds_time(phantoms, tmp_path):
    wanted = study(
        train={"rounds": 100, "local_epochs": 1, "batch_size": 8},
        aggregate={"quorum": 2, "round_timeout": 4},
    )
    with deployed(tmp_path / "real", wanted, phantoms) as world:
        everybody(world)
        run = Run(world)
        run.reached(2)
        slow = world.running["south"]
        os.killpg(slow.pid, signal.SIGSTOP)
        wait_until(lambda: len(run.rounds() - run.rounds("south")) >= 2, 60)
        os.killpg(slow.pid, signal.SIGCONT)
        back = max(run.rounds())
        wait_until(lambda: max(run.rounds("south"), default=0) > back, 60)
        assert "south is left out: it did not answer in time" in world.read_output("run")


@pytest.mark.slow
def test_a_coordinator_stops_a_run_reads_its_log_and_goes_on(phantoms, tmp_path):
    wanted = study(train={"rounds": 12, "local_epochs": 3, "batch_size": 8})

    def command(world: Loopback, *arguments: str) -> str:
        return subprocess.run(
            [sys.executable, "-c", loopback._SERVER, *arguments],
            env={**os.environ, "CONSILIUM_PROJECT": str(world.project.folder)},
            capture_output=True,
            text=True,
            check=True,
        ).stdout

    with deployed(tmp_path / "real", wanted, phantoms) as world:
        everybody(world)
        run = Run(world, world.project.runs / "named")
        run.reached(1)
        waited_for = world.running["south"]
        os.killpg(waited_for.pid, signal.SIGSTOP)  # else all rounds may be over before a command
        assert "east" in command(world, "sites")
        assert "run --resume" in command(world, "stop", run.path.name)
        assert run.process.wait(60) == 130
        os.killpg(waited_for.pid, signal.SIGCONT)
        assert f"Go on with: consilium-server run --resume {run.path}" in world.read_output("run")
        done = len(run.rounds())
        assert done < 12
        run.resume()
        run.ended()
        assert run.rounds() == set(range(1, 13))
        assert "run folder" in world.read_output("run")
        assert "is left out" not in command(world, "logs", run.path.name)
        assert "serving hospitals" in command(world, "logs")
        assert "up" in command(world, "status")


@pytest.fixture
def disk(tmp_path):
    """A disk of 100 kB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    small = ["mount", "-t", "tmpfs", "-o", "size=100k", "tmpfs", str(disk)]
    if subprocess.run(small, capture_output=True, check=False).returncode:
        pytest.skip("a small disk cannot be mounted here")
    yield disk
    # Lazily: after a failure, which is what should be seen, tensors there are still mapped.
    subprocess.run(["umount", "--lazy", str(disk)], check=True)


@pytest.mark.slow
def test_a_disk_that_is_full_at_a_checkpoint_stops_the_run_which_goes_on_later(
    phantoms, tmp_path, disk
):
    wanted = study(train={"rounds": 5, "local_epochs": 1, "batch_size": 8})
    with deployed(tmp_path / "real", wanted, phantoms) as world:
        everybody(world)
        (disk / "other").write_bytes(bytes(60_000))
        run = Run(world, disk / "the-run")
        assert run.process.wait(120) == 1
        said = " ".join(world.read_output("run").split())
        assert "No space left on device. Free some space, then resume the run" in said
        (disk / "other").unlink()
        subprocess.run(["mount", "-o", "remount,size=20m", str(disk)], check=True)
        run.resume()
        run.ended()
        assert all(run.rounds(name) == {1, 2, 3, 4, 5} for name in NAMES)
        same(run.read_last(), simulated(tmp_path / "simulation", wanted, phantoms))


EVIL = """
import functools, torch
import client.link.node as node
from flwr.app import ArrayRecord, Array, ConfigRecord
make_app, rounds = node.make_app, iter(("NaN", "shape", "huge", "extra", "text"))
def evil(honest, message, context):
    reply = honest(message, context)
    if message.metadata.message_type != "train" or reply.has_error(): return reply
    way, content = next(rounds, None), reply.content
    name = next(iter(content["arrays"]))
    tensor = torch.from_numpy(content["arrays"][name].numpy().copy())
    if way == "NaN": tensor.view(-1)[0] = float("nan")
    if way == "shape": tensor = tensor[:1]
    if way == "huge": tensor += 1e9
    if way == "extra": content["more"] = ConfigRecord({"x": 1})
    if way in ("NaN", "shape", "huge"): content["arrays"][name] = Array(tensor)
    if way == "text": content["arrays"] = ArrayRecord({"DOE_JOHN": Array(tensor)})
    return reply
node.make_app = lambda runtime: functools.partial(evil, make_app(runtime))
from client.cli.main import main; main()
"""


@pytest.mark.slow
def test_a_hospital_that_sends_nonsense_is_left_out_and_nothing_else_happens(
    phantoms, tmp_path, monkeypatch
):
    wanted = study(train={"rounds": 6, "local_epochs": 1, "batch_size": 8})
    with deployed(tmp_path / "real", wanted, phantoms) as world:
        world.start_link()
        for name in ("east", "north"):
            world.start_hospital(name)
        monkeypatch.setattr(loopback, "_CLIENT", EVIL)
        world.start_hospital("south")
        run = Run(world)
        run.ended()
        assert run.rounds("south") == {6}
        assert run.rounds("east") == {1, 2, 3, 4, 5, 6}
        assert world.read_output("run").count("south is left out: it sent") == 5
        assert "DOE_JOHN" not in world.read_output("run")
        assert all(tensor.isfinite().all() for tensor in run.read_last().values())


@pytest.mark.slow
def test_a_hospital_without_the_backbone_is_sent_it_once(phantoms, tmp_path, shared):
    weights = shared / "weights" / "squeezenet1_0.pth"
    wanted = study(model={"backbone": "squeezenet1_0", "weights": str(weights)})
    with deployed(tmp_path / "real", wanted, phantoms) as world:
        for name in ("north", "south"):
            loopback.change_site_file(world.sites[name], weights=None)
        everybody(world)
        run = Run(world)
        run.ended()
        assert "sending the backbone: 0 % of 3 MB to 2 sites" in " ".join(
            world.read_output("run").split()
        )
        assert all(run.rounds(name) == {1, 2, 3} for name in NAMES)
        held = list((Site.read(world.sites["north"]).state / "weights").iterdir())
        assert [(path.suffix, path.stat().st_size > 2e6) for path in held] == [
            (".safetensors", True)
        ]
        sent = world.read_output("run").count("sending the backbone")
        second = world.start_run(
            str(world.study), "--set", "seed=9", "--out", str(tmp_path / "second")
        )
        assert second.wait(120) == 0, world.read_output("run")
        assert world.read_output("run").count("sending the backbone") == sent


@pytest.mark.slow
@pytest.mark.timeout(2400)
def test_a_hundred_random_kills_leave_every_ledger_whole_and_its_epsilon_exact(phantoms, tmp_path):
    """Hospitals, the link and the run, killed at any moment: nothing is spent or averaged twice."""
    kills, choose = 100, random.Random(5)  # noqa: S311
    wanted = study(
        privacy=PRIVATE | {"spare_rounds": kills},
        train={"rounds": 100, "local_epochs": 1, "batch_size": 8},
        aggregate={"quorum": 1, "round_timeout": 120},
    )
    killed = Counter[str]()
    with deployed(tmp_path / "real", wanted, phantoms) as world:
        everybody(world)
        run = Run(world)
        run.reached(1)
        while killed.total() < kills and run.process.poll() != 0:
            time.sleep(choose.uniform(0.2, 5))
            victim = choose.choice([*NAMES, *NAMES, "link", "run"])
            world.kill_process(victim)
            killed[victim] += 1
            if victim == "link":
                world.start_link()
            elif victim != "run":
                world.start_hospital(victim)
            if run.process.poll():  # also where too few were there when it went on
                run.resume()
        while run.process.wait(600):
            run.resume()  # one may have been lost to a quorum that was not there
        assert run.rounds() == set(range(1, 101))
        assert killed.total() == kills
        for name in NAMES:
            world.kill_process(name)
            entries = read_ledger(Site.read(world.sites[name]).state)  # checked line by line
            rounds = [
                entry
                for entry in entries
                if isinstance(entry, Reserved | Sealed | Sent) and entry.release.privacy
                if entry.release.kind == "round"
            ]
            reserved = Counter(e.key for e in rounds if isinstance(e, Reserved))
            sealed = {e.key: e.contents.sha256 for e in rounds if isinstance(e, Sealed)}
            sent = {(e.key, e.contents.sha256) for e in rounds if isinstance(e, Sent)}
            assert sent <= set(sealed.items())
            assert len(sealed) <= reserved.total() <= len(sealed) + killed[name]
            assert len(list_events(entries)) == reserved.total()
            assert {e.release.round for e in rounds if e.key in sealed} >= run.rounds(name)
            ours, theirs = Spending(entries, 1e-5).total(), by_google(list_events(entries))
            assert 0 <= ours - theirs <= 0.02


@pytest.mark.slow
@pytest.mark.parametrize("name", ["skin", "skin_private"])
def test_a_real_study_runs_here_as_it_is_in_a_simulation(shared, tmp_path, name):
    """Four real sites, the study file unchanged but for its rounds and where the weights are."""
    weights = shared / "weights" / "squeezenet1_0.pth"
    changes = [f"model.weights={weights}", "adapt=false"]
    if name == "skin":  # the private one is solved, without rounds
        changes += ["train.rounds=3", "model.init=zero"]
    wanted = Study.read(CONFIGS / f"{name}.yaml", changes)
    found = find_phantoms(shared / "data" / "skin_sites", SKIN)
    with Loopback(tmp_path / "real", wanted, found) as world:
        everybody(world)
        run = Run(world)
        assert run.process.wait(550) == 0, world.read_output("run")
        if wanted.private:
            for site in SKIN:
                entries = read_ledger(Site.read(world.sites[site]).state)
                ours, theirs = Spending(entries, 1e-5).total(), by_google(list_events(entries))
                assert 7.9 < theirs <= ours <= 8
            return
        assert all(run.rounds(site) == {1, 2, 3} for site in SKIN)
        folder = tmp_path / "simulation"
        files = create_run(found, wanted, folder, tmp_path / "real" / "cache")
        simulate_run(server_app, client_app, files, folder)
        same(run.read_last(), load_file(folder / "last.safetensors"))
