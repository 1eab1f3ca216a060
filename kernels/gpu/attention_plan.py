"""The work lists of a step's attention, made on the device once for all layers.

Lengths lie on the device and grids must not depend on them, so someone has to find out there which
program does what. A scan over the requests in every program of every layer would cost each of them
a microsecond or two before its first load; here one small launch a step writes lists, and a
program's search is one load of an item (32 bytes).

* Requests with at most ``MOST_DECODED`` new tokens go to ``attention_decode``. One long against an
  equal share of all the work is cut into splits of a fixed number of positions, which go to
  different programs and are merged after; the others are one item, longest first. Since a split's
  bits and the order of merging are the same either way (see ``attention_tile``), this choice may
  look at the batch without the result doing so.
* The others are cut into tiles of queries for ``attention_prefill``, those that end last first.

Splits leave partial results in ``slots`` of ``Hq * (D + 2)`` float32 each: one for a new token
and a split, so ``cached tokens / SPLIT + R`` of them for one new token a request. When requests
that share a prefix have more, those without a slot go uncut: slower, with the same result.

The lists' lengths, the capacity of slots and all grids follow from shapes. Kernels read nothing of
``query_starts`` and ``context_lens`` but through the plan, which cuts what is out of range.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from kernels.gpu.cost import Cost
from kernels.gpu.workspace import Workspace

__all__ = [
    "ITEM",
    "MOST_DECODED",
    "AttentionPlan",
    "AttentionShape",
    "Tiles",
    "attention_cost",
    "plan_attention",
]

MOST_DECODED = 8
"""New tokens up to which a request is decoding (or verifying a draft)."""

ITEM = tl.constexpr(8)
"""Numbers in an item: request, first token, queries, first position, begin, end, slot, partial."""

_CHUNK = 16


@dataclass(frozen=True)
class Tiles:
    """How a kernel cuts its work; a row's bits depend on these, and on nothing else but itself.

    Attributes:
        rows: rows of a tile of queries, a power of two from 16.
        keys: positions of a tile of keys, a power of two from 16.
        split: positions after which sums are closed, a multiple of ``keys``.
        num_warps: warps of a program.
        num_stages: stages of its pipeline.
        programs_per_processor: programs of a persistent grid for each multiprocessor.
        merged_together: splits loaded before the first of them is merged; no result depends on it.
    """

    rows: int
    keys: int
    split: int
    num_warps: int
    num_stages: int
    programs_per_processor: int
    merged_together: int

    def queries(self, group: int) -> int:
        """Whole queries in a tile, each with ``group`` heads."""
        return self.rows // group


@dataclass(frozen=True)
class AttentionShape:
    """What is known of a call without looking at the device.

    Attributes:
        tokens: new tokens, T.
        requests: R.
        room: positions that a line of the block table has room for.
        q_heads: Hq.
        kv_heads: Hkv.
        head_dim: D.
        blocks: blocks of the cache, N.
        block_size: B.
        most_new: no request has more new tokens than this.
    """

    tokens: int
    requests: int
    room: int
    q_heads: int
    kv_heads: int
    head_dim: int
    blocks: int
    block_size: int
    most_new: int

    @classmethod
    def of(
        cls,
        q: torch.Tensor,
        k_cache: torch.Tensor,
        block_tables: torch.Tensor,
        most_new: int | None = None,
    ) -> AttentionShape:
        """Of a call with these tensors; without ``most_new`` a request may have all T tokens."""
        tokens, q_heads, head_dim = q.shape
        blocks, kv_heads, block_size, _ = k_cache.shape
        requests, width = block_tables.shape
        return cls(
            tokens=tokens,
            requests=requests,
            room=width * block_size,
            q_heads=q_heads,
            kv_heads=kv_heads,
            head_dim=head_dim,
            blocks=blocks,
            block_size=block_size,
            most_new=tokens if most_new is None else min(tokens, most_new),
        )

    @property
    def group(self) -> int:
        """Query heads that share a key-value head."""
        return self.q_heads // self.kv_heads

    def num_slots(self, split: int) -> int:
        """Partial results there is room for."""
        each = self.tokens // self.requests
        new = each if 1 <= each <= MOST_DECODED else 1
        cached = self.blocks * self.block_size // split + self.requests
        return new * min(cached, self.requests * -(-self.room // split))

    def num_decode_items(self, tiles: Tiles) -> int:
        """Items of the decode list at most: uncut tiles, and one a slot."""
        new = min(MOST_DECODED, self.most_new)
        return self.requests * -(-new // tiles.queries(self.group)) + self.num_slots(tiles.split)

    def num_prefill_items(self, tiles: Tiles) -> int:
        """Items of the prefill list at most: whole tiles, and each request's last."""
        if self.most_new <= MOST_DECODED:
            return 0
        prefilling = min(self.requests, self.tokens // (MOST_DECODED + 1))
        return self.tokens // tiles.queries(self.group) + prefilling


@dataclass(frozen=True)
class AttentionPlan:
    """A step's work lists and the memory of its partial results.

    Attributes:
        shape: of the calls that it is for.
        decode: tiles of the decode kernel.
        prefill: tiles of the prefill kernel.
        programs: programs of the decode kernel's persistent grid.
        folds: whether the prefill kernel closes its sums after each split too.
        counts: ``[2]`` int32, items in use of the decode list and of the prefill list.
        decode_items: ``[., 8]`` int32, see ``ITEM``.
        prefill_items: ``[., 8]`` int32.
        merges: ``[R, 4]`` int32: first token, new tokens, first slot, splits (0: nothing to merge).
        sums: ``[slots, Hq, D]`` float32, sums of values weighted by ``2**(score - top)``.
        stats: ``[slots, Hq, 2]`` float32: top, the largest score, and the sum of weights.
    """

    shape: AttentionShape
    decode: Tiles
    prefill: Tiles
    programs: int
    folds: bool
    counts: torch.Tensor
    decode_items: torch.Tensor
    prefill_items: torch.Tensor
    merges: torch.Tensor
    sums: torch.Tensor
    stats: torch.Tensor


@triton.jit
def _write_items(items_ptr, at, mask, request, token, queries, position, begin, end, slot, partial):
    item = items_ptr + at * ITEM
    tl.store(item, tl.zeros_like(at) + request, mask=mask)
    tl.store(item + 1, token, mask=mask)
    tl.store(item + 2, queries, mask=mask)
    tl.store(item + 3, position, mask=mask)
    tl.store(item + 4, begin, mask=mask)
    tl.store(item + 5, end, mask=mask)
    tl.store(item + 6, slot, mask=mask)
    tl.store(item + 7, tl.zeros_like(at) + partial, mask=mask)


# Sizes that change from step to step must not each be compiled for.
@triton.jit(do_not_specialize=["requests", "tokens", "most_new", "room", "num_slots", "programs"])
def _plan(
    query_starts_ptr, context_lens_ptr, counts_ptr, decode_ptr, prefill_ptr, merges_ptr,
    requests, tokens, most_new, room, num_slots, programs,
    DECODE_QUERIES: tl.constexpr, PREFILL_QUERIES: tl.constexpr, MOST: tl.constexpr,
    SPLIT: tl.constexpr, ALL: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Items of one request; each program looks at all requests to know where its own go."""
    row = tl.program_id(0)
    every = tl.arange(0, ALL)
    real = every < requests
    first = tl.load(query_starts_ptr + every, mask=real, other=0)
    after = tl.load(query_starts_ptr + every + 1, mask=real, other=0)
    context = tl.load(context_lens_ptr + every, mask=real, other=0)
    first = tl.minimum(tl.maximum(first, 0), tokens)
    context = tl.minimum(context, room)
    new = tl.minimum(tl.minimum(after, tokens) - first, context)
    new = tl.where(real, tl.minimum(tl.maximum(new, 0), most_new), 0)
    base = context - new  # positions before this step

    decoding = (new > 0) & (new <= MOST)
    tiles = tl.where(decoding, (new + DECODE_QUERIES - 1) // DECODE_QUERIES, 0)
    splits = tl.where(decoding, (context + SPLIT - 1) // SPLIT, 0)
    share = tl.sum(tiles * splits, 0) // programs
    # A request may be a quarter of a program's share: programs then differ by no more than that.
    wanted = tl.where((splits > 1) & (splits * 4 > share), new * splits, 0)
    upto = tl.cumsum(wanted, 0)
    cut = (wanted > 0) & (upto <= num_slots)
    whole_tiles = tl.where(cut, 0, tiles)
    cut_items = tl.where(cut, tiles * splits, 0)
    prefilling = new > MOST
    tiles_to_fill = tl.where(prefilling, (new + PREFILL_QUERIES - 1) // PREFILL_QUERIES, 0)
    if row == 0:
        tl.store(counts_ptr, tl.sum(whole_tiles + cut_items, 0))
        tl.store(counts_ptr + 1, tl.sum(tiles_to_fill, 0))

    mine = every == row
    my_first = tl.sum(tl.where(mine, first, 0), 0)
    my_new = tl.sum(tl.where(mine, new, 0), 0)
    my_context = tl.sum(tl.where(mine, context, 0), 0)
    my_base = my_context - my_new
    my_tiles = tl.sum(tl.where(mine, tiles, 0), 0)
    my_cut = tl.sum(tl.where(mine & cut, 1, 0), 0)
    my_splits = tl.sum(tl.where(mine & cut, splits, 0), 0)
    my_slot = tl.sum(tl.where(mine, upto - wanted, 0), 0)
    merge = merges_ptr + row * 4
    tl.store(merge, my_first)
    tl.store(merge + 1, my_new)
    tl.store(merge + 2, my_slot)
    tl.store(merge + 3, my_splits)

    longer = (context > my_context) | ((context == my_context) & (every < row))
    before = tl.sum(tl.where(longer, whole_tiles, 0), 0)
    if my_cut > 0:
        before = tl.sum(whole_tiles, 0) + tl.sum(tl.where(every < row, cut_items, 0), 0)
    num_items = my_tiles * tl.maximum(my_splits, 1)
    for start in range(0, num_items, CHUNK):
        index = start + tl.arange(0, CHUNK)
        # Tiles of one split are neighbours: what one program reads the next finds in the L2 cache.
        query = index % tl.maximum(my_tiles, 1) * DECODE_QUERIES
        split = index // tl.maximum(my_tiles, 1)
        queries = tl.minimum(my_new - query, DECODE_QUERIES)
        position = my_base + query
        end = position + queries
        if my_cut > 0:
            end = tl.minimum(end, (split + 1) * SPLIT)
        _write_items(
            decode_ptr, before + index, index < num_items, row, my_first + query, queries,
            position, split * SPLIT, end, my_slot + split * my_new + query, my_cut,
        )  # fmt: skip

    # A tile's place is the number of tiles that end later, which for each request is a division:
    # its tiles end at base + PREFILL_QUERIES, base + 2 * PREFILL_QUERIES, ..., context.
    my_tiles_to_fill = tl.sum(tl.where(mine, tiles_to_fill, 0), 0)
    for start in range(0, my_tiles_to_fill, CHUNK):
        tile = start + tl.arange(0, CHUNK)
        query = tile * PREFILL_QUERIES
        queries = tl.minimum(my_new - query, PREFILL_QUERIES)
        end = my_base + query + queries
        past = end[:, None] - base[None, :]
        ended = tl.minimum(tl.maximum(past, 0) // PREFILL_QUERIES, tiles_to_fill[None, :])
        ended = tl.where(end[:, None] >= context[None, :], tiles_to_fill[None, :], ended)
        at_end = (end[:, None] == context[None, :]) | (
            (past > 0) & (past < new[None, :]) & (past % PREFILL_QUERIES == 0)
        )
        tied = at_end & (prefilling & (every < row))[None, :]
        before_tile = tl.sum(tiles_to_fill[None, :] - ended + tied.to(tl.int32), 1)
        _write_items(
            prefill_ptr, before_tile, tile < my_tiles_to_fill, row, my_first + query, queries,
            my_base + query, tl.zeros_like(tile), end, tl.zeros_like(tile), 0,
        )  # fmt: skip


def plan_attention(
    workspace: Workspace,
    query_starts: torch.Tensor,
    context_lens: torch.Tensor,
    shape: AttentionShape,
    decode: Tiles,
    prefill: Tiles,
    programs: int,
    folds: bool,
) -> AttentionPlan:
    """Launch the kernel that writes the work lists; ``shape.requests`` is not 0.

    The plan's tensors lie in ``workspace`` and hold until the next plan there.
    """
    slots = shape.num_slots(decode.split)
    int32, float32 = torch.int32, torch.float32
    plan = AttentionPlan(
        shape=shape,
        decode=decode,
        prefill=prefill,
        programs=programs,
        folds=folds,
        counts=workspace.take("counts", (2,), int32),
        decode_items=workspace.take("decode", (shape.num_decode_items(decode), 8), int32),
        prefill_items=workspace.take("prefill", (shape.num_prefill_items(prefill), 8), int32),
        merges=workspace.take("merges", (shape.requests, 4), int32),
        sums=workspace.take("sums", (slots, shape.q_heads, shape.head_dim), float32),
        stats=workspace.take("stats", (slots, shape.q_heads, 2), float32),
    )
    _plan[(shape.requests,)](
        query_starts,
        context_lens,
        plan.counts,
        plan.decode_items,
        plan.prefill_items,
        plan.merges,
        shape.requests,
        shape.tokens,
        shape.most_new,
        shape.room,
        slots,
        max(1, programs // shape.kv_heads),
        DECODE_QUERIES=decode.queries(shape.group),
        PREFILL_QUERIES=prefill.queries(shape.group),
        MOST=MOST_DECODED,
        SPLIT=decode.split,
        ALL=max(16, triton.next_power_of_2(shape.requests)),
        CHUNK=_CHUNK,
        num_warps=4 if shape.requests <= 256 else 8,
    )
    return plan


def attention_cost(
    new: Sequence[int],
    context: Sequence[int],
    q_heads: int,
    kv_heads: int,
    head_dim: int,
    act_bytes: int,
    cache_bytes: int,
) -> Cost:
    """The floor of attention: each request's cache read once, each pair in sight multiplied twice.

    ``new`` and ``context`` are the requests' new and all tokens; the last two arguments are the
    sizes of an activation and of a number in the cache.
    """
    cached = sum(length for count, length in zip(new, context, strict=True) if count)
    pairs = sum(
        count * length - count * (count - 1) // 2
        for count, length in zip(new, context, strict=True)
    )
    moved = cached * 2 * kv_heads * head_dim * cache_bytes
    moved += sum(new) * 2 * q_heads * head_dim * act_bytes
    return Cost(moved, 4 * q_heads * head_dim * pairs)
