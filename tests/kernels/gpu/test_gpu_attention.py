"""Paged attention against the oracle: every border of blocks, tiles and splits, ragged batches."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from kernels import KernelError
from kernels.gpu import GpuOps, attention
from kernels.gpu.workspace import Workspace
from tests.kernels.comparisons import BF16, F16, F32, Ragged, poison, ragged_batch, randn
from tests.kernels.gpu.attention_runs import (
    LARGER,
    ORACLE,
    SMALL,
    USUAL,
    Setting,
    check,
    make_plan,
    on,
    run,
)

# The interpreter's bfloat16 is wrong.
NARROW = [F16, BF16] if torch.cuda.is_available() else [F16]
BORDERS = [1, 15, 16, 17, 31, 32, 33, 64, 65]  # of a block, a tile and a split, or two


@pytest.mark.parametrize("block", [16, 32])
@pytest.mark.parametrize("new", [1, 3])
def test_decoding_at_every_border(device: torch.device, block: int, new: int) -> None:
    context = [max(length, new) for length in BORDERS]
    check(device, [new] * len(BORDERS), context, q_heads=2, kv_heads=1, block=block)


@pytest.mark.parametrize("block", [16, 32])
def test_prefill_at_every_border(device: torch.device, block: int) -> None:
    new = [9, 15, 16, 17, 31, 32, 33, 9, 40]
    check(device, new, [9, 15, 16, 17, 31, 32, 33, 65, 64], q_heads=2, kv_heads=1, block=block)


@pytest.mark.parametrize(
    ("group", "head_dim"),
    [(1, 64), (2, 128), (4, 256), (8, 64), (8, 128), (8, 256), (16, 64), (16, 128)],
)
def test_heads(device: torch.device, head_dim: int, group: int) -> None:
    kv_heads = 2 if group < 4 else 1
    check(device, [1, 9], [70, 21], q_heads=kv_heads * group, kv_heads=kv_heads,
          head_dim=head_dim)  # fmt: skip


@pytest.mark.parametrize(("group", "head_dim", "block"), [(3, 80, 8), (5, 16, 24), (7, 8, 1)])
def test_sizes_that_are_no_powers_of_two(
    device: torch.device, group: int, head_dim: int, block: int
) -> None:
    check(device, [1, 12, 5], [50, 20, 37], q_heads=group, kv_heads=1, head_dim=head_dim,
          block=block)  # fmt: skip


def test_block_tables_of_large_blocks(device: torch.device) -> None:
    check(device, [1, 20], [300, 150], block=64)


def test_mixed_batch_with_padding_leaves_the_rest_alone(device: torch.device) -> None:
    new, context = [1, 0, 11, 8, 0, 1, 25], [40, 9, 60, 8, 0, 1, 25]
    check(device, new, context, padded_tokens=5)
    check(device, [0, 0], [3, 0], padded_tokens=2)


@pytest.mark.parametrize("dtype", NARROW)
@pytest.mark.parametrize("act", [F32, None])
def test_narrow_caches(device: torch.device, dtype: torch.dtype, act: torch.dtype | None) -> None:
    check(device, [1, 20], [70, 33], act=act or dtype, cache=dtype)


@pytest.mark.parametrize(
    "setting",
    [
        Setting(programs=1),
        Setting(programs=64),
        Setting(slots=3, programs=64),
        Setting(slots=0, programs=64),
        Setting(most_new=8),
    ],
)
def test_how_work_is_shared_out_is_not_seen(device: torch.device, setting: Setting) -> None:
    batch = on(device, ragged_batch(new=[1, 3, 8, 2], context=[70, 97, 45, 2], q_heads=2,
                                    kv_heads=1, head_dim=32))  # fmt: skip
    usual = run(batch, USUAL)
    assert torch.equal(run(batch, setting), usual)
    torch.testing.assert_close(usual, batch_on_cpu(batch).run(ORACLE), rtol=1e-5, atol=1e-5)


def batch_on_cpu(batch: Ragged) -> Ragged:
    return on(torch.device("cpu"), batch)


def one_of(batch: Ragged, row: int, begin: int, end: int) -> Ragged:
    """Some of the new tokens of one request, alone, the cache as it was then."""
    start, stop = batch.query_starts[row : row + 2].tolist()
    length = int(batch.context_lens[row]) - (stop - start) + end
    return replace(
        batch,
        q=batch.q[start + begin : start + end].contiguous(),
        block_tables=batch.block_tables[row : row + 1].contiguous(),
        query_starts=torch.tensor([0, end - begin], dtype=torch.int32, device=batch.q.device),
        context_lens=torch.tensor([length], dtype=torch.int32, device=batch.q.device),
    )


def pieces(batch: Ragged, row: int, size: int, setting: Setting) -> torch.Tensor:
    """One request's new tokens, ``size`` at a time."""
    start, stop = batch.query_starts[row : row + 2].tolist()
    cuts = range(0, stop - start, size)
    return torch.cat(
        [run(one_of(batch, row, cut, min(cut + size, stop - start)), setting) for cut in cuts]
    )


