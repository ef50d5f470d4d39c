"""Tables of what one model did, and how numbers stand in a table."""

from collections.abc import Sequence

from common.metrics.counts import Counts
from common.metrics.metrics import SHARE_LABELS, average_precision, class_auroc
from common.metrics.statistics import Estimate, class_shares
from common.page.blocks import Table

MISSING = "no figure"
"""What stands where a number is withheld, or not defined."""


def tabulate_classes(counts: Counts, classes: Sequence[str], of: str) -> Table:
    """How a model calls each class, with Wilson's intervals by image.

    Args:
      counts: Of the model on test images.
      classes: Their names.
      of: The model and the images, in words.
    """
    shares = class_shares(counts)
    rows = [
        [
            name,
            str(counts.confusion[k].sum()),
            *(format_estimate(found[k]) for found in shares.values()),
            format_figure(class_auroc(counts, k)),
            format_figure(average_precision(counts, k)),
        ]
        for k, name in enumerate(classes)
    ]
    heads = [SHARE_LABELS.get(name, name) for name in shares]
    caption = f"{of}; 95 % Wilson intervals, by image"
    return Table(("class", "images", *heads, "AUROC", "AP"), rows, caption=caption)


def format_estimate(found: Estimate | None, *, signed: bool = False) -> str:
    """Format a value with its interval, to three places."""
    if found is None:
        return MISSING
    sign = "+" if signed else ""
    return f"{found.value:{sign}.3f} ({found.low:{sign}.3f} to {found.high:{sign}.3f})"


def format_figure(number: float | None) -> str:
    """Format a number to three places."""
    return MISSING if number is None else f"{number:.3f}"
