"""The commands of `consilium-client` about what leaves the hospital, and what it costs."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from common.support.terminal import console, size, table

if TYPE_CHECKING:
    from client.ledger.entries import Contents, Sent
    from client.ledger.spending import Spending, StudySpending
    from client.site import Site

SiteFile = Annotated[
    Path, typer.Argument(metavar="SITE_YAML", help="The hospital's own file, site.yaml.")
]
Yes = Annotated[bool, typer.Option("--yes", help="Do it without asking.")]

_SHAPES = 3
_RARE = 0.025
"""What happens by chance less often is not taken for chance."""


def ledger(
    site_file: SiteFile,
    picture: Annotated[
        Path | None, typer.Option(metavar="FILE.png", help="Draw ε over time into this file.")
    ] = None,
) -> None:
    """Show what this site has spent: ε by study and in all, and what is left of max_epsilon.

    The ledger in the state folder has a line for every message that left, written and on disk
    before it leaves. Here it is checked line by line, then added up. A line that was changed, lost
    or rolled back is an error.
    """
    from client.ledger import spending
    from client.ledger.ledger import read_ledger
    from client.site import Site

    site = Site.read(site_file)
    entries = read_ledger(site.state)
    spent = spending.Spending.of(entries, site.policy.delta, site.policy.max_epsilon)
    studies = spent.studies
    if not studies:
        console.print(f"Nothing has left this site: no line in {site.state / 'ledger.jsonl'}.")
    if studies:
        console.print(_studies(studies, spent.delta))
    if unaccounted := sum(study.open for study in studies):
        console.print(f"{unaccounted} rounds {spending.UNACCOUNTED}; no ε bounds what they tell")
    if any(study.private for study in studies):
        console.print("alone: what a study alone would cost. Together they cost the total.")
    console.print(_total(spent, site))
    if spent.ends:
        told = f"ε {spent.held_out():.2f} at δ = {spent.delta:g}, by {spent.ends} ends of studies"
        console.print(f"held-out patients: {told}")
    console.print(spending.MEANING, style="dim")
    if picture:
        _draw(spent, site, picture)
        console.print(f"picture: {picture}")


def _studies(studies: Sequence["StudySpending"], delta: float) -> Table:
    columns = ("study", "id", "private rounds", "σ", "q", "steps", "ε alone", "not accounted")
    shown = table(*columns, left=columns[:2])
    for study in studies:
        private = study.private
        shown.add_row(
            study.name,
            study.study,
            str(len(private)),
            _few(p.noise_multiplier for p in private),
            _few(p.sample_rate for p in private),
            f"{sum(p.steps for p in private):,}" if private else "–",
            f"{study.epsilon(delta):.2f}" if private else "–",
            f"{study.open} rounds" if study.open else "–",
        )
    return shown


def _few(numbers: object) -> str:
    distinct = sorted(set(numbers))  # type: ignore[call-overload]
    if not distinct:
        return "–"
    return f"{distinct[0]:.3g}" + (f" to {distinct[-1]:.3g}" if len(distinct) > 1 else "")


def _total(spent: "Spending", site: "Site") -> str:
    epsilon, budget = spent.total(), site.policy.max_epsilon
    text = f"accounted: total ε {epsilon:.2f} at δ = {spent.delta:g} by {spent.bound()}"
    if spent.adopted:
        text += f", {spent.adopted.epsilon:g} of it for lines that were lost"
    if budget is None:
        return f"{text}; no max_epsilon in site.yaml"
    return f"{text}; {max(0.0, budget - epsilon):.2f} left of max_epsilon {budget:g}"


def _draw(spent: "Spending", site: "Site", path: Path) -> None:
    from client.cli import plots
    from client.ledger import spending

    unaccounted = [
        spending.read_time(entry)
        for entry in spending.list_sent(spent.entries)
        if entry.release.kind == "round" and entry.release.privacy is None
    ]
    plots.plot_spending(
        spent.over_time(),
        unaccounted,
        path,
        delta=spent.delta,
        budget=site.policy.max_epsilon,
    )


def ledger_adopt(
    site_file: SiteFile,
    epsilon: Annotated[
        float, typer.Option(help="What the lines that are lost have spent, at least.")
    ],
    delta: Annotated[float, typer.Option(help="The δ of that ε; 0 if nothing was spent.")],
    yes: Yes = False,
) -> None:
    """Begin a new ledger in place of one that is lost or damaged.

    Restore ledger.jsonl and ledger.head from a backup if you can, and only if it is the newest.
    Otherwise every line that can still be read stays, and what it spent stays spent. So does all
    that a study would have spent to its end, if this site agreed to it and no line of it is left.
    What else the lost lines spent is known to nobody but you: the reports of past studies tell. Say
    too much rather than too little: it adds to the rest for good. The old file is set aside.
    """
    from client.admin.lost import list_lost_releases
    from client.ledger.adoption import adopt_ledger, salvage_ledger
    from client.site import Site

    site = Site.read(site_file)
    state = site.private()
    left = salvage_ledger(state)
    whole = list_lost_releases(site, left.entries)
    console.print(f"{len(left.entries)} lines can be read, and stay.")
    if left.lost:
        console.print(f"Others cannot: {left.lost}", style="yellow")
    for name in sorted({one.name for one in whole}):
        console.print(f"No line is left of study {name}: it counts as if it had come to its end.")
    console.print(f"What else was lost: ε {epsilon:g} at δ = {delta:g} is spent for good.")
    console.print("If more was spent in truth, every ε that is told from here on is too low.")
    console.print("A coordinator that remembers the old ledger will leave this site out; tell him.")
    if not yes and not typer.confirm("Begin it?"):
        console.print("Nothing was changed.")
        raise typer.Exit(1)
    adopt_ledger(state, epsilon, delta, whole)
    console.print("Done.")


def ledger_move(site_file: SiteFile, yes: Yes = False) -> None:
    """Use the ledger where it is now: its files were moved, or restored from a backup.

    A ledger in two places is two budgets. So a client refuses one that lies in another file, or on
    another machine, than when it was last in use. Say yes if it is the newest copy there is, and
    the only one that is used from now on.
    """
    from client.ledger.ledger import Ledger
    from client.site import Site

    state = Site.read(site_file).private()
    console.print(f"The ledger in {state} is to be used here from now on, and nowhere else.")
    if not yes and not typer.confirm("Is it the newest, and is no other copy in use?"):
        console.print("Nothing was changed.")
        raise typer.Exit(1)
    Ledger(state).close()
    console.print("Done.")


def audit(
    site_file: SiteFile,
    name: Annotated[
        str, typer.Argument(metavar="STUDY", help="A study that ended here, by name or id.")
    ],
) -> None:
    """Attack a released model: can its losses tell who trained here? Nothing of it is sent.

    A model that learned patients by heart errs less on those who trained than on those who were
    held out. This is the simplest attack there is: one that finds nothing proves nothing.
    """
    from client.models.membership import attack_membership
    from client.site import Site

    found = attack_membership(Site.read(site_file), name)
    console.print(f"study           {found.study}")
    console.print(f"patients        {found.trained} trained, {found.held_out} held out")
    console.print(
        f"told apart      AUROC {found.auroc:.3f}; 0.500 is chance, which does as well with a "
        f"probability of {found.chance:.3f}"
    )
    if found.sought:
        console.print(
            f"found           {found.found} of {found.sought} who trained, where 5 % of the others "
            "are taken for them; in classes with 20 held out or more"
        )
    more = found.chance < _RARE
    told = "more than chance" if more else "no more than chance, as far as so few can show"
    console.print(f"The model's losses tell {told}.")


def disclosed(
    site_file: SiteFile,
    study: Annotated[
        str | None, typer.Option(metavar="NAME", help="Of this study only, by name or id.")
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="For programs, with every shape and the whole hash.")
    ] = False,
) -> None:
    """List every message that left: when, for which study, what was in it, and its SHA-256.

    The hash is of the message byte by byte, so what a server has can be compared with what left.
    An error is listed with the word that was told. Answers about the ledger itself are not: they
    say nothing of patients.
    """
    from client.ledger import spending
    from client.ledger.ledger import read_ledger
    from client.site import Site

    site = Site.read(site_file)
    found = spending.list_sent(read_ledger(site.state), study)
    if as_json:
        typer.echo(json.dumps([_plain(entry) for entry in found], indent=1))
    elif not found:
        console.print("Nothing has left this site" + (f" for {study}." if study else "."))
    else:
        console.print(_left(found))


def _plain(entry: "Sent") -> dict[str, object]:
    release, contents = entry.release, entry.contents
    return {
        "line": entry.n,
        "time": entry.time,
        "study": release.study,
        "name": release.name,
        "kind": release.kind,
        "round": release.round,
        "private": release.privacy is not None,
        **contents.model_dump(mode="json"),
    }


def _left(found: Sequence["Sent"]) -> Table:
    columns = ("time", "study", "message", "size", "sha256", "tensors", "figures")
    shown = table(*columns)
    for entry in found:
        release, contents = entry.release, entry.contents
        message = f"round {release.round}" if release.round else release.kind
        shown.add_row(
            entry.time,
            release.name,
            message,
            size(contents.bytes),
            contents.sha256[:16],
            _tensors(contents),
            ", ".join(contents.metrics) or "–",
        )
    return shown


def _tensors(contents: "Contents") -> str:
    shapes = ["×".join(map(str, shape)) for shape in contents.tensors.values()]
    more = [f"{len(shapes) - _SHAPES} more"] if len(shapes) > _SHAPES else []
    return ", ".join([*shapes[:_SHAPES], *more]) or "–"
