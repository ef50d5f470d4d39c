"""What sites withhold, coarsen or lose: the run goes on, nobody is weighed by what is not known,
and a ledger that was rolled back is not taken for the site's."""

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import lru_cache, partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from flwr.app import Array, Context, Message, MetricRecord, RecordDict
from safetensors.torch import load_file

from client.ledger import adoption
from client.privacy.rounding import Rounding
from common.config.study import Study
from common.errors import RunError
from common.flower.messages import make_error_reply
from common.metrics.counts import Counts
from common.model.contract import Contract, Versions
from common.model.network import assemble
from common.protocol.disclosure import Disclosure
from common.protocol.fields import ByPart
from common.protocol.join import JoinReply
from common.protocol.ledger import LedgerHead, LedgerReply, LedgerRequest
from common.protocol.tensors import Tensors
from server.app import app as server_app
from server.rounds.admission import Member
from server.rounds.federation import Federation
from server.rounds.ledger_heads import ROLLED_BACK, LedgerHeads
from server.rounds.weighing import weigh_sites
from server.runs.results import read_results
from server.runs.run_folder import RunFolder
from simulations.engines.base import InProcess
from simulations.engines.grid import InProcessGrid, simulate_run
from simulations.studies import runner
from tests.builders import (
    PHANTOMS,
    client_app,
    create_run,
    edit_site,
    find_phantoms,
    make_study,
    read_study,
)

pytestmark = pytest.mark.numbers

App = Callable[[Message, Context], Message]

# --- sites that answer whatever a test wants ---

EXACT = Disclosure(counts="exact", sums="none")
FINAL = Disclosure(counts="exact", metrics="final", sums="none")
STUDY = make_study(name="t", classes=["dark", "bright"])
PRIVATE = make_study(
    name="t",
    classes=["dark", "bright"],
    privacy={"mechanism": "dp_sgd", "epsilon": 1.0, "delta": 1e-6},
)


@lru_cache
def network(private: bool = False) -> Any:
    return assemble(PRIVATE if private else STUDY, "none")


def head(count: int, letter: str = "a") -> LedgerHead:
    return LedgerHead(count=count, hash=letter * 64, receipt="e" * 64)


def reply(name: str, disclosure: Disclosure = EXACT, **changes: Any) -> JoinReply:
    """What a site with 30 and 11 training images says at join."""
    tells = disclosure.resolved(private=False)
    rounding = Rounding(bytes(32), tells.base)
    patients = {"train": 20, "validation": 4, "test": 9}
    images = {"train": (30, 11), "validation": (3, 4), "test": (9, 9)}
    given: dict[str, Any] = {
        "name": name,
        "role": "train",
        "contract": network().contract,
        "disclosure": tells,
        "patients": {
            p: rounding.round_number(n, p) if tells.tells else None for p, n in patients.items()
        },
        "images": {
            p: rounding.round_images(n, p) if tells.tells else None for p, n in images.items()
        },
        "enrolled": None,
        "ledger": head(1),
        "versions": Versions.here(),
    }
    return JoinReply.model_validate(given | changes)


class Sites:
    """A node for each join reply; asked about its ledger, it answers what it was given."""

    def __init__(self, replies: Sequence[JoinReply], hashes: Mapping[str, Any] = {}) -> None:
        self.replies, self.hashes = replies, hashes
        self.asked: dict[str, int] = {}

    def __call__(self, message: Message, context: Context) -> Message:
        told = self.replies[int(Path(str(context.node_config["site"])).name)]
        if message.metadata.message_type == "query":
            return Message(told.record(), reply_to=message)
        self.asked[told.name] = LedgerRequest.read(message.content).count
        answer = self.hashes[told.name]
        if isinstance(answer, RecordDict):
            return Message(answer, reply_to=message)
        if answer == "error":
            return make_error_reply(message, "site")
        return Message(LedgerReply(answer).record(), reply_to=message)

    def join(self, study: Study = STUDY, known: Mapping[str, LedgerHead] = {}) -> Federation:
        nodes = [Path(str(index)) for index in range(len(self.replies))]
        grid = InProcessGrid(self, nodes)  # type: ignore[arg-type]
        federation = Federation(grid, study, network(study.private), known)
        federation.join()
        return federation


