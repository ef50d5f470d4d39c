"""The figures of a hospital's own page: a verdict, tables with intervals by patient, pictures."""

from collections.abc import Iterator

from client.reports.outcome import SiteOutcome
from common.metrics.by_patient import Evidence
from common.metrics.calibration import brier_interval, calibration
from common.metrics.metrics import METRICS, value
from common.metrics.verdicts import judge_own
from common.page.blocks import VERDICT_TONES, Block, Table, Text
from common.page.plots_of_counts import plot_confusion, plot_reliability, plot_roc
from common.page.tables import format_estimate, format_figure, tabulate_classes
from common.support.seeds import derive

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
    yield Text(f"{sentence[0].upper()}{sentence[1:]}", VERDICT_TONES[verdict])
    yield Text(_FEW, "note")


def tabulate_ways(outcome: SiteOutcome, evidence: Evidence) -> Iterator[Block]:
    """Every way of training on the test patients, and the differences of two on the same."""
    names = list(next(iter(evidence.figures.values())))
    labels = [METRICS[name].label for name in names]
    rows = [
        [
            way,
            *(format_estimate(evidence.figures[way][name]) for name in names),
            format_figure(value(counts, "accuracy")),
            format_estimate(brier_interval(counts)),
            format_figure(found.error if (found := calibration(counts)) else None),
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
            *(format_estimate(pair.differences[name], signed=True) for name in names),
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
    of = f"the {way} model"
    yield tabulate_classes(counts, study.classes, of.capitalize())
    seed = derive(study.seed, outcome.prepared.site.name, "page")
    pictures = (
        plot_confusion(counts, study.classes, of),
        plot_roc(counts, study.classes, of),
        plot_reliability(counts, study.classes, of, seed=seed),
    )
    yield from (picture for picture in pictures if picture is not None)
