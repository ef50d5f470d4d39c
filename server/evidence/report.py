"""The report of a run: one page, the model's card, and the same facts as JSON."""

from collections.abc import Sequence
from dataclasses import replace

from common.page.blocks import Page, Section, Text
from common.page.render import render_page
from server.evidence.card import collect_card_facts, describe_use, write_card
from server.evidence.course import describe_course, describe_making
from server.evidence.facts import RunFacts, read_facts
from server.evidence.limits import list_limits
from server.evidence.performance import (
    Estimates,
    estimate_figures,
    show_classes,
    tabulate_pairs,
    tabulate_sites,
)
from server.evidence.pictures import draw_gains, draw_released, draw_rounds
from server.evidence.privacy import describe_privacy
from server.evidence.verdicts import judge_sites
from server.runs.results import list_sites
from server.runs.run_folder import RunFolder

REPORT, CARD, FACTS = "report.html", "card.md", "facts.json"


def write_report(
    folder: RunFolder, audit: float | None = None, groups: Sequence[Section] = ()
) -> None:
    """Write the report of a finished run, its model's card, and the card's facts.

    Args:
      folder: Of the run.
      audit: The largest ε that attacks on the same study show, if there was an audit.
      groups: How the model does for groups of patients, where somebody can tell.

    Raises:
      RunError: the run is not finished, or its folder cannot be written.
    """
    facts = read_facts(folder, audit)
    estimates = estimate_figures(facts)
    sections = compose_sections(facts, estimates, groups)
    folder.write(REPORT, render_page(_make_page(facts, _add_pictures(facts, estimates, sections))))
    folder.write(CARD, write_card(facts, sections))
    folder.write(FACTS, collect_card_facts(facts))


def compose_sections(
    facts: RunFacts, estimates: Estimates, groups: Sequence[Section] = ()
) -> list[Section]:
    """Everything that is said in words and tables, in the order in which it is read."""
    question = "How does it do elsewhere?" if facts.external else "Did federating help?"
    figures = [tabulate_sites(facts, estimates), *tabulate_pairs(facts)]
    return [
        Section(question, list(judge_sites(facts))),
        Section("Figures on test patients", figures),
        Section("By class", list(show_classes(facts))),
        *groups,
        Section("What the model is for", [describe_use(facts)]),
        Section("Limits of this evidence", [Text(line) for line in list_limits(facts)]),
        Section("Privacy", list(describe_privacy(facts))),
        Section("Who took part, and what it cost", list(describe_course(facts))),
        Section("What the model was made of", list(describe_making(facts)), folded=True),
    ]


def _add_pictures(
    facts: RunFacts, estimates: Estimates, sections: Sequence[Section]
) -> list[Section]:
    """The sections of the page, with pictures where the tables say the same."""
    verdict, figures, classes, *rest = sections
    return [
        replace(verdict, blocks=[*verdict.blocks, *draw_gains(facts, estimates)]),
        figures,
        replace(classes, blocks=[*classes.blocks, *draw_released(facts)]),
        Section("How the model was found", list(draw_rounds(facts))),
        *rest,
    ]


def _name_subject(facts: RunFacts) -> str:
    if facts.external:
        return "the released model at hospitals that took no part"
    return "what federating gave, and cost"


def _make_page(facts: RunFacts, sections: list[Section]) -> Page:
    ended = facts.happened.ended
    when = f"{ended:%Y-%m-%d} · " if ended else ""
    sites = f"{len(list_sites(facts.results))} sites with figures"
    return Page(
        title=f"{facts.study.name}: {_name_subject(facts)}",
        subtitle=f"{when}{sites} · released: {facts.released} · run {facts.folder.name}",
        sections=sections,
        footer="Made by Consilium from what sites told, and from nothing else. Without patients' "
        "images, names or scores of single patients.",
    )