def weights(federation: Federation) -> dict[str, float]:
    return {name: weight.number for name, weight in federation.weights.items()}


def names(federation: Federation) -> list[str]:
    return [member.name for member in federation.members]


# --- weights ---


def test_sites_that_all_tell_exactly_weigh_by_their_training_images() -> None:
    small = ByPart(train=(2, 0), validation=(3, 4), test=(9, 9))
    silent = Disclosure(counts="exact", metrics="none", sums="none")  # of figures alone
    sites = Sites(
        [
            reply("a"),
            reply("b", images=small),
            reply("c", silent),
            reply("d", Disclosure(counts="none", sums="none"), role="evaluate"),
        ]
    )
    assert weights(sites.join()) == {"a": 41.0, "b": 2.0, "c": 41.0}


@pytest.mark.parametrize(
    "less", [Disclosure(counts="rounded"), Disclosure(min_cell=2), Disclosure(counts="none")]
)
def test_one_that_tells_less_makes_all_weigh_the_same(less: Disclosure) -> None:
    federation = Sites([reply("a"), reply("b", less.resolved(private=False))]).join()
    assert weights(federation) == {"a": 1.0, "b": 1.0}


def hidden(**changes: Any) -> JoinReply:
    """As in a private study: nothing of the patients that train."""
    told = reply("a", FINAL, contract=network(private=True).contract)
    parts = {
        key: getattr(told, key).model_copy(update={"train": None}) for key in ("patients", "images")
    }
    return told.model_copy(update=parts | changes)


def test_in_privacy_sites_weigh_by_what_they_declare_or_else_all_the_same() -> None:
    federation = Sites([hidden(), hidden(name="b")]).join(PRIVATE)
    assert weights(federation) == {"a": 1.0, "b": 1.0}
    federation = Sites([hidden(enrolled=300), hidden(name="b", enrolled=100)]).join(PRIVATE)
    assert weights(federation) == {"a": 300.0, "b": 100.0}
    federation = Sites([hidden(enrolled=300), hidden(name="b")]).join(PRIVATE)
    assert weights(federation) == {"a": 1.0, "b": 1.0}


def counted(name: str, *images: int) -> JoinReply:
    return reply(name, images=ByPart(train=images, validation=(3, 4), test=(9, 9)))


@pytest.mark.parametrize(
    ("others", "share"), [([500], 3 / 4), ([500, 900], 2700 / 4100), ([500, 600, 900], 1800 / 3800)]
)
def test_who_claims_a_billion_images_does_not_own_the_average(
    others: list[int], share: float
) -> None:
    honest = [counted(f"honest-{n}", n, 0) for n in others]
    liar = counted("liar", 5 * 10**8, 5 * 10**8)
    told = Sites([*honest, liar]).join().weights
    assert told["liar"].share == pytest.approx(share)
    assert [name for name, weight in told.items() if weight.capped] == ["liar"]
    assert "capped: it tells 1000000000" in str(told["liar"])
    assert sum(weight.share for weight in told.values()) == pytest.approx(1)


def test_who_declares_a_billion_patients_does_not_own_the_average() -> None:
    federation = Sites([hidden(enrolled=10**9), hidden(name="b", enrolled=100)]).join(PRIVATE)
    assert weights(federation) == {"a": 300.0, "b": 100.0}


@pytest.mark.parametrize(("most", "weight"), [(3.0, 30.0), (50.0, 500.0), (None, 900.0)])
def test_a_study_says_how_much_a_site_may_weigh(most: float | None, weight: float) -> None:
    members = [Member(0, counted("a", 10, 0)), Member(1, counted("b", 900, 0))]
    told = weigh_sites(members, make_study(aggregate={"max_weight": most}).aggregate.max_weight)
    assert {name: each.number for name, each in told.items()} == {"a": 10.0, "b": weight}


def test_who_declares_patients_to_a_study_without_privacy_is_left_out() -> None:
    federation = Sites([reply("a"), reply("b", enrolled=300)]).join()
    assert names(federation) == ["a"]
    assert federation.refusals == {"b": "it declares patients that nobody asked for"}


