"""The blocks that a page is made of: values, of text alone; how they look is the template's."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from common.metrics.verdicts import Verdict

Tone = Literal["plain", "good", "bad", "unsure", "note"]
"""How a sentence is meant: a verdict is `good`, `bad` or `unsure`; a `note` is small print."""


VERDICT_TONES: Mapping[Verdict, Tone] = {"better": "good", "worse": "bad", "unsure": "unsure"}


@dataclass(frozen=True)
class Text:
    """A sentence or two.

    Attributes:
      text: Plain text; names of sites and classes in it may be anything.
      tone: How it is meant.
    """

    text: str
    tone: Tone = "plain"


@dataclass(frozen=True)
class Facts:
    """Names and their values, such as study and date."""

    rows: Mapping[str, str]


@dataclass(frozen=True)
class Table:
    """A table of text.

    Attributes:
      columns: The heads.
      rows: As many cells each.
      left: How many columns, from the first, are words; the others are numbers.
      caption: What it shows, and of whom.
    """

    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    left: int = 1
    caption: str = ""


@dataclass(frozen=True)
class Figure:
    """A picture.

    Attributes:
      title: What it shows: the metric, the model, the images.
      svg: The picture itself, made by `plots.draw_figure`.
      caption: What the reader should know.
    """

    title: str
    svg: str
    caption: str = ""


Block = Text | Facts | Table | Figure


@dataclass(frozen=True)
class Section:
    """A part of the page under a heading of its own.

    Attributes:
      title: The heading.
      blocks: From top to bottom; figures that follow each other stand side by side.
      folded: Whether only the heading shows until it is opened; on paper all is open.
    """

    title: str
    blocks: Sequence[Block]
    folded: bool = False


@dataclass(frozen=True)
class Page:
    """A whole page.

    Attributes:
      title: Of the page, and of the window.
      subtitle: Of what and when it is.
      sections: From top to bottom; empty ones are left out.
      footer: Who made it, and where it may go.
    """

    title: str
    subtitle: str
    sections: Sequence[Section]
    footer: str = ""
