"""What the project wants of one H200, and where in the tables it shows."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

__all__ = ["GOALS", "Goal", "Table"]

Table = Mapping[str, Mapping[str, str]]
"""``part/group/row`` -> column -> text."""


class Goal(NamedTuple):
    """A figure of one row, or its ratio to that of another row, and what it should be."""

    about: str
    row: str
    column: str
    limit: float
    at_least: bool = True
    over: str | None = None
    """The row to divide by."""
    inverse: bool = False
    """Divided the other way round: how many times faster where figures are times."""
    unit: str = ""

    def measured(self, table: Table) -> float | None:
        """The figure; None where the rows have none."""
        value = _number(table, self.row, self.column)
        if value is None or self.over is None:
            return value
        other = _number(table, self.over, self.column)
        if not other or not value:
            return None
        return other / value if self.inverse else value / other

    def is_met(self, value: float) -> bool:
        """Whether this figure is good enough."""
        return value >= self.limit if self.at_least else value <= self.limit

    @property
    def wanted(self) -> str:
        """The limit in words."""
        return f"{'≥' if self.at_least else '≤'} {self.limit:,g}{self.unit}"


def _number(table: Table, row: str, column: str) -> float | None:
    try:
        return float(table[row][column])
    except (KeyError, ValueError):
        return None


_DECODE = "kernels/attention/decode-bf16-8b-"
_READ = "kernels/attention/read-bf16-8b-1x16384-of-16384"
_FP8 = "kernels/linear/fp8-8b-gate_up-"
_STEP = "decode-1@1024"
_FULL = "decode-256@128"
GOALS = (
    Goal("decode attention, 16 requests of 8k, share of the measured bandwidth",
         f"{_DECODE}16x1-of-8192", "share", 0.92),
    Goal("decode attention, one request of 32k", f"{_DECODE}1x1-of-32768", "share", 0.85),
    Goal("attention over a prompt of 16k, bfloat16", _READ, "TFLOP/s", 620, unit=" TFLOP/s"),
    Goal("FP8 product of 4,096 rows, against torch._scaled_mm", f"{_FP8}4096", "times best peer",
         0.98, unit="×"),
    Goal("FP8 product of one row, share of the measured bandwidth", f"{_FP8}1", "share", 0.88),
    Goal("add and norm of 4,096 rows", "kernels/rows/add_rms_norm-8b-4096", "share", 0.92),
    Goal("gate of 4,096 rows", "kernels/rows/swiglu-8b-4096", "share", 0.92),
    Goal("norm, rotation and cache write of 4,096 rows",
         "kernels/rows/qk_norm_rope_write-8b-4096", "share", 0.92),
    Goal("one layer of 8B for one token, fused against unfused", "kernels/layer/fused-8b-1", "us",
         0.7, at_least=False, over="kernels/layer/unfused-8b-1", unit="×"),
    Goal("8B, one request, bfloat16", f"engine/8b-bf16/{_STEP}", "step_ms", 3.95, at_least=False,
         unit=" ms"),
    Goal("8B, one request, FP8", f"engine/8b-fp8/{_STEP}", "step_ms", 2.25, at_least=False,
         unit=" ms"),
    Goal("0.6B, one request, bfloat16", f"engine/0.6b-bf16/{_STEP}", "step_ms", 0.45,
         at_least=False, unit=" ms"),
    Goal("8B, 256 requests, bfloat16", f"engine/8b-bf16/{_FULL}", "tokens_per_s", 15_600,
         unit=" tok/s"),
    Goal("8B, 256 requests, FP8 weights and cache", f"engine/8b-fp8-kv8/{_FULL}", "tokens_per_s",
         25_000, unit=" tok/s"),
    Goal("8B, one request, FP8 against bfloat16", f"engine/8b-fp8/{_STEP}", "step_ms", 1.6,
         over=f"engine/8b-bf16/{_STEP}", inverse=True, unit="×"),
    Goal("8B, 256 requests, FP8 weights and cache against bfloat16",
         f"engine/8b-fp8-kv8/{_FULL}", "tokens_per_s", 1.5, over=f"engine/8b-bf16/{_FULL}",
         unit="×"),
    Goal("8B, memory of the weights, FP8 against bfloat16", "engine/8b-fp8/memory", "GiB", 0.58,
         at_least=False, over="engine/8b-bf16/memory", unit="×"),
    Goal("8B, memory of a cached token, FP8 against bfloat16", "engine/8b-fp8-kv8/memory",
         "KiB a token", 0.5, at_least=False, over="engine/8b-bf16/memory", unit="×"),
    Goal("8B, a prompt of 100k, bfloat16", "engine/8b-bf16/read-102400", "first_ms", 6300,
         at_least=False, unit=" ms"),
    Goal("8B, 256 requests, against the faster of transformers' ways", f"engine/8b-bf16/{_FULL}",
         "times best peer", 6.0, unit="×"),
)  # fmt: skip
