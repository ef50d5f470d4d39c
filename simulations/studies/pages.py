"""The page of several runs: what was printed of them, with their pictures, in one file."""

import base64
from collections.abc import Iterator, Sequence
from datetime import date
from pathlib import Path

from markupsafe import Markup

from common.page.blocks import Block, Figure, Page, Section, Table, Text
from common.page.render import render_page
from common.support import files
from common.support.tables import FittedTable
from common.support.terminal import Shown, console

REPORT = "report.html"


def write_page(
    folder: Path, title: str, shown: Sequence[Shown], pictures: Sequence[tuple[str, str]]
) -> None:
    """Write the page of a series of runs into its folder.

    Args:
      folder: The folder of the series.
      title: What was compared, of which study.
      shown: What was printed; a text in bold begins a section.
      pictures: Their titles, and their files in the folder; those that are not there are left out.
    """
    drawn = [_embed(label, folder / name) for label, name in pictures if (folder / name).exists()]
    sections = [*_cut(shown)]
    first, *rest = sections or [Section("Results", [])]
    first = Section(first.title, [*drawn, *first.blocks])
    page = Page(
        title=title,
        subtitle=f"{date.today():%Y-%m-%d} · {folder.name}",
        sections=[first, *rest],
        footer="Made by Consilium of simulated hospitals on one machine. Each run has a report of "
        "its own in its folder.",
    )
    files.write(folder / REPORT, render_page(page))
    console.print(f"report: {folder / REPORT}")


def _cut(shown: Sequence[Shown]) -> Iterator[Section]:
    """Cut what was printed into sections."""
    title, blocks = "Results", list[Block]()
    for what, style in shown:
        if isinstance(what, str) and style == "bold":
            if blocks:
                yield Section(title, blocks)
            title, blocks = what.strip().capitalize(), []
        else:
            blocks += _convert(what, style)
    if blocks:
        yield Section(title, blocks)


def _convert(what: object, style: str) -> list[Block]:
    if isinstance(what, FittedTable):
        left = [column.justify == "left" for column in what.columns]
        heads = [str(column.header) for column in what.columns]
        shown = Table(heads, [*what.list_rows()], left=(*left, False).index(False))
        return [shown, *(Text(line, "note") for line in what.explain_signs())]
    text = str(what).strip()
    return [Text(text, "note" if style == "dim" else "plain")] if text else []


def _embed(title: str, path: Path) -> Figure:
    """A picture of the folder, in the page itself."""
    data = base64.b64encode(path.read_bytes()).decode()
    tag = Markup('<img alt="{}" src="data:image/png;base64,{}">').format(title, data)
    return Figure(title, str(tag), f"also in {path.name}")
