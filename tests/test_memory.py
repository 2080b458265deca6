"""Peak memory of a run is that run's, not what the process had taken before it."""

import ctypes
import sys

import pytest
import torch

from deltavit.train.memory import forget_peak, peak_memory

CPU = torch.device("cpu")


@pytest.mark.skipif(sys.platform != "linux" or not hasattr(ctypes.CDLL(None), "malloc_trim"), reason="glibc alone")
def test_what_was_freed_before_does_not_count_again():
    forget_peak(CPU)
    before = peak_memory(CPU)
    pieces = [torch.ones(20_000) for _ in range(5_000)]  # 80 KB each, which an allocator keeps
    last = pieces[-1]  # on top of the heap
    del pieces
    assert peak_memory(CPU) > before + 350e6
    forget_peak(CPU)
    assert peak_memory(CPU) < before + 100e6
    del last
