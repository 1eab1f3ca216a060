"""The oracle itself, against formulations that share no code with it."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from kernels.reference import ReferenceOps
from tests.kernels.comparisons import (
    BF16,
    EPS,
    F16,
    F32,
    draws,
    poison,
    ragged_batch,
    randn,
    rotary_table,
)

OPS = ReferenceOps()


@pytest.mark.parametrize("dtype", [F32, BF16, F16])
def test_norms_against_torch(dtype: torch.dtype) -> None:
    x, weight = randn(5, 48, dtype=dtype), randn(48, seed=1, dtype=dtype)
    out = poison(5, 48, dtype=dtype)
    OPS.rms_norm(out, x, weight, EPS)
    want = F.rms_norm(x.double(), (48,), weight.double(), EPS)
    assert torch.equal(out, want.to(dtype))
    residual = randn(5, 48, seed=3, dtype=dtype)
    before = residual.clone()
    OPS.add_rms_norm(out, residual, x, weight, EPS)
    assert torch.equal(residual, before + x)
    assert torch.equal(
        out, F.rms_norm((before + x).double(), (48,), weight.double(), EPS).to(dtype)
    )


def test_linear_swiglu_embed_gather_against_torch() -> None:
    x, weight = randn(4, 30), randn(7, 30, seed=1)
    out = poison(4, 7)
    OPS.linear(out, x, OPS.pack_linear(weight))
    torch.testing.assert_close(out, F.linear(x, weight))
    gated = poison(4, 15)
    OPS.swiglu(gated, x)
    torch.testing.assert_close(gated, F.silu(x[:, :15]) * x[:, 15:])
    ids = torch.tensor([3, 0, 6])
    rows = poison(3, 30)
    OPS.embed(rows, ids, weight)
    assert torch.equal(rows, F.embedding(ids, weight))
    OPS.gather_rows(rows, weight, ids)
    assert torch.equal(rows, weight[[3, 0, 6]])


@pytest.mark.parametrize("head_dim", [4, 64])
def test_rope_as_complex_numbers(head_dim: int) -> None:
    """Element i and i + D/2 are one complex number, turned by position * theta_i."""
    tokens, half = 6, head_dim // 2
    qkv = randn(tokens, 3 * head_dim)
    positions = torch.tensor([0, 1, 2, 100, 7, 3])
    ones, cache = torch.ones(head_dim), torch.zeros(2, 1, 8, head_dim)
    values = torch.zeros_like(cache)
    q_out = poison(tokens, 1, head_dim)
    slots = torch.arange(8, 8 + tokens)
    OPS.qk_norm_rope_write(
        q_out, qkv, ones, ones, rotary_table(101, head_dim), positions, slots, cache, values, EPS
    )
    heads = F.rms_norm(qkv.view(tokens, 3, head_dim).double(), (head_dim,), eps=EPS)
    steps = 10_000.0 ** (-torch.arange(half, dtype=torch.float64) * 2 / head_dim)
    turn = torch.polar(torch.ones(tokens, half).double(), positions[:, None] * steps)
    turned = torch.complex(heads[..., :half], heads[..., half:]) * turn[:, None]
    want = torch.cat((turned.real, turned.imag), dim=-1).float()
    torch.testing.assert_close(q_out[:, 0], want[:, 0], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(cache[1, 0, :tokens], want[:, 1], atol=1e-5, rtol=1e-5)
    assert torch.equal(values[1, 0, :tokens], qkv[:, 2 * head_dim :])
    assert not bool(cache[0].any())


def test_rope_against_transformers() -> None:
    """Hugging Face's own function, and proof that it imports beside a package called kernels."""
    import kernels

    qwen3 = pytest.importorskip("transformers.models.qwen3.modeling_qwen3")
    assert not hasattr(kernels, "__version__")
    assert qwen3.Qwen3ForCausalLM is not None
    q, k = randn(1, 2, 5, 16), randn(1, 2, 5, 16, seed=1)
    table = rotary_table(5, 16)
    cos, sin = (part.repeat(1, 2)[None] for part in table.chunk(2, dim=1))
    want_q, want_k = qwen3.apply_rotary_pos_emb(q, k, cos, sin)
    qkv = torch.cat((q, k, k), dim=1)[0].transpose(0, 1).reshape(5, -1).contiguous()
    q_out, cache = poison(5, 2, 16), torch.zeros(1, 2, 8, 16)
    # A norm that changes nothing: unit heads and a weight of one over sqrt(D) times their length.
    scale = torch.cat((q, k, k), dim=1)[0].square().mean(-1).sqrt().transpose(0, 1)
    OPS.qk_norm_rope_write(
        q_out, qkv, torch.ones(16), torch.ones(16), table, torch.arange(5), torch.arange(5), cache,
        torch.zeros_like(cache), 0.0,
    )  # fmt: skip
    got_k = cache[0, :, :5].transpose(0, 1) * scale[:, 2:4, None]
    torch.testing.assert_close(q_out * scale[:, :2, None], want_q[0].transpose(0, 1))
    torch.testing.assert_close(got_k, want_k[0].transpose(0, 1))


