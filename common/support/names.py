"""Names of sites and classes, which may be any text, made fit to show."""

from collections.abc import Iterable, Sequence
from itertools import takewhile


def clean_name(name: str) -> str:
    """Put a sign in place of each character of a name that cannot be seen, such as a new line."""
    return "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in name)


def shorten_names(names: Iterable[str], width: int) -> dict[str, str]:
    """Shorten names in the middle, where they tell least, and keep those apart that differ.

    Names that would become the same show the part that starts where they differ. Where that does
    not tell them apart either, all names are numbered, in the order of the alphabet.

    Args:
      names: In any order, which does not matter: the same names are always shortened alike.
      width: The most characters of a shortened name, at least 8.

    Returns:
      What to show, by name.
    """
    clean = {name: clean_name(name) for name in sorted(set(names))}
    same: dict[str, list[str]] = {}
    for name, shown in clean.items():
        same.setdefault(_cut_middle(shown, width), []).append(name)
    short: dict[str, str] = {}
    for shown, alike in same.items():
        parts = [shown] if len(alike) == 1 else _tell_apart([clean[n] for n in alike], width)
        short |= dict(zip(alike, parts, strict=True))
    if len(set(short.values())) == len(short):
        return short
    marks = {name: f"#{number}" for number, name in enumerate(clean, start=1)}
    return {n: _cut_end(clean[n], width - len(mark)) + mark for n, mark in marks.items()}


def _tell_apart(names: Sequence[str], width: int) -> list[str]:
    ends = zip(min(names), max(names), strict=False)
    alike = len(list(takewhile(lambda pair: pair[0] == pair[1], ends)))
    start = max(0, alike - 3)  # a little of what they share, to read it by
    return [_cut_end(f"…{name[start:]}", width) for name in names]


def _cut_middle(name: str, width: int) -> str:
    tail = (width - 1) // 2
    return name if len(name) <= width else f"{name[: width - 1 - tail]}…{name[-tail:]}"


def _cut_end(name: str, width: int) -> str:
    return name if len(name) <= width else f"{name[: width - 1]}…"
