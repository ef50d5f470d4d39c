"""The cost of privacy in time: an epoch of DP-SGD beside one without, on kept activations."""

import time
from collections.abc import Callable
from statistics import median

import torch
from rich.progress import track
from torch import nn

from client.features.extract import Prepared
from client.features.store import Rows
from client.privacy import dp_sgd, self_check
from client.privacy.parameters import PrivateRelease
from client.privacy.plan import PrivacyPlan, Query
from client.privacy.sampling import Patients
from client.training import trainer
from client.training.dataset import Examples
from common.config.study import Study
from common.errors import StudyError
from common.model.network import assemble
from common.support.terminal import console, table

_ROWS, _BATCH, _REPEATS = 256, 32, 3
_SIDE = 224


def show_cost(backbone: str = "resnet18", depths: tuple[str, ...] = ("head", "last:1")) -> None:
    """Print the seconds of an epoch, private and not, run in turns, and of each round's check."""
    columns = "without privacy", "with", "ratio", "check, each round"
    shown = table(backbone, *columns, left=(backbone,))
    for depth in track(depths, "privacy", console=console, disable=not console.is_terminal):
        plain, private, check = _contenders(backbone, depth)
        times = [[_seconds(each) for each in (plain, private, check)] for _ in range(_REPEATS)]
        without, with_, checked = (median(each) for each in zip(*times, strict=True))
        cells = f"{without:.3f} s", f"{with_:.3f} s", f"{with_ / without:.2f}"
        shown.add_row(depth, *cells, f"{checked:.3f} s")
    console.print(f"an epoch of {_ROWS} patients, batches of {_BATCH}, median of {_REPEATS}")
    console.print(shown)


def _contenders(
    backbone: str, depth: str
) -> tuple[Callable[[], object], Callable[[], object], Callable[[], object]]:
    """An epoch without privacy, one with it, and the check before it."""
    plan = _study(backbone, depth, private=False).train
    examples, suffix = _ready(backbone, depth, private=False)
    protected, private = _ready(backbone, depth, private=True)
    rate, steps = _BATCH / _ROWS, _ROWS // _BATCH
    one = PrivateRelease(
        mechanism="dp_sgd",
        noise_multiplier=1.0,
        sample_rate=rate,
        steps=steps,
        delta=1e-5,
        clip_norm=1.0,
    )
    privacy_plan = PrivacyPlan(queries=(Query(kind="round", release=one),), enrolled=_ROWS)
    whose = Patients.of([str(i) for i in range(_ROWS)])
    return (
        lambda: trainer.train(suffix, examples, plan, classes=2, lr=1e-3, seed=0),
        lambda: dp_sgd.train(private, protected, whose, plan, privacy_plan, lr=1e-3),
        lambda: self_check.check_rows(private, protected, privacy_plan),
    )


def _ready(backbone: str, depth: str, *, private: bool) -> tuple[Examples, nn.Module]:
    network = assemble(_study(backbone, depth, private=private), "none")
    with torch.no_grad():
        shape = network.split.prefix(torch.zeros(1, 3, _SIDE, _SIDE)).shape[1:]
    rows = torch.rand(_ROWS, *shape, generator=torch.Generator().manual_seed(0))
    prepared = Prepared(Rows([(rows, i) for i in range(_ROWS)]), 1, nn.Identity())
    return Examples(prepared, torch.arange(_ROWS) % 2), network.split.suffix


def _study(backbone: str, depth: str, *, private: bool) -> Study:
    content = {
        "name": "bench",
        "classes": ["a", "b"],
        "model": {"backbone": backbone, "weights": "none", "unfreeze": depth, "init": "zero"},
        "images": {"size": _SIDE},
        "adapt": False,
        "train": {"rounds": 1, "batch_size": _BATCH, "optimizer": "sgd"},
        "privacy": {"mechanism": "dp_sgd", "epsilon": 8.0, "delta": 1e-5},
    }
    if not private:
        content["privacy"] = {"mechanism": "none"}
    return Study.parse(content, "bench", StudyError)


def _seconds(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began
