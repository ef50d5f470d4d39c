"""Strategies by name. Adding one is one entry in `REGISTRY`."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import cast

import torch
from flwr.app import ArrayRecord, ConfigRecord, Message, MessageType
from flwr.serverapp import Grid
from flwr.serverapp.strategy import FedAdam, FedAvg, FedAvgM, FedProx

from common import wire
from common.errors import did_you_mean
from common.flower import SUPERLINK_NODE_ID
from common.study import Study
from common.wire import Tensors


@dataclass(frozen=True)
class Option:
    """A strategy's own parameter: its default, and the range it may take."""

    default: float
    least: float = 0.0
    most: float = 1e6


@dataclass(frozen=True)
class Entry:
    """A Flower strategy: its class, its options, and the attributes it carries along."""

    make: type[FedAvg]
    options: Mapping[str, Option] = field(default_factory=dict)
    state: tuple[str, ...] = ()


REGISTRY: dict[str, Entry] = {
    "fedavg": Entry(FedAvg),
    "fedprox": Entry(FedProx, {"proximal_mu": Option(0.01)}),
    "fedavgm": Entry(
        FedAvgM,
        {"server_learning_rate": Option(1.0), "server_momentum": Option(0.9, most=0.9999)},
        state=("momentum_vector",),
    ),
    "fedadam": Entry(
        FedAdam,
        {
            "eta": Option(0.01),
            "beta_1": Option(0.9, most=0.9999),
            "beta_2": Option(0.99, most=0.9999),
            "tau": Option(1e-3, least=1e-9),
        },
        state=("m_t", "v_t"),
    ),
}


class _Cohort:
    """All that strategies look at in a Flower grid: the nodes of one round."""

    def __init__(self, nodes: Sequence[int]) -> None:
        self._nodes = list(nodes)

    def get_node_ids(self) -> list[int]:
        return self._nodes


class Aggregator:
    """A Flower strategy as the round loop uses it: who to send what, and what the replies become.

    Raises:
      StudyError: a strategy or option that is not in the registry.
    """

    def __init__(self, study: Study, names: tuple[str, ...]) -> None:
        self._names = names
        self._entry = _entry(study)
        defaults = {name: option.default for name, option in self._entry.options.items()}
        options = {**defaults, **study.aggregate.options}
        # One reply is enough for Flower: the quorum is the round loop's own.
        self._strategy = self._entry.make(
            fraction_train=1.0,
            fraction_evaluate=1.0,
            min_train_nodes=1,
            min_evaluate_nodes=1,
            min_available_nodes=1,
            weighted_by_key=wire.WEIGHT,
            arrayrecord_key=wire.ARRAYS,
            configrecord_key=wire.CONFIG,
            **options,  # type: ignore[arg-type]
        )

    def requests(
        self, round_number: int, tensors: Tensors, config: ConfigRecord, nodes: Sequence[int]
    ) -> list[Message]:
        """One message for each of `nodes`."""
        # FedAvgM tells arrays apart by their position alone.
        arrays = wire.to_arrays({name: tensors[name] for name in self._names})
        cohort = cast(Grid, _Cohort(nodes))
        return list(self._strategy.configure_train(round_number, arrays, config, cohort))

    def merge(self, round_number: int, updates: Sequence[tuple[ArrayRecord, float]]) -> Tensors:
        """The next tensors, float32, from checked replies: each site's tensors and weight."""
        records = [wire.strategy_record(arrays, weight) for arrays, weight in updates]
        # Strategies read a reply's content alone, so the address does not matter.
        messages = [Message(record, SUPERLINK_NODE_ID, MessageType.TRAIN) for record in records]
        arrays, _ = self._strategy.aggregate_train(round_number, messages)
        if arrays is None:
            raise ValueError("expected at least one update")
        return {name: torch.from_numpy(arrays[name].numpy()).float() for name in self._names}

    def state(self) -> Tensors:
        """What the strategy carries from round to round."""
        tensors: Tensors = {}
        for attribute in self._entry.state:
            value = getattr(self._strategy, attribute)
            # FedAvgM keeps a list in the order of the arrays, FedOpt a dict.
            named = zip(self._names, value, strict=True) if isinstance(value, list) else value
            for name, array in dict(named or {}).items():
                tensors[f"{attribute}/{name}"] = torch.from_numpy(array)
        return tensors

    def restore(self, tensors: Tensors) -> None:
        """Take up a saved `state`."""
        for attribute in self._entry.state:
            names = [name for name in self._names if f"{attribute}/{name}" in tensors]
            arrays = {name: tensors[f"{attribute}/{name}"].numpy() for name in names}
            as_list = self._entry.make is FedAvgM
            setattr(
                self._strategy, attribute, (list(arrays.values()) if as_list else arrays) or None
            )


def _entry(study: Study) -> Entry:
    name = study.aggregate.strategy
    if name not in REGISTRY:
        known = ", ".join(REGISTRY)
        remedy = did_you_mean(name, REGISTRY)
        raise study.error("aggregate.strategy", expected=known, got=repr(name), remedy=remedy)
    entry = REGISTRY[name]
    for key, number in study.aggregate.options.items():
        where, option = f"aggregate.options.{key}", entry.options.get(key)
        if option is None:
            expected = f"an option of {name} ({', '.join(entry.options) or 'it has none'})"
            raise study.error(where, expected=expected, got=repr(key))
        if not option.least <= number <= option.most:
            raise study.error(where, expected=f"{option.least:g} to {option.most:g}", got=number)
    return entry
