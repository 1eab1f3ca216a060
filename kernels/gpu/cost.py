"""The least that an op can take, for benchmarks to set beside what it took.

Each op family of this package has functions ``cost(...)`` that give a ``Cost`` from shapes and
lengths alone: every byte that must cross the device's memory once, and every operation that the
formula of the op has (a multiplication and an addition count as two).
"""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["Cost"]


@dataclass(frozen=True)
class Cost:
    """A floor: ``bytes`` moved to and from device memory, and ``flops`` done."""

    bytes: int
    flops: int

    def __add__(self, other: Cost) -> Cost:
        """Of one op after the other."""
        return Cost(self.bytes + other.bytes, self.flops + other.flops)

    def seconds(self, bytes_per_s: float, flops_per_s: float) -> float:
        """The shortest time on a device of these rates (the roofline, Williams et al. 2009)."""
        return max(self.bytes / bytes_per_s, self.flops / flops_per_s)
