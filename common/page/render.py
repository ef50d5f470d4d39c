"""A page as one HTML file without scripts, which a content policy keeps from loading anything."""

from dataclasses import replace
from itertools import groupby

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from common.page.blocks import Block, Figure, Page


def render_page(page: Page) -> str:
    """Render a page; the same page gives the same text."""
    there = [section for section in page.sections if section.blocks]
    template = _ENVIRONMENT.get_template("page.html")
    return template.render(page=replace(page, sections=there), group=_group_figures, svg=Markup)


def _group_figures(blocks: list[Block]) -> list[list[Block]]:
    """Blocks one by one, but figures that follow each other together."""
    pairs = groupby(blocks, key=lambda block: isinstance(block, Figure))
    return [
        part for figures, run in pairs for part in ([list(run)] if figures else [[b] for b in run])
    ]


def _name_kind(block: Block) -> str:
    return type(block).__name__


_ENVIRONMENT = Environment(
    loader=PackageLoader("common.page", "."),
    autoescape=True,
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)
_ENVIRONMENT.filters["kind"] = _name_kind
