"""One comparison an op: random arguments of odd shapes, the oracle beside the ops under test.

Each function raises ``AssertionError`` when the two disagree by more than rounding allows, so that
the same comparison both accepts a backend and must refuse one with a planted bug.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from kernels import ANY_DRAW, Draws, Ops
from kernels.reference import ReferenceOps

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
ORACLE = ReferenceOps()
EPS = 1e-6

# One rounding of the stored dtype, and for float32 the rounding of a few hundred operations.
_RELATIVE = {F32: 2e-5, BF16: 2.0**-7, F16: 2.0**-10}


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = F32) -> torch.Tensor:
    """Standard normal numbers that depend on the shape and ``seed`` only."""
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(*shape, generator=generator).to(dtype)


def poison(*shape: int, dtype: torch.dtype = F32) -> torch.Tensor:
    """An output buffer in which every element that is not written shows."""
    return torch.full(shape, 12345.0, dtype=dtype)


def assert_close(
    got: torch.Tensor, want: torch.Tensor, *, floor: float = 1e-5, slack: torch.Tensor | None = None
) -> None:
    """Equal to within ``slack`` and one rounding of the dtype, relative, or ``floor`` near zero."""
    assert got.dtype is want.dtype
    wanted = want.double()
    if slack is not None:
        wanted += (got.double() - wanted).clamp(-slack.double(), slack.double())
    torch.testing.assert_close(
        got.double(), wanted, rtol=_RELATIVE[got.dtype], atol=floor, equal_nan=False
    )


def as_multiplied(ops: Ops, x: torch.Tensor, stored: torch.dtype) -> torch.Tensor:
    """``x`` as these ops see it in a product with numbers of dtype ``stored``."""
    rounded = ops.rounds_to(stored)
    assert rounded in (None, BF16)
    assert rounded in (None, stored)
    return x if rounded is None else x.to(rounded).to(x.dtype)


def embed(
    ops: Ops,
    *,
    tokens: int,
    vocab: int,
    width: int,
    act: torch.dtype = F32,
    weight: torch.dtype = F32,
) -> None:
    table = randn(vocab, width, dtype=weight)
    ids = torch.randint(0, vocab, (tokens,), generator=torch.Generator().manual_seed(tokens))
    want, got = poison(tokens, width, dtype=act), poison(tokens, width, dtype=act)
    ORACLE.embed(want, ids, table)
    ops.embed(got, ids, table)
    assert torch.equal(got, want)


def rms_norm(
    ops: Ops, *, tokens: int, width: int, act: torch.dtype = F32, weight: torch.dtype = F32
) -> None:
    x, scale = randn(tokens, width, dtype=act), randn(width, seed=1, dtype=weight)
    x[: tokens // 2] *= 1e-3  # small enough for eps to count
    want, got = poison(tokens, width, dtype=act), poison(tokens, width, dtype=act)
    ORACLE.rms_norm(want, x, scale, EPS)
    ops.rms_norm(got, x, scale, EPS)
    assert_close(got, want)
    ops.rms_norm(x, x, scale, EPS)
    assert torch.equal(x, got), "out may be x"


def add_rms_norm(
    ops: Ops, *, tokens: int, width: int, act: torch.dtype = F32, weight: torch.dtype = F32
) -> None:
    x, scale = randn(tokens, width, dtype=act), randn(width, seed=1, dtype=weight)
    residual = randn(tokens, width, seed=2, dtype=act)
    sums = residual.clone()
    want, got = poison(tokens, width, dtype=act), poison(tokens, width, dtype=act)
    ORACLE.add_rms_norm(want, residual, x, scale, EPS)
    ops.add_rms_norm(got, sums, x, scale, EPS)
    assert torch.equal(sums, residual)
    assert_close(got, want)


def rotary_table(positions: int, head_dim: int, theta: float = 10_000.0) -> torch.Tensor:
    """``cos_sin [P, D]`` of the default rotary embedding (Su et al. 2021)."""
    steps = torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim
    angles = torch.arange(positions, dtype=torch.float64)[:, None] * theta**-steps
    return torch.cat((angles.cos(), angles.sin()), dim=1).to(F32)


def qk_norm_rope_write(
    ops: Ops,
    *,
    tokens: int,
    q_heads: int,
    kv_heads: int,
    head_dim: int,
    block: int = 16,
    act: torch.dtype = F32,
    weight: torch.dtype = F32,
    cache: torch.dtype = F32,
    padded: int = 0,
) -> None:
    """``padded`` more tokens, at the end, write to the scratch block."""
    total, blocks = tokens + padded, 2 + (tokens + padded) // block + 3
    qkv = randn(total, (q_heads + 2 * kv_heads) * head_dim, dtype=act)
    qkv[::2] *= 1e-3  # small enough for eps to count
    q_weight, k_weight = (randn(head_dim, seed=s, dtype=weight) for s in (1, 2))
    positions = torch.randperm(total + 5, generator=torch.Generator().manual_seed(1))[:total]
    slots = torch.randperm((blocks - 1) * block, generator=torch.Generator().manual_seed(2))
    slots = slots[:total] + block
    slots[tokens:] = 3 % block
    kv = [poison(blocks, kv_heads, block, head_dim, dtype=cache) for _ in range(4)]
    want, got = (poison(total, q_heads, head_dim, dtype=act) for _ in range(2))
    table = rotary_table(total + 5, head_dim)
    ORACLE.qk_norm_rope_write(
        want, qkv, q_weight, k_weight, table, positions, slots, kv[0], kv[1], EPS
    )
    ops.qk_norm_rope_write(got, qkv, q_weight, k_weight, table, positions, slots, kv[2], kv[3], EPS)
    assert_close(got, want)
    assert_close(kv[2][1:], kv[0][1:])
    assert torch.equal(kv[3][1:], kv[1][1:])


@dataclass(frozen=True)
class Ragged:
    """Arguments of ``paged_attention`` but for ``out`` and ``scale``."""

    q: torch.Tensor
    k_cache: torch.Tensor
    v_cache: torch.Tensor
    block_tables: torch.Tensor
    query_starts: torch.Tensor
    context_lens: torch.Tensor

    def run(self, ops: Ops, scale: float | None = None) -> torch.Tensor:
        """The op's output, in a poisoned buffer."""
        out = poison(*self.q.shape, dtype=self.q.dtype)
        ops.paged_attention(
            out,
            self.q,
            self.k_cache,
            self.v_cache,
            self.block_tables,
            self.query_starts,
            self.context_lens,
            self.q.shape[2] ** -0.5 if scale is None else scale,
        )
        return out


