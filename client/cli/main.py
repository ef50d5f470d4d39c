"""`consilium-client`: a hospital looks after its own side."""

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from client.cli import connect, consent, models, privacy
from client.cli.privacy import SiteFile, Yes
from common.errors import SiteError
from common.support import terminal
from common.support.terminal import console, size, table

if TYPE_CHECKING:
    from client.features.cache import Kept
    from client.site import Site

app = typer.Typer(
    help="Look after a hospital's own side: what leaves it, what that costs, what is on its disk.",
    epilog="Begin with: consilium-client init site.yaml",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)

for command, name, rest in (
    (connect.init, "init", "--server link.example.org:443"),
    (connect.check, "check", "study.yaml"),
    (connect.start, "start", ""),
    (consent.studies, "studies", ""),
    (consent.approve, "approve", "skin-lesions"),
    (consent.decline, "decline", "skin-lesions"),
    (consent.plan, "plan", "study.yaml"),
    (consent.adapt, "adapt", "skin-lesions"),
    (models.report, "report", "skin-lesions"),
    (privacy.ledger, "ledger", "--picture epsilon.png"),
    (privacy.disclosed, "disclosed", "--study skin-lesions"),
    (privacy.audit, "audit", "skin-lesions"),
    (privacy.ledger_adopt, "ledger-adopt", "--epsilon 3 --delta 1e-6"),
    (privacy.ledger_move, "ledger-move", ""),
):
    app.command(name, epilog=f"Example: consilium-client {name} site.yaml {rest}".rstrip())(command)

app.command(epilog="Example: consilium-client predict skin-lesions images/ --site site.yaml")(
    models.predict
)
app.command(epilog="Example: consilium-client export skin-lesions exported/ --site site.yaml")(
    models.export
)
app.command(epilog="Example: consilium-client evaluate runs/skin --site site.yaml")(models.evaluate)


def main() -> None:
    """Run the command line; a mistake with a known remedy ends in one line, never a traceback."""
    os.umask(0o077)  # whatever a hospital's client writes is for its user alone
    remedy = "Free some space, or mend the rights, then try again."
    terminal.run(app, remedy=remedy)


@app.command(epilog="Example: consilium-client cache site.yaml")
def cache(site_file: SiteFile) -> None:
    """List the prepared images: what they are, the room they take, when a study last used them.

    Images are prepared once and kept, so that no study prepares them again. Keep fewer of them with
    limit_gb and days, under cache in site.yaml; delete them all with purge.
    """
    from client.features.cache import list_stores
    from client.site import Site

    site = Site.read(site_file)
    found = list_stores(site.cache_folder)
    if found:
        console.print(_table(found))
    console.print(f"{_total(found, site)} in {site.cache_folder}")
    if site.cache.days is not None:
        console.print(
            f"unused for {site.cache.days} days, they go when a study opens next", style="dim"
        )


@app.command(epilog="Example: consilium-client purge site.yaml")
def purge(site_file: SiteFile, yes: Yes = False) -> None:
    """Delete all prepared images and sealed replies, of every study; the images themselves stay.

    Both are patient data: something like the image can be made from a prepared one. A study that
    needs prepared images makes them again, also one that is running now. A private round whose
    sealed reply is gone cannot be sent again for free: if it is asked for again, it spends anew.
    The ledger stays as it is.
    """
    from client.features import cache
    from client.site import Site

    site = Site.read(site_file)
    found, sealed = cache.list_stores(site.cache_folder), _sealed(site)
    if not found and not sealed:
        console.print(f"No prepared images in {site.cache_folder}: nothing to delete.")
        return
    console.print(_table(found))
    console.print(f"{_total(found, site)} in {site.cache_folder}")
    console.print("These are patient data. A study that needs them makes them again.")
    if site.cache.folder is not None:
        console.print("Other sites whose cache.folder is this folder lose theirs too.")
    if sealed:
        console.print(f"{sealed} sealed replies: a round that is asked for again spends anew.")
    if not yes and not typer.confirm("Delete them all?"):
        console.print("Nothing was deleted.")
        raise typer.Exit(1)
    deleted = cache.purge_stores(site.cache_folder)
    _unseal(site)
    console.print(f"Deleted {size(sum(kept.bytes for kept in deleted))}.")


@app.command(epilog="Example: consilium-client forget site.yaml p0042")
def forget(
    site_file: SiteFile,
    patient: Annotated[str, typer.Argument(metavar="ID", help="The patient, as the data has it.")],
    yes: Yes = False,
) -> None:
    """Leave a patient out from now on, and delete what was prepared from the images.

    His prepared images go, and every sealed reply, since he may have trained for it. A list in the
    state folder keeps him out of every study to come; it holds no id, only a hash under the site's
    secret. His images themselves are yours to delete, afterwards. What has left cannot be called
    back: models that were trained with him are not unlearned, and the ledger keeps its lines.
    """
    from client.consent import exclusions
    from client.features import cache
    from client.features.extract import make_namer
    from client.ledger.ledger import lock_state
    from client.site import Site

    site = Site.read(site_file)
    images = [row.image for row in site.data.rows(()) if row.patient == patient]
    if not images:
        expected, got = "a patient with images in data", "one with none"
        remedy = "If they are deleted already, purge deletes all that was prepared."
        raise SiteError("forget ID", expected=expected, got=got, remedy=remedy)
    console.print(f"{len(images)} images of this patient are used by {site.name}.")
    console.print("Models that were trained with them are not unlearned; the ledger stays.")
    if not yes and not typer.confirm("Leave this patient out for good?"):
        console.print("Nothing was changed.")
        raise typer.Exit(1)
    with lock_state(site.private()):  # a process at work would go on with what it has in memory
        name = make_namer(site.cache_folder)
        names = [name(image.digest()) for image in images]
        exclusions.exclude_patient(site, patient)
        rows = cache.forget_rows(site.cache_folder, names)
        sealed = _unseal(site)
    console.print(f"Left out for good. Deleted {rows} prepared images, {sealed} sealed replies.")


def _sealed(site: "Site") -> int:
    folder = site.state / "outbox"
    return len(list(folder.iterdir())) if folder.is_dir() else 0


def _unseal(site: "Site") -> int:
    """Delete every sealed reply; returns how many there were."""
    from client.ledger.outbox import Outbox

    sealed = _sealed(site)
    if sealed:
        Outbox(site.state / "outbox").purge()
    return sealed


def _table(found: Sequence["Kept"]) -> Table:
    columns = "prepared images", "rows", "size", "created", "last used"
    shown = table(*columns, left=("prepared images", "created", "last used"))
    for kept in reversed(found):
        about = dict(kept.about)
        created = about.pop("created", "–")
        what = ", ".join(f"{key} {value}" for key, value in about.items())
        used = f"{kept.used:%Y-%m-%d %H:%M}"
        shown.add_row(what or kept.folder.name, f"{kept.rows:,}", size(kept.bytes), created, used)
    return shown


def _total(found: Sequence["Kept"], site: "Site") -> str:
    most = "" if site.cache.limit is None else f" of at most {size(site.cache.limit)}"
    return f"total {size(sum(kept.bytes for kept in found))}{most}"