# --- who is let in ---


def test_who_tells_what_a_private_study_does_not_let_it_tell_is_left_out() -> None:
    loud = reply("b", FINAL, contract=network(private=True).contract)
    every_round = hidden(name="c", disclosure=EXACT)
    federation = Sites([hidden(), loud, every_round]).join(PRIVATE)
    assert names(federation) == ["a"]
    assert federation.refusals == dict.fromkeys(
        ("b", "c"), "it does not tell what this study lets it tell"
    )


def test_who_keeps_back_what_it_says_it_tells_is_left_out() -> None:
    sites = Sites([reply("b"), hidden(contract=network().contract, disclosure=EXACT)])
    federation = sites.join()
    assert names(federation) == ["b"]
    assert "does not tell" in federation.refusals["a"]


def test_who_counts_other_classes_or_trains_on_nothing_is_left_out() -> None:
    three = ByPart(train=(1, 1, 1), validation=(1, 1, 1), test=(1, 1, 1))
    nobody = ByPart(train=(0, 0), validation=(3, 4), test=(9, 9))
    sites = Sites([reply("a"), reply("b", images=three), reply("c", images=nobody)])
    federation = sites.join()
    assert names(federation) == ["a"]
    assert federation.refusals["b"] == "it counts other classes than the study has"
    assert federation.refusals["c"] == "it has nothing to train on"


# --- ledgers ---


def test_a_site_that_joins_for_the_first_time_is_not_asked() -> None:
    sites = Sites([reply("a", ledger=head(9)), reply("b")])
    assert names(sites.join()) == ["a", "b"]
    assert names(sites.join(known={"c": head(99)})) == ["a", "b"]
    assert sites.asked == {}


def test_a_ledger_that_goes_further_is_asked_for_its_hash_there() -> None:
    sites = Sites(
        [reply("a", ledger=head(9, "d")), reply("b", ledger=head(3, "d"))],
        {"a": "a" * 64, "b": "b" * 64},
    )
    federation = sites.join(known={"a": head(5), "b": head(2, "b")})
    assert sites.asked == {"a": 5, "b": 2}
    assert names(federation) == ["a", "b"]
    assert federation.refusals == {}


@pytest.mark.parametrize(
    "now", [head(4), head(1, "b"), head(5, "b"), head(5)], ids=["4", "1", "5, another", "5"]
)
def test_a_ledger_that_goes_no_further_was_rolled_back(now: LedgerHead) -> None:
    """Joining alone adds a line: even the same head is what was there before the last join."""
    sites = Sites([reply("a", ledger=now), reply("b", ledger=head(8))], {"b": "a" * 64})
    federation = sites.join(known={"a": head(5), "b": head(5)})
    assert names(federation) == ["b"]
    assert federation.refusals == {"a": ROLLED_BACK}
    assert set(sites.asked) == {"b"}


@pytest.mark.parametrize(
    ("answer", "why"),
    [
        ("b" * 64, ROLLED_BACK),
        (None, ROLLED_BACK),
        ("error", "its site file or its ledger is wrong"),
        (RecordDict(), "it sent a message with other parts than agreed"),
        (LedgerRequest(5).record(), "it sent no usable 'hash' in the message"),
    ],
)
def test_a_wrong_answer_about_the_ledger_is_refused(answer: object, why: str) -> None:
    sites = Sites(
        [reply("a", ledger=head(9)), reply("b", ledger=head(9))], {"a": answer, "b": "a" * 64}
    )
    federation = sites.join(known={"a": head(5), "b": head(5)})
    assert names(federation) == ["b"]
    assert federation.refusals == {"a": why}


def test_a_quorum_lost_to_old_ledgers_ends_with_the_reason() -> None:
    with pytest.raises(RunError, match=r"1 training sites.*0 of 1 sites \(a: its ledger was roll"):
        Sites([reply("a", ledger=head(4))]).join(known={"a": head(5)})


