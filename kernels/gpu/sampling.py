"""The draw: top-k, top-p and min-p as thresholds found without a sort, then the Gumbel maximum.

A row is parted into chunks, one program each, and read once by every kernel below.

1. ``_largest``: each chunk's largest logit and its lowest id.
2. ``_narrow``, ``32 / BITS`` launches for top-k, as many for top-p. A logit is looked at as a
   32-bit integer that falls as the logit rises, so that "among the k largest" is "at most the k-th
   smallest integer" and ties stay ties. Both filters ask for the largest ``x`` with
   ``F(x) < wanted``, where ``F(x)`` adds up over all integers below ``x``: ones for top-k
   (``wanted = k``), probabilities for top-p (``wanted = p * all that top-k left``). Each launch
   evaluates F at the ``2^BITS - 1`` inner borders of ``2^BITS`` equal parts, and the next launch
   goes on in the part where F crosses. The integers' bits are those of the logits, so top-k is
   exact.
3. ``_draw``: each chunk's largest ``z + noise`` among what the three filters keep, and
   ``_pick``: the row's, chunks in their order. The noise is that of ``kernels.noise``, bit for bit
   up to the uniform number; its logarithms are float32's.

What no row of a call uses, as the host says with ``Draws``, is not launched: two kernels for
greedy rows, three without top-k and top-p.

Probabilities are added as integers, multiples of 2^-40 of the largest: integer sums have no order,
so draws depend neither on chunks nor on the batch. A float32 ``exp`` is off by about 1e-7, so only
a top-p border, or a race of two tokens, that is closer than this may fall on the other side than
the oracle's. A row without top-k or top-p leaves ``_narrow`` at once.

Floor: reads ``S*V*4`` bytes for ``_largest`` and ``_draw`` each, and once more for every launch of
``_narrow`` whose filter the row uses. 64 rows of 152k are 39 MB, which H100's L2 cache holds.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from kernels.gpu.rounding import INTERPRETED
from kernels.gpu.tuning import capability_of, config
from kernels.interface import ANY_DRAW, Draws

__all__ = ["sample", "token_hashes", "truncate"]


@triton.jit
def _mix64(x):
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB
    return x ^ (x >> 31)


@triton.jit
def _mix32(x):
    x = (x ^ (x >> 16)) * 0x85EBCA6B
    x = (x ^ (x >> 13)) * 0xC2B2AE35
    return x ^ (x >> 16)


@triton.jit
def _token_hash(seed, position, ids):
    """32 hash bits for int32 ``ids [N]`` of one row; ``seed`` and ``position`` are ``[1]``."""
    golden = tl.full([1], 0x9E3779B97F4A7C15, tl.uint64)
    one = tl.full([1], 1, tl.uint64)
    row = (position.to(tl.uint64, bitcast=True) + one) * golden
    key = _mix64(_mix64(seed.to(tl.uint64, bitcast=True) + golden) + row)
    low = (key & 0xFFFFFFFF).to(tl.uint32)
    high = (key >> 32).to(tl.uint32)
    return _mix32(_mix32(ids.to(tl.uint32, bitcast=True) * 0x9E3779B9 + low) ^ high)


@triton.jit
def _uniform(hashes):
    """``(hash + 0.5) / 2^32`` in float32, with relative precision at zero."""
    high = (hashes >> 16).to(tl.float32)
    low = (hashes & 0xFFFF).to(tl.float32)
    return (high * 65536.0 + (low + 0.5)) * 2.3283064365386963e-10


@triton.jit
def _gumbel(hashes):
    """``-log(-log1p(-u))``: the logarithm of ``1 - u`` is taken where it is precise."""
    u = _uniform(hashes)
    rest = tl.maximum(1.0 - u, 0.25)  # in the half where it counts, at least 1/2
    lost = (1.0 - rest) - u  # what rounding 1 - u left out
    near_zero = tl.log(rest) + lost / rest
    near_one = tl.log(_uniform(hashes ^ 0xFFFFFFFF))  # inverted bits give 1 - u itself
    return -tl.log(-tl.where(hashes < 0x80000000, near_zero, near_one))


@triton.jit
def _load_chunk(logits_ptr, row, chunk, vocab, CHUNK: tl.constexpr):
    """One chunk of a row as (ids, logits), NaN and what is not there as ``-inf``, -0 as 0."""
    ids = chunk * CHUNK + tl.arange(0, CHUNK)
    x = tl.load(logits_ptr + row * vocab + ids, mask=ids < vocab, other=float("-inf"))
    x = tl.where(x == x, x, float("-inf"))
    return ids, tl.where(x == 0.0, 0.0, x)


@triton.jit
def _row_max(largest_ptr, row, chunks, CHUNKS: tl.constexpr):
    parts = tl.arange(0, CHUNKS)
    at = largest_ptr + row * chunks + parts
    return tl.max(tl.load(at, mask=parts < chunks, other=float("-inf")), axis=0)


@triton.jit
def _falling_bits(x):
    """A uint32 for each float32 (no NaN, no -0) that falls as the number rises."""
    bits = x.to(tl.uint32, bitcast=True)
    return tl.where(bits < 0x80000000, 0x7FFFFFFF - bits, bits)


@triton.jit
def _scaled(x, best, temperature):
    """``z``: at most 0, exactly 0 for the largest; ``-inf`` where a tiny temperature overflows."""
    # Zeros first, for the difference of two infinities is NaN.
    gap = tl.where(x == best, 0.0, x) - tl.where(x == best, 0.0, best)
    return tl.div_rn(gap, tl.zeros_like(gap) + temperature)


@triton.jit
def _largest(largest_ptr, first_ptr, logits_ptr, vocab, CHUNK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    chunk = tl.program_id(1)
    ids, x = _load_chunk(logits_ptr, row, chunk, vocab, CHUNK)
    best = tl.max(x, axis=0)
    part = row * tl.num_programs(1) + chunk
    tl.store(largest_ptr + part, best)
    tl.store(first_ptr + part, tl.min(tl.where(x == best, ids, vocab), axis=0))


@triton.jit
def _is_off(temperature, top_k, top_p, vocab, COUNTS: tl.constexpr):
    """True if a row does not use the filter: top-k where ``COUNTS``, else top-p."""
    if COUNTS:
        return (temperature == 0) | (top_k <= 0) | (top_k >= vocab)
    return (temperature == 0) | (top_p >= 1)


@triton.jit
def _crossing(
    lows_ptr, parts_ptr, row, chunks, top_k, top_p, launch, COUNTS: tl.constexpr,
    BITS: tl.constexpr, CHUNKS: tl.constexpr,
):  # fmt: skip
    """Where the part begins in which F crosses what is wanted, after this many launches."""
    BORDERS: tl.constexpr = 1 << BITS
    chunk = tl.arange(0, CHUNKS)
    border = tl.arange(0, BORDERS)
    size = tl.num_programs(0).to(tl.int64) * chunks
    line = ((launch - 1) % 2) * size + row * chunks + chunk
    at = parts_ptr + line[:, None] * BORDERS + border[None, :]
    below = tl.sum(tl.load(at, mask=(chunk < chunks)[:, None], other=0), axis=0).to(tl.float64)
    if COUNTS:
        wanted = top_k.to(tl.float64)
    else:  # what stands at border 0 is the sum of all
        wanted = top_p.to(tl.float64) * tl.sum(tl.where(border == 0, below, 0.0), axis=0)
    passed = tl.sum(((below < wanted) & (border > 0)).to(tl.int64), axis=0)
    low = tl.load(lows_ptr + (launch - 1).to(tl.int64) * tl.num_programs(0) + row)
    return low + (passed << (32 - BITS * launch))


@triton.jit(do_not_specialize=["launch"])
def _narrow(
    lows_ptr, parts_ptr, limits_ptr, largest_ptr, logits_ptr, temperature_ptr, top_k_ptr, top_p_ptr,
    vocab, launch, FIRST: tl.constexpr, COUNTS: tl.constexpr, BITS: tl.constexpr,
    GROUP: tl.constexpr, CHUNK: tl.constexpr, CHUNKS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    chunk = tl.program_id(1)
    chunks = tl.num_programs(1)
    temperature = tl.load(temperature_ptr + row)
    top_k = tl.load(top_k_ptr + row)
    top_p = tl.load(top_p_ptr + row)
    if _is_off(temperature, top_k, top_p, vocab, COUNTS):
        return
    if FIRST:
        low = row * 0
    else:
        low = _crossing(
            lows_ptr, parts_ptr, row, chunks, top_k, top_p, launch, COUNTS, BITS, CHUNKS
        )
    if chunk == 0:
        tl.store(lows_ptr + launch.to(tl.int64) * tl.num_programs(0) + row, low)
    ids, x = _load_chunk(logits_ptr, row, chunk, vocab, CHUNK)
    bits = _falling_bits(x).to(tl.int64)
    there = ids < vocab
    if COUNTS:
        weights = there.to(tl.int64)
    else:
        best = _row_max(largest_ptr, row, chunks, CHUNKS)
        there = there & (bits <= tl.load(limits_ptr + row))
        share = tl.exp(_scaled(x, best, temperature)) * 1099511627776.0  # 2^40
        weights = tl.where(there, share, 0.0).to(tl.int64)
    size = tl.num_programs(0).to(tl.int64) * chunks
    to = parts_ptr + ((launch % 2) * size + row * chunks + chunk) * (1 << BITS)
    step = tl.full([], 1, tl.int64) << (32 - BITS - BITS * launch)
    for begin in tl.static_range(0, 1 << BITS, GROUP):
        border = begin + tl.arange(0, GROUP)
        below = (bits[None, :] < (low + border * step)[:, None]) | (border == 0)[:, None]
        tl.store(to + border, tl.sum(tl.where(below, weights[None, :], 0), axis=1))


@triton.jit
def _settle(
    limits_ptr, lows_ptr, parts_ptr, temperature_ptr, top_k_ptr, top_p_ptr, vocab, chunks,
    COUNTS: tl.constexpr, BITS: tl.constexpr, CHUNKS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    top_k = tl.load(top_k_ptr + row)
    top_p = tl.load(top_p_ptr + row)
    if _is_off(tl.load(temperature_ptr + row), top_k, top_p, vocab, COUNTS):
        return
    launches = tl.full([], 32 // BITS, tl.int32)
    limit = _crossing(
        lows_ptr, parts_ptr, row, chunks, top_k, top_p, launches, COUNTS, BITS, CHUNKS
    )
    tl.store(limits_ptr + row, limit)


@triton.jit
def _draw(
    keys_ptr, drawn_ptr, largest_ptr, limits_ptr, logits_ptr, temperature_ptr, min_p_ptr, seeds_ptr,
    positions_ptr, vocab, LIMITED: tl.constexpr, CHUNK: tl.constexpr, CHUNKS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    chunk = tl.program_id(1)
    chunks = tl.num_programs(1)
    temperature = tl.load(temperature_ptr + row)
    if temperature == 0:
        return
    best = _row_max(largest_ptr, row, chunks, CHUNKS)
    ids, x = _load_chunk(logits_ptr, row, chunk, vocab, CHUNK)
    z = _scaled(x, best, temperature)
    kept = tl.exp(z) >= tl.load(min_p_ptr + row)
    if LIMITED:
        kept = kept & (_falling_bits(x).to(tl.int64) <= tl.load(limits_ptr + row))
    kept = kept | (x == best)
    here = row + tl.zeros([1], tl.int64)
    hashes = _token_hash(tl.load(seeds_ptr + here), tl.load(positions_ptr + here), ids)
    keys = tl.where(kept & (ids < vocab), z + _gumbel(hashes), float("-inf"))
    top = tl.max(keys, axis=0)
    part = row * chunks + chunk
    tl.store(keys_ptr + part, top)
    tl.store(drawn_ptr + part, tl.min(tl.where(keys == top, ids, vocab), axis=0))


@triton.jit
def _pick(
    out_ptr, keys_ptr, drawn_ptr, largest_ptr, first_ptr, temperature_ptr, vocab, chunks,
    WARM: tl.constexpr, CHUNKS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    part = tl.arange(0, CHUNKS)
    here = part < chunks
    at = row * chunks + part
    scores = tl.load(largest_ptr + at, mask=here, other=float("-inf"))
    ids = tl.load(first_ptr + at, mask=here, other=vocab)
    best = tl.max(scores, axis=0)
    if WARM and (tl.load(temperature_ptr + row) != 0) & (best != float("-inf")):
        scores = tl.load(keys_ptr + at, mask=here, other=float("-inf"))
        ids = tl.load(drawn_ptr + at, mask=here, other=vocab)
        best = tl.max(scores, axis=0)
    picked = tl.min(tl.where(scores == best, ids, vocab), axis=0)
    tl.store(out_ptr + row, picked.to(tl.int64))


@dataclass(frozen=True)
class _Truncated:
    """What the first steps find out about each row."""

    largest: torch.Tensor  # [S, chunks] float32
    first: torch.Tensor  # [S, chunks] int32, the lowest id of the largest
    limits: torch.Tensor | None
    """``[S]`` int64, the largest ``_falling_bits`` that top-k and top-p keep; None: all is kept."""


def truncate(
    logits: torch.Tensor,
    temperature: torch.Tensor,
    top_k: torch.Tensor,
    top_p: torch.Tensor,
    draws: Draws = ANY_DRAW,
) -> _Truncated:
    """Steps 1 and 2; the arguments are those of ``Ops.sample``."""
    rows, vocab = logits.shape
    best = config("sample", capability_of(logits.device), V=vocab)
    bits, chunk = best["BITS"], {"CHUNK": best["CHUNK"], "num_warps": best.num_warps}
    chunks, launches = triton.cdiv(vocab, best["CHUNK"]), 32 // bits
    padded = triton.next_power_of_2(chunks)
    group = 1 << bits if INTERPRETED.value else best["GROUP"]  # borders that are looked at together
    device, grid = logits.device, (rows, chunks)
    largest = torch.empty(grid, dtype=torch.float32, device=device)
    first = torch.empty(grid, dtype=torch.int32, device=device)
    _largest[grid](largest, first, logits, vocab, **chunk)
    if not draws.top_k and not draws.top_p:
        return _Truncated(largest, first, None)
    # What top-k leaves is where top-p begins.
    limits = torch.full((rows,), 0xFFFFFFFF, dtype=torch.int64, device=device)
    lows = torch.empty((launches, rows), dtype=torch.int64, device=device)
    # Two of them: while a launch writes one, its programs still read the other.
    parts = torch.empty((2, rows, chunks, 1 << bits), dtype=torch.int64, device=device)
    for counts in (True, False):
        if not (draws.top_k if counts else draws.top_p):
            continue
        for launch in range(launches):
            _narrow[grid](
                lows, parts, limits, largest, logits, temperature, top_k, top_p, vocab, launch,
                FIRST=launch == 0, COUNTS=counts, BITS=bits, GROUP=group, CHUNKS=padded, **chunk,
            )  # fmt: skip
        _settle[(rows,)](
            limits, lows, parts, temperature, top_k, top_p, vocab, chunks,
            COUNTS=counts, BITS=bits, CHUNKS=padded,
        )  # fmt: skip
    return _Truncated(largest, first, limits)


def sample(
    out_ids: torch.Tensor,
    logits: torch.Tensor,
    temperature: torch.Tensor,
    top_k: torch.Tensor,
    top_p: torch.Tensor,
    min_p: torch.Tensor,
    seeds: torch.Tensor,
    positions: torch.Tensor,
    draws: Draws = ANY_DRAW,
) -> None:
    """See ``Ops.sample``."""
    rows, vocab = logits.shape
    if not rows:
        return
    best = config("sample", capability_of(logits.device), V=vocab)
    chunks = triton.cdiv(vocab, best["CHUNK"])
    padded = triton.next_power_of_2(chunks)
    row = truncate(logits, temperature, top_k, top_p, draws)
    keys, drawn = row.largest, row.first  # not read where no row is drawn for
    if draws.warm:
        keys, drawn = torch.empty_like(row.largest), torch.empty_like(row.first)
        limited = row.limits is not None
        _draw[(rows, chunks)](
            keys, drawn, row.largest, row.limits if limited else positions, logits, temperature,
            min_p, seeds, positions, vocab,
            LIMITED=limited, CHUNK=best["CHUNK"], CHUNKS=padded, num_warps=best.num_warps,
        )  # fmt: skip
    _pick[(rows,)](
        out_ids, keys, drawn, row.largest, row.first, temperature, vocab, chunks,
        WARM=draws.warm, CHUNKS=padded,
    )  # fmt: skip


@triton.jit
def _token_hashes(out_ptr, seed_ptr, position_ptr, first_id, COUNT: tl.constexpr):
    one = tl.zeros([1], tl.int32)
    ids = first_id + tl.arange(0, COUNT)
    hashes = _token_hash(tl.load(seed_ptr + one), tl.load(position_ptr + one), ids)
    tl.store(out_ptr + tl.arange(0, COUNT), hashes.to(tl.int64))


def token_hashes(
    seed: torch.Tensor, position: torch.Tensor, first_id: int, count: int
) -> torch.Tensor:
    """The hash of ``kernels.noise`` as the kernels compute it, int64 ``[count]``, a power of two.

    ``seed`` and ``position`` are int64 ``[1]``.
    """
    out = torch.empty(count, dtype=torch.int64, device=seed.device)
    _token_hashes[(1,)](out, seed, position, first_id, COUNT=count)
    return out
