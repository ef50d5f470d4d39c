"""`consilium-client`: a hospital looks after its own side."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from common import terminal
from common.terminal import console, size

if TYPE_CHECKING:
    from client.cache import Kept
    from client.site import Site

app = typer.Typer(
    help="Look after a hospital's own side: what is on its disk, and what becomes of it.",
    epilog="Begin with: consilium-client cache site.yaml",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)

SiteFile = Annotated[
    Path, typer.Argument(metavar="SITE_YAML", help="The hospital's own file, site.yaml.")
]


def main() -> None:
    """Run the command line; a mistake with a known remedy ends in one line, never a traceback."""
    remedy = "Free some space, or mend the rights, then try again."
    terminal.run(app, remedy=remedy)


@app.command(epilog="Example: consilium-client cache site.yaml")
def cache(site_file: SiteFile) -> None:
    """List the prepared images: what they are, the room they take, when a study last used them.

    Images are prepared once and kept, so that no study prepares them again. Keep fewer of them with
    limit_gb and days, under cache in site.yaml; delete them all with purge.
    """
    from client.cache import stores
    from client.site import Site

    site = Site.read(site_file)
    found = stores(site.cache_folder)
    if found:
        console.print(_table(found))
    console.print(f"{_total(found, site)} in {site.cache_folder}")
    if site.cache.days is not None:
        console.print(
            f"unused for {site.cache.days} days, they go when a study opens next", style="dim"
        )


@app.command(epilog="Example: consilium-client purge site.yaml")
def purge(
    site_file: SiteFile,
    yes: Annotated[bool, typer.Option("--yes", help="Delete without asking.")] = False,
) -> None:
    """Delete all prepared images, of every study; the images themselves stay.

    They are patient data: something like the image can be made from them. A study that needs them
    makes them again, also one that is running now.
    """
    from client import cache
    from client.site import Site

    site = Site.read(site_file)
    found = cache.stores(site.cache_folder)
    if not found:
        console.print(f"No prepared images in {site.cache_folder}: nothing to delete.")
        return
    console.print(_table(found))
    console.print(f"{_total(found, site)} in {site.cache_folder}")
    console.print("These are patient data. A study that needs them makes them again.")
    if site.cache.folder is not None:
        console.print("Other sites whose cache.folder is this folder lose theirs too.")
    if not yes and not typer.confirm("Delete them all?"):
        console.print("Nothing was deleted.")
        raise typer.Exit(1)
    deleted = cache.purge(site.cache_folder)
    console.print(f"Deleted {size(sum(kept.bytes for kept in deleted))}.")


def _table(found: Sequence["Kept"]) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("prepared images", "rows", "size", "created", "last used"):
        table.add_column(column, justify="right" if column in ("rows", "size") else "left")
    for kept in reversed(found):
        about = dict(kept.about)
        created = about.pop("created", "–")
        what = ", ".join(f"{key} {value}" for key, value in about.items())
        used = f"{kept.used:%Y-%m-%d %H:%M}"
        table.add_row(what or kept.folder.name, f"{kept.rows:,}", size(kept.bytes), created, used)
    return table


def _total(found: Sequence["Kept"], site: "Site") -> str:
    most = "" if site.cache.limit is None else f" of at most {size(site.cache.limit)}"
    return f"total {size(sum(kept.bytes for kept in found))}{most}"
