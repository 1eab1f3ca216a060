"""``out = x @ weight.T`` where both are e4m3, for many rows: the tensor cores' 8-bit rate.

Two layouts of scales: one float32 for each row of ``x`` and of the weight, applied when a tile is
done; or, as in Qwen3's published FP8 checkpoints (DeepSeek-V3, arXiv:2412.19437), one for each
1 x 128 elements of ``x`` and each 128 x 128 of the weight, applied to each step's partial sum.

Floor: ``O*H + T*H + T*O*sizeof(out)`` bytes and the scales, ``2*T*H*O`` operations at twice the
rate of bfloat16.

Programs walk tiles as in ``kernels.gpu.linear``, and as there a row's bits depend on the
configuration, not on the batch. Hopper's tensor cores add e4m3 products in some 14 bits, so their
sum is taken to float32 after every ``BLOCK_K``, 128 elements (the same report, section 3.3).

Where the device has a tensor memory accelerator and the tensors suit it, tiles are loaded through
host descriptors, else through pointers; both give the same bits.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from kernels.gpu.cost import Cost
from kernels.gpu.linear import num_programs, tile_of
from kernels.gpu.tuning import Config, capability_of, config

try:
    from triton.tools.tensor_descriptor import TensorDescriptor
except ImportError:  # the pointers do without
    TensorDescriptor = None

__all__ = ["cost", "linear_fp8_block", "linear_fp8_row", "multiplies_e4m3"]

_BLOCK = 128


@triton.jit
def _load_tile(source, rows, first, start, limit, width, ROWS: tl.constexpr, BLOCK_K: tl.constexpr,
               DESCRIPTORS: tl.constexpr):  # fmt: skip
    """``[ROWS, BLOCK_K]`` of a matrix ``[limit, width]``, zero beyond it."""
    if DESCRIPTORS:
        tile = source.load([first, start])
    else:
        k = start + tl.arange(0, BLOCK_K)
        places = source + rows.to(tl.int64)[:, None] * width + k[None, :]
        tile = tl.load(places, mask=(rows < limit)[:, None] & (k < width)[None, :], other=0.0)
    return tile


@triton.jit(do_not_specialize=["tokens"])
def linear_fp8_kernel(
    out,
    x,
    x_scales,
    weight,
    w_scales,
    tokens,
    features,
    width,
    BLOCKWISE: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    tiles_m, tiles_n = tl.cdiv(tokens, BLOCK_M), tl.cdiv(features, BLOCK_N)
    steps = tl.cdiv(width, BLOCK_K)
    for tile in range(tl.program_id(0), tiles_m * tiles_n, tl.num_programs(0)):
        tile_m, tile_n = tile_of(tile, tiles_m, tiles_n, GROUP_M)
        m = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
        n = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
        total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for step in range(0, steps):
            start = step * BLOCK_K
            a = _load_tile(
                x, m, tile_m * BLOCK_M, start, tokens, width, BLOCK_M, BLOCK_K, DESCRIPTORS
            )
            b = _load_tile(
                weight, n, tile_n * BLOCK_N, start, features, width, BLOCK_N, BLOCK_K, DESCRIPTORS
            )
            if BLOCKWISE:  # BLOCK_K is the width of a block
                part = tl.dot(a, b.T)
                x_scale = tl.load(x_scales + m.to(tl.int64) * steps + step, mask=m < tokens)
                w_scale = tl.load(w_scales + n // BLOCK_K * steps + step, mask=n < features)
                total += part * x_scale[:, None] * w_scale[None, :]
            else:
                total = tl.dot(a, b.T, total, max_num_imprecise_acc=BLOCK_K)
        if not BLOCKWISE:
            x_scale = tl.load(x_scales + m, mask=m < tokens)
            w_scale = tl.load(w_scales + n, mask=n < features)
            total = total * x_scale[:, None] * w_scale[None, :]
        places = out + m.to(tl.int64)[:, None] * features + n[None, :]
        mask = (m < tokens)[:, None] & (n < features)[None, :]
        tl.store(places, total.to(out.dtype.element_ty), mask=mask)


def multiplies_e4m3(device: torch.device) -> bool:
    """Whether the device's tensor cores multiply e4m3 (Ada, Hopper and later)."""
    return capability_of(device) >= (8, 9)


