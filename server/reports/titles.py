"""What stands above a picture, so that nobody takes it for one of another run."""

from collections.abc import Sequence
from statistics import mean

from common.support.plot_style import Title
from server.runs.run_folder import RunFolder

_MOST_SEEDS = 10


def title_run(run: RunFolder, what: str, released: int, images: str) -> Title:
    """The title of a picture of one run.

    Args:
      run: The run.
      what: What the picture shows.
      released: The number of rounds of the model that was released.
      images: How many images of which kind the figures are of, in words.
    """
    rounds = run.study.train.rounds
    model = f"the model of round {released} of {rounds}" if released else "the solved head"
    parts = [f"released: {model}", images, f"seed {run.study.seed}"]
    return Title(f"{run.study.name}: {what}", _join([*parts, find_date(run)]))


def title_runs(
    runs: Sequence[RunFolder], what: str, images: Sequence[int], kind: str = "test images"
) -> Title:
    """The title of a picture of several runs of one study.

    Args:
      runs: The runs, each of another seed or setting.
      what: What the picture shows.
      images: How many of them each run's figures are of.
      kind: What is counted.
    """
    seeds = sorted({run.study.seed for run in runs})
    few = len(seeds) <= _MOST_SEEDS
    told = ", ".join(map(str, seeds)) if few else f"{seeds[0]} to {seeds[-1]}, {len(seeds)} of them"
    parts = ["released models", f"{mean(images):.0f} {kind} a run", f"seeds {told}"]
    return Title(f"{runs[0].study.name}: {what}", _join([*parts, find_date(runs[-1])]))


def count_validation(run: RunFolder) -> int:
    """How many validation images the sites tell of that tell their number."""
    told = [site["images"]["validation"] for site in run.read_facts()["sites"].values()]
    return sum(sum(classes or ()) for classes in told)


def find_date(run: RunFolder) -> str:
    """The day when a run ended, by UTC; nothing where it is not noted."""
    ends = [line["time"] for line in run.read_journal() if line["what"] == "finished"]
    return str(ends[-1][:10]) if ends else ""


def _join(parts: Sequence[str]) -> str:
    return " · ".join(filter(None, parts))
