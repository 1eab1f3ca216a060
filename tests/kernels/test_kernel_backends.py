"""Every backend against the oracle, over the shapes where kernels break."""

from __future__ import annotations

import pytest
import torch

from kernels import Ops, cpu
from kernels.cpu.fallback import TorchOps
from tests.kernels import comparisons as compare
from tests.kernels.comparisons import BF16, F16, F32

DTYPES = [(F32, F32), (F32, BF16), (F32, F16), (BF16, BF16), (F16, F16), (BF16, F32)]


@pytest.fixture(params=["torch", "native"], scope="module")
def ops(request: pytest.FixtureRequest) -> Ops:
    return TorchOps() if request.param == "torch" else cpu.load()


@pytest.mark.parametrize(("act", "weight"), DTYPES)
@pytest.mark.parametrize("tokens", [0, 1, 5, 70])
@pytest.mark.parametrize("width", [1, 7, 8, 64, 130])
def test_row_ops(ops: Ops, tokens: int, width: int, act: torch.dtype, weight: torch.dtype) -> None:
    compare.embed(ops, tokens=tokens, vocab=33, width=width, act=act, weight=weight)
    compare.rms_norm(ops, tokens=tokens, width=width, act=act, weight=weight)
    compare.add_rms_norm(ops, tokens=tokens, width=width, act=act, weight=weight)
    compare.swiglu(ops, tokens=tokens, width=width, act=act)
    compare.gather_rows(ops, tokens=tokens + 1, rows=tokens, width=width, act=act)


@pytest.mark.parametrize(("act", "weight"), DTYPES)
@pytest.mark.parametrize("head_dim", [2, 10, 32, 64, 128, 256])
@pytest.mark.parametrize(("tokens", "q_heads", "kv_heads"), [(1, 1, 1), (19, 6, 3), (40, 16, 1)])
def test_qk_norm_rope_write(
    ops: Ops,
    tokens: int,
    q_heads: int,
    kv_heads: int,
    head_dim: int,
    act: torch.dtype,
    weight: torch.dtype,
) -> None:
    compare.qk_norm_rope_write(
        ops,
        tokens=tokens,
        q_heads=q_heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        act=act,
        weight=weight,
        cache=weight,
        padded=tokens // 4,
    )


@pytest.mark.parametrize("cache", [F32, BF16, F16])
@pytest.mark.parametrize("block", [1, 5, 16, 128])
def test_slots_of_any_block_size(ops: Ops, block: int, cache: torch.dtype) -> None:
    compare.qk_norm_rope_write(
        ops, tokens=23, q_heads=2, kv_heads=2, head_dim=32, block=block, cache=cache
    )


@pytest.mark.parametrize(("act", "cache"), [(F32, F32), (F32, BF16), (F32, F16), (BF16, BF16)])
@pytest.mark.parametrize("head_dim", [8, 32, 64, 128, 256])
@pytest.mark.parametrize(("q_heads", "kv_heads"), [(1, 1), (2, 2), (4, 2), (6, 2), (16, 1)])
def test_attention_heads(
    ops: Ops, q_heads: int, kv_heads: int, head_dim: int, act: torch.dtype, cache: torch.dtype
) -> None:
    compare.paged_attention(
        ops,
        new=[1, 0, 5, 2],
        context=[1, 3, 5, 37],
        q_heads=q_heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        act=act,
        cache=cache,
        padded_tokens=2,
    )


@pytest.mark.parametrize(
    ("new", "context"),
    [
        ([], []),
        ([0], [0]),
        ([0, 0], [7, 0]),
        ([1], [1]),
        ([1, 1, 1, 1], [15, 16, 17, 200]),
        ([15], [15]),
        ([16], [16]),
        ([17], [17]),
        ([3, 1, 0, 9], [63, 64, 65, 66]),
        ([130], [131]),
        ([64, 1], [256, 129]),
    ],
)
@pytest.mark.parametrize("block", [1, 16, 24])
def test_attention_lengths(ops: Ops, new: list[int], context: list[int], block: int) -> None:
    compare.paged_attention(
        ops, new=new, context=context, q_heads=4, kv_heads=2, head_dim=32, block=block
    )


@pytest.mark.parametrize("act", [F32, BF16])
@pytest.mark.parametrize("weight", [F32, BF16, F16])
@pytest.mark.parametrize("tokens", [0, 1, 2, 3, 6, 7, 13, 65])
@pytest.mark.parametrize(("width", "features"), [(1, 1), (3, 16), (64, 17), (300, 80), (600, 33)])
def test_linear(
    ops: Ops, tokens: int, width: int, features: int, act: torch.dtype, weight: torch.dtype
) -> None:
    for out in {act, F32}:
        compare.linear(
            ops, tokens=tokens, width=width, features=features, act=act, weight=weight, out=out
        )


@pytest.mark.parametrize(("rows", "vocab", "count"), [(1, 1, 1), (3, 50, 0), (4, 100, 37)])
def test_logit_edits(ops: Ops, rows: int, vocab: int, count: int) -> None:
    compare.apply_penalties(ops, rows=rows, vocab=vocab, count=count)
    compare.add_bias(ops, rows=rows, vocab=vocab, count=count)
    compare.apply_token_mask(ops, rows=rows, vocab=vocab)


@pytest.mark.parametrize(("rows", "vocab"), [(1, 1), (20, 2), (300, 17), (400, 1000), (40, 20011)])
def test_sample(ops: Ops, rows: int, vocab: int) -> None:
    compare.sample(ops, rows=rows, vocab=vocab)


@pytest.mark.parametrize(
    ("rows", "vocab", "k"),
    [(1, 1, 0), (1, 1, 1), (3, 50, 5), (4, 1000, 0), (2, 999, 20), (2, 64, 64)],
)
def test_logprobs(ops: Ops, rows: int, vocab: int, k: int) -> None:
    compare.logprobs(ops, rows=rows, vocab=vocab, k=k)
