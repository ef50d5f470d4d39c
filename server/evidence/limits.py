"""The limits of what a run shows, said by the run itself."""

from collections.abc import Iterator

from common.metrics.counts import Counts
from common.protocol.evidence import LOCAL
from server.evidence.facts import RunFacts
from server.runs.results import find_left_out

_FEW = 10
"""Test images of a class, below which its sensitivity is hardly known."""


def list_limits(facts: RunFacts) -> list[str]:
    """List what keeps a reader from concluding more, in whole sentences."""
    return [*_of_scope(facts), *_of_numbers(facts), *_of_sites(facts)]


def _of_scope(facts: RunFacts) -> Iterator[str]:
    yield _describe_validation(facts)
    yield "Decisions are of single images; the model was not tried in clinical use."
    yield "One training seed: training again, with another holdout, would give other figures."
    if not facts.study.card.label_source:
        yield "Where the labels come from is not stated; figures are no truer than they are."


def _describe_validation(facts: RunFacts) -> str:
    if facts.external:
        return "External validation: nothing was fitted to these hospitals, which took no part."
    where = "all figures are of patients of the sites that trained, kept apart from training."
    if names := sorted(path.parent.name for path in facts.folder.glob("external/*/report.json")):
        return f"Here {where} External validation is in reports of its own: {', '.join(names)}."
    return f"No external validation: {where} Another hospital, camera or population may fare worse."


def _of_numbers(facts: RunFacts) -> Iterator[str]:
    whole = facts.united[facts.own_way]
    if few := _find_few(whole, facts):
        yield f"Few test images of some classes over all sites: {few}."
    for name, counts in facts.results[facts.own_way].items():
        if few := _find_few(counts, facts):
            yield f"Few test images at {name}: {few}."
        if lacking := _find_lacking(counts, facts):
            yield f"No test image at {name} of {lacking}: nothing is known of these there."
    evidence = facts.told.get("evidence", {})
    several = [name for name in facts.results[facts.own_way] if name not in evidence]
    if clustered := [name for name in several if _has_several(facts, name)]:
        yield (
            f"Intervals of {', '.join(clustered)} count images as if each were of another patient, "
            "though patients have several: they are too narrow."
        )


def _of_sites(facts: RunFacts) -> Iterator[str]:
    if out := find_left_out(facts.results):
        yield f"Overall figures leave out {', '.join(out)}: not every way was tested there."
    for name, words in sorted(facts.told.get("withheld", {}).items()):
        yield f"{name} withholds {words}."
    if LOCAL not in facts.results and not facts.external:
        yield "No site's own model alone was tested, so nothing here shows that federating helped."


def _find_few(counts: Counts, facts: RunFacts) -> str:
    images = counts.confusion.sum(axis=1) if not counts.noise else ()
    named = zip(facts.study.classes, images, strict=False)
    return ", ".join(f"{name} {n}" for name, n in named if 0 < n < _FEW)


def _find_lacking(counts: Counts, facts: RunFacts) -> str:
    images = counts.confusion.sum(axis=1) if not counts.noise else ()
    return ", ".join(c for c, n in zip(facts.study.classes, images, strict=False) if n == 0)


def _has_several(facts: RunFacts, name: str) -> bool:
    """Whether patients of a site's test part have several images, as far as it tells."""
    site = facts.sites.get(name)
    if site is None or site["patients"]["test"] is None:
        return True
    return bool(sum(site["images"]["test"]) > site["patients"]["test"])
