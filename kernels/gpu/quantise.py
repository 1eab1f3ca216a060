"""Activations rounded to e4m3 on the fly, with one scale for each row or for 128 of its elements.

``scale = max|x| / 448`` (1 where all is zero), ``q = e4m3(x / scale)``, to nearest, ties to even.
Floor: ``T*H*(sizeof(act) + 1)`` bytes and the scales, about ``3*T*H`` operations. A row's bits
depend on that row alone.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from kernels.gpu.cost import Cost
from kernels.gpu.rounding import LARGEST_E4M3, to_e4m3
from kernels.gpu.tuning import capability_of, config

__all__ = ["GROUP", "cost", "quantise_groups", "quantise_rows"]

GROUP = 128
"""Elements of a row that share a scale in ``quantise_groups``."""


@triton.jit
def quantise_rows_kernel(out, scales, x, width, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    largest = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, width, BLOCK):
        column = start + tl.arange(0, BLOCK)
        value = tl.load(x + row * width + column, mask=column < width, other=0.0).to(tl.float32)
        largest = tl.maximum(largest, tl.abs(value))
    top = tl.max(largest, 0)
    scale = tl.where(top > 0.0, top / LARGEST_E4M3, 1.0)
    tl.store(scales + row, scale)
    for start in range(0, width, BLOCK):
        column = start + tl.arange(0, BLOCK)
        value = tl.load(x + row * width + column, mask=column < width, other=0.0).to(tl.float32)
        tl.store(out + row * width + column, to_e4m3(value / scale), mask=column < width)


@triton.jit
def quantise_groups_kernel(
    out, scales, x, width, groups, GROUP: tl.constexpr, GROUPS: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    group = tl.program_id(1) * GROUPS + tl.arange(0, GROUPS)
    column = group[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    value = tl.load(x + row * width + column, mask=column < width, other=0.0).to(tl.float32)
    top = tl.max(tl.abs(value), 1)
    scale = tl.where(top > 0.0, top / LARGEST_E4M3, 1.0)
    tl.store(scales + row * groups + group, scale, mask=group < groups)
    tl.store(out + row * width + column, to_e4m3(value / scale[:, None]), mask=column < width)


def cost(tokens: int, width: int, act_bytes: int, *, groups: bool) -> Cost:
    """The floor of either; ``act_bytes`` is the size of an element of ``x``."""
    scales = tokens * (triton.cdiv(width, GROUP) if groups else 1)
    return Cost(tokens * width * (act_bytes + 1) + 4 * scales, 3 * tokens * width)


def quantise_rows(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """``x [T, H]`` as e4m3 ``[T, H]`` and scales float32 ``[T]``."""
    tokens, width = x.shape
    out = torch.empty(tokens, width, dtype=torch.float8_e4m3fn, device=x.device)
    scales = torch.empty(tokens, dtype=torch.float32, device=x.device)
    if tokens:
        chosen = config("quantise_rows", capability_of(x.device), H=width)
        quantise_rows_kernel[(tokens,)](out, scales, x, width, **chosen.launch)
    return out, scales


def quantise_groups(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """``x [T, H]`` as e4m3 ``[T, H]`` and scales float32 ``[T, ceil(H/128)]``."""
    tokens, width = x.shape
    groups = triton.cdiv(width, GROUP)
    out = torch.empty(tokens, width, dtype=torch.float8_e4m3fn, device=x.device)
    scales = torch.empty(tokens, groups, dtype=torch.float32, device=x.device)
    if tokens:
        chosen = config("quantise_groups", capability_of(x.device), H=width)
        grid = (tokens, triton.cdiv(groups, chosen["GROUPS"]))
        quantise_groups_kernel[grid](out, scales, x, width, groups, GROUP=GROUP, **chosen.launch)
    return out, scales
