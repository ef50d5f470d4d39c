"""Strategies by name. Adding one is one entry in `REGISTRY`."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import count
from typing import cast

import torch
from flwr.app import ArrayRecord, ConfigRecord, Message, MessageType
from flwr.serverapp import Grid
from flwr.serverapp.strategy import (
    FedAdagrad,
    FedAdam,
    FedAvg,
    FedAvgM,
    FedMedian,
    FedProx,
    FedTrimmedAvg,
    FedYogi,
    Krum,
    MultiKrum,
)

from common.config.study import Study
from common.errors import did_you_mean
from common.flower.messages import SUPERLINK_NODE_ID
from common.flower.strategies import read_carried, write_carried
from common.protocol.fields import ARRAYS, CONFIG
from common.protocol.round import WEIGHT, make_strategy_record
from common.protocol.tensors import Tensors, to_arrays

Options = Mapping[str, float]


@dataclass(frozen=True)
class Option:
    """A strategy's own parameter: its default, and the range it may take."""

    default: float
    least: float = 0.0
    most: float = 1e6

    @property
    def whole(self) -> bool:
        """Whether it counts something."""
        return isinstance(self.default, int)


@dataclass(frozen=True)
class StrategyEntry:
    """A Flower strategy: its class and its options.

    Attributes:
      make: Flower's class.
      options: The strategy's own parameters, by name.
      state: The attributes that it carries from round to round.
      replies: The fewest replies with which it does what it promises, given its options.
      differences: Whether it compares replies with each other. It then gets what changed since the
        round began: in float32, models that hardly differ are told apart by that alone.
    """

    make: type[FedAvg]
    options: Mapping[str, Option] = field(default_factory=dict)
    state: tuple[str, ...] = ()
    replies: Callable[[Options], int] = lambda options: 1
    differences: bool = False


_STEP = {"eta": Option(0.01), "tau": Option(1e-3, least=1e-9)}
_MOMENTS = {"beta_1": Option(0.9, most=0.9999), "beta_2": Option(0.99, most=0.9999)}
_ATTACKERS = {"num_malicious_nodes": Option(1, least=1, most=10_000)}


def _for_krum(options: Options) -> int:
    # n >= 2f + 3 (Blanchard et al. 2017); and it selects no more than it compares with, n - f - 2.
    attackers, selected = options["num_malicious_nodes"], options.get("num_nodes_to_select", 1)
    return int(max(2 * attackers + 3, selected + attackers + 2))


REGISTRY: dict[str, StrategyEntry] = {
    "fedavg": StrategyEntry(FedAvg),
    "fedprox": StrategyEntry(FedProx, {"proximal_mu": Option(0.01)}),
    "fedavgm": StrategyEntry(
        FedAvgM,
        {"server_learning_rate": Option(1.0), "server_momentum": Option(0.9, most=0.9999)},
        state=("momentum_vector",),
    ),
    "fedadam": StrategyEntry(FedAdam, {**_STEP, **_MOMENTS}, state=("m_t", "v_t")),
    "fedyogi": StrategyEntry(FedYogi, {**_STEP, **_MOMENTS}, state=("m_t", "v_t")),
    "fedadagrad": StrategyEntry(FedAdagrad, {**_STEP, "eta": Option(0.1)}, state=("v_t",)),
    # Of two replies the median is the mean.
    "fedmedian": StrategyEntry(FedMedian, replies=lambda options: 3, differences=True),
    # With fewer it trims none.
    "fedtrimmedavg": StrategyEntry(
        FedTrimmedAvg,
        {"beta": Option(0.2, least=0.001, most=0.499)},
        replies=lambda options: next(n for n in count(1) if int(options["beta"] * n)),
        differences=True,
    ),
    "krum": StrategyEntry(Krum, _ATTACKERS, replies=_for_krum, differences=True),
    "multikrum": StrategyEntry(
        MultiKrum,
        {**_ATTACKERS, "num_nodes_to_select": Option(2, least=1, most=10_000)},
        replies=_for_krum,
        differences=True,
    ),
}


class _Cohort:
    """The part of a Flower grid that strategies look at: the nodes of one round."""

    def __init__(self, nodes: Sequence[int]) -> None:
        self._nodes = list(nodes)

    def get_node_ids(self) -> list[int]:
        return self._nodes


