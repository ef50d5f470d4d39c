"""Tables for a terminal of any width: every figure whole, and no two names shortened to one."""

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from rich.console import Console, ConsoleOptions, RenderResult
from rich.measure import Measurement
from rich.table import Column, Table
from rich.text import Text

from common.support.names import shorten_names

_GAP = 2
_NAME = 24
"""The characters that a name keeps where a table is too wide."""


class _Width(NamedTuple):
    """The characters that a column takes: at least, and on lines that never wrap."""

    least: int
    most: int


class FittedTable(Table):
    """A table without frame that shows every cell whole, in as many lines as that takes.

    Headers wrap first. Then the names at its left are shortened in the middle, and columns without
    room follow below, beside the same names.

    Args:
      columns: The headers.
      left: The columns that are flush left, the others right; None for all.
      signs: What stands in a cell instead of a figure, and why, in words; told below the table
        where it occurs.
    """

    def __init__(
        self, columns: Sequence[str], left: Collection[str] | None, signs: Mapping[str, str]
    ) -> None:
        super().__init__(box=None, pad_edge=False, header_style="bold")
        for name in columns:
            flush = "left" if left is None or name in left else "right"
            self.add_column(name, justify=flush, overflow="fold")  # type: ignore[arg-type]
        names = [left is not None and name in left for name in columns]
        self._names = max(1, names.index(False) if False in names else 1)
        self._headings: list[tuple[int, Text]] = []
        self._signs = signs

    def add_heading(self, text: str, style: str = "bold") -> None:
        """Add a line of its own, as long as it may be, above the rows that follow."""
        self._headings.append((self.row_count, Text(text, style)))

    def list_rows(self) -> Iterator[list[str]]:
        """Every row as text; a heading is a row with nothing beside it."""
        headings = [*self._headings]
        for at, row in enumerate(zip(*(column.cells for column in self.columns), strict=True)):
            while headings and headings[0][0] <= at:
                yield [headings.pop(0)[1].plain, *[""] * (len(self.columns) - 1)]
            yield [str(cell) for cell in row]

    def explain_signs(self) -> list[str]:
        """The reason of each sign that occurs."""
        words = {word for row in self.list_rows() for cell in row for word in cell.split()}
        return [f"{sign}: {why}" for sign, why in self._signs.items() if sign in words]

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """Where rich asks for what is printed."""
        cells = [list(column.cells) for column in self.columns]
        widths = self._measure(console, options, cells)
        if _add(width.least for width in widths) > options.max_width:
            for at in range(self._names):
                short = shorten_names(map(str, cells[at]), _NAME)
                cells[at] = [short[str(cell)] for cell in cells[at]]
            widths = self._measure(console, options, cells)
        for i, block in enumerate(self._cut(widths, options.max_width)):
            if i:
                yield Text("")
            yield from self._draw(block, cells, self._widen(widths, block, options.max_width))
        for line in self.explain_signs():
            yield Text(line, "dim")

    def _measure(
        self, console: Console, options: ConsoleOptions, cells: Sequence[Sequence[Any]]
    ) -> list[_Width]:
        def measure(column: Column, below: Sequence[Any]) -> _Width:
            head, *body = (Measurement.get(console, options, x) for x in (column.header, *below))
            words = column.justify == "left" and column not in self.columns[: self._names]
            least = [cell.minimum if words else cell.maximum for cell in body]
            most = [head.maximum, *(cell.maximum for cell in body)]
            return _Width(max(head.minimum, *least, 1), max(most))

        return [measure(*each) for each in zip(self.columns, cells, strict=True)]

    def _cut(self, widths: Sequence[_Width], room: int) -> Iterator[list[int]]:
        """The columns of each block: those of names, and as many others as there is room for."""
        names, block = [*range(self._names)], [*range(self._names)]
        for at in range(self._names, len(widths)):
            if len(block) > len(names) and _add(widths[i].least for i in [*block, at]) > room:
                yield block
                block = [*names]
            block.append(at)
        yield block

    def _widen(self, widths: Sequence[_Width], block: Sequence[int], room: int) -> list[int]:
        """Widths of the columns of a block: all that they ask for, or what is left for text."""
        if _add(widths[at].most for at in block) <= room:
            return [widths[at].most for at in block]
        spare = max(0, room - _add(widths[at].least for at in block))
        found = []
        for at in block:
            text = self.columns[at].justify == "left"
            more = min(spare, widths[at].most - widths[at].least) if text else 0
            found.append(widths[at].least + more)
            spare -= more
        return found

    def _draw(
        self, block: Sequence[int], cells: Sequence[Sequence[Any]], widths: Sequence[int]
    ) -> Iterator[Table | Text]:
        """Some columns of the table, cut where there are headings."""
        yield self._part(block, cells, widths, range(0))
        done = 0
        for row, heading in [*self._headings, (self.row_count, None)]:
            if done < row:
                yield self._part(block, cells, widths, range(done, row))
                done = row
            if heading is not None:
                yield heading

    def _part(
        self,
        block: Sequence[int],
        cells: Sequence[Sequence[Any]],
        widths: Sequence[int],
        rows: range,
    ) -> Table:
        """Some rows of some columns; of no rows, the headers."""
        part = Table(box=None, pad_edge=False, header_style="bold", show_header=not rows)
        for at, width in zip(block, widths, strict=True):
            head, flush = self.columns[at].header, self.columns[at].justify
            part.add_column(head, justify=flush, overflow="fold", width=width)
        for row in rows:
            part.add_row(*(cells[at][row] for at in block), style=self.rows[row].style)
        return part


def _add(widths: Iterable[int]) -> int:
    """The width of columns side by side."""
    known = list(widths)
    return sum(known) + _GAP * (len(known) - 1)
