"""The study says what every site computes in; the site says on how many cores."""

import pytest
import torch

from client.features.precision import chosen, computes, settled

pytestmark = pytest.mark.numbers


def test_a_round_computes_on_as_many_threads_as_it_is_to():
    torch.set_num_threads(2)
    try:
        with settled(threads=3):
            assert torch.get_num_threads() == 3
            assert torch.backends.cudnn.enabled
            assert torch.backends.cudnn.deterministic
            assert not torch.backends.cudnn.allow_tf32
        with pytest.raises(KeyboardInterrupt), settled(threads=1):
            raise KeyboardInterrupt
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(1)


def test_every_cpu_computes_in_both():
    for dtype in ("float32", "bfloat16"):
        assert computes(dtype, chosen("cpu"))
    assert not computes("bfloat16", chosen("mps"))
    assert computes("float32", chosen("mps"))
