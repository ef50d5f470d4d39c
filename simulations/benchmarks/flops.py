"""FLOPs: the number that a network asks for, and the number that this machine does a second."""

import time
from math import prod
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from common.config.study import Study
from common.model.network import assemble
from simulations.benchmarks.contenders import choose_device


def count_operations(study: Study) -> tuple[int, int]:
    """Count the FLOPs of one image: the prefix forward, the rest forward and backward."""
    network = assemble(study, study.model.weights)
    prefix, suffix, _ = network.split
    side = network.preprocess.crop
    with torch.no_grad(), _counter() as before:
        activation = prefix(torch.zeros(1, 3, side, side))
    with _counter() as after:
        trained = [p for p in suffix.parameters() if p.requires_grad]
        torch.autograd.grad(suffix(activation).sum(), trained)
    return before.get_total_flops(), after.get_total_flops()


def _counter() -> FlopCounterMode:
    # torch's own count of a grouped convolution's backward pass is too large by its groups.
    own = {torch.ops.aten.convolution_backward: _convolution_backward}
    return FlopCounterMode(display=False, custom_mapping=own)


def _convolution_backward(gradient: Any, _inputs: Any, weight: Any, *rest: Any, **_: Any) -> int:
    """Count as many as forward, for each of the two gradients that is asked for."""
    wanted = sum(rest[-1][:2])
    return int(2 * wanted * gradient[0] * prod(gradient[2:]) * prod(weight))


def measure_product(dtype: str) -> float:
    """Measure one product of large square matrices, in 10⁹ FLOP/s."""
    where = choose_device()
    side = 2048 if where.type == "cpu" else 8192
    if where.type == "cuda":  # convolutions use TF32 unless told otherwise, products do not
        torch.backends.cuda.matmul.fp32_precision = "tf32"
    one = torch.rand(side, side, device=where).to(getattr(torch, dtype))
    began = time.perf_counter()
    one @ one
    if where.type != "cpu":
        torch.accelerator.synchronize()
    return 2 * side**3 / (time.perf_counter() - began) / 1e9
