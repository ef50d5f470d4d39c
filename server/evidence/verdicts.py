"""Did federating help, for whom, and how sure are we: one sentence for each site."""

from collections.abc import Iterator

from common.metrics.by_patient import Evidence
from common.metrics.counts import Counts
from common.metrics.metrics import METRICS, value
from common.metrics.statistics import Estimate
from common.page.blocks import Text, Tone
from server.evidence.facts import RunFacts
from server.runs.results import list_sites, unite_sites

_WORDS: dict[Tone, str] = {
    "good": "better than its own model alone",
    "bad": "worse than its own model alone",
    "unsure": "these patients cannot tell it from its own model alone",
}


def judge_sites(facts: RunFacts) -> Iterator[Text]:
    """Say of each site whether the model it is left with beats its own model alone."""
    yield _tell_all(facts)
    names = sorted(list_sites(facts.results) | set(facts.told.get("withheld", {})))
    for name in names:
        evidence = facts.evidence.get(name)
        yield _judge(facts, name, evidence) if evidence else _tell(facts, name)
    if facts.evidence:
        yield Text(
            f"{len(names)} sites are compared one by one: of twenty pairs of equal models, about "
            "one would still look different.",
            "note",
        )


def find_gain(facts: RunFacts, evidence: Evidence) -> Estimate | None:
    """By how much a site's model beats its own alone, in the study's metric, if both are there."""
    wanted = (facts.own_way, "local")
    found = [pair.differences for pair in evidence.pairs if (pair.first, pair.second) == wanted]
    return found[0].get(facts.study.select) if found else None


def judge_gain(gain: Estimate, *, higher: bool) -> Tone:
    """Whether an interval lies beyond 0, on the side where the metric is better."""
    low, high = (gain.low, gain.high) if higher else (-gain.high, -gain.low)
    return "good" if low > 0 else "bad" if high < 0 else "unsure"


def _tell_all(facts: RunFacts) -> Text:
    """How each way of training does on the test patients of all sites together."""
    select = facts.study.select
    whole = unite_sites(facts.results, len(facts.study.classes))
    figures = {way: value(counts, select) for way, counts in whole.items()}
    told = [f"{way} {found:.3f}" for way, found in figures.items() if found is not None]
    if not told:
        return Text("No site tells figures of its test patients.", "unsure")
    images = _count(whole[facts.own_way])
    label = METRICS[select].label
    return Text(f"All sites together, {label} on {images} test images: {', '.join(told)}.")


def _judge(facts: RunFacts, name: str, evidence: Evidence) -> Text:
    gain, metric = find_gain(facts, evidence), METRICS[facts.study.select]
    if gain is None:
        return _tell(facts, name)
    tone = judge_gain(gain, higher=metric.higher)
    return Text(
        f"{name}: {_WORDS[tone]}. The {facts.own_way} model gains {gain.value:+.3f} "
        f"({gain.low:+.3f} to {gain.high:+.3f}) in {metric.label}, on {evidence.images} test "
        f"images of {evidence.patients} patients.",
        tone,
    )


def _tell(facts: RunFacts, name: str) -> Text:
    """What is known of a site without a comparison on the same patients."""
    counts, metric = facts.results[facts.own_way].get(name), METRICS[facts.study.select]
    figure = value(counts, facts.study.select) if counts else None
    if counts is None or figure is None:
        return Text(f"{name}: no figure; it withholds {facts.withheld(name)}.", "unsure")
    local = facts.results.get("local", {}).get(name)
    alone = value(local, facts.study.select) if local else None
    told = (
        f"{metric.label} {figure:.3f} of the {facts.own_way} model on {_count(counts)} test images"
    )
    if alone is None:
        return Text(f"{name}: {told}.", "plain" if facts.external else "unsure")
    why = f"{alone:.3f} of its own alone; how sure that is, the site does not tell"
    return Text(f"{name}: {told}, {why}.", "unsure")


def _count(counts: Counts) -> str:
    return f"about {max(counts.n, 0)}" if counts.noise else str(counts.n)
