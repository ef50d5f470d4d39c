"""Every registered strategy keeps its promises, whatever its name."""

import pytest
import torch
from flwr.app import ConfigRecord

from common.config.study import Study
from common.errors import StudyError
from common.flower.messages import identify_task
from common.protocol.tensors import Tensors, to_arrays
from server.rounds.strategies import REGISTRY, Aggregator
from tests.builders import make_study

pytestmark = pytest.mark.numbers

NAMES = ("head.weight", "head.bias")
ROBUST = ("fedmedian", "fedtrimmedavg", "krum", "multikrum")
SITES = 7


@pytest.fixture(autouse=True)
def _identity() -> None:
    identify_task(1, 1)


def study_with(strategy: str, quorum: int = SITES, **options: float) -> Study:
    aggregate = {"strategy": strategy, "options": options, "quorum": quorum}
    return make_study(train={"rounds": 6}, aggregate=aggregate)


def tensors(seed: int) -> Tensors:
    generator = torch.Generator().manual_seed(seed)
    return {
        "head.weight": torch.randn(4, 3, generator=generator),
        "head.bias": torch.randn(4, generator=generator),
    }


def step(
    aggregator: Aggregator, number: int, start: Tensors, updates: list[tuple[Tensors, float]]
) -> Tensors:
    messages = aggregator.make_requests(number, start, ConfigRecord({"study": "s"}), [1, 2, 3])
    assert sorted(message.metadata.dst_node_id for message in messages) == [1, 2, 3]
    sent = [(to_arrays(update), weight) for update, weight in updates]
    return aggregator.merge_updates(number, sent)


def close(one: Tensors, other: Tensors, atol: float = 1e-6) -> bool:
    return all(torch.allclose(one[name], other[name], atol=atol) for name in NAMES)


@pytest.mark.parametrize("strategy", REGISTRY)
def test_equal_replies_are_a_fixed_point(strategy: str) -> None:
    aggregator = Aggregator(study_with(strategy), NAMES)
    start = now = tensors(0)
    for number in range(1, 5):
        now = step(aggregator, number, now, [(now, float(i)) for i in range(1, SITES + 1)])
        # A mean is off by a rounding, which adaptive strategies stretch by eta / tau, 100 at most.
        assert close(now, start, atol=1e-4)
        assert all(tensor.dtype == torch.float32 for tensor in now.values())


@pytest.mark.parametrize("strategy", REGISTRY)
def test_the_order_of_replies_does_not_matter(strategy: str) -> None:
    updates = [(tensors(i), float(i)) for i in range(1, SITES + 1)]
    one, other = (Aggregator(study_with(strategy), NAMES) for _ in range(2))
    a, b = tensors(0), tensors(0)
    for number in range(1, 4):
        a = step(one, number, a, updates)
        b = step(other, number, b, updates[::-1])
    assert close(a, b)


@pytest.mark.parametrize("strategy", REGISTRY)
def test_three_rounds_and_three_resumed_are_six(strategy: str) -> None:
    def updates(number: int) -> list[tuple[Tensors, float]]:
        return [(tensors(10 * number + i), float(i)) for i in range(1, SITES + 1)]

    whole = Aggregator(study_with(strategy), NAMES)
    a = tensors(0)
    for number in range(1, 7):
        a = step(whole, number, a, updates(number))
    first, b = Aggregator(study_with(strategy), NAMES), tensors(0)
    for number in range(1, 4):
        b = step(first, number, b, updates(number))
    saved = {name: tensor.clone() for name, tensor in first.save_state().items()}
    second = Aggregator(study_with(strategy), NAMES)
    second.restore_state(saved)
    for number in range(4, 7):
        b = step(second, number, b, updates(number))
    assert all(torch.equal(a[name], b[name]) for name in NAMES)


@pytest.mark.parametrize("strategy", [name for name, entry in REGISTRY.items() if entry.state])
def test_without_its_state_a_strategy_ends_elsewhere(strategy: str) -> None:
    """So the test above would notice a state that is not saved."""
    updates = [(tensors(i), 1.0) for i in (1, 2)]
    kept, lost = Aggregator(study_with(strategy), NAMES), None
    now = tensors(0)
    for number in range(1, 4):
        now = step(kept, number, now, updates)
    lost = Aggregator(study_with(strategy), NAMES)
    assert not close(step(kept, 4, now, updates), step(lost, 4, now, updates))


def test_fedavg_is_the_weighted_mean() -> None:
    aggregator = Aggregator(study_with("fedavg"), NAMES)
    merged = step(aggregator, 1, tensors(0), [(tensors(1), 3.0), (tensors(2), 1.0)])
    for name in NAMES:
        expected = 0.75 * tensors(1)[name] + 0.25 * tensors(2)[name]
        torch.testing.assert_close(merged[name], expected)


