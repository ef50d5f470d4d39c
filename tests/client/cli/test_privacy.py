"""What a hospital is told of its own releases is what the ledger holds; nothing goes without a
yes."""

import csv
import json
import re
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image

from client.cli import main as cli
from client.consent import exclusions
from client.consent.cohort import cut_records
from client.features.extract import make_namer
from client.features.store import Store
from client.ledger.adoption import adopt_ledger
from client.ledger.entries import Contents, Release
from client.ledger.ledger import Ledger, read_ledger
from client.ledger.outbox import Outbox
from client.ledger.release import Reply, release
from client.privacy.accountant import (
    DpEvent,
    choose_filter_order,
    compute_epsilon,
    compute_filtered_epsilon,
)
from client.privacy.held_out import plan_end
from client.privacy.parameters import PrivateRelease
from client.site import Site
from common.config.study import Study
from common.config.yaml import dump
from common.errors import SiteError
from tests.builders import OPEN, session_of

SKIN, CHEST = "1" * 16, "2" * 16
SITE = {"name": "east", "data": {"format": "manifest", "root": "."}, "state": "state"}
STUDY = {
    "name": "skin",
    "classes": ["dark", "bright"],
    "model": {"backbone": "shufflenet_v2_x0_5", "weights": "none"},
    "images": {"size": 32},
    "train": {"rounds": 10, "batch_size": 16},
    "holdout": {"validation": 0, "test": 0},
}
PRIVATE = {"mechanism": "dp_sgd", "epsilon": 8, "delta": 1e-5, "spare_rounds": 2}
CONTENTS = Contents(
    tensors={"head.weight": (7, 512), "head.bias": (7,)},
    metrics=("metrics.train-loss", "last.confusion"),
    bytes=14_364,
    sha256="c" * 64,
)

Command = Callable[..., tuple[int, str]]


