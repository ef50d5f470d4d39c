"""Which model is released: after a solved head, the one that validates best beyond noise.

The simplest that no other beats by more than its standard error (Breiman et al. 1984): a few dozen
validation patients cannot tell one late round from another, and the best of many is a lottery.
"""

from common.config.study import Study
from common.metrics.counts import Counts
from common.metrics.metrics import METRICS, value
from common.metrics.statistics import intervals
from server.runs.run_folder import Best, Checkpoint

_DRAWS = 200
_TWO_SIDED = 2 * 1.96
"""Standard errors in a 95 % interval."""


def choose_best(study: Study, checkpoint: Checkpoint, counts: Counts) -> Best | None:
    """The best model so far: the checkpoint's own model if it beats the best before beyond noise.

    Args:
      study: Whose `select` metric counts.
      checkpoint: The model that was judged, and the best before it.
      counts: On the validation images of all sites that tell; none where none does.
    """
    best, score = checkpoint.best, value(counts, study.select)
    if score is None:
        return best
    sign = 1 if METRICS[study.select].higher else -1
    if best is not None and sign * (score - best.score) <= best.noise:
        return best
    noise = find_noise(study, counts)
    return Best(round=checkpoint.round, score=score, noise=noise, tensors=checkpoint.tensors)


def is_stalled(study: Study, checkpoint: Checkpoint) -> bool:
    """Whether `patience` models since the best, all but the last judged, were no better."""
    best, patience = checkpoint.best, study.train.patience
    return bool(best and patience and checkpoint.round - 1 - best.round >= patience)


def find_noise(study: Study, counts: Counts) -> float:
    """The standard error of the `select` metric, by bootstrap of images; 0 where it has none."""
    found = intervals(counts, [study.select], seed=study.seed, draws=_DRAWS)[study.select]
    return (found.high - found.low) / _TWO_SIDED if found else 0.0
