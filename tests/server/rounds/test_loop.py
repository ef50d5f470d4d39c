"""The real ServerApp and ClientApp over serialised messages, with sites that misbehave."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import Array, Context, Message
from safetensors.torch import load_file

from client.consent.cohort import cut_records
from client.site import Site
from common.config.study import Study
from common.errors import RunError, StudyError
from common.model.inference import load_model
from common.model.network import assemble
from common.protocol.fields import ARRAYS, METRICS
from common.protocol.round import WEIGHT
from server.app import app as server_app
from server.rounds.strategies import REGISTRY
from server.runs.results import read_results, unite_counts
from server.runs.run_folder import RunFolder
from simulations.cli.main import main
from simulations.engines.grid import simulate_run
from simulations.sites import virtual_sites
from tests.builders import (
    DEMO,
    PHANTOMS,
    ROOT,
    client_app,
    create_run,
    edit_site,
    find_phantoms,
    read_study,
)

pytestmark = pytest.mark.numbers

ClientApp = Callable[[Message, Context], Message]


demo = partial(read_study, "demo", "train.rounds=3", "train.local_epochs=1")


def settle(study: Study, folder: Path, phantoms: Path) -> list[Path]:
    """Four phantom hospitals in a new run folder."""
    return create_run(find_phantoms(phantoms), study, folder, phantoms / "cache")


def run(study: Study, folder: Path, phantoms: Path, app: ClientApp = client_app) -> RunFolder:
    simulate_run(server_app, app, settle(study, folder, phantoms), folder)  # type: ignore[arg-type]
    return RunFolder(folder)


def site_of(context: Context) -> str:
    return Path(str(context.node_config["site"])).parent.name


def round_of(message: Message) -> int | None:
    """Its number, if the message asks to train."""
    if message.metadata.message_type != "train":
        return None
    return int(message.content.config_records["config"]["server-round"])  # type: ignore[arg-type]


def meddling(site: str, change: Callable[[Message], None], rounds: Sequence[int] = ()) -> ClientApp:
    """The real ClientApp, but one site changes its round replies."""

    def app(message: Message, context: Context) -> Message:
        reply = client_app(message, context)
        number = round_of(message)
        if number and site_of(context) == site and (not rounds or number in rounds):
            change(reply)
        return reply

    return app


def lines(folder: RunFolder, site: str | None) -> list[dict[str, Any]]:
    """A site's lines of `metrics.jsonl`, or the overall ones, of rounds that trained."""
    history = folder.read_history()
    return [x for x in history if x["site"] == site and x["train_loss"] is not None]


def test_a_study_leaves_everything_a_person_needs(tmp_path: Path, phantoms: Path) -> None:
    folder = run(demo("train.rounds=6"), tmp_path / "run", phantoms)
    names = {path.name for path in folder.path.iterdir()}
    expected = {"study.yaml", "run.yaml", "metrics.jsonl", "report.json", "model.safetensors"}
    expected |= {"last.safetensors", "last.json"}
    assert names >= expected | {"curves.png", "confusion.png", "sites"}
    assert not [name for name in names if name.endswith(".part")]
    for site in (*PHANTOMS, None):
        assert [line["round"] for line in lines(folder, site)] == list(range(1, 7))
    overall = lines(folder, None)
    assert overall[-1]["train_loss"] < overall[0]["train_loss"]
    assert max(line["balanced_accuracy"] for line in overall) > overall[0]["balanced_accuracy"]
    # The last model is validated too: one more line each, without training.
    assert [x["round"] for x in folder.read_history() if x["train_loss"] is None] == [7] * 5


def test_the_last_is_released_whatever_its_validation(tmp_path: Path, phantoms: Path) -> None:
    def app(message: Message, context: Context) -> Message:
        reply = client_app(message, context)
        if round_of(message) == 5:  # the last
            _zero(reply)
        return reply

    folder = run(demo("train.rounds=5"), tmp_path / "run", phantoms, app)
    scores = {x["model_round"]: x["loss"] for x in folder.read_history() if x["site"] is None}
    assert set(scores) == set(range(6))
    assert scores[5] == pytest.approx(np.log(4))
    assert scores[4] < scores[5]
    last = folder.read_last()
    assert last is not None
    assert last.round == 5
    released = load_file(folder.path / "model.safetensors")
    for name, tensor in last.tensors.items():
        assert torch.equal(released[name], tensor)
    results, facts = read_results(folder.path, 4)
    assert facts["released_round"] == 5
    # All are tested by it: a head of zeros takes everyone for the first class.
    assert all(counts.confusion[:, 0].sum() == counts.n for counts in results["federated"].values())


