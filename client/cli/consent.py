"""The commands of `consilium-client` by which a person decides what this hospital takes part in."""

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from client.cli.privacy import SiteFile, Yes
from common.support.terminal import console, size, table

if TYPE_CHECKING:
    from client.admin.cost import Noise
    from client.site import Site
    from common.config.study import Private, Study

StudyFile = Annotated[
    Path, typer.Argument(metavar="STUDY_YAML", help="The study that the coordinator asks for.")
]
StudyName = Annotated[
    str, typer.Argument(metavar="STUDY", help="By name or id, as studies lists them.")
]

_SHOWN = 8
_SAID = {"waiting": "waits for yes or no", "approved": "yes", "declined": "no"}


def studies(site_file: SiteFile) -> None:
    """List the studies that were sent here for a person to decide, and what was said to them.

    With approve: ask in site.yaml, which is so unless the file says otherwise, a study does nothing
    here until somebody says approve.
    """
    from client.consent.approval import list_approvals
    from client.site import Site

    site = Site.read(site_file)
    if site.policy.approve == "policy":
        console.print(f"approve: policy in {site_file}: no study waits for a person.")
    shown = table("study", "id", "sent", "answer", left=("study", "id", "sent", "answer"))
    found = list_approvals(site)
    for one in found:
        answer = f"{_SAID[one.decision]}, {one.decided}" if one.decided else _SAID[one.decision]
        shown.add_row(one.study.name, one.study.id, one.asked, answer)
    console.print(shown if found else "No study was sent for a person to decide.")


def approve(site_file: SiteFile, name: StudyName, yes: Yes = False) -> None:
    """Show what a study would do, cost and tell here; take part in it if you say yes.

    The yes is to the study exactly as it was sent, and is kept in the state folder; a study with
    one digit changed waits anew. The policy in site.yaml is asked all the same. decline takes the
    yes back.
    """
    from client.consent.approval import find_approval, keep_decision
    from client.site import Site

    site = Site.read(site_file)
    approval = find_approval(site, name)
    study = approval.study
    agreed = _show(site, study)
    console.print(f"sent           {approval.asked}, SHA-256 {study.sha256}")
    if not yes and not typer.confirm("Take part in it?"):
        console.print(
            f"Nothing was changed. To say no: consilium-client decline {site_file} {name}"
        )
        raise typer.Exit(1)
    keep_decision(site, approval, "approved")
    if agreed:
        console.print("Approved. It begins when the coordinator asks the next time.", style="green")
    else:
        console.print("Approved, but refused as above: site.yaml has the last word.", style="red")


def decline(site_file: SiteFile, name: StudyName) -> None:
    """Say no to a study that waits, or take back a yes: it gets no further answer from here.

    The coordinator learns that this site does not take part, and no reason. What has left before
    cannot be called back.
    """
    from client.consent.approval import find_approval, keep_decision
    from client.site import Site

    site = Site.read(site_file)
    approval = find_approval(site, name)
    keep_decision(site, approval, "declined")
    console.print(f"Declined: {approval.study.name} ({approval.study.id}).")


def plan(site_file: SiteFile, study_file: StudyFile) -> None:
    """Show what a study would do, cost and tell here, before it is sent; nothing is changed.

    For a study with differential privacy: the noise this site would need, and what all its
    studies together would have spent after each round. For one without: that nothing bounds what
    it tells. In both cases: whether the policy agrees, and what would leave. The exit code is 1 if
    this site would refuse.
    """
    from client.site import Site
    from common.config.study import Study

    raise typer.Exit(0 if _show(Site.read(site_file), Study.read(study_file)) else 1)


def adapt(site_file: SiteFile, name: StudyName) -> None:
    """Fit the released model of a private study to this site's own patients; it stays here.

    Other studies do so at their end. In a private one the coordinator waits for the last reply, and
    the time of a fit would tell how many patients train here. The model is not private.
    """
    from client.models.own import fit_later
    from client.site import Site

    site = Site.read(site_file)
    fit_later(site, name)
    console.print(
        f"The model is in {site.state / 'adapted'}. It is not private: it must not leave."
    )


# --- the page about a study ---


