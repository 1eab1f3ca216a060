"""How long a call takes on the device, and what the device can do at most."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import torch

from kernels.fp8 import E4M3
from kernels.gpu.cost import Cost
from tests.gpu.setting import Setting

__all__ = ["Call", "Roof", "Timing", "measure_roof", "time_call"]

Call = Callable[[], object]
REPEAT_MS = 60


class Timing(NamedTuple):
    """A median."""

    seconds: float
    how: str
    """``graph``: replays of a CUDA graph; ``launches``: calls one by one; ``clock``: no GPU."""


class Roof(NamedTuple):
    """The measured ceilings."""

    bytes_per_s: float
    """Read and written by a copy."""
    bf16: float
    """Operations a second of a product in bfloat16."""
    fp8: float
    """The same in e4m3; 0 where the device cannot."""

    def share(self, cost: Cost, rate: str, seconds: float) -> float:
        """How near a time is to the shortest that these ceilings allow."""
        flops = self.fp8 if rate == "fp8" and self.fp8 else self.bf16
        return cost.seconds(self.bytes_per_s, flops) / seconds


def time_call(setting: Setting, call: Call) -> Timing:
    """The median time of a call, its data not in the L2 cache.

    On the GPU by CUDA events, of a graph's replay if the call can be recorded, so that a launch's
    cost on the processor does not count.
    """
    if setting.device.type != "cuda":
        call()
        started = time.perf_counter()
        call()
        return Timing(time.perf_counter() - started, "clock")
    from triton.testing import do_bench

    call()
    torch.cuda.synchronize()
    try:
        replay, how = _recorded(call), "graph"
    except Exception as error:
        # Whatever was being recorded is over; some peers cannot be.
        torch.cuda.synchronize()
        print(f"not recorded: {error!r}"[:200], flush=True)
        replay, how = call, "launches"
    median_ms = do_bench(replay, warmup=REPEAT_MS // 3, rep=REPEAT_MS, return_mode="median")
    return Timing(float(median_ms) / 1e3, how)


def _recorded(call: Call) -> Call:
    """The call as a CUDA graph's replay, after the warm-up on a side stream that graphs ask for."""
    new_stream: Any = torch.cuda.Stream
    side = new_stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        call()
        call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay


@cache
def measure_roof(setting: Setting) -> Roof:
    """Copy a GiB, multiply matrices of 8,192."""
    device = setting.device
    source = torch.ones(setting.size(2**30, 2**12), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    copy_s = time_call(setting, lambda: target.copy_(source)).seconds
    size = setting.size(8192, 32)
    left, right = (torch.randn(size, size, device=device).to(setting.act) for _ in range(2))
    product = torch.empty(size, size, dtype=setting.act, device=device)
    bf16_s = time_call(setting, lambda: torch.mm(left, right, out=product)).seconds
    flops = 2.0 * size**3
    return Roof(2 * source.nbytes / copy_s, flops / bf16_s, flops / _fp8_seconds(setting, size))


def _fp8_seconds(setting: Setting, size: int) -> float:
    """Of a product in e4m3 by ``torch._scaled_mm``; infinite where it cannot be had."""
    one = torch.ones((), device=setting.device)
    left, right = (torch.randn(size, size, device=setting.device).to(E4M3) for _ in range(2))
    try:
        return time_call(
            setting,
            lambda: torch._scaled_mm(
                left, right.T, one, one, out_dtype=torch.bfloat16, use_fast_accum=True
            ),
        ).seconds
    except (RuntimeError, NotImplementedError) as error:
        print(f"no product in e4m3: {error}"[:200], flush=True)
        return float("inf")