class Aggregator:
    """A Flower strategy as the round loop uses it: it makes requests and merges replies.

    Raises:
      StudyError: a strategy or option that is not in the registry, or a quorum too small for it.
    """

    def __init__(self, study: Study, names: tuple[str, ...]) -> None:
        self._names = names
        self._entry = entry = _entry(study)
        options = _options(study, entry)
        _enough(study, options)
        self._sent: Tensors = {}
        # One reply is enough for Flower: the quorum is the round loop's own.
        self._strategy = entry.make(
            fraction_train=1.0,
            fraction_evaluate=1.0,
            min_train_nodes=1,
            min_evaluate_nodes=1,
            min_available_nodes=1,
            weighted_by_key=WEIGHT,
            arrayrecord_key=ARRAYS,
            configrecord_key=CONFIG,
            **options,  # type: ignore[arg-type]
        )

    def make_requests(
        self, round_number: int, tensors: Tensors, config: ConfigRecord, nodes: Sequence[int]
    ) -> list[Message]:
        """Make one message for each of `nodes`."""
        # FedAvgM tells arrays apart by their position alone.
        self._sent = {name: tensors[name] for name in self._names}
        arrays = to_arrays(self._sent)
        cohort = cast(Grid, _Cohort(nodes))
        return list(self._strategy.configure_train(round_number, arrays, config, cohort))

    def merge_updates(
        self, round_number: int, updates: Sequence[tuple[ArrayRecord, float]]
    ) -> Tensors:
        """Merge checked replies to the last `make_requests` into the next tensors, float32.

        Args:
          round_number: The number of the round, from 1.
          updates: The tensors and the weight of each site; some strategies take no weights.
        """
        records = [make_strategy_record(self._seen(arrays), weight) for arrays, weight in updates]
        # Strategies read a reply's content alone, so the address does not matter.
        messages = [Message(record, SUPERLINK_NODE_ID, MessageType.TRAIN) for record in records]
        arrays, _ = self._strategy.aggregate_train(round_number, messages)
        if arrays is None:
            raise ValueError("expected at least one update")
        merged = {name: torch.from_numpy(arrays[name].numpy()).float() for name in self._names}
        if self._entry.differences:
            return {name: self._sent[name] + change for name, change in merged.items()}
        return merged

    def _seen(self, arrays: ArrayRecord) -> ArrayRecord:
        """A reply's tensors as the strategy looks at them."""
        if not self._entry.differences:
            return arrays
        tensors = {name: torch.from_numpy(arrays[name].numpy()) for name in self._names}
        return to_arrays({name: tensors[name] - self._sent[name] for name in self._names})

    def save_state(self) -> Tensors:
        """Save the tensors that the strategy carries from round to round."""
        tensors: Tensors = {}
        for attribute in self._entry.state:
            for name, array in read_carried(self._strategy, attribute, self._names).items():
                tensors[f"{attribute}/{name}"] = torch.from_numpy(array)
        return tensors

    def restore_state(self, tensors: Tensors) -> None:
        """Restore a saved state."""
        for attribute in self._entry.state:
            names = [name for name in self._names if f"{attribute}/{name}" in tensors]
            arrays = {name: tensors[f"{attribute}/{name}"].numpy() for name in names}
            write_carried(self._strategy, attribute, arrays)


def _entry(study: Study) -> StrategyEntry:
    name = study.aggregate.strategy
    if name not in REGISTRY:
        known = ", ".join(REGISTRY)
        remedy = did_you_mean(name, REGISTRY)
        raise study.error("aggregate.strategy", expected=known, got=repr(name), remedy=remedy)
    return REGISTRY[name]


def _options(study: Study, entry: StrategyEntry) -> Options:
    given, name = study.aggregate.options, study.aggregate.strategy
    for key, number in given.items():
        where, option = f"aggregate.options.{key}", entry.options.get(key)
        if option is None:
            expected = f"an option of {name} ({', '.join(entry.options) or 'it has none'})"
            raise study.error(where, expected=expected, got=repr(key))
        if not option.least <= number <= option.most or (option.whole and number % 1):
            kind = "a whole number, " if option.whole else ""
            expected = f"{kind}{option.least:g} to {option.most:g}"
            raise study.error(where, expected=expected, got=number)
    chosen = {key: given.get(key, option.default) for key, option in entry.options.items()}
    return {key: int(n) if entry.options[key].whole else n for key, n in chosen.items()}


def count_least_replies(study: Study) -> int:
    """Count the fewest replies with which the study's strategy does what it promises."""
    entry = _entry(study)
    return entry.replies(_options(study, entry))


def _enough(study: Study, options: Options) -> None:
    fewest = count_least_replies(study)
    if study.aggregate.quorum < fewest:
        told = ", ".join(f"{key}: {number:g}" for key, number in options.items())
        what = study.aggregate.strategy + (f" with {told}" if told else "")
        expected = f"at least {fewest}, the fewest replies {what} works with"
        raise study.error("aggregate.quorum", expected=expected, got=study.aggregate.quorum)