def _show(site: "Site", study: "Study") -> bool:
    """The page; returns whether the site would take part."""
    from client.admin.cost import estimate_cost
    from client.ledger import spending
    from common.config.study import Private

    found = estimate_cost(site, study)
    for line in _asked(study):
        console.print(line)
    about = "" if found.drawn else "about "  # who is held out is drawn with the first study
    console.print(f"training here  {about}{found.training:,} patients, {found.images:,} images")
    console.print(f"disk           up to about {size(found.room)} of prepared images")
    if isinstance(study.privacy, Private):
        if found.noise:
            _show_noise(found.noise, study.privacy, site.policy.max_epsilon)
        console.print(spending.MEANING, style="dim")
    else:
        text = "trained without differential privacy: not accounted, no ε bounds what it tells"
        console.print(f"privacy        none; {text}")
    console.print(f"leaves         {_leaving(site, study, sums=found.sums)}")
    refusals = [found.refusal, found.noise and found.noise.unaffordable]
    for no in filter(None, refusals):
        console.print(f"refused        {no}", style="red")
    if not any(refusals):
        console.print("agreed         the policy has nothing against it", style="green")
    return not any(refusals)


def _asked(study: "Study") -> Iterator[str]:
    """What the study says of itself."""
    model, train, images = study.model, study.train, study.images
    rest = len(study.classes) - _SHOWN
    classes = ", ".join(study.classes[:_SHOWN]) + (f" and {rest} more" if rest > 0 else "")
    yield f"study          {study.name} ({study.id}), of {classes}"
    weights = f"weights {Path(model.weights).name}, {model.precision}"
    yield f"trains         {model.unfreeze} of {model.backbone}, {weights}"
    steps, epochs = train.local_steps, train.local_epochs or 1
    length = _count(steps, "step") if steps else _count(epochs, "epoch")
    # With privacy, patients are drawn: how many is told with the noise.
    batches = "" if study.private else f", batches of {train.batch_size}"
    if train.rounds:
        yield f"rounds         {train.rounds} of {length}{batches}"
    side = f"{images.size} pixels wide" if images.size else "as wide as the backbone has them"
    yield f"images         {side}, {_count(images.augment.views, 'view')} of each that trains"
    held = study.holdout
    yield f"held out       {held.validation:.0%} for validation, {held.test:.0%} for the test"


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'s' if number > 1 else ''}"


def _show_noise(noise: "Noise", privacy: "Private", budget: float | None) -> None:
    from common.config.study import DpSgd

    console.print(f"asked for      ε {privacy.epsilon:g} at δ = {privacy.delta:g}")
    for query in noise.privacy_plan.queries:
        one, total = query.release, query.event.steps
        if isinstance(privacy, DpSgd):
            in_all = f"{query.times} rounds, {privacy.spare_rounds} of them spare"
            patients = f"q {one.sample_rate:.3g}, {noise.privacy_plan.batch:g} patients a step"
            console.print(f"sampling       {patients}")
            console.print(f"steps          {one.steps} a round, {total:,} in {in_all}")
        else:
            console.print(f"{query.kind:14} one sum over all patients, in one step")
        console.print(f"noise          σ {one.noise_multiplier:.4g}, clipping at {one.clip_norm:g}")
    if noise.before.entries:
        console.print("               ε below is of all studies of this site together")
    bound = f"ε by {noise.before.bound(noise.study)} at δ = {noise.before.delta:g}"
    shown = table("after", bound, left=("after",))
    for stop, epsilon in noise.stops:
        shown.add_row(stop, f"{epsilon:.2f}")
    console.print(shown)
    if budget is not None:
        console.print(f"left after it  {budget - epsilon:.2f} of max_epsilon {budget:g}")
    for warning in noise.warnings:
        console.print(f"hopeless?      {warning}", style="yellow")


def _leaving(site: "Site", study: "Study", *, sums: bool) -> str:
    from math import prod

    from common.model.network import assemble
    from common.protocol.noised import NOISED, count_numbers
    from common.protocol.sums import size_sums

    told = site.policy.disclose.resolved(private=study.private)
    network = assemble(study, "none")
    shapes = network.shapes
    numbers = sum(prod(shape) for shape in shapes.values())
    each = f"each round {len(shapes)} tensors of {numbers:,} numbers ({size(4 * numbers)})"
    if study.directions:
        kinds = ((kind, len(study.classes), study.directions) for kind in NOISED)
        bytes_sent = size(8 * sum(count_numbers(*each) for each in kinds))
        each = f"once, two sums over patients with noise ({bytes_sent})"
    elif sums or not study.train.rounds:
        bytes_sent = size(sum(size_sums(len(study.classes), network.width)))
        first = f"once, sums of features by class, not accounted ({bytes_sent})"
        each = f"{first}; then {each}" if study.train.rounds else first
    elif study.model.solved_head:
        each += "; no sums of features (policy.disclose.sums)"
    if network.frozen:
        each += f"; not trained with privacy: {len(network.frozen)} tensors of BatchNorm"
    if site.role == "evaluate":
        each = "no tensors"
    withheld = told.withheld
    return f"{each}; counts: {told.counts}, metrics: {told.metrics}" + (
        f" (withheld: {withheld})" if withheld else ""
    )
