"""Attention of requests with few new tokens: bound by reading keys and values.

A persistent grid walks the decode list of ``attention_plan``: an item is a tile of queries (one
request's new tokens with all the heads that share a key-value head) over its whole context, or over
one split of it (flash-decoding, arXiv:2311.01282). What splits leave is merged by ``_merge``, in
order of position. A query's bits depend on its own request's cache up to its position only: tiles
and splits are counted from the context's start, and merging a split adds the same in any batch.

Floor: ``2*Hkv*D*sizeof(C)`` bytes for each context token of each request, ``2*Hq*D*sizeof(act)``
for each new token; ``4*Hq*D`` operations for each (query, key) pair in sight. Splits add
``2*Hq*(D + 2)*4`` bytes each, with 8 heads a group and bfloat16 about 3% at 512 positions.

FP8 caches are widened to the activations' dtype, which is exact, and multiplied there; the key's
scale goes into the scores' and the value's onto the result.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from kernels.gpu.attention_plan import ITEM, MOST_DECODED, AttentionPlan, attention_cost
from kernels.gpu.attention_tile import attend_item, fold
from kernels.gpu.cost import Cost

__all__ = ["cost", "launch_decode"]


@triton.jit(do_not_specialize=["table_width", "num_blocks"])
def _decode(
    out_ptr, q_ptr, k_ptr, v_ptr, k_scale_ptr, v_scale_ptr, tables_ptr, items_ptr, counts_ptr,
    sums_ptr, stats_ptr, table_width, num_blocks, scale,
    SCALED: tl.constexpr, Q_HEADS: tl.constexpr, KV_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr,
    DIMS: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr,
    SPLIT: tl.constexpr,
):  # fmt: skip
    dims = tl.arange(0, DIMS)
    total_work = tl.load(counts_ptr) * KV_HEADS
    for work in range(tl.program_id(0), total_work, tl.num_programs(0)):
        item = items_ptr + (work // KV_HEADS) * ITEM
        head = work % KV_HEADS
        query, place, inside, top, total, sums, to_values = attend_item(
            item, head, tl.load(item + 4), q_ptr, k_ptr, v_ptr, k_scale_ptr, v_scale_ptr,
            tables_ptr, table_width, num_blocks, scale,
            SCALED, True, Q_HEADS, KV_HEADS, HEAD_DIM, DIMS, BLOCK, ROWS, KEYS, SPLIT,
        )  # fmt: skip
        inside_dims = inside[:, None] & (dims < HEAD_DIM)[None, :]
        if tl.load(item + 7) > 0:
            slot = (tl.load(item + 6) + query).to(tl.int64) * Q_HEADS + place % Q_HEADS
            tl.store(sums_ptr + slot[:, None] * HEAD_DIM + dims[None, :], sums, mask=inside_dims)
            tl.store(stats_ptr + slot * 2, top, mask=inside)
            tl.store(stats_ptr + slot * 2 + 1, total, mask=inside)
        else:
            values = sums / total[:, None] * to_values
            at = place[:, None] * HEAD_DIM + dims[None, :]
            tl.store(out_ptr + at, values.to(out_ptr.dtype.element_ty), mask=inside_dims)


@triton.jit
def _merge(
    out_ptr, sums_ptr, stats_ptr, merges_ptr, v_scale_ptr,
    SCALED: tl.constexpr, Q_HEADS: tl.constexpr, KV_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr,
    DIMS: tl.constexpr, MOST: tl.constexpr, TOGETHER: tl.constexpr,
):  # fmt: skip
    """One head of all new tokens of a request that was cut."""
    merge = merges_ptr + tl.program_id(0) * 4
    head = tl.program_id(1)
    splits = tl.load(merge + 3)
    if splits == 0:
        return
    new = tl.load(merge + 1)
    query = tl.arange(0, MOST)
    dims = tl.arange(0, DIMS)
    inside = query < new
    inside_dims = inside[:, None] & (dims < HEAD_DIM)[None, :]
    first = tl.load(merge + 2) + query
    top = tl.full([MOST], float("-inf"), tl.float32)
    total = tl.zeros([MOST], tl.float32)
    sums = tl.zeros([MOST, DIMS], tl.float32)
    for start in range(0, splits, TOGETHER):
        for ahead in tl.static_range(TOGETHER):
            split = start + ahead
            there = split < splits
            slot = (first + split * new).to(tl.int64) * Q_HEADS + head
            at = sums_ptr + slot[:, None] * HEAD_DIM + dims[None, :]
            split_sums = tl.load(at, mask=inside_dims & there, other=0.0)
            split_top = tl.load(stats_ptr + slot * 2, mask=inside & there, other=float("-inf"))
            split_total = tl.load(stats_ptr + slot * 2 + 1, mask=inside & there, other=0.0)
            top, total, sums = fold(top, total, sums, split_top, split_total, split_sums)
    to_values = 1.0
    if SCALED:
        to_values = tl.load(v_scale_ptr + head // (Q_HEADS // KV_HEADS))
    values = sums / tl.where(inside, total, 1.0)[:, None] * to_values
    place = (tl.load(merge) + query).to(tl.int64) * Q_HEADS + head
    at = place[:, None] * HEAD_DIM + dims[None, :]
    tl.store(out_ptr + at, values.to(out_ptr.dtype.element_ty), mask=inside_dims)


def launch_decode(
    plan: AttentionPlan,
    out: torch.Tensor,
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    block_tables: torch.Tensor,
    scale: float,
    scales: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> None:
    """Attention of the requests on the plan's decode list.

    Arguments as in ``Ops.paged_attention``; ``scales`` are ``k_scale`` and ``v_scale`` of caches in
    e4m3, ``[Hkv]`` float32.
    """
    shape, tiles = plan.shape, plan.decode
    k_scale, v_scale = scales or (plan.stats, plan.stats)  # not read without scales
    heads = {
        "SCALED": scales is not None,
        "Q_HEADS": shape.q_heads,
        "KV_HEADS": shape.kv_heads,
        "HEAD_DIM": shape.head_dim,
        "DIMS": max(16, triton.next_power_of_2(shape.head_dim)),
    }
    _decode[(plan.programs,)](
        out,
        q,
        k_cache,
        v_cache,
        k_scale,
        v_scale,
        block_tables,
        plan.decode_items,
        plan.counts,
        plan.sums,
        plan.stats,
        block_tables.shape[1],
        shape.blocks,
        scale * math.log2(math.e),
        **heads,
        BLOCK=shape.block_size,
        ROWS=tiles.rows,
        KEYS=tiles.keys,
        SPLIT=tiles.split,
        num_warps=tiles.num_warps,
        num_stages=tiles.num_stages,
    )
    if shape.room > tiles.split:
        _merge[(shape.requests, shape.q_heads)](
            out,
            plan.sums,
            plan.stats,
            plan.merges,
            v_scale,
            **heads,
            MOST=MOST_DECODED,
            TOGETHER=tiles.merged_together,
            num_warps=4,
        )


def cost(
    new: Sequence[int],
    context: Sequence[int],
    q_heads: int,
    kv_heads: int,
    head_dim: int,
    act_bytes: int,
    cache_bytes: int,
) -> Cost:
    """The floor of ``launch_decode``: of those requests that are decoding."""
    mine = [n if n <= MOST_DECODED else 0 for n in new]
    return attention_cost(mine, context, q_heads, kv_heads, head_dim, act_bytes, cache_bytes)
