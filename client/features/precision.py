"""What numbers are computed in, and how: settings alone, so that equal ones give equal numbers."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from common.config.study import Dtype


def choose_device(wanted: str) -> torch.device:
    """The device that a site file names; `auto` is an accelerator, if there is one."""
    if wanted != "auto":
        return torch.device(wanted)
    if torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def can_compute(dtype: Dtype, device: torch.device) -> bool:
    """Whether the device computes in this type; a CPU without units for it does so slowly."""
    if dtype == "float32" or device.type == "cpu":
        return True  # on mps too little of bfloat16 is implemented
    return device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)


def autocast(dtype: Dtype, device: torch.device) -> torch.autocast:
    """Automatic mixed precision where `dtype` is not float32."""
    return torch.autocast(device.type, torch.bfloat16, enabled=dtype != "float32")


@contextmanager
def fix_numerics(threads: int) -> Iterator[None]:
    """Compute on so many cores whatever this process may use, and on a GPU by fixed kernels.

    How a sum is split among threads decides its last digits, even where an elementwise function
    is computed by another routine. On a GPU float32 is float32: TF32 would keep ten bits of it.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with torch.backends.cudnn.flags(enabled=True, deterministic=True, allow_tf32=False):
            yield
    finally:
        torch.set_num_threads(before)
