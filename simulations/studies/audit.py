"""An audit of ε: one study at several ε and without, with patients whom a coin decides about."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np

from common.config.study import Private, Study
from common.errors import RunError
from common.metrics.one_run import Bound, bound_epsilon
from common.support import files
from common.support.plot_style import Title
from common.support.terminal import console, table
from server.reports.titles import title_runs
from server.runs.run_folder import RunFolder
from simulations.engines.audited import AUDIT, Audited, explain_interrupted
from simulations.studies import plots
from simulations.studies.epsilons import label_epsilon, run_epsilons
from simulations.studies.pages import write_page
from simulations.studies.runner import Source

_WAYS = {"model": "the released model", "sums": "all sums"}
"""What an adversary guesses by."""
_DELTA = 1e-5
"""At which studies without privacy are bounded."""


def audit_study(
    study: Study,
    source: Source,
    folder: Path,
    *,
    epsilons: Sequence[float | None],
    seeds: Sequence[int],
    canaries: int,
    cache: Path,
) -> None:
    """Run the study at each ε, on each seed, with canaries; print and plot what gave them away.

    Coins of all seeds are counted together: each run is a mechanism of its own, and each coin is of
    one run. Runs that are there already are only read.

    Args:
      study: A study, with privacy unless only "without" is asked for.
      source: The source of the hospitals.
      folder: One folder in it for each ε, and in that one for each seed.
      epsilons: None is the study without privacy.
      seeds: Each draws another holdout.
      canaries: Of all sites of one run together.
      cache: The folder of prepared images.

    Raises:
      StudyError: an ε is asked for, and the study is not private.
    """
    delta = study.privacy.delta if isinstance(study.privacy, Private) else _DELTA
    runs = run_epsilons(
        study,
        source,
        folder,
        epsilons=epsilons,
        seeds=seeds,
        cache=cache,
        make_engine=lambda: Audited(canaries),
        results=False,
        prefix=f"{canaries}-canaries-",
    )
    console.print()
    with console.keep() as shown:
        found = {epsilon: _bound(paths, delta) for epsilon, paths in runs.items()}
        folders = [RunFolder(path) for paths in runs.values() for path in paths]
        coins = [max(b.canaries for b in by.values()) // len(seeds) for by in found.values() if by]
        above = title_runs(folders, "what attacks show of ε", coins or [0], "canaries")
        _report(found, delta, folder, above)
    title = f"{study.name}: can anybody tell who took part?"
    write_page(folder, title, shown, [("ε promised, and what attacks show", "audit.png")])
    console.print(f"run folder: {folder}, with audit.json and audit.png")


def read_audit(folder: Path) -> dict[str, float]:
    """The largest ε that an audit shows for Gaussian noise, by the label of the promised ε.

    Raises:
      RunError: there is none in this folder.
    """
    try:
        bounds = json.loads((folder / AUDIT).read_text(encoding="utf-8"))["bounds"]
        return {told: max(way["gaussian"] for way in by.values()) for told, by in bounds.items()}
    except (OSError, ValueError, LookupError, TypeError):
        remedy = "Run consilium-simulate audit, and name its --out."
        raise RunError(folder, expected="an audit", got="none", remedy=remedy) from None


def find_bound(folder: Path, study: Study) -> float:
    """The largest ε that an audit shows at a study's own ε; raises `RunError` if it has none."""
    wanted = label_epsilon(study.privacy.epsilon if isinstance(study.privacy, Private) else None)
    shown = read_audit(folder)
    if wanted not in shown:
        raise RunError(folder, expected=f"an audit at {wanted}", got=", ".join(shown))
    return shown[wanted]


def _bound(runs: Sequence[Path], delta: float) -> dict[str, Bound]:
    """The bound that each way to guess shows, of the coins of all runs and sites together."""
    if unfinished := [run for run in runs if not (run / AUDIT).exists()]:
        raise explain_interrupted(unfinished[0])
    read = [json.loads((run / AUDIT).read_text(encoding="utf-8")) for run in runs]
    sites = [site for run in read for site in run.values()]
    included = np.concatenate([np.array(site["included"], np.bool_) for site in sites])
    found = {}
    for way in _WAYS:
        # Where a site told nothing its coins count as not guessed: that it did not may be of them.
        told = [site[way] or [0.0] * len(site["included"]) for site in sites]
        if any(site[way] for site in sites):
            found[way] = bound_epsilon(np.concatenate(told), included, delta)
    if silent := sorted({name for run in read for name, site in run.items() if not site["sums"]}):
        console.print(f"told no sums that were looked at: {', '.join(silent)}", style="dim")
    return found


def _report(
    found: Mapping[float | None, Mapping[str, Bound]], delta: float, folder: Path, title: Title
) -> None:
    columns = ("guessed by", "right", "AUROC", "ε at least", "if Gaussian", "at most to be seen")
    shown = table("privacy", *columns, left=("privacy", "guessed by"))
    for epsilon, by_way in found.items():
        for way, bound in by_way.items():
            shown.add_row(
                label_epsilon(epsilon),
                _WAYS[way],
                f"{bound.right} of {bound.canaries}",
                f"{bound.auroc:.3f}",
                f"{bound.epsilon:.2f}",
                f"{bound.gaussian:.2f}",
                f"{bound.ceiling:.1f}, {bound.gaussian_ceiling:.1f}",
            )
    console.print(shown)
    console.print(_say(found, delta), style="dim")
    content = {
        label_epsilon(e): {way: asdict(bound) for way, bound in by.items()}
        for e, by in found.items()
    }
    files.write(folder / AUDIT, json.dumps({"delta": delta, "bounds": content}, indent=1))
    plots.plot_audit(
        {e: {_WAYS[way]: b.gaussian for way, b in by.items()} for e, by in found.items()},
        folder / "audit.png",
        title,
    )


def _say(found: Mapping[float | None, Mapping[str, Bound]], delta: float) -> str:
    """In words: what the bounds are, and whether one is above what was promised."""
    above = [
        f"{label_epsilon(e)} by {_WAYS[way]}"
        for e, by in found.items()
        for way, bound in by.items()
        if e is not None and max(bound.epsilon, bound.gaussian) > e
    ]
    told = (
        f"A coin decided of each canary whether he trains. ε at least: shown, each at 95 %, at δ = "
        f"{delta:g}, whatever the mechanism; if Gaussian: if the noise is. Low bounds prove "
        "nothing: another adversary may guess better, and so many coins cannot show more than the "
        "last column."
    )
    if above:
        return f"{told} ABOVE WHAT WAS PROMISED, so the promise does not hold: {', '.join(above)}."
    return f"{told} None is above the ε of its study."