def test_only_float32_tensors_of_the_suffix_travel(tmp_path: Path, phantoms: Path) -> None:
    study = demo("model.unfreeze=last:1", "train.rounds=1")
    seen: list[tuple[set[str], set[str]]] = []

    def watched(message: Message, context: Context) -> Message:
        reply = client_app(message, context)
        for record in (message.content, reply.content):
            for arrays in record.array_records.values():
                seen.append((set(arrays), {array.dtype for array in arrays.values()}))
        return reply

    run(study, tmp_path / "run", phantoms, watched)
    trainable = set(assemble(study, study.model.weights).trainable)
    assert any("conv5" in name for name in trainable)
    assert seen
    assert all(names == trainable and kinds == {"float32"} for names, kinds in seen)


def _zero(reply: Message) -> None:
    arrays = reply.content.array_records[ARRAYS]
    for name, array in list(arrays.items()):
        arrays[name] = Array(np.zeros_like(array.numpy()))


def _nan(reply: Message) -> None:
    arrays = reply.content.array_records[ARRAYS]
    name = next(iter(arrays))
    arrays[name] = Array(np.full_like(arrays[name].numpy(), np.nan))


def _shape(reply: Message) -> None:
    arrays = reply.content.array_records[ARRAYS]
    arrays[next(iter(arrays))] = Array(np.zeros((3, 3), np.float32))


def _extra(reply: Message) -> None:
    reply.content.array_records[ARRAYS]["more"] = Array(np.zeros(3, np.float32))


def _weight(reply: Message) -> None:
    reply.content.metric_records[METRICS][WEIGHT] = 1_000_000_000


def _vast(reply: Message) -> None:
    arrays = reply.content.array_records[ARRAYS]
    name = next(iter(arrays))
    arrays[name] = Array(np.full_like(arrays[name].numpy(), 3e38))


def _crowd(reply: Message) -> None:
    """A billion images, all classified right: the site's figures would be everyone's."""
    counts = reply.content.metric_records["validation"]
    counts["confusion"] = [0, 10**9]
    counts["positive"] = [2000, 10**9]
    counts["negative"] = [2048, 10**9, 4096, 10**9, 6144, 10**9]


def _metric(reply: Message) -> None:
    reply.content.metric_records[METRICS]["more"] = 1.0


def _counts(reply: Message) -> None:
    reply.content.metric_records["validation"]["confusion"] = [0, -5]


def _nothing(reply: Message) -> None:
    reply.content.clear()


