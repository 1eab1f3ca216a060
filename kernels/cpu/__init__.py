"""The CPU backend: C++ compiled on first use, or torch where there is no compiler."""

from __future__ import annotations

from functools import cache

import torch

from kernels.cpu.fallback import TorchOps
from kernels.interface import Ops

__all__ = ["load", "set_num_threads"]


@cache
def load() -> Ops:
    """The best CPU ops of this machine; the same object on every call."""
    return TorchOps()


def set_num_threads(count: int) -> None:
    """How many threads the CPU ops may use, the calling one included, in this process."""
    if count < 1:
        raise ValueError(f"the number of threads must be at least 1, got {count}")
    torch.set_num_threads(count)
