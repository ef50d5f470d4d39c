"""A table shows every cell whole at any width, and hospitals never share a name."""

import pytest

from common.support.tables import FittedTable
from common.support.terminal import PlainConsole, table

HOSPITALS = [f"university_hospital_{name}" for name in ("north", "south", "east", "west")]
FIGURES = ("accuracy", "balanced accuracy", "macro F1", "AUROC", "Brier score", "error")


def lines_of(shown: FittedTable, width: int) -> list[str]:
    console = PlainConsole(width=width, highlight=False, markup=False)
    with console.capture() as captured:
        console.print(shown)
    lines = [line.rstrip() for line in captured.get().splitlines()]
    assert all(len(line) <= width for line in lines)
    return lines


def tabulate() -> FittedTable:
    shown = table("site", "trained", *FIGURES, left=("site", "trained"))
    for i, site in enumerate(HOSPITALS):
        shown.add_row(site, "federated", *(f"0.{i}{k}0" for k in range(len(FIGURES))))
    return shown


@pytest.mark.parametrize("width", [60, 80, 120, 200])
def test_no_cell_is_cut_and_no_name_is_shared(width: int) -> None:
    lines = lines_of(tabulate(), width)
    rows = [line.split() for line in lines if "federated" in line]
    names = {row[0] for row in rows}
    assert len(names) == len(HOSPITALS)
    told = [figure for row in rows for figure in row[2:]]
    assert sorted(told) == sorted(f"0.{i}{k}0" for i in range(4) for k in range(len(FIGURES)))
    headers = {word for line in lines if "federated" not in line for word in line.split()}
    assert {word for name in FIGURES for word in name.split()} <= headers


def test_a_table_that_fits_stays_one() -> None:
    lines = lines_of(tabulate(), 120)
    assert lines[0].split() == ["site", "trained", *" ".join(FIGURES).split()]
    assert [line.split()[0] for line in lines[1:]] == HOSPITALS


def test_a_heading_is_a_line_of_its_own_and_columns_below_it_stay_in_line() -> None:
    shown = table("", "a figure", left=("",))
    for site in HOSPITALS:
        shown.add_heading(f"{site}: {'many ' * 8}images")
        shown.add_row("  local", "0.5")
    lines = lines_of(shown, 80)
    assert lines[0] == f"{'':9}a figure"
    assert lines[1:3] == [f"{HOSPITALS[0]}: {'many ' * 8}images", f"{'  local':9}     0.5"]
    assert len(lines) == 1 + 2 * len(HOSPITALS)


def test_a_sign_is_explained_only_where_it_occurs() -> None:
    signs = {"–": "no images of the class", "×": "withheld by the site"}
    shown = table("site", "AUROC", left=("site",), signs=signs)
    shown.add_row("a–b", "0.500")
    assert len(lines_of(shown, 80)) == 2
    shown.add_row("north", "×")
    assert lines_of(shown, 80)[3:] == ["×: withheld by the site"]


def test_text_wraps_at_words_where_figures_never_do() -> None:
    shown = table("what", "told")
    shown.add_row("site", "counts exact, metrics final, and much more than a line can hold")
    lines = lines_of(shown, 30)
    assert len(lines) > 3
    assert " ".join(" ".join(lines).split()).endswith("and much more than a line can hold")