@pytest.mark.parametrize(
    "change", [_nan, _vast, _shape, _extra, _weight, _metric, _counts, _crowd, _nothing]
)
def test_an_odd_reply_is_left_out(
    change: Callable[[Message], None],
    tmp_path: Path,
    phantoms: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    folder = run(demo(), tmp_path / "run", phantoms, meddling("south", change))
    assert not lines(folder, "south")
    assert len(lines(folder, "north")) == 3
    assert "south is left out: it sent" in caplog.text
    last = folder.read_last()
    assert last is not None
    assert all(torch.isfinite(tensor).all() for tensor in last.tensors.values())


def test_a_site_that_errs_once_comes_back(tmp_path: Path, phantoms: Path) -> None:
    folder = run(demo(), tmp_path / "run", phantoms, meddling("south", _nan, rounds=[2]))
    assert [line["round"] for line in lines(folder, "south")] == [1, 3]


def test_no_exception_text_reaches_the_server(tmp_path: Path, phantoms: Path) -> None:
    """The site's images vanish after join; its log says which, the wire only that it failed."""
    study = demo()
    folder = tmp_path / "run"
    site_files = settle(study, folder, phantoms)
    secret = "/data/patients/DOE_JOHN_1961.png"  # noqa: S105
    replies: list[Message] = []

    def failing(message: Message, context: Context) -> Message:
        if site_of(context) == "south" and message.metadata.message_type == "train":
            config = message.content.config_records["config"]
            config["study"] = secret  # the client will complain about exactly this text
        reply = client_app(message, context)
        replies.append(reply)
        return reply

    simulate_run(server_app, failing, site_files, folder)  # type: ignore[arg-type]
    errors = [reply.error for reply in replies if reply.has_error()]
    assert errors
    assert all(error.reason == "contract" for error in errors)
    told = (folder / "run.yaml").read_text() + (folder / "metrics.jsonl").read_text()
    assert "DOE_JOHN" not in told


def test_too_few_good_replies_stop_the_run_and_it_can_go_on(tmp_path: Path, phantoms: Path) -> None:
    study, folder = demo("aggregate.quorum=4"), tmp_path / "run"
    with pytest.raises(RunError, match=r"round 2: expected 4 good replies.*south: it sent.*resume"):
        run(study, folder, phantoms, meddling("south", _nan, rounds=[2]))
    assert not (folder / "report.json").exists()
    simulate_run(server_app, client_app, virtual_sites.find_site_files(folder), folder)
    whole = run(study, tmp_path / "whole", phantoms)
    assert_same_end(RunFolder(folder), whole)


def assert_same_end(one: RunFolder, other: RunFolder) -> None:
    for name in ("last.safetensors", "model.safetensors", "report.json"):
        assert (one.path / name).read_bytes() == (other.path / name).read_bytes(), name
    assert one.read_history() == other.read_history()


def test_another_site_takes_the_place_of_one_that_fails(tmp_path: Path, phantoms: Path) -> None:
    study = demo("aggregate.fraction=0.5", "aggregate.quorum=2", "train.rounds=6")
    folder = run(study, tmp_path / "run", phantoms, meddling("south", _nan))
    rounds = [line["round"] for line in folder.read_history() if line["site"]]
    assert all(rounds.count(number) == 2 for number in range(1, 7))
    assert not lines(folder, "south")


def test_without_validation_patients_the_last_model_is_released(
    tmp_path: Path, phantoms: Path
) -> None:
    folder = run(demo("holdout.validation=0"), tmp_path / "run", phantoms)
    assert json.loads((folder.path / "report.json").read_text())["released_round"] == 3
    last = folder.read_last()
    assert last is not None
    released = load_file(folder.path / "model.safetensors")
    assert all(torch.equal(released[name], tensor) for name, tensor in last.tensors.items())
    assert any(tensor.any() for tensor in last.tensors.values())


def test_the_last_message_is_asked_again(tmp_path: Path, phantoms: Path) -> None:
    """A site that misses it once is in the report all the same."""
    failed: list[str] = []

    def app(message: Message, context: Context) -> Message:
        reply = client_app(message, context)
        if message.metadata.message_type == "evaluate" and not failed:
            failed.append(site_of(context))
            reply.content.clear()
        return reply

    folder = run(demo(), tmp_path / "run", phantoms, app)
    results, _ = read_results(folder.path, 4)
    assert failed
    assert set(results["federated"]) == set(PHANTOMS)


def test_two_processes_on_one_run_are_refused(tmp_path: Path, phantoms: Path) -> None:
    study, folder = demo(), tmp_path / "run"
    site_files = settle(study, folder, phantoms)
    with RunFolder(folder).locked(), pytest.raises(RunError, match="one that runs it now"):
        simulate_run(server_app, client_app, site_files, folder)
    simulate_run(server_app, client_app, site_files, folder)


class Interrupted(BaseException):
    """As sudden as a killed process, as far as this process can tell."""


@pytest.mark.parametrize("strategy", REGISTRY)
def test_three_and_three_resumed_rounds_are_six(
    strategy: str, tmp_path: Path, phantoms: Path
) -> None:
    study = demo("train.rounds=6", f"aggregate.strategy={strategy}", "aggregate.quorum=5")

    def begin(folder: Path) -> list[Path]:
        five = virtual_sites.cut_pool(phantoms / "north", study, spec="iid", sites=5)
        return create_run(five, study, folder, phantoms / "cache")

    def stops(message: Message, context: Context) -> Message:
        if round_of(message) == 4 and site_of(context) == "site-4":
            raise Interrupted
        return client_app(message, context)

    cut, whole = tmp_path / "cut", tmp_path / "whole"
    with pytest.raises(Interrupted):
        simulate_run(server_app, stops, begin(cut), cut)  # type: ignore[arg-type]
    last = RunFolder(cut).read_last()
    assert last is not None
    assert last.round == 3
    simulate_run(server_app, client_app, virtual_sites.find_site_files(cut), cut)
    simulate_run(server_app, client_app, begin(whole), whole)
    assert_same_end(RunFolder(cut), RunFolder(whole))


@pytest.mark.system
def test_a_killed_process_resumes_to_the_same_end(
    tmp_path: Path, phantoms: Path, run_main: Callable[..., tuple[int, str]]
) -> None:
    """SIGKILL at three moments; each time the command goes on from the last finished round."""
    study = [str(DEMO), "--set", "train.rounds=12", "--set", "train.patience="]
    study += ["--set", "train.local_epochs=1", "--set", "adapt=false"]
    sites = [part for name in PHANTOMS for part in ("--site", str(phantoms / name))]
    start = ["run", *study, *sites, "--cache", str(phantoms / "cache")]
    cut, whole = tmp_path / "cut", tmp_path / "whole"
    code, said = run_main(main, *start, "--out", whole)
    assert code == 0, said
    command = [sys.executable, "-c", "from simulations.cli.main import main; main()"]
    arguments = [*command, *start, "--out", str(cut)]
    for moment in (2, 5, 9):
        process = subprocess.Popen(
            arguments, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        wait_for_round(cut, moment, process)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        arguments = [*command, "run", "--resume", str(cut)]
    subprocess.run(arguments, cwd=ROOT, check=True, capture_output=True)
    assert_same_end(RunFolder(cut), RunFolder(whole))


def wait_for_round(folder: Path, number: int, process: subprocess.Popen[bytes]) -> None:
    for _ in range(6000):
        history = RunFolder(folder).read_history()
        if process.poll() is not None or (history and history[-1]["round"] >= number):
            return
        time.sleep(0.01)
    raise AssertionError(f"round {number} never came")


def test_a_torn_log_line_is_dropped_on_resume(tmp_path: Path, phantoms: Path) -> None:
    study, folder = demo("aggregate.quorum=4"), tmp_path / "run"
    with pytest.raises(RunError):
        run(study, folder, phantoms, meddling("south", _nan, rounds=[3]))
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"round": 3, "site": "east"}\n{"round": 3, "si')
    simulate_run(server_app, client_app, virtual_sites.find_site_files(folder), folder)
    assert_same_end(RunFolder(folder), run(study, tmp_path / "whole", phantoms))


def test_a_damaged_checkpoint_is_named(tmp_path: Path, phantoms: Path) -> None:
    folder = run(demo(), tmp_path / "run", phantoms)
    (folder.path / "last.safetensors").write_bytes(b"not a checkpoint")
    with pytest.raises(RunError, match=r"last\.safetensors: expected an intact checkpoint"):
        folder.read_last()


def test_a_run_of_another_study_is_not_resumed(tmp_path: Path, phantoms: Path) -> None:
    folder = run(demo(), tmp_path / "run", phantoms)
    with pytest.raises(RunError, match="another train"):
        RunFolder.resume(folder.path, demo("train.lr=0.5"))
    with pytest.raises(RunError, match="expected a new or empty folder"):
        RunFolder.create(folder.path)


def test_a_run_folder_is_closed_to_others(tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    (tmp_path / "there").chmod(0o777)
    for name in ("there", "new"):
        folder = RunFolder.create(tmp_path / name)
        assert folder.path.stat().st_mode & 0o777 == 0o700


def test_an_evaluating_site_only_tests(tmp_path: Path, phantoms: Path) -> None:
    study, folder = demo(), tmp_path / "run"
    found = find_phantoms(phantoms, PHANTOMS[:-1])
    found.append(virtual_sites.find_site(phantoms / "west", evaluates_only=True))
    site_files = create_run(found, study, folder, phantoms / "cache")
    simulate_run(server_app, client_app, site_files, folder)
    assert not lines(RunFolder(folder), "west")
    results, _ = read_results(folder, 4)
    everyone = (phantoms / "west/manifest.csv").read_text().count("\n") - 1
    assert results["federated"]["west"].n == everyone


def test_a_site_with_another_backbone_is_refused_by_name(tmp_path: Path, phantoms: Path) -> None:
    study, folder = demo(), tmp_path / "run"
    site_files = settle(study, folder, phantoms)
    from safetensors.torch import save_file

    state = load_file(str(study.model.weights_file))
    state["conv1.0.weight"][0, 0, 0, 0] += 1e-3
    (tmp_path / "other").mkdir()
    save_file(state, tmp_path / "other" / "phantom_backbone.safetensors")
    text = site_files[2].read_text()
    other = text.replace(str(study.model.weights_file.parent), str(tmp_path / "other"))  # type: ignore[union-attr]
    assert other != text
    site_files[2].write_text(other)
    simulate_run(server_app, client_app, site_files, folder)
    assert "south: its backbone differ from ours" in (folder / "run.yaml").read_text()
    assert not lines(RunFolder(folder), "south")


def test_a_join_below_the_quorum_tells_each_reason(tmp_path: Path, phantoms: Path) -> None:
    study, folder = demo("aggregate.quorum=4"), tmp_path / "run"
    site_files = settle(study, folder, phantoms)
    edit_site(site_files[0], policy={"max_epsilon": 1.0, "delta": 1e-5})
    with pytest.raises(RunError, match=r"expected 4 training sites.*its policy or its data"):
        simulate_run(server_app, client_app, site_files, folder)


def test_early_stopping(tmp_path: Path, phantoms: Path) -> None:
    study = demo("train.rounds=40", "train.patience=2", "train.lr=1.0e-9")

    def stops(message: Message, context: Context) -> Message:
        if round_of(message) == 3:
            raise Interrupted
        return client_app(message, context)

    whole = run(study, tmp_path / "whole", phantoms)
    last = whole.read_last()
    assert last is not None
    scores = [line["balanced_accuracy"] for line in lines(whole, None)]
    assert last.round == len(scores) < 40
    # The rounds went on until two more models were scored that are no better than the best.
    assert scores.index(max(scores)) == len(scores) - 3
    cut = tmp_path / "cut"
    with pytest.raises(Interrupted):
        run(study, cut, phantoms, stops)
    simulate_run(server_app, client_app, virtual_sites.find_site_files(cut), cut)
    assert_same_end(RunFolder(cut), whole)


def test_a_fraction_of_the_sites_per_round(tmp_path: Path, phantoms: Path) -> None:
    study = demo("aggregate.fraction=0.5", "aggregate.quorum=2", "train.rounds=6")
    folder = run(study, tmp_path / "run", phantoms)
    cohorts = {
        number: sorted(
            x["site"] for x in folder.read_history() if x["round"] == number and x["site"]
        )
        for number in range(1, 7)
    }
    assert all(len(cohort) == 2 for cohort in cohorts.values())
    assert len({tuple(cohort) for cohort in cohorts.values()}) > 1


def test_a_warm_start_begins_where_the_other_run_ended(tmp_path: Path, phantoms: Path) -> None:
    first = run(demo("train.rounds=6"), tmp_path / "first", phantoms)
    again = demo(f"model.init={first.path}")
    second = run(again, tmp_path / "second", phantoms)
    # The same patients are held out, so the first scored model is exactly the released one.
    released = first.read_history()[-1]["balanced_accuracy"]
    assert lines(second, None)[0]["balanced_accuracy"] == pytest.approx(released)


def test_a_warm_start_that_does_not_fit(tmp_path: Path, phantoms: Path) -> None:
    deeper = demo("model.unfreeze=last:1", "train.rounds=1")
    first = run(deeper, tmp_path / "first", phantoms)
    for change, reason in (
        ("seed=0", "trained no deeper than this study"),
        ("seed=1", "another seed"),
        ("holdout.test=0.1", "another holdout"),
        ("classes=[nodule, clear, consolidation, effusion]", "another classes"),
        ("model.weights=none", "another weights"),
    ):
        study = demo(f"model.init={first.path}", change)
        with pytest.raises(StudyError, match=rf"model\.init: expected a run.*{reason}"):
            run(study, tmp_path / change, phantoms)
    study = demo(f"model.init={tmp_path / 'nowhere'}")
    with pytest.raises(StudyError, match=r"model\.init: expected a finished run"):
        run(study, tmp_path / "nothing", phantoms)


def test_replies_in_another_order_change_nothing(tmp_path: Path, phantoms: Path) -> None:
    study = demo()
    backwards = tmp_path / "backwards"
    site_files = settle(study, backwards, phantoms)
    simulate_run(server_app, client_app, list(reversed(site_files)), backwards)
    assert_same_end(RunFolder(backwards), run(study, tmp_path / "forwards", phantoms))


def test_the_released_model_predicts_as_the_federation_did(tmp_path: Path, phantoms: Path) -> None:
    """Two lines of Python give the model, and its errors on test patients are the reported ones."""
    study, folder = demo(), tmp_path / "run"
    site_files = settle(study, folder, phantoms)
    simulate_run(server_app, client_app, site_files, folder)
    model = load_model(folder)
    tested = cut_records(Site.read(site_files[1]), study).test
    images = [record.image.path for record in tested]  # type: ignore[attr-defined]
    predicted = model.decisions(images)
    truth = torch.tensor([record.label for record in tested])
    results, _ = read_results(folder, 4)
    counts = results["federated"]["north"]
    assert counts.n == len(images)
    assert int((predicted == truth).sum()) == int(np.trace(counts.confusion))
    assert unite_counts(results["federated"].values(), 4).n > counts.n
    assert json.loads((folder / "report.json").read_text())["released_round"] >= 0
