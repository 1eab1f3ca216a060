"""The CPU backend: C++ compiled on first use, or torch where there is no compiler."""

from __future__ import annotations

import logging
from functools import cache

import torch

from kernels.cpu import build
from kernels.cpu.fallback import TorchOps
from kernels.cpu.native import NativeOps
from kernels.interface import Ops

__all__ = ["load", "set_num_threads"]

_log = logging.getLogger(__name__)


@cache
def _native() -> NativeOps | None:
    """The compiled ops, or None, said once in the log, where they cannot be had."""
    try:
        return NativeOps(build.library())
    except (build.BuildError, OSError) as error:
        _log.warning(
            "CPU kernels are not compiled; using torch's own ops, which are slower and may give "
            "a request other tokens in another batch: %s",
            error,
        )
        return None


def load() -> Ops:
    """The best CPU ops of this machine. The first call on a machine compiles for some seconds."""
    return _native() or TorchOps()


def set_num_threads(count: int) -> None:
    """How many threads the CPU ops may use, the calling one included, in this process.

    One until this is called; a forked child starts with one again.
    """
    if count < 1:
        raise ValueError(f"the number of threads must be at least 1, got {count}")
    native = _native()
    if native is None:
        torch.set_num_threads(count)
    else:
        native.set_num_threads(count)
