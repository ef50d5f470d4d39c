"""The resolved parameters of a private release, as the ledger writes them down."""

from typing import Annotated, Literal, get_args

from pydantic import Field

from client.privacy.accountant import DpEvent
from common.config.study import Word
from common.config.yaml import Section

Count = Annotated[int, Field(ge=1)]
Positive = Annotated[float, Field(gt=0)]

TrainingRelease = Literal["round", "moments", "prototypes"]
TRAINING: tuple[str, ...] = get_args(TrainingRelease)
"""What is released of training patients, and may be private: by the kind of message."""


class PrivateRelease(Section):
    """The resolved parameters of one private release; what ε is computed from."""

    mechanism: Word
    noise_multiplier: Positive
    """Standard deviation of the noise, in units of `clip_norm`."""
    sample_rate: Annotated[float, Field(gt=0, le=1)]
    """Probability that a training patient is sampled in a step."""
    steps: Count
    delta: Annotated[float, Field(gt=0, lt=1)]
    clip_norm: Positive

    @property
    def event(self) -> DpEvent:
        """As the accountant takes it."""
        return DpEvent(self.noise_multiplier, self.sample_rate, self.steps)
