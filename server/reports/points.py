"""The figures of rounds as points of curves, for whatever shows them beside the run folder."""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

from common.metrics.metrics import METRICS


class Point(NamedTuple):
    """One figure: the curve it is on, its round, its value."""

    tag: str
    step: int
    value: float


def list_points(
    lines: Iterable[Mapping[str, Any]], select: str, *, by_site: bool
) -> Iterator[Point]:
    """List the points of lines of `metrics.jsonl`, but for figures that nobody tells.

    Args:
      lines: Of rounds that are finished.
      select: The study's metric; the AUROC is shown beside it.
      by_site: Whether those of each site are listed, too.
    """
    for line in lines:
        if by_site or line["site"] is None:
            yield from _list_points_of(line, dict.fromkeys((select, "auroc")))


def _list_points_of(line: Mapping[str, Any], metrics: Iterable[str]) -> Iterator[Point]:
    of = f"/{line['site']}" if line["site"] else ""  # a site may itself be called overall
    loss = {f"training loss{of}": line["train_loss"]}
    figures = {f"validation {METRICS[name].label}{of}": line[name] for name in metrics}
    for step, named in ((line["round"], loss), (line["model_round"], figures)):
        for tag, figure in named.items():
            if figure is not None:
                yield Point(tag, step, figure)