def cost(tokens: int, width: int, features: int, out_bytes: int, *, blockwise: bool) -> Cost:
    """The floor of both products; ``out_bytes`` is the size of an element of ``out``."""
    scales = tokens + features
    if blockwise:
        steps = triton.cdiv(width, _BLOCK)
        scales = steps * (tokens + triton.cdiv(features, _BLOCK))
    moved = width * (tokens + features) + 4 * scales + tokens * features * out_bytes
    return Cost(moved, 2 * tokens * width * features)


def linear_fp8_row(
    out: torch.Tensor,
    x: torch.Tensor,
    x_scales: torch.Tensor,
    weight: torch.Tensor,
    w_scales: torch.Tensor,
    *,
    batch_invariant: bool,
) -> None:
    """``out[t, o] = x_scales[t] * w_scales[o] * sum_h x[t, h] * weight[o, h]``.

    Args:
        out: ``[T, O]`` any float dtype.
        x: ``[T, H]`` float8_e4m3fn.
        x_scales: ``[T]`` float32.
        weight: ``[O, H]`` float8_e4m3fn.
        w_scales: ``[O]`` float32.
        batch_invariant: use the one configuration that serves every ``T``.
    """
    _launch(out, x, x_scales, weight, w_scales, blockwise=False, batch_invariant=batch_invariant)


def linear_fp8_block(
    out: torch.Tensor,
    x: torch.Tensor,
    x_scales: torch.Tensor,
    weight: torch.Tensor,
    w_scales: torch.Tensor,
    *,
    batch_invariant: bool,
) -> None:
    """The same with ``x_scales [T, ceil(H/128)]`` and ``w_scales [ceil(O/128), ceil(H/128)]``."""
    _launch(out, x, x_scales, weight, w_scales, blockwise=True, batch_invariant=batch_invariant)


def _launch(
    out: torch.Tensor,
    x: torch.Tensor,
    x_scales: torch.Tensor,
    weight: torch.Tensor,
    w_scales: torch.Tensor,
    *,
    blockwise: bool,
    batch_invariant: bool,
) -> None:
    tokens, width = x.shape
    features = weight.shape[0]
    if tokens == 0:
        return
    chosen = config(
        "linear_fp8_invariant" if batch_invariant else "linear_fp8",
        capability_of(x.device),
        T=0 if batch_invariant else 1 << (tokens - 1).bit_length(),
        O=features,
        H=width,
    )
    tiles = triton.cdiv(tokens, chosen["BLOCK_M"]) * triton.cdiv(features, chosen["BLOCK_N"])
    descriptors = _suit_descriptors(x, weight)
    left, right = _described(x, weight, chosen) if descriptors else (x, weight)
    linear_fp8_kernel[(min(tiles, num_programs(x.device)),)](
        out, left, x_scales, right, w_scales, tokens, features, width,
        BLOCKWISE=blockwise, DESCRIPTORS=descriptors, **chosen.launch,
    )  # fmt: skip


def _suit_descriptors(x: torch.Tensor, weight: torch.Tensor) -> bool:
    """Whether the tensor memory accelerator may load these: Hopper and later, 16-byte strides."""
    if TensorDescriptor is None or x.device.type != "cuda" or capability_of(x.device) < (9, 0):
        return False
    return x.shape[1] % 16 == 0 and x.data_ptr() % 16 == 0 and weight.data_ptr() % 16 == 0


def _described(x: torch.Tensor, weight: torch.Tensor, chosen: Config) -> tuple[object, object]:
    depth = chosen["BLOCK_K"]
    return (
        TensorDescriptor.from_tensor(x, [chosen["BLOCK_M"], depth]),
        TensorDescriptor.from_tensor(weight, [chosen["BLOCK_N"], depth]),
    )