def test_a_request_has_the_same_bits_alone_and_in_a_batch(device: torch.device) -> None:
    new, context = [1, 20, 8, 40], [97, 64, 33, 47]
    batch = on(device, ragged_batch(new=new, context=context, q_heads=6, kv_heads=2, head_dim=32))
    together, at = run(batch), 0
    for row, count in enumerate(new):
        alone = pieces(batch, row, count, USUAL)
        assert torch.equal(alone, together[at : at + count]), row
        at += count


@pytest.mark.parametrize(("size", "other"), [(11, 22), (4, 7)])
def test_a_prompt_has_the_same_bits_in_pieces(device: torch.device, size: int, other: int) -> None:
    """Pieces that decode agree among themselves, and so do those that prefill."""
    batch = on(device, ragged_batch(new=[22], context=[71], q_heads=2, kv_heads=1, head_dim=32))
    assert torch.equal(pieces(batch, 0, size, USUAL), pieces(batch, 0, other, USUAL))


@pytest.mark.parametrize("size", [7, 11])
def test_invariant_tiles_give_the_same_bits_in_any_pieces(device: torch.device, size: int) -> None:
    invariant = Setting(decode=LARGER, prefill=LARGER, folds=True)
    batch = on(device, ragged_batch(new=[22], context=[71], q_heads=2, kv_heads=1, head_dim=32))
    assert torch.equal(pieces(batch, 0, size, invariant), pieces(batch, 0, 22, invariant))


def test_a_block_that_is_not_there_is_read_as_block_0(device: torch.device) -> None:
    batch = on(device, ragged_batch(new=[1, 9], context=[40, 20], q_heads=4, kv_heads=2,
                                    head_dim=32))  # fmt: skip
    for cache in (batch.k_cache, batch.v_cache):
        cache[0] = randn(*cache.shape[1:]).to(device)
    wrong, zeros = batch.block_tables.clone(), batch.block_tables.clone()
    wrong[0, 1], wrong[1, 0] = -5, 2**31 - 1
    zeros[0, 1], zeros[1, 0] = 0, 0
    got = run(replace(batch, block_tables=wrong))
    assert torch.equal(got, run(replace(batch, block_tables=zeros)))
    assert not torch.equal(got, run(batch))


def test_lengths_out_of_range_touch_no_other_request(device: torch.device) -> None:
    batch = on(device, ragged_batch(new=[1, 12, 1], context=[20, 20, 30], q_heads=2, kv_heads=1,
                                    head_dim=32))  # fmt: skip
    for cache in (batch.k_cache, batch.v_cache):
        cache.nan_to_num_(0.0)
    want = run(batch)
    lengths, starts = batch.context_lens.clone(), batch.query_starts.clone()
    lengths[0], lengths[1] = 10**6, 3
    assert torch.equal(run(replace(batch, context_lens=lengths))[13], want[13])
    starts[3] = 99
    assert torch.equal(run(replace(batch, query_starts=starts)), want)