@pytest.fixture
def command(
    run_main: Callable[..., tuple[int, str]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> Command:
    """Runs `consilium-client` in an empty folder, with what is typed: exit code, all it printed."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(cli.console, "width", 240)
    return partial(run_main, cli.main)


def site(folder: Path, patients: int = 0, **changes: Any) -> Path:
    """A site's file, and so many patients of two images each."""
    with (folder / "manifest.csv").open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["image", "label", "patient"])
        for i in range(2 * patients):
            noise = np.random.default_rng(i).integers(0, 256, (32, 32, 3), np.uint8)
            Image.fromarray(noise).save(folder / f"{i}.png")
            table.writerow([f"{i}.png", ("dark", "bright")[i % 2], f"p{i // 2}"])
    path = folder / "site.yaml"
    data = SITE["data"] | ({"enrolled_patients": patients} if patients else {})
    policy = OPEN | changes.pop("policy", {})
    content = {**SITE, "data": data, "device": "cpu", "policy": policy, **changes}
    path.write_text(yaml.safe_dump(content))
    return path


def study(folder: Path, **changes: object) -> Path:
    path = folder / "study.yaml"
    path.write_text(dump({**STUDY, **changes}))
    return path


def privacy(noise: float = 1.0, steps: int = 16) -> PrivateRelease:
    return PrivateRelease(
        mechanism="dp_sgd",
        noise_multiplier=noise,
        sample_rate=0.05,
        steps=steps,
        delta=1e-5,
        clip_norm=1.0,
    )


def spend(state: Path) -> None:
    """Two private rounds of one study, one of them drawn twice; three open ones of another."""
    state.mkdir(mode=0o700, exist_ok=True)
    with Ledger(state) as ledger:
        for number in (1, 2, 2):
            what = Release(study=SKIN, name="skin", kind="round", round=number, privacy=privacy())
            ledger.reserve(what)
        ledger.seal(what, CONTENTS)
        ledger.send(what, CONTENTS)
        ledger.send(Release(study=CHEST, name="chest", kind="join"), CONTENTS)
        for number in (1, 2, 3):
            what = Release(study=CHEST, name="chest", kind="round", round=number)
            ledger.send(what, CONTENTS)


# --- ledger ---


def test_the_ledger_adds_up_over_studies_and_counts_the_rest_apart(
    command: Command, tmp_path: Path
) -> None:
    spend(tmp_path / "state")
    policy = {"max_epsilon": 8.0, "delta": 1e-5}
    code, text = command("ledger", site(tmp_path, policy=policy))
    assert code == 0, text
    rows = {line.split()[0]: line.split() for line in text.splitlines() if line.strip()}
    spent = compute_epsilon([DpEvent(1.0, 0.05, 48)], 1e-5)
    assert rows["skin"] == ["skin", SKIN, "3", "1", "0.05", "48", f"{spent:.2f}", "–"]
    assert rows["chest"] == ["chest", CHEST, "0", "–", "–", "–", "–", "3", "rounds"]
    assert f"total ε {spent:.2f} at δ = 1e-05 by PRV; {8 - spent:.2f} left of max_epsilon 8" in text
    assert "3 rounds not accounted: trained without differential privacy" in text
    assert "added or removed. Validation and test patients have an ε of their own" in text
    assert "held-out patients" not in text  # no study has ended with one


def test_the_ends_of_studies_are_added_up_apart(command: Command, tmp_path: Path) -> None:
    spend(tmp_path / "state")
    end = plan_end(0.5, 1e-5)
    with Ledger(tmp_path / "state") as ledger:
        for of in (SKIN, CHEST):
            ledger.reserve(Release(study=of, name="x", kind="final", privacy=end))
    policy = {"delta": 1e-5, "disclose": {"epsilon": 0.5}}
    code, text = command("ledger", site(tmp_path, policy=policy))
    assert code == 0, text
    assert f"total ε {compute_epsilon([DpEvent(1.0, 0.05, 48)], 1e-5):.2f}" in text
    told = compute_epsilon([end.event] * 2, 1e-5)
    assert f"held-out patients: ε {told:.2f} at δ = 1e-05, by 2 ends" in text


def test_several_studies_compose_and_are_not_just_added(command: Command, tmp_path: Path) -> None:
    path = site(tmp_path)
    (tmp_path / "state").mkdir(mode=0o700)
    with Ledger(tmp_path / "state") as ledger:
        for of, noise in ((SKIN, 1.0), (CHEST, 2.0)):
            ledger.reserve(
                Release(study=of, name="x", kind="round", round=1, privacy=privacy(noise, 100))
            )
    code, text = command("ledger", path)
    assert code == 0, text
    spent, order = (
        [DpEvent(1.0, 0.05, 100), DpEvent(2.0, 0.05, 100)],
        choose_filter_order(8.0, 1e-5),
    )
    both = compute_filtered_epsilon(spent, 1e-5, order)
    each = [compute_epsilon([DpEvent(noise, 0.05, 100)], 1e-5) for noise in (1.0, 2.0)]
    by = f"by a Rényi filter of order {order}"
    assert f"total ε {both:.2f} at δ = 1e-05 {by}; no max_epsilon in site.yaml" in text
    assert all(f" {alone:.2f} " in text for alone in each)
    assert max(each) < compute_epsilon(spent, 1e-5) < both < sum(each)


def test_a_picture_of_what_was_spent(command: Command, tmp_path: Path) -> None:
    path = site(tmp_path, policy={"max_epsilon": 8.0, "delta": 1e-5})
    assert command("ledger", path, "--picture", tmp_path / "empty.png")[0] == 0
    spend(tmp_path / "state")
    code, text = command("ledger", path, "--picture", tmp_path / "spent.png")
    assert code == 0, text
    for name in ("empty.png", "spent.png"):
        assert Image.open(tmp_path / name).size[0] > 600


def test_a_site_without_a_ledger_has_spent_nothing(command: Command, tmp_path: Path) -> None:
    code, text = command("ledger", site(tmp_path))
    assert code == 0
    assert "Nothing has left this site" in text
    assert "total ε 0.00" in text
    assert not (tmp_path / "state").exists()


def test_a_damaged_ledger_ends_in_a_line_with_the_way_out(command: Command, tmp_path: Path) -> None:
    spend(tmp_path / "state")
    file = tmp_path / "state" / "ledger.jsonl"
    file.write_bytes(file.read_bytes().replace(b'"steps": 16', b'"steps": 1 ', 1))
    path = site(tmp_path)
    for name in ("ledger", "disclosed"):
        code, text = command(name, path)
        assert (code, text.count("\n")) == (1, 1)
        assert "line 2 as it was written, got another" in text
        assert "`consilium-client ledger-adopt`" in text
    code, text = command("ledger-adopt", path, "--epsilon", "3.5", "--delta", "1e-5", typed="n\n")
    assert code == 1
    assert "Nothing was changed" in text
    code, text = command("ledger-adopt", path, "--epsilon", "3.5", "--delta", "1e-5", typed="y\n")
    assert code == 0, text
    for word in ("can be read, and stay", "spent for good", "too low", "leave this site out"):
        assert word in text
    code, text = command("ledger", path)
    assert "3.5 of it for lines that were lost" in text
    assert float(re.search(r"total ε ([0-9.]+) at δ = 2e-05", text)[1]) > 3.5  # and line 2 counts


@pytest.mark.parametrize("amount", [("-1", "0"), ("nan", "0"), ("1", "1")])
def test_an_impossible_amount_is_not_adopted(
    command: Command, tmp_path: Path, amount: tuple[str, str]
) -> None:
    path = site(tmp_path)
    spent, delta = amount
    code, text = command("ledger-adopt", path, f"--epsilon={spent}", f"--delta={delta}", "--yes")
    assert code == 1
    assert "expected what was spent at least" in text
    assert read_ledger(tmp_path / "state") == []


# --- disclosed ---


def test_every_message_that_left_is_listed(command: Command, tmp_path: Path) -> None:
    spend(tmp_path / "state")
    path = site(tmp_path)
    code, text = command("disclosed", path)
    assert code == 0, text
    assert [" ".join(line.split()[1:4]) for line in text.splitlines()[1:]] == [
        "skin round 2",
        "chest join 14.4",
        "chest round 1",
        "chest round 2",
        "chest round 3",
    ]
    assert text.count("c" * 16) == 5
    assert text.count("7×512, 7") == 5
    assert text.count("metrics.train-loss, last.confusion") == 5
    only = command("disclosed", path, "--study", "skin")[1]
    assert len(only.splitlines()) == 2
    assert only == command("disclosed", path, "--study", SKIN)[1]
    assert "Nothing has left this site for other." in command("disclosed", path, "--study=other")[1]


def test_a_program_gets_every_shape_and_the_whole_hash(command: Command, tmp_path: Path) -> None:
    spend(tmp_path / "state")
    code, text = command("disclosed", site(tmp_path), "--json")
    assert code == 0
    first, *rest = json.loads(text)
    assert first["sha256"] == "c" * 64
    assert first["tensors"] == {"head.weight": [7, 512], "head.bias": [7]}
    assert first["private"] is True
    assert [entry["kind"] for entry in rest] == ["join", "round", "round", "round"]
    assert not any(entry["private"] for entry in rest)


# --- plan ---


def test_a_plan_calibrates_all_rounds_and_tells_what_all_studies_cost_together(
    command: Command, tmp_path: Path
) -> None:
    path = site(tmp_path, patients=40)
    wanted = study(tmp_path, privacy=PRIVATE)
    code, fresh = command("plan", path, wanted)
    assert code == 0, fresh
    assert not (tmp_path / "state").exists()  # a look changes nothing
    assert "about 40 patients, 80 images" in fresh
    assert "q 0.4, 16 patients a step" in fresh
    assert "3 a round, 36 in 12 rounds, 2 of them spare" in fresh
    spend(tmp_path / "state")
    before = (tmp_path / "state/ledger.jsonl").read_bytes()
    code, later = command("plan", path, wanted)
    assert "here  40 patients, 80 images" in later
    sigmas = [float(re.search(r"σ ([0-9.]+), clipping", text)[1]) for text in (fresh, later)]
    assert sigmas[0] == sigmas[1]
    spent = DpEvent(1.0, 0.05, 48)
    for sigma, had, text in zip(sigmas, ([], [spent]), (fresh, later), strict=True):
        order = choose_filter_order(8.0, 1e-5)  # of several studies, as their numbers may depend
        spend_all = partial(compute_filtered_epsilon, order=order) if had else compute_epsilon
        assert 7.5 < compute_epsilon([DpEvent(sigma, 0.4, 36)], 1e-5) <= 8
        table = dict(re.findall(r"^ *(now|round [0-9]+) +([0-9.]+)$", text, re.MULTILINE))
        assert float(table["now"]) == pytest.approx(compute_epsilon(had, 1e-5), abs=0.006)
        assert float(table["round 12"]) == pytest.approx(
            spend_all([*had, DpEvent(sigma, 0.4, 36)], 1e-5), abs=0.006
        )
        assert float(table["round 1"]) == pytest.approx(
            spend_all([*had, DpEvent(sigma, 0.4, 3)], 1e-5), abs=0.006
        )
    assert (tmp_path / "state/ledger.jsonl").read_bytes() == before
    assert "2 tensors of" in later
    assert "metrics: final" in later


def test_a_plan_nobody_can_pay_for_is_refused_with_the_reason(
    command: Command, tmp_path: Path
) -> None:
    adopted = tmp_path / "state"
    adopted.mkdir(mode=0o700)
    adopt_ledger(adopted, 7.99, 0.0)
    wanted = study(tmp_path, privacy=PRIVATE)
    code, text = command(
        "plan", site(tmp_path, patients=4, policy={"max_epsilon": 12, "delta": 1e-5}), wanted
    )
    assert code == 1
    assert "refused" in text
    assert re.search(r"max_epsilon: expected ε of at most 12 at δ = 1e-05, got 15\.[89]", text)
    code, text = command(
        "plan", site(tmp_path, patients=4, policy={"max_epsilon": 16, "delta": 1e-5}), wanted
    )
    assert code == 0
    assert "refused" not in text


def test_too_much_noise_is_said_and_by_which_rule(command: Command, tmp_path: Path) -> None:
    path = site(tmp_path, patients=8)
    code, text = command("plan", path, study(tmp_path, privacy=PRIVATE | {"epsilon": 0.5}))
    assert code == 0, text
    assert "σ over the expected batch is" in text
    assert "above 0.1" in text


def test_a_plan_says_that_sums_of_few_patients_are_refused(
    command: Command, tmp_path: Path
) -> None:
    solved = {"backbone": "shufflenet_v2_x0_5", "weights": "none", "head": "discriminant"}
    wanted = study(tmp_path, model=solved, train={"rounds": 0})
    code, text = command("plan", site(tmp_path, patients=4), wanted)
    assert code == 1, text
    assert "once, sums of features by class, not accounted" in text
    assert "policy.disclose.sums: expected sums over 10 patients of a class or more" in text
    assert "agreed " not in text


def test_a_plan_without_privacy_says_that_nothing_is_accounted(
    command: Command, tmp_path: Path
) -> None:
    wanted = study(tmp_path)
    code, text = command("plan", site(tmp_path, patients=4), wanted)
    assert code == 0, text
    assert "not accounted, no ε bounds what it tells" in text
    assert "agreed" in text
    assert "refused" not in text
    code, text = command(
        "plan", site(tmp_path, 4, policy={"max_epsilon": 1, "delta": 1e-5}), wanted
    )
    assert code == 1
    assert "refused" in text
    assert "max_epsilon" in text
    assert "agreed " not in text


# --- forget and purge ---


def test_a_forgotten_patient_is_gone_from_the_cache_and_from_every_study(
    command: Command, tmp_path: Path
) -> None:
    path = site(tmp_path, patients=4)
    wanted = Study(**{**STUDY, "images": {"size": 32, "augment": {"views": 3, "ops": ["flip"]}}})
    hospital = Site.read(path)
    session_of(hospital, wanted)
    images = {r.patient: [] for r in cut_records(hospital, wanted).train}
    for record in cut_records(hospital, wanted).train:
        images[record.patient].append(record.image.digest())
    name = make_namer(hospital.cache_folder)
    gone, kept = ([name(d) for d in images[p]] for p in ("p1", "p2"))
    (store,) = [p.parent for p in hospital.cache_folder.rglob("about.json")]
    held = Store(store)
    held.refresh()
    assert held.missing([*gone, *kept]) == []
    code, text = command("forget", path, "p1", typed="n\n")
    assert code == 1
    assert {r.patient for r in cut_records(hospital, wanted).train} == {"p0", "p1", "p2", "p3"}
    code, text = command("forget", path, "p1", typed="y\n")
    assert code == 0, text
    assert "not unlearned" in text
    assert "Deleted 6 prepared images" in text
    assert {r.patient for r in cut_records(hospital, wanted).train} == {"p0", "p2", "p3"}
    assert session_of(hospital, wanted).prepared.offer.patients.train == 3
    held = Store(store)
    held.refresh()
    assert held.missing(gone) == [0, 1]
    assert held.missing(kept) == []
    content = (tmp_path / "state/forgotten").read_text()
    assert re.fullmatch(r"[0-9a-f]{64}\n", content)
    assert command("forget", path, "p1", "--yes")[0] == 0
    assert (tmp_path / "state/forgotten").read_text() == content


def test_sealed_replies_go_when_a_patient_does(command: Command, tmp_path: Path) -> None:
    path = site(tmp_path, patients=2)
    with Ledger(Site.read(path).private()) as ledger:
        outbox = Outbox(tmp_path / "state/outbox")
        what = Release(study=SKIN, name="skin", kind="round", round=1, privacy=privacy())
        release(ledger, outbox, what, lambda: Reply(b"sealed", {}))
        code, text = command("forget", path, "p1", "--yes")
        assert code == 1
        assert "one process at a time" in text
        own = Site.read(path)
        assert exclusions.drop_excluded(own, own.data.records(("dark", "bright")))
    lines = (tmp_path / "state/ledger.jsonl").read_bytes()
    code, text = command("forget", path, "p1", "--yes")
    assert code == 0, text
    assert "1 sealed replies" in text
    assert not list((tmp_path / "state/outbox").iterdir())
    assert (tmp_path / "state/ledger.jsonl").read_bytes() == lines


def test_a_patient_nobody_has_is_not_forgotten_in_silence(command: Command, tmp_path: Path) -> None:
    code, text = command("forget", site(tmp_path, patients=2), "p9", "--yes")
    assert (code, text.count("\n")) == (1, 1)
    assert "expected a patient with images in data, got one with none" in text
    assert "purge deletes all" in text
    assert not (tmp_path / "state/forgotten").exists()


def test_purge_takes_sealed_replies_too_and_says_so(command: Command, tmp_path: Path) -> None:
    path = site(tmp_path)
    with Ledger(Site.read(path).private()) as ledger:
        what = Release(study=SKIN, name="skin", kind="round", round=1, privacy=privacy())
        outbox = Outbox(tmp_path / "state/outbox")
        release(ledger, outbox, what, lambda: Reply(b"sealed", {}))
    code, text = command("purge", path, typed="n\n")
    assert code == 1
    assert "1 sealed replies: a round that is asked for again spends anew" in text
    assert len(list((tmp_path / "state/outbox").iterdir())) == 1
    assert command("purge", path, "--yes")[0] == 0
    assert not list((tmp_path / "state/outbox").iterdir())
    assert len(read_ledger(tmp_path / "state")) == 4


def test_a_ledger_is_used_elsewhere_only_once_somebody_says_so(
    command: Command, tmp_path: Path
) -> None:
    spend(tmp_path / "old")
    shutil.copytree(tmp_path / "old", tmp_path / "state")
    path = site(tmp_path)
    assert command("ledger-move", path, typed="n\n")[0] == 1
    with pytest.raises(SiteError, match="consilium-client ledger-move"):
        Ledger(tmp_path / "state", bound=True)
    code, text = command("ledger-move", path, typed="y\n")
    assert code == 0, text
    assert "used here from now on, and nowhere else" in text
    Ledger(tmp_path / "state", bound=True).close()


def test_a_lost_secret_is_named_and_no_ledger_is_adopted_without_it(
    command: Command, tmp_path: Path
) -> None:
    spend(tmp_path / "state")
    (tmp_path / "state/secret").unlink()
    path = site(tmp_path)
    for name, *rest in (["ledger"], ["disclosed"], ["ledger-adopt", "--epsilon=0", "--delta=0"]):
        code, text = command(name, path, *rest)
        assert (code, text.count("\n")) == (1, 1)
        assert "state/secret: expected the secret that this site worked with" in text
        assert "Restore the file secret from a backup" in text
