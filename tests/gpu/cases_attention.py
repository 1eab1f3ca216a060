"""Paged attention: decoding, reading prompts, reading in chunks; caches in bfloat16 and e4m3.

A step's work is shared out once for all its layers, so that is a row of its own.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch.nn.attention.bias import causal_lower_right
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from kernels.fp8 import E4M3
from kernels.gpu import GpuOps
from kernels.gpu.attention_plan import attention_cost
from tests.gpu.cases import Case, Named, compiled, fp8_of, of_bytes
from tests.gpu.setting import Setting
from tests.gpu.shapes import shape_of
from tests.gpu.timing import Call

__all__ = ["cases"]

BLOCK = 16
BATCHES = (1, 16, 64, 256)
CONTEXTS = (1024, 8192, 32_768)
MOST_CACHED = 1 << 20
"""Tokens over all requests: of the 8B model's heads 4 GiB in bfloat16, and again for torch."""
READS = ((2048, 2048), (16_384, 16_384), (32_768, 32_768), (102_400, 102_400), (2048, 32_768))
DEFAULT = {("8b", "bf16", 256, 1, 1024), ("8b", "bf16", 16, 1, 8192), ("8b", "bf16", 1, 1, 32_768),
           ("8b", "fp8", 16, 1, 8192), ("8b", "bf16", 1, 16_384, 16_384)}  # fmt: skip


def cases(setting: Setting) -> Iterator[Named]:
    """Every batch and context that a cache of one layer may hold here."""
    works = [
        (batch, 1, context)
        for batch in BATCHES
        for context in CONTEXTS
        if batch * context <= MOST_CACHED
    ]
    works += [(1, new, context) for new, context in READS]
    for model in ("0.6b", "8b"):
        for kind in ("bf16", "fp8"):
            for batch, new, context in works:
                name = "decode" if new == 1 else "read"
                sizes = f"{batch}x{new}-of-{context}"
                default = (model, kind, batch, new, context) in DEFAULT
                make = partial(_case, model, kind, batch, new, context)
                yield f"{name}-{kind}-{model}-{sizes}", make, default
    for batch in BATCHES:
        yield f"plan-bf16-8b-{batch}x1-of-1024", partial(_planning, batch), batch == 256


class Paged(NamedTuple):
    """Requests that are all alike, their blocks in random order."""

    q: torch.Tensor  # [R*new, Hq, D]
    k_cache: torch.Tensor  # [N, Hkv, B, D]
    v_cache: torch.Tensor
    tables: torch.Tensor  # [R, blocks]
    starts: torch.Tensor  # [R+1]
    lengths: torch.Tensor  # [R]
    new: int
    context: int

    def flat(self, cache: torch.Tensor) -> torch.Tensor:
        """A cache as other attentions want it: ``[R, Hkv, context, D]``."""
        pages = cache[self.tables.long()].to(self.q.dtype)  # [R, blocks, Hkv, B, D]
        return pages.permute(0, 2, 1, 3, 4).flatten(2, 3).contiguous()

    @property
    def queries(self) -> torch.Tensor:
        """``[R, Hq, new, D]``."""
        rows = len(self.lengths)
        return self.q.view(rows, self.new, *self.q.shape[1:]).transpose(1, 2).contiguous()


