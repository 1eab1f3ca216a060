"""The comparisons have teeth: each planted bug must make the comparison of its op fail."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from kernels.cpu.fallback import TorchOps
from kernels.reference import ReferenceOps
from tests.kernels import comparisons as compare
from tests.kernels.comparisons import BF16, F32

BASE = ReferenceOps()


def mutant(op: str, body: Callable[..., Any]) -> TorchOps:
    """The torch backend with one op replaced; ``body`` gets the op's own arguments."""
    ops = TorchOps()
    setattr(ops, op, body)
    return ops


def must_catch(op: str, body: Callable[..., Any], **shape: Any) -> None:
    """The comparison accepts the real op at this shape and refuses the mutant."""
    check = getattr(compare, op)
    check(TorchOps(), **shape)
    with pytest.raises(AssertionError):
        check(mutant(op, body), **shape)


def shifted(values: torch.Tensor, by: int, end: int) -> torch.Tensor:
    """Values off by ``by``, kept below ``end``."""
    return ((values + by) % end).to(values.dtype)


def rms_without_eps(out: Any, x: Any, weight: Any, eps: float) -> None:
    BASE.rms_norm(out, x, weight, 0.0)


def rms_of_sum(out: Any, x: Any, weight: Any, eps: float) -> None:
    out.copy_(x / (x.square().sum(-1, keepdim=True) + eps).sqrt() * weight)


def rms_gemma(out: Any, x: Any, weight: Any, eps: float) -> None:
    BASE.rms_norm(out, x, weight + 1, eps)


@pytest.mark.parametrize("body", [rms_without_eps, rms_of_sum, rms_gemma])
def test_rms_norm(body: Callable[..., None]) -> None:
    must_catch("rms_norm", body, tokens=6, width=40)


def add_keeps_residual(out: Any, residual: Any, x: Any, weight: Any, eps: float) -> None:
    BASE.add_rms_norm(out, residual.clone(), x, weight, eps)


def test_add_rms_norm() -> None:
    must_catch("add_rms_norm", add_keeps_residual, tokens=3, width=40)


def test_embed_and_gather() -> None:
    def embed(out: Any, ids: Any, table: Any) -> None:
        BASE.embed(out, shifted(ids, 1, table.shape[0]), table)

    def gather(out: Any, x: Any, rows: Any) -> None:
        BASE.gather_rows(out, x, shifted(rows, 1, x.shape[0]))

    must_catch("embed", embed, tokens=5, vocab=9, width=8)
    must_catch("gather_rows", gather, tokens=5, rows=3, width=8)


def qk(change: Callable[[list[Any]], None]) -> Callable[..., None]:
    """The op with its list of arguments changed."""

    def body(*arguments: Any) -> None:
        values = list(arguments)
        change(values)
        BASE.qk_norm_rope_write(*values)

    return body


def rope_backwards(a: list[Any]) -> None:
    half = a[4].shape[1] // 2
    a[4] = torch.cat((a[4][:, :half], -a[4][:, half:]), dim=1)