def test_fedprox_asks_the_sites_for_its_term() -> None:
    aggregator = Aggregator(study_with("fedprox", proximal_mu=0.3), NAMES)
    (message,) = aggregator.make_requests(1, tensors(0), ConfigRecord({"study": "s"}), [1])
    assert message.content.config_records["config"]["proximal-mu"] == 0.3


def near(start: Tensors, seed: int, step: float) -> Tensors:
    return {name: start[name] + step * tensors(seed)[name] for name in NAMES}


@pytest.mark.parametrize("strategy", REGISTRY)
def test_two_of_seven_that_lie_move_the_robust_ones_no_further_than_honest_sites_do(
    strategy: str,
) -> None:
    options = {"num_malicious_nodes": 2.0} if "krum" in strategy else {}
    options |= {"beta": 0.3} if strategy == "fedtrimmedavg" else {}
    start = tensors(0)
    honest = [(near(start, seed, 1e-2), 10.0) for seed in range(1, 6)]
    lies = [(near(start, 1, -100.0), 10.0), ({n: start[n] + 1000 for n in NAMES}, 10.0)]
    merged = step(Aggregator(study_with(strategy, **options), NAMES), 1, start, honest + lies)
    within = all(
        (merged[name] <= torch.stack([u[name] for u, _ in honest]).amax(0) + 1e-6).all()
        and (merged[name] >= torch.stack([u[name] for u, _ in honest]).amin(0) - 1e-6).all()
        for name in NAMES
    )
    assert within == (strategy in ROBUST)


def test_krum_takes_the_reply_in_the_midst_of_the_others_however_little_they_differ() -> None:
    """A thousandth of a weight of 1000 is lost in the squares of float32, unless told apart."""
    start = {name: tensors(0)[name] * 1000 for name in NAMES}
    aside = [1.0, -1.0, 0.3, -0.3, 0.02]
    updates = [(near(start, 7, 2e-3 * far), 1.0) for far in aside]
    aggregator = Aggregator(study_with("krum", quorum=5), NAMES)
    merged = step(aggregator, 1, start, updates)
    assert all(torch.allclose(merged[n], updates[4][0][n], rtol=0, atol=2e-4) for n in NAMES)


def test_multikrum_averages_those_it_selects_by_weight() -> None:
    start = tensors(0)
    updates = [(near(start, 7, far), weight) for far, weight in ((0.0, 3.0), (0.01, 1.0))]
    updates += [(near(start, 7, far), 1.0) for far in (-0.5, 0.6, 0.7)]
    merged = step(Aggregator(study_with("multikrum", quorum=5), NAMES), 1, start, updates)
    assert close(merged, near(start, 7, 0.0025))


@pytest.mark.parametrize(
    ("strategy", "options", "least"),
    [
        ("fedmedian", {}, 3),
        ("fedtrimmedavg", {}, 5),
        ("fedtrimmedavg", {"beta": 0.34}, 3),
        ("krum", {}, 5),
        ("krum", {"num_malicious_nodes": 2.0}, 7),
        ("multikrum", {}, 5),
        ("multikrum", {"num_malicious_nodes": 2.0, "num_nodes_to_select": 4.0}, 8),
    ],
)
def test_a_quorum_too_small_for_a_strategy_is_refused(
    strategy: str, options: dict[str, float], least: int
) -> None:
    Aggregator(study_with(strategy, quorum=least, **options), NAMES)
    with pytest.raises(StudyError, match=rf"aggregate\.quorum: expected at least {least}, .*got"):
        Aggregator(study_with(strategy, quorum=least - 1, **options), NAMES)


@pytest.mark.parametrize("beta", [0.2, 0.1, 1 / 49, 0.07, 0.001])
def test_at_its_smallest_quorum_the_trimmed_mean_trims(beta: float) -> None:
    least = REGISTRY["fedtrimmedavg"].replies({"beta": beta})
    for sites, trims in ((least, True), (least - 1, False)):
        if sites > 1:
            zero = {name: torch.zeros_like(tensors(0)[name]) for name in NAMES}
            updates = [(zero, 1.0)] * (sites - 1) + [({n: zero[n] + 1 for n in NAMES}, 1.0)]
            study = study_with("fedtrimmedavg", quorum=least, beta=beta)
            merged = step(Aggregator(study, NAMES), 1, zero, updates)
            assert close(merged, zero) == trims or sites > 1000


def test_half_a_liar_is_refused() -> None:
    with pytest.raises(StudyError, match=r"num_malicious_nodes: expected a whole number, 1 to"):
        Aggregator(study_with("krum", num_malicious_nodes=1.5), NAMES)


def test_unknown_names_are_refused_with_the_nearest() -> None:
    with pytest.raises(StudyError, match=r"aggregate\.strategy: .*Did you mean 'fedavg'"):
        Aggregator(study_with("fedavgg"), NAMES)
    with pytest.raises(StudyError, match=r"aggregate\.options\.mu: expected an option of fedprox"):
        Aggregator(study_with("fedprox", mu=0.3), NAMES)
