"""Size: what a run costs grows with its sites, and not with its rounds."""

import multiprocessing
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor

import pytest
import torch

from simulations.benchmarks import engine_overhead

# A spawned process would begin with the peak of this one, in which other tests have run.
PROCESSES = multiprocessing.get_context("forkserver")


def test_the_table_shows_each_size(
    capsys: pytest.CaptureFixture[str], new_process: Callable[[], None]
) -> None:
    engine_overhead.show_overhead((2, 3), rounds=2)
    rows = [line.split() for line in capsys.readouterr().out.splitlines()[-2:]]
    assert [row[0] for row in rows] == ["2", "3"]
    assert all(float(cell) > 0 for row in rows for cell in row[1:5])
    assert all((row[6], row[8]) == ("s", "MB") or row[8] == "GB" for row in rows)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_thousand_hospitals_take_bounded_memory() -> None:
    with ProcessPoolExecutor(1, PROCESSES, torch.set_num_threads, (1,)) as process:
        cost = process.submit(engine_overhead.measure_run, 1000, rounds=5).result()
    assert cost.memory[-1] < 2_500_000
    assert cost.memory[-1] - cost.memory[1] < 20_000  # round after round needs nothing more
