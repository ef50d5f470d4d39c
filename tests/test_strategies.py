"""Every registered strategy keeps three promises, whatever its name."""

import pytest
import torch
from flwr.app import ConfigRecord

from common import wire
from common.errors import StudyError
from common.flower import SUPERLINK_NODE_ID, TaskIdentity
from common.study import Study
from common.wire import Tensors
from server.strategies import REGISTRY, Aggregator

NAMES = ("head.weight", "head.bias")


@pytest.fixture(autouse=True)
def _identity() -> None:
    TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, 1, SUPERLINK_NODE_ID


def make_study(strategy: str, **options: float) -> Study:
    content = {
        "name": "s",
        "classes": ["a", "b"],
        "model": {"backbone": "resnet18"},
        "train": {"rounds": 6},
        "aggregate": {"strategy": strategy, "options": options},
    }
    return Study.parse(content, "study.yaml", StudyError)


def tensors(seed: int) -> Tensors:
    generator = torch.Generator().manual_seed(seed)
    return {
        "head.weight": torch.randn(4, 3, generator=generator),
        "head.bias": torch.randn(4, generator=generator),
    }


def step(
    aggregator: Aggregator, number: int, start: Tensors, updates: list[tuple[Tensors, float]]
) -> Tensors:
    messages = aggregator.requests(number, start, ConfigRecord({"study": "s"}), [1, 2, 3])
    assert sorted(message.metadata.dst_node_id for message in messages) == [1, 2, 3]
    sent = [(wire.to_arrays(update), weight) for update, weight in updates]
    return aggregator.merge(number, sent)


def close(one: Tensors, other: Tensors) -> bool:
    return all(torch.allclose(one[name], other[name], atol=1e-6) for name in NAMES)


@pytest.mark.parametrize("strategy", REGISTRY)
def test_equal_replies_are_a_fixed_point(strategy: str) -> None:
    aggregator = Aggregator(make_study(strategy), NAMES)
    start = now = tensors(0)
    for number in range(1, 5):
        now = step(aggregator, number, now, [(now, 10.0), (now, 1.0), (now, 5.0)])
        assert close(now, start)
        assert all(tensor.dtype == torch.float32 for tensor in now.values())


@pytest.mark.parametrize("strategy", REGISTRY)
def test_the_order_of_replies_does_not_matter(strategy: str) -> None:
    updates = [(tensors(i), float(i)) for i in (1, 2, 3)]
    one, other = (Aggregator(make_study(strategy), NAMES) for _ in range(2))
    a, b = tensors(0), tensors(0)
    for number in range(1, 4):
        a = step(one, number, a, updates)
        b = step(other, number, b, updates[::-1])
    assert close(a, b)


@pytest.mark.parametrize("strategy", REGISTRY)
def test_three_rounds_and_three_resumed_are_six(strategy: str) -> None:
    def updates(number: int) -> list[tuple[Tensors, float]]:
        return [(tensors(10 * number + i), float(i)) for i in (1, 2, 3)]

    whole = Aggregator(make_study(strategy), NAMES)
    a = tensors(0)
    for number in range(1, 7):
        a = step(whole, number, a, updates(number))
    first, b = Aggregator(make_study(strategy), NAMES), tensors(0)
    for number in range(1, 4):
        b = step(first, number, b, updates(number))
    saved = {name: tensor.clone() for name, tensor in first.state().items()}
    second = Aggregator(make_study(strategy), NAMES)
    second.restore(saved)
    for number in range(4, 7):
        b = step(second, number, b, updates(number))
    assert all(torch.equal(a[name], b[name]) for name in NAMES)


@pytest.mark.parametrize("strategy", ["fedavgm", "fedadam"])
def test_without_its_state_a_strategy_ends_elsewhere(strategy: str) -> None:
    """So the test above would notice a state that is not saved."""
    updates = [(tensors(i), 1.0) for i in (1, 2)]
    kept, lost = Aggregator(make_study(strategy), NAMES), None
    now = tensors(0)
    for number in range(1, 4):
        now = step(kept, number, now, updates)
    lost = Aggregator(make_study(strategy), NAMES)
    assert not close(step(kept, 4, now, updates), step(lost, 4, now, updates))


def test_fedavg_is_the_weighted_mean() -> None:
    aggregator = Aggregator(make_study("fedavg"), NAMES)
    merged = step(aggregator, 1, tensors(0), [(tensors(1), 3.0), (tensors(2), 1.0)])
    for name in NAMES:
        expected = 0.75 * tensors(1)[name] + 0.25 * tensors(2)[name]
        torch.testing.assert_close(merged[name], expected)


def test_fedprox_asks_the_sites_for_its_term() -> None:
    aggregator = Aggregator(make_study("fedprox", proximal_mu=0.3), NAMES)
    (message,) = aggregator.requests(1, tensors(0), ConfigRecord({"study": "s"}), [1])
    assert message.content.config_records["config"]["proximal-mu"] == 0.3


def test_unknown_names_are_refused_with_the_nearest() -> None:
    with pytest.raises(StudyError, match=r"aggregate\.strategy: .*Did you mean 'fedavg'"):
        Aggregator(make_study("fedavgg"), NAMES)
    with pytest.raises(StudyError, match=r"aggregate\.options\.mu: expected an option of fedprox"):
        Aggregator(make_study("fedprox", mu=0.3), NAMES)