def rope_swapped(a: list[Any]) -> None:
    a[4] = a[4].roll(a[4].shape[1] // 2, dims=1)


def rope_late(a: list[Any]) -> None:
    a[5] = shifted(a[5], 1, a[4].shape[0])


def slot_late(a: list[Any]) -> None:
    a[6] = shifted(a[6], 1, a[7].shape[0] * a[7].shape[2])


def slot_by_row(a: list[Any]) -> None:
    a[6] = a[6].sort().values


def weights_swapped(a: list[Any]) -> None:
    a[2], a[3] = a[3], a[2]


def caches_swapped(a: list[Any]) -> None:
    a[7], a[8] = a[8], a[7]


@pytest.mark.parametrize(
    "change",
    [
        rope_backwards,
        rope_swapped,
        rope_late,
        slot_late,
        slot_by_row,
        weights_swapped,
        caches_swapped,
    ],
)
def test_qk_norm_rope_write(change: Callable[[list[Any]], None]) -> None:
    shape = {"tokens": 9, "q_heads": 4, "kv_heads": 2, "head_dim": 32, "padded": 2}
    must_catch("qk_norm_rope_write", qk(change), **shape)


def test_rope_of_neighbouring_pairs() -> None:
    """The other convention, GPT-J's, which pairs 2i with 2i+1."""

    def body(q_out: Any, qkv: Any, *rest: Any) -> None:
        dim = q_out.shape[2]
        order = torch.arange(dim).view(2, dim // 2).T.flatten()
        heads = qkv.view(qkv.shape[0], -1, dim)[:, :, order]
        BASE.qk_norm_rope_write(q_out, heads.reshape(qkv.shape).contiguous(), *rest)

    must_catch("qk_norm_rope_write", body, tokens=3, q_heads=2, kv_heads=1, head_dim=16)


def attention(change: Callable[[list[Any]], None]) -> Callable[..., None]:
    """The op with its list of arguments changed."""

    def body(*arguments: Any) -> None:
        values = list(arguments)
        change(values)
        BASE.paged_attention(*values)

    return body


def scale_forgotten(a: list[Any]) -> None:
    a[7] = 1.0


def sees_one_less(a: list[Any]) -> None:
    a[6] = torch.maximum(a[6] - 1, a[5].diff())


def heads_interleaved(a: list[Any]) -> None:
    q_heads, kv_heads = a[1].shape[1], a[2].shape[1]
    a[1] = a[1].view(-1, q_heads // kv_heads, kv_heads, a[1].shape[2])
    a[1] = a[1].transpose(1, 2).reshape(a[1].shape[0], q_heads, -1).contiguous()


def values_are_keys(a: list[Any]) -> None:
    a[3] = a[2]


@pytest.mark.parametrize(
    "change", [scale_forgotten, sees_one_less, heads_interleaved, values_are_keys]
)
def test_paged_attention(change: Callable[[list[Any]], None]) -> None:
    shape = {"new": [1, 5, 0], "context": [17, 30, 4], "q_heads": 6, "kv_heads": 2, "head_dim": 32}
    must_catch("paged_attention", attention(change), **shape)


def test_attention_that_is_not_causal() -> None:
    def body(
        out: Any, q: Any, k: Any, v: Any, tables: Any, starts: Any, lengths: Any, s: float
    ) -> None:
        for row in range(tables.shape[0]):
            for token in range(int(starts[row]), int(starts[row + 1])):
                BASE.paged_attention(
                    out[token : token + 1], q[token : token + 1], k, v, tables[row : row + 1],
                    torch.tensor([0, 1], dtype=torch.int32), lengths[row : row + 1], s,
                )  # fmt: skip

    shape = {"new": [4], "context": [9], "q_heads": 2, "kv_heads": 2, "head_dim": 16}
    must_catch("paged_attention", body, **shape)


def test_swiglu() -> None:
    def swapped(out: Any, gate_up: Any) -> None:
        BASE.swiglu(out, gate_up.roll(out.shape[1], dims=1).contiguous())

    def gelu(out: Any, gate_up: Any) -> None:
        gate, up = gate_up.chunk(2, dim=1)
        out.copy_(torch.nn.functional.gelu(gate) * up)

    must_catch("swiglu", swapped, tokens=2, width=20)
    must_catch("swiglu", gelu, tokens=2, width=20)


def test_linear() -> None:
    def skips_last(out: Any, x: Any, packed: Any) -> None:
        out.copy_(x[:, :-1].float() @ packed.weight[:, :-1].T)

    def rounds_activations(out: Any, x: Any, packed: Any) -> None:
        out.copy_(x.to(BF16).float() @ packed.weight.T)

    def rounds_output(out: Any, x: Any, packed: Any) -> None:
        out.copy_((x @ packed.weight.T).to(BF16))

    for body in (skips_last, rounds_activations, rounds_output):
        must_catch("linear", body, tokens=3, width=600, features=20, act=F32)


def test_penalties() -> None:
    def presence_on_prompt(logits: Any, rows: Any, ids: Any, counts: Any, *p: Any) -> None:
        BASE.apply_penalties(logits, rows, ids, counts.clamp(min=1), *p)

    def always_divides(logits: Any, rows: Any, ids: Any, counts: Any, r: Any, *p: Any) -> None:
        real = rows < logits.shape[0]
        at = rows[real], ids[real]
        signs = logits[at].sign()
        logits[at] *= signs
        logits[at] /= r[at[0]]
        logits[at] *= signs
        BASE.apply_penalties(logits, rows, ids, counts, torch.ones_like(r), *p)

    def padding_counts(logits: Any, rows: Any, *rest: Any) -> None:
        BASE.apply_penalties(logits, rows % logits.shape[0], *rest)

    for body in (presence_on_prompt, always_divides, padding_counts):
        must_catch("apply_penalties", body, rows=3, vocab=20, count=30)

    def overwrites(logits: Any, rows: Any, ids: Any, values: Any) -> None:
        real = rows < logits.shape[0]
        logits[rows[real], ids[real]] = values[real]

    must_catch("add_bias", overwrites, rows=3, vocab=20, count=30)


def test_token_mask() -> None:
    def backwards(logits: Any, mask: Any) -> None:
        BASE.apply_token_mask(logits, ~mask)

    def signed_words(logits: Any, mask: Any) -> None:
        BASE.apply_token_mask(logits, mask.clamp(min=0))

    for body in (backwards, signed_words):
        must_catch("apply_token_mask", body, rows=3, vocab=70)


def sampling(index: int, change: Callable[[Any], Any]) -> Callable[..., None]:
    """``sample`` with its argument ``index`` changed."""

    def body(*arguments: Any) -> None:
        values = list(arguments)
        values[index] = change(values[index])
        BASE.sample(*values)

    return body


@pytest.mark.parametrize(
    ("index", "change"),
    [
        (2, lambda t: torch.where(t > 0, 1.0, t)),
        (2, lambda t: t.clamp(min=0.5)),
        (3, lambda k: torch.where(k == 0, k, k + 1)),
        (3, torch.zeros_like),
        (4, lambda p: (p * 0.95).contiguous()),
        (5, lambda m: m * 0.5),
        (6, lambda s: s & 0xFFFFFFFF),
        (7, lambda p: p + 1),
        (7, lambda p: p & 0xFFFF),
    ],
)
def test_sample(index: int, change: Callable[[Any], Any]) -> None:
    must_catch("sample", sampling(index, change), rows=200, vocab=60)


def test_logprobs() -> None:
    def not_normalised(lp: Any, ids: Any, ranks: Any, logits: Any, chosen: Any, k: int) -> None:
        BASE.logprobs(lp, ids, ranks, logits, chosen, k)
        lp.copy_(logits.gather(1, ids))

    def rank_of_ties(lp: Any, ids: Any, ranks: Any, logits: Any, chosen: Any, k: int) -> None:
        BASE.logprobs(lp, ids, ranks, logits, chosen, k)
        ranks.copy_((logits >= logits.gather(1, chosen[:, None])).sum(1))

    def high_ids_first(lp: Any, ids: Any, ranks: Any, logits: Any, chosen: Any, k: int) -> None:
        vocab = logits.shape[1]
        BASE.logprobs(lp, ids, ranks, logits.flip(1).contiguous(), vocab - 1 - chosen, k)
        ids.copy_(vocab - 1 - ids)

    for body in (not_normalised, rank_of_ties, high_ids_first):
        must_catch("logprobs", body, rows=3, vocab=50, k=5)