def test_nobody_is_put_out_by_who_takes_its_name() -> None:
    """A node that is refused under a site's name does not take the site along."""
    other = Contract(**{**network().contract.model_dump(), "backbone": "ab"})
    for replies in ([reply("a", contract=other), reply("a")], [reply("a"), reply("a")]):
        federation = Sites([*replies, reply("b")]).join()
        assert names(federation) == ["a", "b"]
        assert len(federation.refusals) == 1


def test_how_far_ledgers_went_outlives_the_process_and_who_did_not_come(tmp_path: Path) -> None:
    path = tmp_path / "ledgers.json"
    assert LedgerHeads(path).read_heads() == {}
    LedgerHeads(path).keep_heads({"a": head(1), "b": head(2)})
    LedgerHeads(path).keep_heads({"b": head(7, "c")})
    LedgerHeads(path).keep_heads({"b": head(6)})  # an old reply, sent again
    assert LedgerHeads(path).read_heads() == {"a": head(1), "b": head(7, "c")}


@pytest.mark.parametrize("content", ["", "{", '{"a": 5}', '{"a": {"count": 0, "hash": "x"}}'])
def test_a_damaged_list_of_ledgers_is_named(tmp_path: Path, content: str) -> None:
    path = tmp_path / "ledgers.json"
    path.write_text(content)
    with pytest.raises(RunError, match=r"ledgers\.json: expected how far.*Restore it"):
        LedgerHeads(path).read_heads()


# --- real hospitals ---


demo = partial(
    read_study,
    "demo",
    "train.rounds=2",
    "train.local_epochs=1",
    "aggregate.quorum=1",
    "holdout.validation=0.4",
)


def settle(
    folder: Path, phantoms: Path, disclose: Mapping[str, object], *changes: str
) -> list[Path]:
    """Four phantom hospitals in a new run folder; those named tell less."""
    study, found = demo(*changes), find_phantoms(phantoms)
    site_files = create_run(found, study, folder, phantoms / "cache")
    for path in site_files:
        if path.parent.name in disclose:
            edit_site(path, policy={"disclose": disclose[path.parent.name]})
    return site_files


def run(folder: Path, site_files: Sequence[Path], app: App = client_app) -> RunFolder:
    simulate_run(server_app, app, site_files, folder)  # type: ignore[arg-type]
    return RunFolder(folder)


MIXED = {
    "north": {"counts": "none"},
    "south": {"metrics": "final"},
    "west": {"counts": "rounded"},
}
FIGURES = ("accuracy", "balanced_accuracy", "f1", "auroc", "loss")


def strict(constant: str) -> None:
    raise AssertionError(f"{constant} is no JSON")


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory, phantoms: Path) -> RunFolder:
    """A finished run of four sites, three of which tell less."""
    path = tmp_path_factory.mktemp("mixed") / "run"
    return run(path, settle(path, phantoms, MIXED))


def test_a_run_with_sites_that_tell_less_is_whole(
    mixed: RunFolder, capsys: pytest.CaptureFixture[str]
) -> None:
    text = (mixed.path / "metrics.jsonl").read_text()
    lines = [json.loads(line, parse_constant=strict) for line in text.splitlines()]
    by_site = {
        name: {x["round"]: x for x in lines if x["site"] == name} for name in (*PHANTOMS, None)
    }
    for number in (1, 2):
        for silent in ("north", "south", "west"):
            line = by_site[silent][number]
            assert all(line[key] is None for key in ("train_loss", *FIGURES))
            assert line["bytes"] > 0
        assert all(by_site["east"][number][key] is not None for key in ("accuracy", "loss"))
        # Of those that tell it: nobody's loss is guessed.
        assert by_site[None][number]["train_loss"] == by_site["east"][number]["train_loss"]
    assert set(by_site["north"]) == {1, 2}
    assert by_site["south"][3]["balanced_accuracy"] is not None  # at the end it tells
    west = by_site["west"][3]
    assert west["accuracy"] is not None
    assert [west[key] for key in ("auroc", "loss", "train_loss")] == [None] * 3

    report = json.loads((mixed.path / "report.json").read_text(), parse_constant=strict)
    assert set(report["results"]["federated"]["sites"]) == {"east", "south", "west"}
    assert report["withheld"] == {
        "north": "all figures",
        "south": "figures of single rounds",
        "west": "figures of single rounds, scores, losses, and numbers finer than multiples of 10",
    }
    results, _ = read_results(mixed.path, 4)
    assert (results["federated"]["west"].confusion % 10 == 0).all()
    assert results["federated"]["east"].positive.any()
    sites = mixed.read_facts()["sites"]
    assert sites["north"]["images"]["train"] is None
    assert all(n % 10 == 0 for n in sites["west"]["images"]["train"])

    capsys.readouterr()
    runner.resume_run(mixed.path, None, InProcess(), compare=False)
    shown = capsys.readouterr().out
    rows = [line.strip() for line in shown.splitlines() if line.startswith("north")]
    assert rows == ["north: all figures withheld by the site"] * 2  # metrics, and sensitivities
    assert "withheld by sites: north: all figures; south: figures of single rounds" in shown
    for name in ("curves.png", "confusion.png", "comparison.png", "model.safetensors"):
        assert (mixed.path / name).stat().st_size > 0


