"""The figures of a hospital's own page: a verdict, tables with intervals by patient, pictures."""

from collections.abc import Iterator

from client.reports.outcome import SiteOutcome
from common.metrics.by_patient import Evidence
from common.metrics.calibration import brier_interval, calibration
from common.metrics.counts import Counts
from common.metrics.metrics import METRICS, class_auroc, value
from common.metrics.statistics import Estimate, class_shares
from common.metrics.verdicts import Verdict, judge_own
from common.page.blocks import Block, Table, Text, Tone
from common.page.plots_of_counts import plot_confusion, plot_reliability, plot_roc
from common.support.seeds import derive

_TONES: dict[Verdict, Tone] = {"better": "good", "worse": "bad", "unsure": "unsure"}
_ALONE = (
    "The released model is not compared with one of this hospital's patients alone: none is fitted "
    "here where the study or site.yaml says adapt: false, or none trains here. After a private "
    "study, consilium-client adapt fits one; then write this page again."
)
_FEW = "Intervals are of test patients, not of training: another training would differ, too."


def judge_outcome(outcome: SiteOutcome) -> Iterator[Block]:
    """Say whether the model that this hospital is left with beats its own alone."""
    if outcome.evidence is None:
        yield Text(
            "No patient of this hospital was kept for tests: there are no figures.", "unsure"
        )
        return
    told = judge_own(outcome.evidence, outcome.prepared.study.select)
    if told is None:
        yield Text(_ALONE, "unsure")
        return
    verdict, sentence = told
    yield Text(f"{sentence[0].upper()}{sentence[1:]}", _TONES[verdict])
    yield Text(_FEW, "note")


def tabulate_ways(outcome: SiteOutcome, evidence: Evidence) -> Iterator[Block]:
    """Every way of training on the test patients, and the differences of two on the same."""
    names = list(next(iter(evidence.figures.values())))
    labels = [METRICS[name].label for name in names]
    rows = [
        [
            way,
            *(_show(evidence.figures[way][name]) for name in names),
            _figure(value(counts, "accuracy")),
            _show(brier_interval(counts)),
            _figure(found.error if (found := calibration(counts)) else None),
        ]
        for way, counts in outcome.counts.items()
    ]
    of = f"{evidence.images} test images of {evidence.patients} patients"
    heads = ("model", *labels, "accuracy", "Brier score", "ECE")
    caption = f"{of}; 95 % intervals by patient, of the Brier score by image"
    yield Table(heads, rows, caption=caption)
    pairs = [
        [
            f"{pair.first} less {pair.second}",
            *(_show(pair.differences[name], signed=True) for name in names),
            *map(str, pair.joint),
        ]
        for pair in evidence.pairs
    ]
    if pairs:
        right = ("both right", "only the first", "only the second", "neither")
        caption = f"Differences on the same {of}, and how many images each calls right"
        yield Table(("models", *labels, *right), pairs, caption=caption)


def show_classes(outcome: SiteOutcome) -> Iterator[Block]:
    """How the model that the hospital is left with calls each class."""
    study, way, counts = outcome.prepared.study, outcome.way, outcome.counts[outcome.way]
    yield _tabulate_classes(counts, study.classes, way)
    of = f"the {way} model"
    seed = derive(study.seed, outcome.prepared.site.name, "page")
    pictures = (
        plot_confusion(counts, study.classes, of),
        plot_roc(counts, study.classes, of),
        plot_reliability(counts, study.classes, of, seed=seed),
    )
    yield from (picture for picture in pictures if picture is not None)


def _tabulate_classes(counts: Counts, classes: tuple[str, ...], way: str) -> Table:
    shares = class_shares(counts)
    rows = [
        [
            name,
            str(counts.confusion[k].sum()),
            *(_show(found[k]) for found in shares.values()),
            _figure(class_auroc(counts, k)),
        ]
        for k, name in enumerate(classes)
    ]
    heads = [name.upper() if name.endswith("pv") else name for name in shares]
    caption = f"The {way} model; 95 % Wilson intervals, by image"
    return Table(("class", "images", *heads, "AUROC"), rows, caption=caption)


def _show(found: Estimate | None, *, signed: bool = False) -> str:
    if found is None:
        return "undefined"
    sign = "+" if signed else ""
    return f"{found.value:{sign}.3f} ({found.low:{sign}.3f} to {found.high:{sign}.3f})"


def _figure(number: float | None) -> str:
    return "undefined" if number is None else f"{number:.3f}"
