"""Write a hospital's own page of a study."""

from pathlib import Path

from client.models.released import open_released, read_released
from client.reports.figures import judge_outcome, show_classes, tabulate_ways
from client.reports.outcome import SiteOutcome, collect_outcome
from client.reports.told import describe_spending, describe_study, describe_told, list_messages
from client.session import Session
from client.site import Site
from client.storage import explain_disk_errors
from common.errors import SiteError
from common.page.blocks import Page, Section
from common.page.render import render_page
from common.support import files

FOOTER = "This page shows this hospital's own figures in full. It stays here."


def write_page(session: Session) -> Path:
    """Write the page of the study of a session, which has ended here; returns its file.

    Raises:
      SiteError: the study has not ended here, or the disk refuses.
    """
    site, study = session.prepared.site, session.prepared.study
    outcome = collect_outcome(session, read_released(site, study.id))
    path = site.private("reports") / f"{study.id}.html"
    with explain_disk_errors(path, SiteError):
        files.write(path, render_page(_compose(outcome)), mode=0o600)
    return path


def write_page_later(site: Site, name: str) -> Path:
    """Write the page of the last study of this name, or that of this id, that ended here.

    Raises:
      SiteError: none did, or the disk refuses.
    """
    return write_page(open_released(site, name)[0])


def _compose(outcome: SiteOutcome) -> Page:
    site, study, evidence = outcome.prepared.site, outcome.prepared.study, outcome.evidence
    ended = max((entry.time for entry in outcome.sent), default="")
    figures = evidence is not None
    return Page(
        title=f"{study.name} at {site.name}",
        subtitle=f"study {study.id} · last answer {ended}" if ended else f"study {study.id}",
        sections=[
            Section("Did federating help this hospital?", list(judge_outcome(outcome))),
            Section("Models", list(tabulate_ways(outcome, evidence)) if evidence else []),
            Section("Classes", list(show_classes(outcome)) if figures else []),
            Section("What was told, and what was not", list(describe_told(outcome))),
            Section("Privacy", list(describe_spending(outcome))),
            Section("Every message that left", [list_messages(outcome)], folded=True),
            Section("The study", [describe_study(outcome)], folded=True),
        ],
        footer=FOOTER,
    )
