"""Did federating help, for whom, and how sure are we: one sentence for each site."""

from collections.abc import Iterator

from common.metrics.counts import Counts
from common.metrics.metrics import METRICS, value
from common.metrics.statistics import Estimate
from common.metrics.verdicts import find_pair, judge_own
from common.page.blocks import VERDICT_TONES, Text
from common.protocol.evidence import LOCAL
from server.evidence.facts import RunFacts
from server.runs.results import list_sites


def judge_sites(facts: RunFacts) -> Iterator[Text]:
    """Say of each site whether the model it is left with beats its own model alone."""
    yield _tell_all(facts)
    names = sorted(list_sites(facts.results) | set(facts.told.get("withheld", {})))
    yield from (_judge(facts, name) for name in names)
    if facts.evidence and not facts.external:
        yield Text(
            f"{len(names)} sites are compared one by one: of twenty pairs of equal models, about "
            "one would still look different.",
            "note",
        )


def list_gains(facts: RunFacts) -> list[tuple[str, Estimate | None]]:
    """By how much each site's model beats its own alone, in the study's metric, where compared."""
    pairs = {n: find_pair(found, facts.own_way, LOCAL) for n, found in facts.evidence.items()}
    return [(n, pair.differences.get(facts.study.select)) for n, pair in pairs.items() if pair]


def _tell_all(facts: RunFacts) -> Text:
    """How each way of training does on the test patients of all sites together."""
    select = facts.study.select
    whole = facts.united
    figures = {way: value(counts, select) for way, counts in whole.items()}
    told = [f"{way} {found:.3f}" for way, found in figures.items() if found is not None]
    if not told:
        return Text("No site tells figures of its test patients.", "unsure")
    images = _count(whole[facts.own_way])
    label = METRICS[select].label
    return Text(f"All sites together, {label} on {images} test images: {', '.join(told)}.")


def _judge(facts: RunFacts, name: str) -> Text:
    evidence = facts.evidence.get(name)
    if evidence and (judged := judge_own(evidence, facts.study.select)):
        verdict, told = judged
        return Text(f"{name}: {told}", VERDICT_TONES[verdict])
    return _tell(facts, name)


def _tell(facts: RunFacts, name: str) -> Text:
    """What is known of a site without a comparison on the same patients."""
    counts, metric = facts.results[facts.own_way].get(name), METRICS[facts.study.select]
    figure = value(counts, facts.study.select) if counts else None
    if counts is None or figure is None:
        return Text(f"{name}: no figure; it withholds {facts.withheld(name)}.", "unsure")
    local = facts.results.get(LOCAL, {}).get(name)
    alone = value(local, facts.study.select) if local else None
    told = f"{metric.label} {figure:.3f} of the {facts.own_way} model, {_count(counts)} test images"
    if alone is None:
        return Text(f"{name}: {told}.", "plain" if facts.external else "unsure")
    why = f"{alone:.3f} of its own alone; how sure that is, the site does not tell"
    return Text(f"{name}: {told}, {why}.", "unsure")


def _count(counts: Counts) -> str:
    return f"about {max(counts.n, 0)}" if counts.noise else str(counts.n)
