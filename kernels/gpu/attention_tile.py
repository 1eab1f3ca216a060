"""The inner loop of paged attention: one tile of queries over a range of a request's context.

A tile has ``ROWS`` rows: neighbouring queries, each with all the query heads that share one
key-value head, so that keys and values are read once for all of them. Row ``i`` is query
``i // GROUP`` and head ``i % GROUP``. Keys are taken ``KEYS`` positions at a time, counted from
the start of the context, with an online softmax in base 2 (arXiv:1805.02867, arXiv:2307.08691);
sums are float32. Up to the first query's position no key has to be masked, behind it all are.

Sums are closed every ``SPLIT`` positions and folded, in order, into running ones. So a context
gives the same bits if one program goes through it or if many take a split each and ``fold``
follows.

What is multiplied has one dtype: that of queries and cache if they agree, else float32; numbers in
e4m3 are widened to the queries'. Weights of the softmax are rounded to it.

Keys and values are read by rows through the block table: where a tile lies in one block its
address is found once, else by each row. Tensor descriptors (TMA) are not used: a tile that spans
blocks would take one descriptor load a block.
"""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["attend_item", "fold"]


@triton.jit
def _rows_of(
    first_token, queries, head, GROUP: tl.constexpr, Q_HEADS: tl.constexpr, ROWS: tl.constexpr
):
    """Query and place in ``[T, Hq]`` of each row, and which rows there are."""
    rows = tl.arange(0, ROWS)
    query = rows // GROUP
    # A tile holds whole queries; where GROUP does not divide ROWS the last rows stay empty.
    inside = (query < queries) & (query < ROWS // GROUP)
    place = (first_token + query).to(tl.int64) * Q_HEADS + head * GROUP + rows % GROUP
    return query, place, inside


@triton.jit
def fold(top, total, sums, tile_top, tile_total, tile_sums):
    """Add what came of a split to what came of those before it.

    Written with fused multiply-adds so that the compiler has no choice of its own.
    """
    new_top = tl.maximum(top, tile_top)
    anchor = tl.where(new_top == float("-inf"), 0.0, new_top)  # nothing seen yet
    old = tl.exp2(top - anchor)
    new = tl.exp2(tile_top - anchor)
    total = tl.fma(total, old, tile_total * new)
    sums = tl.fma(sums, tl.broadcast_to(old[:, None], sums.shape), tile_sums * new[:, None])
    return new_top, total, sums


@triton.jit
def _rows_in_cache(
    table_ptr, start, end, num_blocks,
    MASKED: tl.constexpr, KV_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr,
    BLOCK: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """Offsets of the rows of the positions from ``start`` on, for head 0."""
    keys = start + tl.arange(0, KEYS)
    if BLOCK % KEYS == 0:
        block = tl.load(table_ptr + start // BLOCK)
    elif MASKED:
        block = tl.load(table_ptr + keys // BLOCK, mask=keys < end, other=0)
    else:
        block = tl.load(table_ptr + keys // BLOCK)
    # A block that is not there is read as block 0, which holds no real data.
    block = tl.where((block >= 0) & (block < num_blocks), block, 0).to(tl.int64)
    return block * (KV_HEADS * BLOCK * HEAD_DIM) + (keys % BLOCK) * HEAD_DIM


@triton.jit
def _load_tile(
    cache_ptr, rows, keys, end,
    MASKED: tl.constexpr, HEAD_DIM: tl.constexpr, DIMS: tl.constexpr,
):  # fmt: skip
    dims = tl.arange(0, DIMS)
    at = cache_ptr + rows[:, None] + dims[None, :]
    if MASKED:
        # Zeros, not whatever lies there: a weight of 0 times a NaN would be a NaN.
        return tl.load(at, mask=(keys < end)[:, None] & (dims < HEAD_DIM)[None, :], other=0.0)
    if DIMS != HEAD_DIM:
        return tl.load(at, mask=(dims < HEAD_DIM)[None, :], other=0.0)
    return tl.load(at)


@triton.jit
def _step(
    q, top, total, sums, k_ptr, v_ptr, table_ptr, num_blocks, start, end, last_key, scale,
    MASKED: tl.constexpr, KV_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, DIMS: tl.constexpr,
    BLOCK: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """The next ``KEYS`` positions."""
    keys = start + tl.arange(0, KEYS)
    rows = _rows_in_cache(
        table_ptr, start, end, num_blocks, MASKED, KV_HEADS, HEAD_DIM, BLOCK, KEYS
    )
    k = _load_tile(k_ptr, rows, keys, end, MASKED, HEAD_DIM, DIMS).to(q.dtype)
    scores = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
    if MASKED:
        scores = tl.where(keys[None, :] <= last_key[:, None], scores, float("-inf"))
    new_top = tl.maximum(top, tl.max(scores, 1))
    anchor = new_top
    if MASKED:
        anchor = tl.where(new_top == float("-inf"), 0.0, new_top)
    weights = tl.exp2(scores - anchor[:, None])
    old = tl.exp2(top - anchor)
    total = tl.fma(total, old, tl.sum(weights, 1))
    v = _load_tile(v_ptr, rows, keys, end, MASKED, HEAD_DIM, DIMS).to(q.dtype)
    sums = tl.dot(weights.to(q.dtype), v, sums * old[:, None], input_precision="ieee")
    return new_top, total, sums


@triton.jit
def _nothing(ROWS: tl.constexpr, DIMS: tl.constexpr):
    """Largest score, sum of weights and weighted sum of no keys."""
    top = tl.full([ROWS], float("-inf"), tl.float32)
    return top, tl.zeros([ROWS], tl.float32), tl.zeros([ROWS, DIMS], tl.float32)


@triton.jit
def _steps(
    q, top, total, sums, closed_top, closed_total, closed_sums, k_ptr, v_ptr, table_ptr, num_blocks,
    begin, end, seen, last_key, scale,
    MASKED: tl.constexpr, FOLDS: tl.constexpr, KV_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr,
    DIMS: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr,
    SPLIT: tl.constexpr,
):  # fmt: skip
    """The tiles from ``begin`` up to ``end``: the open split's results, and the closed ones'."""
    for start in range(begin, end, KEYS):
        if FOLDS and start % SPLIT == 0:
            closed_top, closed_total, closed_sums = fold(
                closed_top, closed_total, closed_sums, top, total, sums
            )
            top, total, sums = _nothing(ROWS, DIMS)
        top, total, sums = _step(
            q, top, total, sums, k_ptr, v_ptr, table_ptr, num_blocks, start, seen, last_key, scale,
            MASKED, KV_HEADS, HEAD_DIM, DIMS, BLOCK, KEYS,
        )  # fmt: skip
    return top, total, sums, closed_top, closed_total, closed_sums


@triton.jit
def _attend(
    q, k_ptr, v_ptr, table_ptr, num_blocks, begin, end, first_position, last_key, scale,
    FOLDS: tl.constexpr, KV_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, DIMS: tl.constexpr,
    BLOCK: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    """Attention of ``q [ROWS, DIMS]`` over the positions ``begin .. end - 1``.

    ``begin`` is a multiple of ``SPLIT``, and that one of ``KEYS``. Row ``i`` sees the keys up to
    ``last_key[i]``, no row less than those up to ``first_position``. ``k_ptr`` and ``v_ptr`` point
    at the key-value head, ``table_ptr`` at the request's blocks; ``scale`` has log2(e) in it.

    Gives each row's largest score (base 2), sum of weights and weighted sum of values.
    """
    # Up to here, a multiple of KEYS, each row sees every key.
    clear = tl.maximum(tl.minimum(first_position + 1, end) // KEYS * KEYS, begin)
    top, total, sums = _nothing(ROWS, DIMS)
    closed_top, closed_total, closed_sums = _nothing(ROWS, DIMS)
    top, total, sums, closed_top, closed_total, closed_sums = _steps(
        q, top, total, sums, closed_top, closed_total, closed_sums, k_ptr, v_ptr, table_ptr,
        num_blocks, begin, clear, end, last_key, scale,
        False, FOLDS, KV_HEADS, HEAD_DIM, DIMS, BLOCK, ROWS, KEYS, SPLIT,
    )  # fmt: skip
    top, total, sums, closed_top, closed_total, closed_sums = _steps(
        q, top, total, sums, closed_top, closed_total, closed_sums, k_ptr, v_ptr, table_ptr,
        num_blocks, clear, end, end, last_key, scale,
        True, FOLDS, KV_HEADS, HEAD_DIM, DIMS, BLOCK, ROWS, KEYS, SPLIT,
    )  # fmt: skip
    if FOLDS:
        top, total, sums = fold(closed_top, closed_total, closed_sums, top, total, sums)
    return top, total, sums


@triton.jit
def attend_item(
    item, head, begin, q_ptr, k_ptr, v_ptr, k_scale_ptr, v_scale_ptr, tables_ptr, table_width,
    num_blocks, scale,
    SCALED: tl.constexpr, FOLDS: tl.constexpr, Q_HEADS: tl.constexpr, KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr, DIMS: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr,
    KEYS: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    """Attention of an item's queries over its positions from ``begin`` on, by one key-value head.

    ``item`` points at an item of ``attention_plan``; the pointers are those of a whole call. Gives
    each row's query, place in ``[T, Hq]`` and whether there is one, what came of it, and what its
    values are to be multiplied by.
    """
    GROUP: tl.constexpr = Q_HEADS // KV_HEADS
    request = tl.load(item).to(tl.int64)
    queries = tl.load(item + 2)
    position = tl.load(item + 3)
    query, place, inside = _rows_of(tl.load(item + 1), queries, head, GROUP, Q_HEADS, ROWS)
    dims = tl.arange(0, DIMS)
    inside_dims = inside[:, None] & (dims < HEAD_DIM)[None, :]
    at = place[:, None] * HEAD_DIM + dims[None, :]
    q = tl.load(q_ptr + at, mask=inside_dims, other=0.0)
    to_scores = scale
    to_values = 1.0
    if SCALED:
        to_scores = scale * tl.load(k_scale_ptr + head)
        to_values = tl.load(v_scale_ptr + head)
    elif q_ptr.dtype.element_ty != k_ptr.dtype.element_ty:
        q = q.to(tl.float32)
    start = head.to(tl.int64) * (BLOCK * HEAD_DIM)
    top, total, sums = _attend(
        q, k_ptr + start, v_ptr + start, tables_ptr + request * table_width, num_blocks,
        begin, tl.load(item + 5), position, position + tl.minimum(query, queries - 1), to_scores,
        FOLDS, KV_HEADS, HEAD_DIM, DIMS, BLOCK, ROWS, KEYS, SPLIT,
    )  # fmt: skip
    return query, place, inside, top, total, sums, to_values
