"""The compiled ops give a row the same bits whatever stands beside it.

Alone or in a batch, a prompt whole or in pieces, one thread or two: always ``torch.equal``.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from kernels import Ops, cpu
from tests.kernels.comparisons import BF16, EPS, F16, F32, Ragged, poison, ragged_batch, randn


@pytest.fixture(scope="module")
def ops() -> Ops:
    loaded = cpu.load()
    if not loaded.batch_invariant:
        pytest.skip("no C++ compiler: the torch fallback makes no promise")
    return loaded


@pytest.fixture
def threads() -> Iterator[None]:
    """Whatever number of threads the test sets is one again afterwards."""
    yield
    cpu.set_num_threads(1)


@pytest.mark.parametrize("weight", [F32, BF16, F16])
@pytest.mark.parametrize(("width", "features"), [(64, 48), (300, 200), (1100, 113)])
def test_linear_rows(ops: Ops, width: int, features: int, weight: torch.dtype) -> None:
    x = randn(67, width)
    packed = ops.pack_linear(randn(features, width, seed=1, dtype=weight))
    alone = torch.cat([run_linear(ops, x[i : i + 1], packed, features) for i in range(67)])
    for count in range(2, 68):
        assert torch.equal(run_linear(ops, x[:count], packed, features), alone[:count]), count
    big = x.repeat(5, 1)  # more than a block of rows
    assert torch.equal(run_linear(ops, big, packed, features), alone.repeat(5, 1))


def run_linear(ops: Ops, x: torch.Tensor, packed: object, features: int) -> torch.Tensor:
    out = poison(x.shape[0], features)
    ops.linear(out, x.contiguous(), packed)  # type: ignore[arg-type]
    return out


@pytest.mark.parametrize("weight", [F32, BF16])
@pytest.mark.parametrize("tokens", [1, 3, 40, 250])
def test_linear_threads(ops: Ops, tokens: int, weight: torch.dtype, threads: None) -> None:
    x, packed = randn(tokens, 512), ops.pack_linear(randn(1500, 512, seed=1, dtype=weight))
    outs = []
    for count in (1, 2, 3):
        cpu.set_num_threads(count)
        outs += [run_linear(ops, x, packed, 1500) for _ in range(3)]
    assert all(torch.equal(out, outs[0]) for out in outs)


def long_request(cache: torch.dtype, q_heads: int, kv_heads: int, head_dim: int) -> Ragged:
    return ragged_batch(
        new=[150], context=[150], q_heads=q_heads, kv_heads=kv_heads, head_dim=head_dim,
        cache=cache,
    )  # fmt: skip


def in_chunks(ops: Ops, whole: Ragged, size: int) -> torch.Tensor:
    """The same tokens, ``size`` at a time, each chunk seeing the cache up to itself."""
    total = whole.q.shape[0]
    outs = []
    for begin in range(0, total, size):
        end = min(begin + size, total)
        chunk = Ragged(
            whole.q[begin:end].contiguous(), whole.k_cache, whole.v_cache, whole.block_tables,
            torch.tensor([0, end - begin], dtype=torch.int32),
            torch.tensor([end], dtype=torch.int32),
        )  # fmt: skip
        outs.append(chunk.run(ops))
    return torch.cat(outs)


@pytest.mark.parametrize("cache", [F32, BF16, F16])
@pytest.mark.parametrize(
    ("q_heads", "kv_heads", "head_dim"), [(2, 2, 64), (4, 2, 128), (8, 1, 40), (16, 1, 32)]
)
def test_attention_chunks(
    ops: Ops, q_heads: int, kv_heads: int, head_dim: int, cache: torch.dtype
) -> None:
    whole = long_request(cache, q_heads, kv_heads, head_dim)
    want = whole.run(ops)
    assert bool(want.isfinite().all())
    for size in (1, 7, 64, 100):
        assert torch.equal(in_chunks(ops, whole, size), want), size


@pytest.mark.parametrize("count", [1, 2])
def test_attention_in_a_batch(ops: Ops, count: int, threads: None) -> None:
    """Row 2 of a mixed batch, against the same request by itself."""
    cpu.set_num_threads(count)
    batch = ragged_batch(
        new=[1, 33, 20, 0, 90], context=[300, 33, 150, 5, 500], q_heads=8, kv_heads=4, head_dim=64,
        cache=BF16, padded_tokens=3,
    )  # fmt: skip
    together = batch.run(ops)
    for row in (0, 1, 2, 4):
        start, end = batch.query_starts[row : row + 2].tolist()
        alone = Ragged(
            batch.q[start:end].contiguous(), batch.k_cache, batch.v_cache,
            batch.block_tables[row : row + 1], torch.tensor([0, end - start], dtype=torch.int32),
            batch.context_lens[row : row + 1],
        )  # fmt: skip
        assert torch.equal(together[start:end], alone.run(ops))


def test_attention_does_not_see_the_future(ops: Ops) -> None:
    """Infinities in later tokens of the same chunk leave earlier tokens' bits alone."""
    whole = long_request(F16, 4, 2, 64)
    want = whole.run(ops)
    block, offset = int(whole.block_tables[0, 100 // 16]), 100 % 16
    whole.v_cache[block, :, offset] = float("inf")
    whole.k_cache[block, :, offset] = float("nan")
    got = whole.run(ops)
    assert torch.equal(got[:100], want[:100])
    assert not bool(got[100].isfinite().any())


def test_attention_with_other_blocks(ops: Ops) -> None:
    """Where the pages lie, and how large they are, does not matter."""
    sizes = {"new": [70], "context": [150], "q_heads": 4, "kv_heads": 2, "head_dim": 64}
    outs = [ragged_batch(**sizes, block=block).run(ops) for block in (1, 16, 64)]  # type: ignore[arg-type]
    assert torch.equal(outs[0], outs[1])
    assert torch.equal(outs[0], outs[2])


def test_row_ops(ops: Ops, threads: None) -> None:
    x, weight = randn(500, 320), randn(320, seed=1, dtype=BF16)
    norm, gated = poison(500, 320), poison(500, 160)
    cpu.set_num_threads(2)
    ops.rms_norm(norm, x, weight, EPS)
    ops.swiglu(gated, x)
    cpu.set_num_threads(1)
    for i in range(0, 500, 50):
        one, one_gated, residual = poison(1, 320), poison(1, 160), torch.zeros(1, 320)
        ops.rms_norm(one, x[i : i + 1], weight, EPS)
        assert torch.equal(one[0], norm[i])
        ops.add_rms_norm(one, residual, x[i : i + 1], weight, EPS)
        assert torch.equal(one[0], norm[i]), "the fused norm is the same norm"
        ops.swiglu(one_gated, x[i : i + 1])
        assert torch.equal(one_gated[0], gated[i])
