"""``out = x @ weight.T`` for few rows: the weight streams through once, 8 or 4 bits an element.

Up to 64 rows the time is that of reading the weight, so it stays in its few bits in memory and
becomes the dtype of ``x`` in registers; products are summed in float32. Numbers of 8 and 4 bits are
exact in bfloat16 and float16, so the scales are applied to sums: for a scale each row once, in the
end; for a scale each block or group to each step's partial sum (a step is one group).

Floor: ``O*H*bits/8`` bytes, the scales and ``T*(H*sizeof(act) + O*sizeof(out))``; ``2*T*H*O``
operations. INT4 with groups of 128 and bfloat16 scales has 4.125 bits an element.

A narrow weight has too few columns of tiles to keep a GPU busy, so ``H`` is cut into a fixed number
of parts (the configuration's ``SPLITS``, whatever the batch); their sums go to memory in float32
and are added from the first part to the last by a second kernel: no atomics, so the same bits on
every run. Those of a row depend on the configuration alone, which goes by ``O`` and ``H``, and on
``T`` except in the batch-invariant mode. More rows than ``BLOCK_M`` are right, too, but each
``BLOCK_M`` of them reads the weight again.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from kernels.gpu.cost import Cost
from kernels.gpu.tuning import capability_of, config
from kernels.quantised import QuantisedWeight, Scheme

__all__ = ["MAX_STREAM_ROWS", "cost", "linear_stream"]

MAX_STREAM_ROWS = 64
"""Rows up to which streaming is the faster way where there is another."""

_ROW, _GROUP, _BLOCK = 0, 1, 2
_SCALING = {
    Scheme.FP8_ROW: _ROW,
    Scheme.INT8_ROW: _ROW,
    Scheme.INT4_GROUP: _GROUP,
    Scheme.FP8_BLOCK: _BLOCK,
}


@triton.jit
def decode_e4m3(byte):
    """e4m3 in a uint8, not NaN, as float16: a shift, and 2^8 for the exponents' biases 15 and 7."""
    wide = byte.to(tl.uint16)
    bits = ((wide & 0x80) << 8) | ((wide & 0x7F) << 7)
    return bits.to(tl.float16, bitcast=True) * 256.0


