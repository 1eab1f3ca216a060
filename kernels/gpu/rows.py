"""Ops on rows: embedding, gathering, RMSNorm, also with the residual's addition and with FP8 out.

All of them are bound by memory. Floors, in bytes: ``embed`` ``T*H*(sizeof(W) + sizeof(act))``,
``gather_rows`` ``2*S*H*sizeof(act)``, ``rms_norm`` ``2*T*H*sizeof(act)``, ``add_rms_norm`` twice
that (two rows in, two out); with FP8 out a row costs ``H + 4`` instead of ``H*sizeof(act)``.
On 3.35 TB/s (H100) ``add_rms_norm`` of 64 rows of 4096 bfloat16 is 0.6 us, below a launch.

A norm holds its row in registers, several rows a program where rows are short, and sums it in one
tree whose shape depends on H alone: a row's bits depend neither on T nor on its neighbours. No
launch compiles anew for another number of rows.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from kernels.gpu.rounding import LARGEST_E4M3, to_e4m3
from kernels.gpu.tuning import capability_of, config

__all__ = ["add_rms_norm", "quantise_rows", "rms_norm", "take_rows"]


@triton.jit(do_not_specialize=["count", "table_len"])
def _take_rows(
    out_ptr, table_ptr, index_ptr, count, table_len, width, ROWS: tl.constexpr, COLS: tl.constexpr
):
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    cols = tl.program_id(1) * COLS + tl.arange(0, COLS)
    inside = (rows < count)[:, None] & (cols < width)[None, :]
    index = tl.load(index_ptr + rows, mask=rows < count, other=-1)
    known = (index >= 0) & (index < table_len)
    values = tl.load(
        table_ptr + index[:, None] * width + cols[None, :], mask=inside & known[:, None], other=0.0
    )
    tl.store(out_ptr + rows[:, None] * width + cols[None, :], values, mask=inside)


def take_rows(out: torch.Tensor, table: torch.Tensor, index: torch.Tensor) -> None:
    """``out[i] = table[index[i]]``, in the dtype of ``out``; zeros where the index is outside."""
    count, width = out.shape
    if not out.numel():
        return
    best = config("take_rows", capability_of(out.device), H=width)
    grid = (triton.cdiv(count, best["ROWS"]), triton.cdiv(width, best["COLS"]))
    _take_rows[grid](out, table, index, count, table.shape[0], width, **best.launch)


@triton.jit
def quantise_rows(y, scales_ptr, rows, count):
    """Scale each row of float32 ``y [ROWS, COLS]`` to the range of e4m3, round, keep the scales."""
    scales = tl.maximum(tl.max(tl.abs(y), axis=1), 7.888609052210118e-31) / LARGEST_E4M3  # 2^-100
    tl.store(scales_ptr + rows, scales, mask=rows < count)
    return to_e4m3(y / scales[:, None])


@triton.jit(do_not_specialize=["count"])
def _rms_norm(
    out_ptr,
    scales_ptr,
    residual_ptr,
    x_ptr,
    weight_ptr,
    count,
    width,
    eps,
    ADDS: tl.constexpr,
    QUANTISES: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    cols = tl.arange(0, COLS)
    inside = (rows < count)[:, None] & (cols < width)[None, :]
    at = rows[:, None] * width + cols[None, :]
    x = tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32)
    if ADDS:
        x += tl.load(residual_ptr + at, mask=inside, other=0.0).to(tl.float32)
        stored = x.to(residual_ptr.dtype.element_ty)
        tl.store(residual_ptr + at, stored, mask=inside)
        x = stored.to(tl.float32)  # the norm is of what was stored
    weight = tl.load(weight_ptr + cols, mask=cols < width, other=0.0).to(tl.float32)
    mean_square = tl.sum(x * x, axis=1) / width
    y = x * tl.rsqrt(mean_square + eps)[:, None] * weight[None, :]
    if QUANTISES:
        tl.store(out_ptr + at, quantise_rows(y, scales_ptr, rows, count), mask=inside)
    else:
        tl.store(out_ptr + at, y, mask=inside)


def _launch_norm(
    out: torch.Tensor,
    scales: torch.Tensor | None,
    residual: torch.Tensor | None,
    x: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
) -> None:
    count, width = x.shape
    if not x.numel():
        return
    best = config("rms_norm", capability_of(x.device), H=width)
    _rms_norm[(triton.cdiv(count, best["ROWS"]),)](
        out,
        out if scales is None else scales,
        x if residual is None else residual,
        x,
        weight,
        count,
        width,
        eps,
        ADDS=residual is not None,
        QUANTISES=scales is not None,
        COLS=triton.next_power_of_2(width),
        **best.launch,
    )


def rms_norm(
    out: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    scales: torch.Tensor | None = None,
) -> None:
    """See ``Ops.rms_norm``, and with ``scales`` ``Fp8Ops.rms_norm_fp8``."""
    _launch_norm(out, scales, None, x, weight, eps)


def add_rms_norm(
    out: torch.Tensor,
    residual: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    scales: torch.Tensor | None = None,
) -> None:
    """See ``Ops.add_rms_norm``, and with ``scales`` ``Fp8Ops.add_rms_norm_fp8``."""
    _launch_norm(out, scales, residual, x, weight, eps)
