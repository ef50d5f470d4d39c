"""One study at several ε and without privacy, on the same holdouts."""

from collections.abc import Callable, Sequence
from pathlib import Path

from common.config.study import NoPrivacy, Private, Study
from simulations.engines.base import Engine
from simulations.studies import runner
from simulations.studies.runner import Source

RunsByEpsilon = dict[float | None, list[Path]]
"""Runs by ε, one for each seed; None is without privacy."""


def run_epsilons(
    study: Study,
    source: Source,
    folder: Path,
    *,
    epsilons: Sequence[float | None],
    seeds: Sequence[int],
    cache: Path,
    make_engine: Callable[[], Engine],
    results: bool = True,
    prefix: str = "",
) -> RunsByEpsilon:
    """Run a study at each ε, on each seed; runs that are there already are only read.

    Args:
      study: Everything but ε is the same in all runs.
      source: The source of the hospitals.
      folder: One folder in it for each ε, and in that one for each seed.
      epsilons: None is the study without privacy.
      seeds: Each draws another holdout.
      cache: The folder of prepared images.
      make_engine: Makes the engine in which the hospitals compute.
      results: Whether to show each run's test figures.
      prefix: Of the folders, where runs are not just of this study.

    Raises:
      StudyError: an ε is asked for, and the study has no mechanism.
    """
    if any(epsilons) and not isinstance(study.privacy, Private):
        raise study.error("privacy", expected="a mechanism", got="none")
    runs: RunsByEpsilon = {}
    for epsilon in epsilons:
        changed = [_change(study, epsilon, seed) for seed in seeds]
        place, title = folder / f"{prefix}{_name(epsilon)}", label_epsilon(epsilon)
        runs[epsilon] = runner.run_series(
            changed, source, place, cache, make_engine(), title=title, results=results
        )
    return runs


def _change(study: Study, epsilon: float | None, seed: int) -> Study:
    """No site fits a model to itself: that is not private."""
    privacy = study.privacy.model_copy(update={"epsilon": epsilon}) if epsilon else NoPrivacy()
    return study.model_copy(update={"privacy": privacy, "adapt": False, "seed": seed})


def _name(epsilon: float | None) -> str:
    return "no-privacy" if epsilon is None else f"epsilon-{epsilon:g}"


def label_epsilon(epsilon: float | None) -> str:
    """As tables call it."""
    return "no privacy" if epsilon is None else f"ε = {epsilon:g}"