@pytest.mark.parametrize("invariant", [False, True])
def test_tuned_tiles(device: torch.device, invariant: bool) -> None:
    batch = ragged_batch(new=[1, 40, 3], context=[600, 90, 3], q_heads=4, kv_heads=2, head_dim=64)
    there = on(device, batch)
    out = poison(*batch.q.shape).to(device)
    plan = attention.plan_step(
        Workspace(device), there.q, there.k_cache, there.block_tables, there.query_starts,
        there.context_lens, invariant=invariant,
    )  # fmt: skip
    for _ in range(2):  # a plan serves every layer
        attention.attend_paged(
            plan, out, there.q, there.k_cache, there.v_cache, there.block_tables, 0.125
        )
    torch.testing.assert_close(out.cpu(), batch.run(ORACLE), rtol=1e-5, atol=1e-5)


def test_ops(device: torch.device) -> None:
    ops = GpuOps()
    batch = ragged_batch(new=[1, 20], context=[33, 20], q_heads=4, kv_heads=2, head_dim=32)
    there = on(device, batch)
    torch.testing.assert_close(there.run(ops).cpu(), batch.run(ORACLE), rtol=1e-5, atol=1e-5)
    empty = on(device, ragged_batch(new=[0], context=[5], q_heads=4, kv_heads=2, head_dim=32))
    assert there.run(ops).shape == (21, 4, 32)
    assert empty.run(ops).shape == (0, 4, 32)
    nobody = replace(
        there, block_tables=there.block_tables[:0], query_starts=there.query_starts[:1],
        context_lens=there.context_lens[:0],
    )  # fmt: skip
    assert torch.equal(nobody.run(ops).cpu(), poison(21, 4, 32))


def test_every_value_is_multiplied_once(device: torch.device) -> None:
    """With equal scores, attention is the mean of values, whatever the scale of the keys."""
    batch = on(device, ragged_batch(new=[1, 12], context=[97, 40], q_heads=4, kv_heads=2,
                                    head_dim=32))  # fmt: skip
    flat = replace(batch, q=torch.zeros_like(batch.q))
    ones = torch.ones_like(batch.v_cache) * randn(1, 2, 1, 32).to(device)
    got = run(replace(flat, v_cache=ones))
    want = ones[0, :, 0].cpu().repeat_interleave(2, 0).expand(13, 4, 32)
    torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6)


def test_tiles_have_room_for_a_group() -> None:
    device = torch.device("cpu") if not torch.cuda.is_available() else torch.device("cuda")
    for op in ("attention_decode", "attention_prefill", "attention_invariant"):
        for row_bytes in (64, 128, 256, 512, 1024):
            tiles = attention.tiles_of(op, device, 71, row_bytes // 2, 2)
            assert tiles.rows >= 71
            assert tiles.split % tiles.keys == 0
    assert SMALL.queries(3) == 5


def test_a_plan_for_other_calls_is_refused(device: torch.device) -> None:
    """Its lists would lead the kernels out of their tensors."""
    ops = GpuOps()
    small = on(device, ragged_batch(new=[1], context=[9], q_heads=2, kv_heads=1, head_dim=32))
    large = on(device, ragged_batch(new=[1, 20], context=[40, 20], q_heads=2, kv_heads=1,
                                    head_dim=32))  # fmt: skip
    out = poison(*small.q.shape).to(device)
    other = ops.plan_attention(
        large.q, large.k_cache, large.block_tables, large.query_starts, large.context_lens
    )
    for plan in (other, "a plan"):
        with pytest.raises(KernelError, match="paged_attention: plan is"):
            ops.paged_attention(
                out, small.q, small.k_cache, small.v_cache, small.block_tables,
                small.query_starts, small.context_lens, 1.0, plan,
            )  # fmt: skip
    assert torch.equal(out.cpu(), poison(*small.q.shape))


def test_more_new_tokens_than_was_promised_harm_nobody(device: torch.device) -> None:
    """Those beyond are not computed, and the other requests are."""
    new, context = [1, 40, 3], [70, 40, 20]
    batch = on(device, ragged_batch(new=new, context=context, q_heads=2, kv_heads=1, head_dim=32))
    plan = make_plan(batch, Setting(most_new=3))
    assert plan.prefill_items.shape[0] == 0
    assert int(plan.counts[0]) <= len(plan.decode_items)
    got, want = run(batch, Setting(most_new=3)), run(batch)
    assert torch.equal(got[:1], want[:1])
    assert torch.equal(got[41:], want[41:])
    assert torch.equal(got[4:41], poison(37, 2, 32))