@pytest.mark.parametrize(("q_heads", "kv_heads"), [(1, 1), (4, 4), (8, 2), (3, 1)])
def test_attention_against_unpaged_sdpa(q_heads: int, kv_heads: int) -> None:
    batch = ragged_batch(
        new=[1, 6, 0, 3], context=[12, 6, 9, 40], q_heads=q_heads, kv_heads=kv_heads, head_dim=16,
        block=8,
    )  # fmt: skip
    out = batch.run(OPS)
    for row, (start, new, length) in enumerate([(0, 1, 12), (1, 6, 6), (7, 0, 9), (7, 3, 40)]):
        for i in range(new):
            seen = length - new + i + 1
            slots = [(int(batch.block_tables[row, p // 8]), p % 8) for p in range(seen)]
            k, v = (
                torch.stack([cache[b, :, o] for b, o in slots], dim=1)
                for cache in (batch.k_cache, batch.v_cache)
            )
            want = F.scaled_dot_product_attention(
                batch.q[start + i, :, None][None], k[None], v[None], enable_gqa=True
            )
            torch.testing.assert_close(out[start + i], want[0, :, 0], atol=1e-5, rtol=1e-5)


def test_logprobs_against_log_softmax() -> None:
    logits = randn(4, 20)
    chosen = torch.tensor([3, 19, 0, 7])
    values, ids, ranks = poison(4, 6), torch.zeros(4, 6, dtype=torch.int64), torch.zeros(4).long()
    OPS.logprobs(values, ids, ranks, logits, chosen, 5)
    want = torch.log_softmax(logits, dim=1)
    top = want.topk(5)
    assert torch.equal(ids, torch.cat((chosen[:, None], top.indices), dim=1))
    torch.testing.assert_close(values, want.gather(1, ids))
    order = logits.argsort(dim=1, descending=True)
    assert ranks.tolist() == [order[r].tolist().index(int(chosen[r])) + 1 for r in range(4)]


@pytest.mark.parametrize(("top_k", "top_p", "min_p"), [(5, 1.0, 0.0), (0, 0.6, 0.0), (7, 0.8, 0.1)])
def test_kept_tokens_against_transformers(top_k: int, top_p: float, min_p: float) -> None:
    """The tokens that are ever drawn are those that Hugging Face's warpers leave."""
    hf = pytest.importorskip("transformers.generation.logits_process")
    logits = randn(1, 30) * 2
    warped = hf.TemperatureLogitsWarper(0.7)(None, logits)
    if top_k:
        warped = hf.TopKLogitsWarper(top_k)(None, warped)
    if top_p < 1:
        warped = hf.TopPLogitsWarper(top_p)(None, warped)
    if min_p:
        warped = hf.MinPLogitsWarper(min_p)(None, warped)
    kept = {int(i) for i in warped[0].isfinite().nonzero()}
    drawn = draws(
        logits.expand(4000, -1).contiguous(), temperature=0.7, top_k=top_k, top_p=top_p, min_p=min_p
    ).run(OPS)
    seen = set(drawn.tolist())
    assert seen <= kept
    rare = math.exp(min(float(warped[0, i]) for i in kept) - float(warped.logsumexp(1)))
    assert seen == kept or rare < 2e-3


def test_repetition_penalty_against_transformers() -> None:
    hf = pytest.importorskip("transformers.generation.logits_process")
    logits, ids = randn(1, 30), torch.tensor([[3, 4, 4, 29]])
    want = hf.RepetitionPenaltyLogitsProcessor(1.3)(ids, logits.clone())
    unique = torch.tensor([3, 4, 29])
    OPS.apply_penalties(
        logits, torch.zeros_like(unique), unique, torch.ones(len(unique), dtype=torch.int32),
        torch.tensor([1.3]), torch.zeros(1), torch.zeros(1),
    )  # fmt: skip
    torch.testing.assert_close(logits, want)
