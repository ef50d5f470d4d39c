"""Errors a person can act on.

Each class has a fixed public `code`. Between machines only the code travels; the text, which may
name a path or a patient, stays where it was raised.
"""

from collections.abc import Iterable
from difflib import get_close_matches
from typing import ClassVar


class ConsiliumError(Exception):
    """A mistake with a known remedy. Its text reads `where: expected …, got …. remedy`.

    Args:
      where: The file and the key, or whatever else is wrong. The whole text if nothing is expected.
      expected: What should stand there.
      got: What stands there instead.
      remedy: What to do, in whole sentences; none where it is obvious.
    """

    code: ClassVar[str] = "internal"

    def __init__(
        self, where: object, *, expected: str = "", got: object = "", remedy: str = ""
    ) -> None:
        text = f"{where}: expected {expected}, got {got}" if expected else str(where)
        super().__init__(f"{text}. {remedy}" if remedy else text)


class StudyError(ConsiliumError):
    """The study file asks for something impossible or unknown."""

    code = "study"


class SiteError(ConsiliumError):
    """The site file, or what it points to, is wrong."""

    code = "site"


class DataError(ConsiliumError):
    """A hospital's images or labels cannot be used as they are.

    Outside it looks like a refusal: which of them it is would tell of the patients.
    """

    code = "refused"


class BackboneError(ConsiliumError):
    """The backbone's weights are missing here or belong to another architecture."""

    code = "backbone"


class MissingWeightsError(BackboneError):
    """This machine has no copy of the backbone's weights; the coordinator can send one."""


class RefusedError(ConsiliumError):
    """The hospital's own policy says no to this study."""

    code = "refused"


class WaitingError(ConsiliumError):
    """A person at the hospital has not decided on this study yet."""

    code = "waiting"


class BudgetError(RefusedError):
    """The hospital's privacy budget does not suffice."""

    code = "budget"


class ContractError(ConsiliumError):
    """A message does not fit what was agreed at join."""

    code = "contract"


class RunError(ConsiliumError):
    """A run folder, or the run itself, cannot go on."""

    code = "run"


class LinkError(ConsiliumError):
    """The link between a hospital and the coordinator, or a key or certificate of it, is wrong."""


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """`Did you mean 'x'?` for the nearest known name, or all the known names."""
    names = sorted(known)
    near = get_close_matches(word, names, n=1, cutoff=0.5)
    return f"Did you mean {near[0]!r}?" if near else f"Known: {', '.join(names)}."
