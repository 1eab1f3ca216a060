"""Attention of requests with many new tokens: bound by products.

A program takes one tile of the prefill list of ``attention_plan``, which has the longest first, so
that the last to be started are short. A tile holds ``ROWS / group`` neighbouring queries with all
the heads of one key-value head: keys and values are read once for them, and only the last few tiles
of keys, ``queries + KEYS`` positions at most, need a mask (FlashAttention-2, arXiv:2307.08691).
A program whose number is beyond the list ends at once; there are at most ``T / queries + T / 9``
tiles a key-value head, whatever the lengths.

A query's bits depend on its own request's cache up to its position only, however its prompt is
cut, as long as no piece has ``MOST_DECODED`` tokens or fewer: those go to ``attention_decode``,
whose sums are closed at each split. With the plan's ``folds`` they are here too, which costs
registers for a second set of sums; then, with the same tiles in both kernels, both give a query the
same bits.

A context is not split: a short chunk over a long one keeps few processors busy.

Floor: as ``attention_decode``, and here the operations count: ``4*Hq*D`` for each (query, key) pair
in sight.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from kernels.gpu.attention_plan import ITEM, MOST_DECODED, AttentionPlan, attention_cost
from kernels.gpu.attention_tile import attend_item
from kernels.gpu.cost import Cost

__all__ = ["cost", "launch_prefill"]


@triton.jit(do_not_specialize=["table_width", "num_blocks"])
def _prefill(
    out_ptr, q_ptr, k_ptr, v_ptr, k_scale_ptr, v_scale_ptr, tables_ptr, items_ptr, counts_ptr,
    table_width, num_blocks, scale,
    SCALED: tl.constexpr, FOLDS: tl.constexpr, Q_HEADS: tl.constexpr, KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr, DIMS: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr,
    KEYS: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    work = tl.program_id(0)
    if work >= tl.load(counts_ptr + 1) * KV_HEADS:
        return
    item = items_ptr + (work // KV_HEADS) * ITEM
    head = work % KV_HEADS
    _, place, inside, _, total, sums, to_values = attend_item(
        item, head, 0, q_ptr, k_ptr, v_ptr, k_scale_ptr, v_scale_ptr,
        tables_ptr, table_width, num_blocks, scale,
        SCALED, FOLDS, Q_HEADS, KV_HEADS, HEAD_DIM, DIMS, BLOCK, ROWS, KEYS, SPLIT,
    )  # fmt: skip
    dims = tl.arange(0, DIMS)
    inside_dims = inside[:, None] & (dims < HEAD_DIM)[None, :]
    at = place[:, None] * HEAD_DIM + dims[None, :]
    values = sums / total[:, None] * to_values
    tl.store(out_ptr + at, values.to(out_ptr.dtype.element_ty), mask=inside_dims)


def launch_prefill(
    plan: AttentionPlan,
    out: torch.Tensor,
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    block_tables: torch.Tensor,
    scale: float,
    scales: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> None:
    """Attention of the requests on the plan's prefill list; arguments as ``launch_decode``'s."""
    shape, tiles = plan.shape, plan.prefill
    most = plan.prefill_items.shape[0]
    if not most:
        return
    k_scale, v_scale = scales or (plan.stats, plan.stats)  # not read without scales
    _prefill[(most * shape.kv_heads,)](
        out,
        q,
        k_cache,
        v_cache,
        k_scale,
        v_scale,
        block_tables,
        plan.prefill_items,
        plan.counts,
        block_tables.shape[1],
        shape.blocks,
        scale * math.log2(math.e),
        SCALED=scales is not None,
        FOLDS=plan.folds,
        Q_HEADS=shape.q_heads,
        KV_HEADS=shape.kv_heads,
        HEAD_DIM=shape.head_dim,
        DIMS=max(16, triton.next_power_of_2(shape.head_dim)),
        BLOCK=shape.block_size,
        ROWS=tiles.rows,
        KEYS=tiles.keys,
        SPLIT=tiles.split,
        num_warps=tiles.num_warps,
        num_stages=tiles.num_stages,
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
    """The floor of ``launch_prefill``: of those requests that are not decoding."""
    mine = [n if n > MOST_DECODED else 0 for n in new]
    return attention_cost(mine, context, q_heads, kv_heads, head_dim, act_bytes, cache_bytes)