def _paged(model: str, kind: str, batch: int, new: int, context: int, setting: Setting) -> Paged:
    shape, device = shape_of(setting, model), setting.device
    batch, context = setting.size(batch, 2), setting.size(context, 48)
    new = setting.size(new, 32)
    pages = -(-context // BLOCK)
    heads, dim = shape.num_kv_heads, shape.head_dim
    caches = [
        torch.randn(batch * pages + 1, heads, BLOCK, dim, device=device).to(setting.act)
        for _ in range(2)
    ]
    if kind == "fp8":
        caches = [cache.to(E4M3) for cache in caches]
    return Paged(
        torch.randn(batch * new, shape.num_heads, dim, device=device).to(setting.act),
        caches[0],
        caches[1],
        (torch.randperm(batch * pages, device=device) + 1).int().view(batch, pages),
        (torch.arange(batch + 1, device=device) * new).int(),
        torch.full((batch,), context, dtype=torch.int32, device=device),
        new,
        context,
    )


def _case(
    model: str, kind: str, batch: int, new: int, context: int, setting: Setting, ops: GpuOps
) -> Case:
    paged = _paged(model, kind, batch, new, context, setting)
    out, batch = torch.empty_like(paged.q), len(paged.lengths)
    _, q_heads, dim = out.shape
    cost = attention_cost(
        [paged.new] * batch, [paged.context] * batch, q_heads, paged.k_cache.shape[1], dim,
        out.element_size(), paged.k_cache.element_size(),
    )  # fmt: skip
    return Case(
        _ours(ops, paged, out, kind),
        cost,
        {
            "torch": lambda: _sdpa(paged),
            "flex": lambda: _flex(setting, paged),
            "flashinfer": lambda: _flashinfer(paged),
        },
        out.view(batch, paged.new, q_heads, dim).transpose(1, 2),
    )


def _ours(ops: GpuOps, paged: Paged, out: torch.Tensor, kind: str) -> Call:
    q, k_cache, v_cache, tables, starts, lengths, new, _ = paged
    scale = q.shape[2] ** -0.5
    plan = ops.plan_attention(q, k_cache, tables, starts, lengths, new)
    if kind == "bf16":
        return lambda: ops.paged_attention(
            out, q, k_cache, v_cache, tables, starts, lengths, scale, plan
        )
    one = torch.ones(k_cache.shape[1], device=q.device)
    return lambda: fp8_of(ops).paged_attention_fp8(
        out, q, k_cache, v_cache, one, one, tables, starts, lengths, scale, plan
    )


def _planning(batch: int, setting: Setting, ops: GpuOps) -> Case:
    q, k_cache, _, tables, starts, lengths, new, _ = _paged("8b", "bf16", batch, 1, 1024, setting)
    return Case(
        lambda: ops.plan_attention(q, k_cache, tables, starts, lengths, new),
        of_bytes(starts, lengths),
        {},
    )


def _sdpa(paged: Paged) -> Call:
    """On contiguous keys and values in the queries' type: it knows no pages and no e4m3."""
    queries, keys, values = paged.queries, paged.flat(paged.k_cache), paged.flat(paged.v_cache)
    whole = paged.new == paged.context
    mask = None if whole or paged.new == 1 else causal_lower_right(paged.new, paged.context)

    return lambda: F.scaled_dot_product_attention(
        queries, keys, values, attn_mask=mask, is_causal=whole, enable_gqa=True
    )


def _flex(setting: Setting, paged: Paged) -> Call:
    queries, keys, values = paged.queries, paged.flat(paged.k_cache), paged.flat(paged.v_cache)
    before = paged.context - paged.new
    mask: Any = None
    if paged.new > 1:
        mask = create_block_mask(
            lambda b, h, q, k: q + before >= k, None, None, paged.new, paged.context,
            device=str(setting.device),
        )  # fmt: skip
    attend: Any = flex_attention if setting.dry else compiled(setting, flex_attention)
    return lambda: attend(queries, keys, values, block_mask=mask, enable_gqa=True)


def _flashinfer(paged: Paged) -> Call:
    import flashinfer  # type: ignore[import-not-found]

    rows, blocks = paged.tables.shape
    device = paged.q.device
    space = torch.empty(256 << 20, dtype=torch.uint8, device=device)
    first = torch.arange(rows + 1, dtype=torch.int32, device=device) * blocks
    last = torch.full((rows,), (paged.context - 1) % BLOCK + 1, dtype=torch.int32, device=device)
    sizes = (paged.q.shape[1], paged.k_cache.shape[1], paged.q.shape[2], BLOCK)
    types = {"q_data_type": paged.q.dtype, "kv_data_type": paged.k_cache.dtype}
    indices = paged.tables.flatten()
    if paged.new == 1:
        wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(space, "HND")
        wrapper.plan(first, indices, last, *sizes, **types)
    else:
        wrapper = flashinfer.BatchPrefillWithPagedKVCacheWrapper(space, "HND")
        wrapper.plan(paged.starts, first, indices, last, *sizes, causal=True, **types)
    return lambda: wrapper.run(paged.q, (paged.k_cache, paged.v_cache))
