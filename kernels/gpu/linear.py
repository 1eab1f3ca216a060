"""``out = x @ weight.T`` with weights in float32, bfloat16 or float16.

Floor: ``O*H*sizeof(W) + T*(H*sizeof(act) + O*sizeof(out))`` bytes, ``2*T*H*O`` operations.

A fixed number of programs, one for each multiprocessor, walk the tiles of ``out``; tiles that share
rows of ``x`` and of the weight are near in time, so that they meet in the L2 cache. Each element is
one sum over ``H``, in tiles of ``BLOCK_K`` from the first to the last and in float32. Its order
depends on the configuration alone: within one, a row has the same bits in any batch. The
batch-invariant mode is one configuration for every ``T``; otherwise they go by ``T``.
"""

from __future__ import annotations

from functools import cache

import torch
import triton
import triton.language as tl

from kernels.gpu.cost import Cost
from kernels.gpu.tuning import capability_of, config

__all__ = ["cost", "linear", "num_programs", "tile_of"]

_INTERPRETED_PROGRAMS = 3  # fewer than most tests have tiles, so that programs walk several

_TRITON = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


@triton.jit
def tile_of(index, tiles_m, tiles_n, GROUP_M: tl.constexpr):
    """Row and column of a tile: ``GROUP_M`` rows of tiles are walked column by column."""
    group = GROUP_M * tiles_n
    first = index // group * GROUP_M
    rows = min(tiles_m - first, GROUP_M)
    return first + index % group % rows, index % group // rows


@triton.jit(do_not_specialize=["tokens"])
def linear_kernel(
    out,
    x,
    weight,
    tokens,
    features,
    width,
    COMPUTE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    tiles_m, tiles_n = tl.cdiv(tokens, BLOCK_M), tl.cdiv(features, BLOCK_N)
    for tile in range(tl.program_id(0), tiles_m * tiles_n, tl.num_programs(0)):
        tile_m, tile_n = tile_of(tile, tiles_m, tiles_n, GROUP_M)
        m = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
        n = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
        x_rows = x + m.to(tl.int64)[:, None] * width  # [M, 1]
        w_rows = weight + n.to(tl.int64)[None, :] * width  # [1, N]
        total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for start in range(0, width, BLOCK_K):
            k = start + tl.arange(0, BLOCK_K)
            a = tl.load(
                x_rows + k[None, :], mask=(m < tokens)[:, None] & (k < width)[None, :], other=0.0
            )
            b = tl.load(
                w_rows + k[:, None], mask=(n < features)[None, :] & (k < width)[:, None], other=0.0
            )
            total = tl.dot(a.to(COMPUTE), b.to(COMPUTE), total, input_precision="ieee")
        places = out + m.to(tl.int64)[:, None] * features + n[None, :]
        mask = (m < tokens)[:, None] & (n < features)[None, :]
        tl.store(places, total.to(out.dtype.element_ty), mask=mask)


@cache
def num_programs(device: torch.device) -> int:
    """Programs of a persistent kernel: the device's multiprocessors."""
    if device.type != "cuda":
        return _INTERPRETED_PROGRAMS
    return torch.cuda.get_device_properties(device).multi_processor_count


def cost(
    tokens: int, width: int, features: int, act_bytes: int, weight_bytes: int, out_bytes: int
) -> Cost:
    """The floor of ``linear``; the last three are the sizes of an element."""
    moved = features * width * weight_bytes + tokens * (width * act_bytes + features * out_bytes)
    return Cost(moved, 2 * tokens * width * features)


def linear(
    out: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, *, batch_invariant: bool
) -> None:
    """``out [T, O] = x [T, H] @ weight [O, H].T``.

    Where ``x`` and ``weight`` differ in dtype, both are multiplied as float32.

    Args:
        out: any float dtype.
        x: float32, bfloat16 or float16.
        weight: the same, independently.
        batch_invariant: use the one configuration that serves every ``T``.
    """
    tokens, width = x.shape
    features = weight.shape[0]
    if tokens == 0:
        return
    compute = x.dtype if x.dtype is weight.dtype else torch.float32
    op = "linear_float32" if compute is torch.float32 else "linear"
    chosen = config(
        f"{op}_invariant" if batch_invariant else op,
        capability_of(x.device),
        T=0 if batch_invariant else 1 << (tokens - 1).bit_length(),
        O=features,
        H=width,
    )
    tiles = triton.cdiv(tokens, chosen["BLOCK_M"]) * triton.cdiv(features, chosen["BLOCK_N"])
    linear_kernel[(min(tiles, num_programs(x.device)),)](
        out, x, weight, tokens, features, width, COMPUTE=_TRITON[compute], **chosen.launch
    )
