"""Norm and rotation of query and key heads, and the write into the paged cache, in one pass.

A program takes a group of neighbouring heads of one token's ``qkv`` row, holds their halves apart
(the rotation pairs element ``i`` with ``i + D/2``) and stores each head where it belongs.

Bound by memory: reads ``T*(Hq+2*Hkv)*D*sizeof(act)``, writes ``T*Hq*D*sizeof(act)`` and
``2*T*Hkv*D*sizeof(C)`` bytes. A head's sum runs in one tree that depends on D alone.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from kernels.gpu.rounding import to_e4m3
from kernels.gpu.tuning import capability_of, config

__all__ = ["qk_norm_rope_write"]


@triton.jit
def _qk_norm_rope_write(
    q_out_ptr,
    qkv_ptr,
    q_weight_ptr,
    k_weight_ptr,
    cos_sin_ptr,
    positions_ptr,
    slots_ptr,
    k_cache_ptr,
    v_cache_ptr,
    k_scale_ptr,
    v_scale_ptr,
    q_heads,
    kv_heads,
    table_len,
    num_slots,
    block_size,
    eps,
    HEAD_DIM: tl.constexpr,
    HALF: tl.constexpr,
    QUANTISES: tl.constexpr,
    HEADS: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    heads = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    dims = tl.arange(0, HALF)
    half = HEAD_DIM // 2
    known = dims < half
    all_heads = q_heads + 2 * kv_heads
    inside = (heads < all_heads)[:, None] & known[None, :]
    at = (token * all_heads + heads)[:, None] * HEAD_DIM + dims[None, :]
    first = tl.load(qkv_ptr + at, mask=inside, other=0.0).to(tl.float32)
    second = tl.load(qkv_ptr + at + half, mask=inside, other=0.0).to(tl.float32)

    is_query = heads < q_heads
    is_key = (heads >= q_heads) & (heads < q_heads + kv_heads)
    is_value = (heads >= q_heads + kv_heads) & (heads < all_heads)

    position = tl.load(positions_ptr + token)
    seen = known & (position >= 0) & (position < table_len)
    cos = tl.load(cos_sin_ptr + position * HEAD_DIM + dims, mask=seen, other=0.0)[None, :]
    sin = tl.load(cos_sin_ptr + position * HEAD_DIM + half + dims, mask=seen, other=0.0)[None, :]
    q_first = tl.load(q_weight_ptr + dims, mask=known, other=0.0).to(tl.float32)
    q_second = tl.load(q_weight_ptr + half + dims, mask=known, other=0.0).to(tl.float32)
    k_first = tl.load(k_weight_ptr + dims, mask=known, other=0.0).to(tl.float32)
    k_second = tl.load(k_weight_ptr + half + dims, mask=known, other=0.0).to(tl.float32)

    mean_square = (tl.sum(first * first, axis=1) + tl.sum(second * second, axis=1)) / HEAD_DIM
    inverse = tl.rsqrt(mean_square + eps)[:, None]
    of_query = is_query[:, None]
    normed_first = first * inverse * tl.where(of_query, q_first[None, :], k_first[None, :])
    normed_second = second * inverse * tl.where(of_query, q_second[None, :], k_second[None, :])
    turned_first = normed_first * cos - normed_second * sin
    turned_second = normed_second * cos + normed_first * sin

    to = q_out_ptr + (token * q_heads + heads)[:, None] * HEAD_DIM + dims[None, :]
    tl.store(to, turned_first, mask=inside & of_query)
    tl.store(to + half, turned_second, mask=inside & of_query)

    slot = tl.load(slots_ptr + token)
    writes = (slot >= 0) & (slot < num_slots)
    # int64 throughout: a cache may have more than 2^31 elements.
    block = slot // block_size
    offset = slot - block * block_size
    key_head = heads - q_heads
    value_head = key_head - kv_heads
    if QUANTISES:
        k_scale = tl.load(k_scale_ptr + key_head, mask=is_key, other=1.0)[:, None]
        v_scale = tl.load(v_scale_ptr + value_head, mask=is_value, other=1.0)[:, None]
        turned_first = to_e4m3(turned_first / k_scale)
        turned_second = to_e4m3(turned_second / k_scale)
        first = to_e4m3(first / v_scale)
        second = to_e4m3(second / v_scale)
    k_at = ((block * kv_heads + key_head) * block_size + offset)[:, None] * HEAD_DIM + dims[None, :]
    k_mask = inside & is_key[:, None] & writes
    tl.store(k_cache_ptr + k_at, turned_first, mask=k_mask)
    tl.store(k_cache_ptr + k_at + half, turned_second, mask=k_mask)
    v_row = (block * kv_heads + value_head) * block_size + offset
    v_at = v_row[:, None] * HEAD_DIM + dims[None, :]
    v_mask = inside & is_value[:, None] & writes
    tl.store(v_cache_ptr + v_at, first, mask=v_mask)
    tl.store(v_cache_ptr + v_at + half, second, mask=v_mask)


def qk_norm_rope_write(
    q_out: torch.Tensor,
    qkv: torch.Tensor,
    q_weight: torch.Tensor,
    k_weight: torch.Tensor,
    cos_sin: torch.Tensor,
    positions: torch.Tensor,
    slots: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    eps: float,
    scales: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> None:
    """See ``Ops.qk_norm_rope_write``, and with scales (of keys, of values) ``Fp8Ops``' own."""
    tokens, q_heads, head_dim = q_out.shape
    blocks, kv_heads, block_size, _ = k_cache.shape
    if not tokens:
        return
    best = config("qk_norm_rope_write", capability_of(q_out.device), D=head_dim)
    k_scale, v_scale = (cos_sin, cos_sin) if scales is None else scales
    _qk_norm_rope_write[(tokens, triton.cdiv(q_heads + 2 * kv_heads, best["HEADS"]))](
        q_out,
        qkv,
        q_weight,
        k_weight,
        cos_sin,
        positions,
        slots,
        k_cache,
        v_cache,
        k_scale,
        v_scale,
        q_heads,
        kv_heads,
        cos_sin.shape[0],
        blocks * block_size,
        block_size,
        eps,
        HEAD_DIM=head_dim,
        HALF=triton.next_power_of_2(head_dim // 2),
        QUANTISES=scales is not None,
        **best.launch,
    )
