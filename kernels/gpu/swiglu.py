"""SwiGLU, also with FP8 out.

Bound by memory: ``3*T*I*sizeof(act)`` bytes, with FP8 out ``T*(2*I*sizeof(act) + I + 4)``.
Element by element, so a row's bits depend on nothing else; the FP8 scale is a maximum, which has
no order.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from kernels.gpu.rows import quantise_rows
from kernels.gpu.tuning import capability_of, config

__all__ = ["swiglu"]


@triton.jit(do_not_specialize=["count"])
def _swiglu(
    out_ptr,
    scales_ptr,
    gate_up_ptr,
    count,
    width,
    QUANTISES: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    cols = tl.program_id(1) * COLS + tl.arange(0, COLS)
    inside = (rows < count)[:, None] & (cols < width)[None, :]
    at = rows[:, None] * (2 * width) + cols[None, :]
    gate = tl.load(gate_up_ptr + at, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(gate_up_ptr + at + width, mask=inside, other=0.0).to(tl.float32)
    y = gate * tl.sigmoid(gate) * up
    to = out_ptr + rows[:, None] * width + cols[None, :]
    if QUANTISES:
        tl.store(to, quantise_rows(y, scales_ptr, rows, count), mask=inside)
    else:
        tl.store(to, y, mask=inside)


def swiglu(out: torch.Tensor, gate_up: torch.Tensor, scales: torch.Tensor | None = None) -> None:
    """See ``Ops.swiglu``, and with ``scales`` ``Fp8Ops.swiglu_fp8``."""
    count, width = out.shape
    if not out.numel():
        return
    capability = capability_of(out.device)
    if scales is None:
        best = config("swiglu", capability, I=width)
        cols = best["COLS"]
        launch = best.launch
    else:  # the scale needs the whole row
        best = config("swiglu_fp8", capability, I=width)
        cols = triton.next_power_of_2(width)
        launch = {**best.launch, "COLS": cols}
    grid = (triton.cdiv(count, best["ROWS"]), triton.cdiv(width, cols))
    _swiglu[grid](
        out,
        out if scales is None else scales,
        gate_up,
        count,
        width,
        QUANTISES=scales is not None,
        **launch,
    )
