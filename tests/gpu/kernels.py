"""The GPU ops one by one: time, share of the measured roofline, torch and FlashInfer beside.

Every time is the median on cold data, of a CUDA graph's replays where the call can be recorded. The
floor of an op is its ``Cost``; ``share`` is the shortest time that the bandwidth of a copy and the
rate of a large product, measured in the same run, allow for it, over its time. ``error`` is the
relative distance of the result from torch's; a row that is wrong has no figures.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from functools import partial

import torch

from kernels.gpu import GpuOps, load
from tests.gpu import cases_attention, cases_linear, cases_rows, cases_sampling, layer
from tests.gpu.cases import Case
from tests.gpu.journal import Figures
from tests.gpu.parts import Group, Row
from tests.gpu.setting import Setting
from tests.gpu.timing import Roof, measure_roof, time_call

__all__ = ["Bench", "groups"]

PEERS = ("torch", "compiled", "flex", "flashinfer")


class Bench:
    """The ops of the device and its ceilings."""

    def __init__(self, setting: Setting) -> None:
        self.setting = setting
        self.ops: GpuOps = load(setting.device.type)

    @property
    def roof(self) -> Roof:
        """Measured when first wanted."""
        return measure_roof(self.setting)

    def ceilings(self) -> Figures:
        """The row of what all others are measured against."""
        roof = self.roof
        return {
            "GB/s": roof.bytes_per_s / 1e9,
            "TFLOP/s": roof.bf16 / 1e12,
            "timed by": f"{roof.fp8 / 1e12:.0f} TFLOP/s in e4m3",
        }

    def measure(self, make: Callable[[Setting, GpuOps], Case]) -> Figures:
        """One op at one size, and its peers."""
        torch.manual_seed(0)
        case = make(self.setting, self.ops)
        found = time_call(self.setting, case.ours)
        figures: Figures = {
            "us": found.seconds * 1e6,
            "GB/s": case.cost.bytes / found.seconds / 1e9,
            "TFLOP/s": case.cost.flops / found.seconds / 1e12,
            "share": self.roof.share(case.cost, case.rate, found.seconds),
            "timed by": found.how,
        }
        times = []
        for peer in PEERS:
            if peer not in case.peers:
                continue
            try:
                call = case.peers[peer]()
                figures |= self._compared(case, peer, call())
                peer_s = time_call(self.setting, call).seconds
            except (RuntimeError, NotImplementedError, ImportError, TypeError, ValueError) as error:
                figures[f"{peer} us"] = _why(error)
                continue
            figures[f"{peer} us"] = peer_s * 1e6
            times.append(peer_s)
        if times:
            figures["times best peer"] = min(times) / found.seconds
        return figures

    def _compared(self, case: Case, peer: str, theirs: object) -> Figures:
        """How far we are from torch. AssertionError: too far."""
        if peer != "torch" or case.result is None or not isinstance(theirs, torch.Tensor):
            return {}
        case.ours()
        ours, wanted = case.result.float(), theirs.float().reshape(case.result.shape)
        error = float((ours - wanted).norm() / wanted.norm())
        assert error <= case.tolerance, f"{error:.2e} from torch's result"
        return {"error": error}


def _why(error: Exception) -> str:
    """A peer's error on one short line."""
    return f"no: {type(error).__name__}: {' '.join(str(error).split())}"[:80]


@contextlib.contextmanager
def open_bench(setting: Setting) -> Iterator[Bench]:
    """The ops."""
    yield Bench(setting)


def groups(setting: Setting) -> list[Group]:
    """All ops; what is run by default are the 8B model's sizes that say most."""
    makers = {
        "linear": cases_linear.cases(setting),
        "attention": cases_attention.cases(setting),
        "layer": layer.cases(setting),
        "rows": cases_rows.cases(setting),
        "sampling": cases_sampling.cases(setting),
    }
    found = [Group("roof", (Row("roof", Bench.ceilings, needs_s=3),), open_bench)]
    for name, cases in makers.items():
        rows = tuple(
            Row(case, partial(_run, make), default, needs_s=4, limit_s=90)
            for case, make, default in cases
        )
        found.append(Group(name, rows, open_bench, needs_s=6))
    return found


def _run(make: Callable[[Setting, GpuOps], Case], bench: Bench) -> Figures:
    try:
        return bench.measure(make)
    finally:
        # Each size is a program of its own, which would keep its tensors.
        torch._dynamo.reset()
        bench.setting.forget()
