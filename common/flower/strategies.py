"""What a Flower strategy carries from round to round, for which Flower has no public name.

A strategy keeps its momentum in attributes: FedAvgM as a list in the order of the arrays, FedOpt as
a dictionary by name.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from flwr.serverapp.strategy import FedAvgM, Strategy
from numpy.typing import NDArray

Arrays = Mapping[str, NDArray[np.float32]]


def read_carried(strategy: Strategy, attribute: str, names: Sequence[str]) -> Arrays:
    """The arrays in an attribute, by name; none before the first round."""
    value: Any = getattr(strategy, attribute)
    named = zip(names, value, strict=True) if isinstance(value, list) else value
    return dict(named or {})


def write_carried(strategy: Strategy, attribute: str, arrays: Arrays) -> None:
    """Put back what `read_carried` gave; no arrays are as before the first round."""
    value = list(arrays.values()) if isinstance(strategy, FedAvgM) else dict(arrays)
    setattr(strategy, attribute, value or None)