def ragged_batch(
    *,
    new: list[int],
    context: list[int],
    q_heads: int,
    kv_heads: int,
    head_dim: int,
    block: int = 16,
    act: torch.dtype = F32,
    cache: torch.dtype = F32,
    padded_tokens: int = 0,
) -> Ragged:
    """A batch with ``new[r]`` new tokens of ``context[r]`` in all, in shuffled blocks.

    What no request may see (unused blocks, block ends beyond a context, table entries that are not
    in use) is NaN or out of range.
    """
    needed = [-(-length // block) for length in context]
    blocks = 1 + sum(needed) + 2
    order = torch.randperm(blocks - 1, generator=torch.Generator().manual_seed(3)) + 1
    tables = torch.full((len(new), max(needed, default=0) + 1), 2**30, dtype=torch.int32)
    k_cache, v_cache = (
        torch.full((blocks, kv_heads, block, head_dim), float("nan"), dtype=cache) for _ in range(2)
    )
    next_block = 0
    for row, length in enumerate(context):
        mine = order[next_block : next_block + needed[row]]
        next_block += needed[row]
        tables[row, : needed[row]] = mine.int()
        for position in range(length):
            where = int(mine[position // block]), slice(None), position % block
            k_cache[where] = randn(kv_heads, head_dim, seed=7 * position + row, dtype=cache)
            v_cache[where] = randn(kv_heads, head_dim, seed=9 * position + row, dtype=cache)
    starts = torch.tensor([0, *new]).cumsum(0).int()
    q = randn(sum(new) + padded_tokens, q_heads, head_dim, dtype=act)
    return Ragged(q, k_cache, v_cache, tables, starts, torch.tensor(context, dtype=torch.int32))


def paged_attention(
    ops: Ops,
    *,
    new: list[int],
    context: list[int],
    q_heads: int,
    kv_heads: int,
    head_dim: int,
    block: int = 16,
    act: torch.dtype = F32,
    cache: torch.dtype = F32,
    padded_tokens: int = 0,
) -> None:
    batch = ragged_batch(
        new=new,
        context=context,
        q_heads=q_heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        block=block,
        act=act,
        cache=cache,
        padded_tokens=padded_tokens,
    )
    seen = replace(batch, q=as_multiplied(ops, batch.q, cache))
    # Rounding each weight of the softmax moves the result by at most so much of the same sum with
    # the values' sizes.
    share = 0.0 if ops.rounds_to(cache) is None else 2.0**-8
    sizes = replace(seen, v_cache=batch.v_cache.abs())
    for scale in (head_dim**-0.5, 4 * head_dim**-0.5):  # the second makes the softmax sharp
        slack = share * sizes.run(ORACLE, scale)
        assert_close(batch.run(ops, scale), seen.run(ORACLE, scale), slack=slack)


def swiglu(ops: Ops, *, tokens: int, width: int, act: torch.dtype = F32) -> None:
    gate_up = randn(tokens, 2 * width, dtype=act) * 4
    if tokens:
        gate_up[0, : min(4, width)] = torch.tensor([-200.0, 200.0, 0.0, -88.5])[:width].to(act)
    want, got = poison(tokens, width, dtype=act), poison(tokens, width, dtype=act)
    ORACLE.swiglu(want, gate_up)
    ops.swiglu(got, gate_up)
    assert_close(got, want)


def linear(
    ops: Ops,
    *,
    tokens: int,
    width: int,
    features: int,
    act: torch.dtype = F32,
    weight: torch.dtype = F32,
    out: torch.dtype | None = None,
) -> None:
    x = randn(tokens, width, dtype=act)
    matrix = randn(features, width, seed=1, dtype=weight)
    want, got = (poison(tokens, features, dtype=out or act) for _ in range(2))
    packed = ops.pack_linear(matrix)
    assert (packed.out_features, packed.in_features) == (features, width)
    ORACLE.linear(want, as_multiplied(ops, x, weight), ORACLE.pack_linear(matrix))
    matrix.zero_()  # the packed form owns its numbers
    ops.linear(got, x, packed)
    # A sum of ``width`` products of standard normals has this many roundings of size one.
    assert_close(got, want, floor=2e-6 * width**0.5 + 1e-6)


def gather_rows(ops: Ops, *, tokens: int, rows: int, width: int, act: torch.dtype = F32) -> None:
    x = randn(tokens, width, dtype=act)
    index = torch.randint(0, tokens, (rows,), generator=torch.Generator().manual_seed(rows))
    want, got = poison(rows, width, dtype=act), poison(rows, width, dtype=act)
    ORACLE.gather_rows(want, x, index)
    ops.gather_rows(got, x, index)
    assert torch.equal(got, want)


def entries(rows: int, vocab: int, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """``count`` distinct (row, id) pairs, every fifth of them padding."""
    flat = torch.randperm(rows * vocab, generator=torch.Generator().manual_seed(count))[:count]
    row, ids = flat // vocab, flat % vocab
    row[::5] = rows
    return row, ids


def apply_penalties(ops: Ops, *, rows: int, vocab: int, count: int) -> None:
    want = randn(rows, vocab)
    got = want.clone()
    row, ids = entries(rows, vocab, count)
    generator = torch.Generator().manual_seed(1)
    counts = torch.randint(0, 4, (row.numel(),), generator=generator).int()
    factors = [torch.rand(rows, generator=generator) + 0.5 for _ in range(3)]
    ORACLE.apply_penalties(want, row, ids, counts, *factors)
    ops.apply_penalties(got, row, ids, counts, *factors)
    assert_close(got, want, floor=1e-6)


def add_bias(ops: Ops, *, rows: int, vocab: int, count: int) -> None:
    want = randn(rows, vocab)
    got = want.clone()
    row, ids = entries(rows, vocab, count)
    values = randn(row.numel()) * 5
    values[1::7] = float("-inf")
    ORACLE.add_bias(want, row, ids, values)
    ops.add_bias(got, row, ids, values)
    assert torch.equal(got, want)


def apply_token_mask(ops: Ops, *, rows: int, vocab: int) -> None:
    want = randn(rows, vocab)
    got = want.clone()
    words = -(-vocab // 32)
    generator = torch.Generator().manual_seed(rows + vocab)
    mask = torch.randint(-(2**31), 2**31, (rows, words), generator=generator).int()
    mask[::3] = -1
    ORACLE.apply_token_mask(want, mask)
    ops.apply_token_mask(got, mask)
    assert torch.equal(got, want)


@dataclass(frozen=True)
class Draw:
    """Arguments of ``sample`` but for ``out_ids``, one row each."""

    logits: torch.Tensor
    temperature: torch.Tensor
    top_k: torch.Tensor
    top_p: torch.Tensor
    min_p: torch.Tensor
    seeds: torch.Tensor
    positions: torch.Tensor

    def run(self, ops: Ops, promise: Draws = ANY_DRAW) -> torch.Tensor:
        """The sampled ids."""
        out = torch.full((self.logits.shape[0],), -1, dtype=torch.int64)
        ops.sample(
            out,
            self.logits,
            self.temperature,
            self.top_k,
            self.top_p,
            self.min_p,
            self.seeds,
            self.positions,
            promise,
        )
        return out


def draws(
    logits: torch.Tensor,
    *,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    seed: int = 0,
) -> Draw:
    """The same settings for every row of ``logits``, at positions 0, 1, 2, ..."""
    rows = logits.shape[0]
    return Draw(
        logits,
        torch.full((rows,), temperature),
        torch.full((rows,), top_k, dtype=torch.int32),
        torch.full((rows,), top_p),
        torch.full((rows,), min_p),
        torch.full((rows,), seed, dtype=torch.int64),
        torch.arange(rows),
    )


def sample(ops: Ops, *, rows: int, vocab: int) -> None:
    """Every mixture of settings; the oracle's choice, but for keys that tie within rounding."""
    generator = torch.Generator().manual_seed(rows + vocab)

    def pick(values: list[float]) -> torch.Tensor:
        return torch.tensor(values)[torch.randint(0, len(values), (rows,), generator=generator)]

    draw = Draw(
        logits=randn(rows, vocab) * 3,
        temperature=pick([0.0, 0.3, 1.0, 2.0]),
        top_k=pick([0, 1, 3, 40, vocab, vocab + 1]).int(),
        top_p=pick([1.0, 0.999, 0.9, 0.5, 0.01]),
        min_p=pick([0.0, 0.02, 0.3, 1.0]),
        seeds=torch.randint(-(2**62), 2**62, (rows,), generator=generator),
        positions=torch.randint(0, 2**40, (rows,), generator=generator),
    )
    before = draw.logits.clone()
    got, want = draw.run(ops), draw.run(ORACLE)
    assert torch.equal(draw.logits, before), "sample must not change the logits"
    # In float32 a key or a cumulative probability may fall on the other side of a close race.
    assert int((got != want).sum()) <= rows // 200, (got, want)


def logprobs(ops: Ops, *, rows: int, vocab: int, k: int) -> None:
    logits = randn(rows, vocab) * 3
    logits[:, vocab // 2 :] = logits[:, : vocab - vocab // 2].clone()  # ties
    if vocab > 4:
        logits[:, 1] = float("-inf")
    chosen = torch.randint(0, vocab, (rows,), generator=torch.Generator().manual_seed(rows))
    outs = [
        (poison(rows, k + 1), torch.full((rows, k + 1), -1), torch.full((rows,), -1))
        for _ in range(2)
    ]
    ORACLE.logprobs(*outs[0], logits, chosen, k)
    ops.logprobs(*outs[1], logits, chosen, k)
    assert_close(outs[1][0], outs[0][0])
    assert torch.equal(outs[1][1], outs[0][1])
    assert torch.equal(outs[1][2], outs[0][2])
