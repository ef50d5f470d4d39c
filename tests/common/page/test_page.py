"""A page of every kind of block: what a reader, a browser and a printer make of it."""

import re
from html.parser import HTMLParser
from importlib.resources import files
from io import BytesIO
from itertools import product
from pathlib import Path

import matplotlib as mpl
import numpy as np
import pytest
from matplotlib.figure import Figure as Canvas
from PIL import Image

from common.page.blocks import Facts, Page, Section, Table, Text
from common.page.plots import draw_cells, draw_figure
from common.page.render import render_page
from tests.browser import open_page, print_page

EVIL = '<script>alert("$x_1$")</script>&' + "long" * 60


def make_page(name: str = EVIL) -> Page:
    """A page of every block, with one name wherever a name can stand."""

    def draw(canvas: Canvas) -> None:
        axes = canvas.subplots()
        draw_cells(axes, np.array([[np.nan, 0.5], [0, 1]]), [["–", name], ["0", "1"]], size=7)
        axes.set_title(name[:20])

    return Page(
        title=name,
        subtitle=name,
        sections=[
            Section(name, [Text(name, "good"), Text(name, "unsure"), Text(name, "note")]),
            Section("Facts", [Facts({name: name})]),
            Section("Table", [Table([name] * 9, [[name] * 9], left=2, caption=name)]),
            Section("Figures", [draw_figure(draw, f"{name} {n}", name) for n in range(3)]),
            Section("Folded", [Text("small print", "note")] * 9, folded=True),
            Section("Empty", []),
        ],
        footer=name,
    )


@pytest.fixture
def page(tmp_path: Path) -> Path:
    path = tmp_path / "page.html"
    path.write_text(render_page(make_page()), encoding="utf-8")
    return path


class Tags(HTMLParser):
    """The tags and attributes of a page, by name."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.names: set[str] = set()
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.names |= {tag, *(f"{tag} {name}" for name, _ in attrs)}


def test_names_are_text_in_every_block_and_attribute() -> None:
    harmless = make_page("north")
    assert Tags(render_page(make_page())).names == Tags(render_page(harmless)).names


def test_a_page_is_the_same_each_time() -> None:
    assert render_page(make_page()) == render_page(make_page())


def test_every_name_inside_a_page_is_given_once() -> None:
    names = re.findall(r'\bid="([^"]*)"', render_page(make_page()))
    assert len(names) == len(set(names)) > 10


def test_a_page_may_load_nothing() -> None:
    text = render_page(make_page())
    assert 'http-equiv="Content-Security-Policy" content="default-src \'none\';' in text
    assert "//" not in text.replace(EVIL, "")


def test_an_empty_section_is_left_out() -> None:
    assert "Empty" not in render_page(make_page())


@pytest.mark.parametrize(("width", "dark"), [(375, False), (375, True), (1280, False)])
def test_a_browser_shows_a_page_without_complaint(page: Path, width: int, dark: bool) -> None:
    seen = open_page(page, width, dark=dark)
    assert seen.errors == []
    assert seen.requests == []
    assert seen.overflow == 0


def test_the_dark_scheme_is_dark(page: Path) -> None:
    light, dark = (open_page(page, 375, dark=dark).picture for dark in (False, True))
    assert read_corner(light) > 0.9
    assert read_corner(dark) < 0.2


def test_the_browser_would_tell_of_a_page_that_loads(page: Path) -> None:
    evil = '<img src="http://127.0.0.1:9/image.png"><p style="min-width: 5000px">wide</p>'
    page.write_text(page.read_text().replace("</main>", f"{evil}<script>1</script></main>"))
    seen = open_page(page, 375)
    assert len(seen.errors) == 2
    assert seen.requests == ["http://127.0.0.1:9/image.png"]
    assert seen.overflow > 4000


def test_a_printed_page_shows_what_is_folded_on_the_screen(page: Path) -> None:
    folded = Section("Folded", [Text("word " * 400)] * 20, folded=True)
    empty = Section("Folded", [Text("word")], folded=True)
    printed = []
    for section in (folded, empty):
        page.write_text(render_page(Page("Title", "", [section])))
        printed.append(print_page(page))
    long, short = (len(re.findall(rb"/Type /Page\b", pdf)) for pdf in printed)
    assert printed[0].startswith(b"%PDF")
    assert long > short == 1


def test_every_text_can_be_read_on_its_paper() -> None:
    template = files("common.page").joinpath("page.html").read_text(encoding="utf-8")
    schemes = [dict(re.findall(r"--(\w+): (#\w+)", part)) for part in template.split(":root {")[1:]]
    assert len(schemes) == 3  # light, dark, paper
    for scheme, word in product(schemes, ("ink", "soft", "good", "bad", "unsure", "link")):
        colours = schemes[0] | scheme
        contrast = compare_light(*(mpl.colors.to_rgb(colours[c]) for c in (word, "paper")))
        assert contrast >= 4.5, (word, colours[word])


def test_text_can_be_read_on_every_shade_of_a_cell() -> None:
    shades = np.linspace(0, 1, 200)
    axes = Canvas().subplots()
    draw_cells(axes, shades[None], [["1"] * 200], size=7)
    inks = [mpl.colors.to_rgb(text.get_color()) for text in axes.texts]
    papers = [colour[:3] for colour in mpl.colormaps["Blues"](shades)]
    assert min(map(compare_light, inks, papers)) >= 4.4


def compare_light(a: tuple[float, ...], b: tuple[float, ...]) -> float:
    """The contrast of two colours, 1 to 21 (WCAG 2)."""
    darker, lighter = sorted(map(measure_light, (a, b)))
    return (lighter + 0.05) / (darker + 0.05)


def measure_light(colour: tuple[float, ...]) -> float:
    rgb = np.array(colour)
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    return float(linear @ [0.2126, 0.7152, 0.0722])


def read_corner(picture: bytes) -> float:
    red, green, blue = Image.open(BytesIO(picture)).convert("RGB").getpixel((1, 1))
    return measure_light((red / 255, green / 255, blue / 255))