@triton.jit(do_not_specialize=["tokens"])
def stream_kernel(
    out,
    x,
    weight,
    scales,
    tokens,
    features,
    width,
    steps_each,
    INT4: tl.constexpr,
    DECODE: tl.constexpr,
    SCALING: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    m = tl.program_id(2) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    split = tl.program_id(1)
    steps = tl.cdiv(width, BLOCK_K)
    PER_STEP: tl.constexpr = BLOCK_K // 2 if INT4 else BLOCK_K  # bytes
    row_bytes = width // 2 if INT4 else width
    x_rows = x + m.to(tl.int64)[:, None] * width
    w_rows = weight + n.to(tl.int64)[None, :] * row_bytes
    in_m, in_n = (m < tokens)[:, None], (n < features)[None, :]
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for step in range(split * steps_each, min((split + 1) * steps_each, steps)):
        byte = step * PER_STEP + tl.arange(0, PER_STEP)
        b = tl.load(w_rows + byte[:, None], mask=in_n & (byte < row_bytes)[:, None], other=0.0)
        if INT4:
            # Even elements meet the low halves, odd ones the high halves: nothing is interleaved.
            in_k = in_m & (byte < row_bytes)[None, :]
            even = tl.load(x_rows + 2 * byte[None, :], mask=in_k, other=0.0)
            odd = tl.load(x_rows + 2 * byte[None, :] + 1, mask=in_k, other=0.0)
            low = ((b & 0xF).to(tl.int8) - 8).to(x.dtype.element_ty)
            high = ((b >> 4).to(tl.int8) - 8).to(x.dtype.element_ty)
            part = tl.dot(even, low, input_precision="ieee")
            part = tl.dot(odd, high, part, input_precision="ieee")
        else:
            a = tl.load(x_rows + byte[None, :], mask=in_m & (byte < width)[None, :], other=0.0)
            if DECODE:
                b = decode_e4m3(b)
            part = tl.dot(a, b.to(x.dtype.element_ty), input_precision="ieee")
        if SCALING == 1:
            scale = tl.load(scales + n.to(tl.int64) * steps + step, mask=n < features)
            part = part * scale.to(tl.float32)[None, :]
        if SCALING == 2:
            scale = tl.load(scales + n // BLOCK_K * steps + step, mask=n < features)
            part = part * scale[None, :]
        total += part
    if SCALING == 0 and SPLITS == 1:
        total = total * tl.load(scales + n, mask=n < features)[None, :]
    places = out + (split.to(tl.int64) * tokens + m[:, None]) * features + n[None, :]
    tl.store(places, total.to(out.dtype.element_ty), mask=in_m & in_n)


@triton.jit(do_not_specialize=["tokens"])
def add_parts_kernel(
    out,
    parts,
    scales,
    tokens,
    features,
    SCALED: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    m = tl.program_id(0).to(tl.int64)
    n = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    for split in tl.static_range(SPLITS):
        total += tl.load(parts + (split * tokens + m) * features + n, mask=n < features)
    if SCALED:
        total = total * tl.load(scales + n, mask=n < features)
    tl.store(out + m * features + n, total.to(out.dtype.element_ty), mask=n < features)


def cost(tokens: int, weight: QuantisedWeight, act_bytes: int, out_bytes: int) -> Cost:
    """The floor of ``linear_stream``; the last two are the sizes of an element."""
    features, width = weight.out_features, weight.in_features
    moved = weight.nbytes + tokens * (width * act_bytes + features * out_bytes)
    return Cost(moved, 2 * tokens * width * features)


def linear_stream(
    out: torch.Tensor, x: torch.Tensor, weight: QuantisedWeight, *, batch_invariant: bool
) -> None:
    """``out [T, O] = x [T, H] @ dequantised(weight) [O, H].T``; ``x`` is not quantised.

    Args:
        out: any float dtype.
        x: float32, bfloat16 or float16.
        weight: in any scheme; its scale of a group may have any float dtype.
        batch_invariant: use the configuration that serves every ``T``.
    """
    tokens, width = x.shape
    features = weight.out_features
    if tokens == 0:
        return
    grouped = _SCALING[weight.scheme] != _ROW
    chosen = config(
        "linear_stream_invariant" if batch_invariant else "linear_stream",
        capability_of(x.device),
        T=0 if batch_invariant else 1 << (tokens - 1).bit_length(),
        O=features,
        H=width,
    )
    depth = weight.group_size if grouped else chosen["BLOCK_K"]
    splits, block_n = chosen["SPLITS"], chosen["BLOCK_N"]
    float8 = weight.data.dtype is torch.float8_e4m3fn
    decode = float8 and capability_of(x.device) < (8, 9)  # whose instructions know no e4m3
    sums = out
    if splits > 1:
        sums = torch.empty(splits, tokens, features, dtype=torch.float32, device=x.device)
    steps_each = triton.cdiv(triton.cdiv(width, depth), splits)
    grid = (triton.cdiv(features, block_n), splits, triton.cdiv(tokens, chosen["BLOCK_M"]))
    stream_kernel[grid](
        sums, x, weight.data.view(torch.uint8) if decode else weight.data, weight.scales,
        tokens, features, width, steps_each, INT4=weight.scheme is Scheme.INT4_GROUP,
        DECODE=decode, SCALING=_SCALING[weight.scheme], **{**chosen.launch, "BLOCK_K": depth},
    )  # fmt: skip
    if splits > 1:
        adding = config("add_parts", capability_of(x.device), O=features)
        add_parts_kernel[(tokens, triton.cdiv(features, adding["BLOCK"]))](
            out, sums, weight.scales, tokens, features,
            SCALED=not grouped, SPLITS=splits, **adding.launch,
        )  # fmt: skip
