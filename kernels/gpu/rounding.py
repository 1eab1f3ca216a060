"""Rounding to e4m3, the 8-bit float of FP8 weights, activations and cache (arXiv:2209.05433).

No infinities, largest number 448, smallest 2^-9; here always to nearest, ties to even, and
saturating. Hopper and Ada do it in one instruction for two numbers, so there is no floor to it.
"""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["INTERPRETED", "LARGEST_E4M3", "to_e4m3"]

LARGEST_E4M3 = tl.constexpr(448.0)

# Triton's interpreter halves what it should round up to a power of two (3.6: 7.9 becomes 4), so
# there numbers are rounded by hand first; what is already an e4m3 number it converts rightly.
INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


@triton.jit
def to_e4m3(x):
    """Round float32 ``x``, which must not be NaN, to e4m3."""
    x = tl.clamp(x, -LARGEST_E4M3, LARGEST_E4M3)
    if INTERPRETED:
        bits = x.to(tl.uint32, bitcast=True)
        bits = (bits + 0x7FFFF + ((bits >> 20) & 1)) & 0xFFF00000
        coarse = (x + 24576.0) - 24576.0  # 1.5 * 2^14: the float32 step there is 2^-9
        x = tl.where(tl.abs(x) < 0.015625, coarse, bits.to(tl.float32, bitcast=True))
    return x.to(tl.float8e4nv)