def test_unknown_numbers_weigh_the_same(tmp_path: Path, phantoms: Path) -> None:
    """The model after a round is the plain mean as soon as one site does not tell exactly."""
    means: dict[str, bool] = {}
    for case, disclose in (("exact", {}), ("coarse", {"west": {"counts": "rounded"}})):
        seen: list[Tensors] = []

        def watched(message: Message, context: Context, seen: Any = seen) -> Message:
            answer = client_app(message, context)
            if message.metadata.message_type == "train":
                arrays = answer.content.array_records["arrays"]
                seen.append({n: torch.from_numpy(a.numpy().copy()) for n, a in arrays.items()})
            return answer

        path = tmp_path / case
        folder = run(path, settle(path, phantoms, disclose, "train.rounds=1"), watched)
        last = folder.read_last()
        assert last is not None
        assert len(seen) == 4
        means[case] = all(
            torch.allclose(torch.stack([x[n] for x in seen]).mean(0), last.tensors[n], atol=1e-7)
            for n in last.tensors
        )
    assert means == {"exact": False, "coarse": True}


@pytest.mark.parametrize("disclose", [{"counts": "none"}, {"metrics": "final"}])
def test_without_any_figure_of_rounds_the_last_model_is_released(
    tmp_path: Path, phantoms: Path, disclose: object, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "run"
    folder = run(
        path, settle(path, phantoms, dict.fromkeys(PHANTOMS, disclose), "train.patience=1")
    )
    last = folder.read_last()
    assert last is not None
    assert last.round == 2
    released = load_file(path / "model.safetensors")
    assert all(torch.equal(released[name], tensor) for name, tensor in last.tensors.items())
    report = json.loads((path / "report.json").read_text(), parse_constant=strict)
    assert report["released_round"] == 2
    runner.resume_run(path, None, InProcess(), compare=False)
    assert "overall" in capsys.readouterr().out


def test_a_comparison_tells_no_more_than_the_federation(mixed: RunFolder, tmp_path: Path) -> None:
    path = Path(shutil.copytree(mixed.path, tmp_path / "run"))
    runner.resume_run(path, None, InProcess(), compare=True)
    results, facts = read_results(path, 4)
    assert set(results) == {"local", "pooled", "federated"}
    for by_site in results.values():
        assert set(by_site) == {"east", "south", "west"}
        assert (by_site["west"].confusion % 10 == 0).all()
        assert not by_site["west"].positive.any()
        assert by_site["south"].positive.any()
    assert set(facts["withheld"]) == {"north", "south", "west"}


# --- replies that are not what was said at join ---


def meddling(kind: str, change: Callable[[RecordDict], None]) -> App:
    """The real ClientApp, but one site changes its replies of one kind."""

    def app(message: Message, context: Context) -> Message:
        answer = client_app(message, context)
        south = Path(str(context.node_config["site"])).parent.name == "south"
        if south and message.metadata.message_type == kind:
            change(answer.content)
        return answer

    return app


def _one_more(record: RecordDict, part: str) -> None:
    """One image is taken from one cell to another, beyond what is told."""
    counts = record.metric_records[part]
    cells = dict(zip(counts["confusion"][::2], counts["confusion"][1::2], strict=True))
    at = max(cells, key=cells.__getitem__)
    cells[at] -= 1
    other = at - 1 if at % 4 else at + 1
    cells[other] = cells.get(other, 0) + 1
    counts["confusion"] = [n for pair in sorted(cells.items()) for n in pair]


def _loss(record: RecordDict) -> None:
    record["metrics"] = MetricRecord({"train-loss": 0.5})


def _figures(record: RecordDict) -> None:
    _loss(record)
    record["validation"] = MetricRecord(Counts.zero(4).sparse())


def _end(record: RecordDict) -> None:
    for part in ("validation", "test"):
        record[part] = MetricRecord({"confusion": [0, 10], "loss_sum": 1.0})


COARSE = {"counts": "exact", "min_cell": 2}
FINER, MORE = "finer than it disclosed at join", "a message with other parts than agreed"
CASES: dict[str, tuple[Mapping[str, object], str, Callable[[RecordDict], None], str]] = {
    "a loss": (COARSE, "train", _loss, MORE),
    "figures of a round": ({"metrics": "final"}, "train", _figures, MORE),
    "cells at the end": (COARSE, "evaluate", lambda r: _one_more(r, "test"), FINER),
    "an end": ({"metrics": "none"}, "evaluate", _end, MORE),
}


@pytest.mark.parametrize("case", CASES)
def test_who_tells_more_than_it_said_is_left_out(
    case: str, tmp_path: Path, phantoms: Path, caplog: pytest.LogCaptureFixture
) -> None:
    disclose, kind, change, why = CASES[case]
    path = tmp_path / "run"
    site_files = settle(path, phantoms, {"south": disclose}, "train.rounds=1")
    folder = run(path, site_files, meddling(kind, change))
    assert "south is left out: it sent" in caplog.text
    assert why in caplog.text
    if kind == "train":
        assert not [x for x in folder.read_history() if x["round"] == 1 and x["site"] == "south"]
    else:
        results, _ = read_results(path, 4)
        assert set(results["federated"]) == {"east", "north", "west"}


def test_a_billion_images_do_not_own_the_model(
    tmp_path: Path, phantoms: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def claims(message: Message, context: Context) -> Message:
        answer = client_app(message, context)
        if Path(str(context.node_config["site"])).parent.name != "south":
            return answer
        if message.metadata.message_type == "query":
            told = JoinReply.read(answer.content)
            images = told.images.model_copy(update={"train": (10**9, 0, 0, 0)})
            changed = told.model_copy(update={"images": images})
            return Message(changed.record(), reply_to=message)
        if message.metadata.message_type == "train":
            for name, array in answer.content.array_records["arrays"].items():
                filled = torch.full(tuple(array.shape), 100.0)
                answer.content.array_records["arrays"][name] = Array(filled.numpy())
        return answer

    folder = run(tmp_path / "run", settle(tmp_path / "run", phantoms, {}, "train.rounds=1"), claims)
    last = folder.read_last()
    assert last is not None
    assert all(tensor.abs().max() < 70 for tensor in last.tensors.values())
    weight = read_results(folder.path, 4)[1]["site_weights"]["south"]
    assert weight["capped"]
    assert weight["share"] < 0.6
    shown = " ".join(capsys.readouterr().out.split())
    assert "weights in the average: east" in shown
    assert "capped: it tells 1000000000" in shown


# --- a hospital restored from an old backup ---


class Interrupted(BaseException):
    """As sudden as a killed process, as far as this process can tell."""


@pytest.fixture
def backups(tmp_path: Path, phantoms: Path, new_process: Callable[[], None]) -> Callable[..., Any]:
    """A run whose process was killed twice, with copies of south's state made on the way."""
    path = tmp_path / "run"
    site_files = settle(path, phantoms, {}, "train.rounds=3", "aggregate.quorum=3")
    south = site_files[PHANTOMS.index("south")]
    state = south.parent / "state"

    def back_up(name: str) -> None:
        shutil.copytree(state, tmp_path / name)

    def until(number: int) -> App:
        """The real ClientApp, in a process that ends in this round."""

        def app(message: Message, context: Context) -> Message:
            if message.metadata.message_type == "train":
                now = message.content.config_records["config"]["server-round"]
                if now == number:
                    raise Interrupted
                if context.node_config["site"] == str(south):
                    back_up(f"before round {now}")
            return client_app(message, context)

        return app

    for number in (2, 3):
        back_up(f"before join {number - 1}")
        with pytest.raises(Interrupted):
            run(path, site_files, until(number))
        new_process()

    def go_on(backup: str | None = None) -> RunFolder:
        if backup:
            shutil.rmtree(state)
            shutil.copytree(tmp_path / backup, state)
        new_process()
        return run(path, site_files)

    return go_on


def test_ledgers_that_only_grew_are_let_in_again(backups: Callable[..., RunFolder]) -> None:
    folder = backups()
    assert set(folder.read_facts()["sites"]) == set(PHANTOMS)
    assert folder.read_facts()["refused"] == {}
    assert set(LedgerHeads(folder.path / "ledgers.json").read_heads()) == set(PHANTOMS)


@pytest.mark.parametrize("backup", ["before join 1", "before round 2"])
def test_a_ledger_restored_from_a_backup_is_refused_and_the_others_go_on(
    backups: Callable[..., RunFolder], backup: str
) -> None:
    folder = backups(backup)
    assert folder.read_facts()["refused"] == {"south": ROLLED_BACK}
    assert set(folder.read_facts()["sites"]) == {"east", "north", "west"}
    assert {x["site"] for x in folder.read_history() if x["round"] == 3} == {
        "east",
        "north",
        "west",
        None,
    }
    assert (folder.path / "report.json").exists()
    # What it told before is not forgotten: it stays refused.
    assert "south" in LedgerHeads(folder.path / "ledgers.json").read_heads()


def test_an_adopted_ledger_is_let_in_once_its_entry_is_taken_out(
    backups: Callable[..., RunFolder], tmp_path: Path, new_process: Callable[[], None]
) -> None:
    state = tmp_path / "run/sites/south/state"
    adoption.adopt_ledger(state, epsilon=1.0, delta=1e-5)
    folder = backups()
    assert folder.read_facts()["refused"] == {"south": ROLLED_BACK}
    path = folder.path / "ledgers.json"
    kept = json.loads(path.read_text())
    del kept["south"]
    path.write_text(json.dumps(kept))
    (folder.path / "report.json").unlink()
    folder = backups()
    assert folder.read_facts()["refused"] == {}
    assert (
        LedgerHeads(folder.path / "ledgers.json").read_heads()["south"].count
        > kept["north"]["count"]
    )


class NamedGrid(InProcessGrid):
    """Nodes that were admitted by the names of their sites."""

    def get_nodes(self) -> list[Any]:
        return [
            SimpleNamespace(node_id=node, name=path.parent.name)
            for node, path in self._sites.items()
        ]


def test_a_rollback_shows_in_a_new_study_too_and_the_site_itself_refuses(
    tmp_path: Path, phantoms: Path, new_process: Callable[[], None]
) -> None:
    """Before, each run knew only what was told to itself."""
    project = tmp_path / "ledgers.json"
    files = settle(tmp_path / "first", phantoms, {}, "train.rounds=1")
    state = files[PHANTOMS.index("south")].parent / "state"

    def propose(name: str) -> Federation:
        new_process()
        known = LedgerHeads(project).read_heads()
        wanted = demo("train.rounds=1", f"name={name}")
        federation = Federation(
            NamedGrid(client_app, files), wanted, assemble(wanted, wanted.model.weights), known
        )
        with suppress(RunError):
            federation.join()
        heads = {member.name: member.reply.ledger for member in federation.members}
        LedgerHeads(project).keep_heads(heads)
        return federation

    shutil.copytree(state, tmp_path / "backup")
    for name in ("one", "two"):
        assert names(propose(name)) == sorted(PHANTOMS)
    shutil.rmtree(state)
    shutil.copytree(tmp_path / "backup", state)
    why = "its site file or its ledger is wrong"
    assert propose("three").refusals == {"south": why}
    project.unlink()  # nor does it go on for another coordinator, who knows nothing
    assert propose("four").refusals == {"south": why}
