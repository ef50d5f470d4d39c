"""What Matplotlib draws, made small and fit to stand in a page."""

import re

from markupsafe import escape

# In a picture `<` and `>` stand nowhere but around tags: in names they are escaped.
_TAG = re.compile(r"<[^<>]*>")
_UNUSED = re.compile(
    r"""(?<=<g)\ id="[^"]*" | \ transform="rotate\(-0\ [^"]*\)" | \ font-family:[^;"]*;?""",
    re.VERBOSE,
)
_LONG = re.compile(r"\d+\.\d{3,}")
_PIXELS = 96  # of CSS, in an inch

SMALLEST, LARGEST = 0.85, 1.25
"""How far a page scales a picture; where it has less room, the picture scrolls in its frame."""


def tidy_svg(drawn: str, size: tuple[float, float], label: str) -> str:
    """Turn an SVG file of Matplotlib into a part of a page.

    Args:
      drawn: The file. Names of its groups go, as nothing refers to them, and so do its fonts.
      size: Width and height in inches.
      label: What it shows, for those who cannot see it.
    """
    width, height = size
    scaled = f"min-width: {width * _PIXELS * SMALLEST:.0f}px"
    scaled = f"{scaled}; max-width: {width * _PIXELS * LARGEST:.0f}px"
    head = f'<svg role="img" aria-label="{escape(label)}" style="{scaled}"'
    head = f'{head} viewBox="0 0 {width * 72:.1f} {height * 72:.1f}">'
    body = drawn[drawn.index("</defs>") + len("</defs>") :]  # the first holds a style for all
    return head + re.sub(r"\s*\n\s*", "\n", _TAG.sub(_shorten_tag, body)).rstrip()


def _shorten_tag(tag: re.Match[str]) -> str:
    return _LONG.sub(lambda number: f"{float(number[0]):.2f}", _UNUSED.sub("", tag[0]))
