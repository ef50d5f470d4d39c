"""The study says what every site computes in; the site says on how many cores."""

import pytest
import torch

from client.features.precision import can_compute, choose_device, fix_numerics

pytestmark = pytest.mark.numbers


def test_a_round_computes_on_as_many_threads_as_it_is_to():
    torch.set_num_threads(2)
    try:
        with fix_numerics(threads=3):
            assert torch.get_num_threads() == 3
            assert torch.backends.cudnn.enabled
            assert torch.backends.cudnn.deterministic
            assert not torch.backends.cudnn.allow_tf32
        with pytest.raises(KeyboardInterrupt), fix_numerics(threads=1):
            raise KeyboardInterrupt
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(1)


def test_every_cpu_computes_in_both():
    for dtype in ("float32", "bfloat16"):
        assert can_compute(dtype, choose_device("cpu"))
    assert not can_compute("bfloat16", choose_device("mps"))
    assert can_compute("float32", choose_device("mps"))
