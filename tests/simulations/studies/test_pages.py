"""The page of several runs shows what was printed of them."""

from pathlib import Path

from common.support.plot_style import write_plot
from common.support.terminal import console, table
from simulations.studies.pages import write_page


def test_a_page_shows_what_was_printed_and_drawn(tmp_path: Path) -> None:
    write_plot(lambda figure: None, tmp_path / "drawn.png")
    with console.keep() as shown:
        signs = {"–": "not defined", "×": "not told"}
        printed = table("strategy", "honest", left=("strategy",), signs=signs)
        printed.add_heading("with two of four & more", "")
        printed.add_row("<b>krum</b>", "0.625")
        printed.add_row("median", "–")
        console.print(printed)
        console.print("in brackets: differences", style="dim")
        console.print("\ntest images", style="bold")
        console.print("chosen: krum")
    console.print("not of the page")
    pictures = [("What lies cost", "drawn.png"), ("Missing", "missing.png")]
    write_page(tmp_path, "lies & strategies", shown, pictures)
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    for words in (
        "lies &amp; strategies",
        "&lt;b&gt;krum&lt;/b&gt;",
        '<td class="number">0.625</td>',
        "with two of four &amp; more",
        "–: not defined",
        '<p class="note">in brackets: differences</p>',
        "<h2>Test images</h2>",
        "chosen: krum",
        "data:image/png;base64,",
    ):
        assert words in page
    assert "<b>krum" not in page
    assert "not told" not in page
    assert "Missing" not in page
    assert "not of the page" not in page
