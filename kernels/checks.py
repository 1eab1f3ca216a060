"""Argument checks shared by the backends: one function an op, each a microsecond or a few.

They look at shapes, dtypes, devices and layout only, never at values.
"""

from __future__ import annotations

from collections.abc import Collection

import torch

from kernels.interface import KernelError, PackedLinear

__all__ = [
    "FLOAT_DTYPES",
    "check_add_bias",
    "check_add_rms_norm",
    "check_apply_penalties",
    "check_apply_token_mask",
    "check_embed",
    "check_gather_rows",
    "check_linear",
    "check_logprobs",
    "check_paged_attention",
    "check_qk_norm_rope_write",
    "check_rms_norm",
    "check_sample",
    "check_swiglu",
    "check_weight",
]

FLOAT_DTYPES = frozenset((torch.float32, torch.bfloat16, torch.float16))
_F32 = torch.float32
_I64 = torch.int64
_I32 = torch.int32


def _sizes(op: str, name: str, tensor: torch.Tensor, letters: str) -> torch.Size:
    """The shape of ``tensor``, which must have as many dimensions as ``letters`` has."""
    shape = tensor.shape
    if len(shape) != letters.count(",") + 1:
        raise KernelError(f"{op}: {name} must be {letters}, got shape {list(shape)}")
    return shape


def _is(
    op: str, name: str, tensor: torch.Tensor, shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    """``tensor`` must have exactly this shape and dtype, and be contiguous."""
    if tensor.dtype is dtype and tensor.shape == shape and tensor.is_contiguous():
        return
    found = f"{tensor.dtype} {list(tensor.shape)} with strides {list(tensor.stride())}"
    raise KernelError(f"{op}: {name} must be a contiguous {dtype} {list(shape)}, got {found}")


def _float(op: str, name: str, tensor: torch.Tensor) -> torch.dtype:
    """The dtype of ``tensor``, which must be one of the three float dtypes."""
    dtype = tensor.dtype
    if dtype not in FLOAT_DTYPES:
        raise KernelError(f"{op}: {name} must be float32, bfloat16 or float16, got {dtype}")
    return dtype


def check_embed(out: torch.Tensor, ids: torch.Tensor, table: torch.Tensor) -> torch.Size:
    """See ``Ops.embed``; gives [T, H]."""
    tokens, width = shape = _sizes("embed", "out", out, "[T,H]")
    _is("embed", "out", out, (tokens, width), _float("embed", "out", out))
    _is("embed", "ids", ids, (tokens,), _I64)
    vocab = _sizes("embed", "table", table, "[V,H]")[0]
    _is("embed", "table", table, (vocab, width), _float("embed", "table", table))
    return shape


def check_rms_norm(out: torch.Tensor, x: torch.Tensor, weight: torch.Tensor) -> torch.Size:
    """See ``Ops.rms_norm``; gives [T, H]."""
    shape = _sizes("rms_norm", "x", x, "[T,H]")
    act = _float("rms_norm", "x", x)
    _is("rms_norm", "x", x, shape, act)
    _is("rms_norm", "out", out, shape, act)
    _is("rms_norm", "weight", weight, (shape[1],), _float("rms_norm", "weight", weight))
    return shape


def check_add_rms_norm(
    out: torch.Tensor, residual: torch.Tensor, x: torch.Tensor, weight: torch.Tensor
) -> torch.Size:
    """See ``Ops.add_rms_norm``; gives [T, H]."""
    shape = _sizes("add_rms_norm", "x", x, "[T,H]")
    act = _float("add_rms_norm", "x", x)
    _is("add_rms_norm", "x", x, shape, act)
    _is("add_rms_norm", "residual", residual, shape, act)
    _is("add_rms_norm", "out", out, shape, act)
    _is("add_rms_norm", "weight", weight, (shape[1],), _float("add_rms_norm", "weight", weight))
    return shape


def _check_caches(
    op: str,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    head_dim: int,
    dtypes: Collection[torch.dtype] = FLOAT_DTYPES,
) -> tuple[int, int, int]:
    """Check both caches; give (blocks, key-value heads, block size)."""
    blocks, kv_heads, block_size, _ = shape = _sizes(op, "k_cache", k_cache, "[N,Hkv,B,D]")
    if shape[3] != head_dim:
        raise KernelError(f"{op}: k_cache has head_dim {shape[3]}, the heads have {head_dim}")
    if blocks < 1 or kv_heads < 1 or block_size < 1:
        raise KernelError(f"{op}: k_cache must not be empty, got shape {list(shape)}")
    dtype = k_cache.dtype
    if dtype not in dtypes:
        raise KernelError(f"{op}: k_cache must be one of {sorted(map(str, dtypes))}, got {dtype}")
    _is(op, "k_cache", k_cache, shape, dtype)
    _is(op, "v_cache", v_cache, shape, dtype)
    return blocks, kv_heads, block_size


def check_qk_norm_rope_write(
    q_out: torch.Tensor,
    qkv: torch.Tensor,
    q_weight: torch.Tensor,
    k_weight: torch.Tensor,
    cos_sin: torch.Tensor,
    positions: torch.Tensor,
    slots: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    cache_dtypes: Collection[torch.dtype] = FLOAT_DTYPES,
) -> tuple[int, int, int, int, int, int]:
    """See ``Ops.qk_norm_rope_write``; gives (T, Hq, Hkv, D, N, B)."""
    op = "qk_norm_rope_write"
    tokens, q_heads, head_dim = shape = _sizes(op, "q_out", q_out, "[T,Hq,D]")
    if head_dim % 2 or head_dim < 2:
        raise KernelError(f"{op}: head_dim must be even and positive, got {head_dim}")
    caches = k_cache, v_cache
    blocks, kv_heads, block_size = _check_caches(op, *caches, head_dim, cache_dtypes)
    act = _float(op, "q_out", q_out)
    _is(op, "q_out", q_out, shape, act)
    _is(op, "qkv", qkv, (tokens, (q_heads + 2 * kv_heads) * head_dim), act)
    weight_dtype = _float(op, "q_weight", q_weight)
    _is(op, "q_weight", q_weight, (head_dim,), weight_dtype)
    _is(op, "k_weight", k_weight, (head_dim,), weight_dtype)
    _is(op, "cos_sin", cos_sin, (_sizes(op, "cos_sin", cos_sin, "[P,D]")[0], head_dim), _F32)
    _is(op, "positions", positions, (tokens,), _I64)
    _is(op, "slots", slots, (tokens,), _I64)
    return tokens, q_heads, kv_heads, head_dim, blocks, block_size


def check_paged_attention(
    out: torch.Tensor,
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    block_tables: torch.Tensor,
    query_starts: torch.Tensor,
    context_lens: torch.Tensor,
    cache_dtypes: Collection[torch.dtype] = FLOAT_DTYPES,
) -> tuple[int, int, int, int, int, int]:
    """See ``Ops.paged_attention``; gives (T, Hq, Hkv, D, N, B)."""
    op = "paged_attention"
    tokens, q_heads, head_dim = shape = _sizes(op, "q", q, "[T,Hq,D]")
    caches = k_cache, v_cache
    blocks, kv_heads, block_size = _check_caches(op, *caches, head_dim, cache_dtypes)
    if q_heads < 1 or q_heads % kv_heads:
        raise KernelError(f"{op}: {q_heads} query heads do not share {kv_heads} key-value heads")
    act = _float(op, "q", q)
    _is(op, "q", q, shape, act)
    _is(op, "out", out, shape, act)
    tables = _sizes(op, "block_tables", block_tables, "[R,max_blocks]")
    _is(op, "block_tables", block_tables, tables, _I32)
    _is(op, "query_starts", query_starts, (tables[0] + 1,), _I32)
    _is(op, "context_lens", context_lens, (tables[0],), _I32)
    return tokens, q_heads, kv_heads, head_dim, blocks, block_size


def check_swiglu(out: torch.Tensor, gate_up: torch.Tensor) -> torch.Size:
    """See ``Ops.swiglu``; gives [T, I]."""
    tokens, width = shape = _sizes("swiglu", "out", out, "[T,I]")
    act = _float("swiglu", "out", out)
    _is("swiglu", "out", out, shape, act)
    _is("swiglu", "gate_up", gate_up, (tokens, 2 * width), act)
    return shape


def check_weight(weight: torch.Tensor) -> torch.Size:
    """See ``Ops.pack_linear``; gives [O, H]."""
    shape = _sizes("pack_linear", "weight", weight, "[O,H]")
    if shape[0] < 1 or shape[1] < 1:
        raise KernelError(f"pack_linear: weight must not be empty, got shape {list(shape)}")
    _is("pack_linear", "weight", weight, shape, _float("pack_linear", "weight", weight))
    return shape


def check_linear(out: torch.Tensor, x: torch.Tensor, packed: PackedLinear) -> int:
    """See ``Ops.linear``; gives T."""
    tokens = _sizes("linear", "x", x, "[T,H]")[0]
    act = _float("linear", "x", x)
    _is("linear", "x", x, (tokens, packed.in_features), act)
    out_dtype = out.dtype
    if out_dtype is not act and out_dtype is not _F32:
        raise KernelError(f"linear: out must be {act} as x, or float32, got {out_dtype}")
    _is("linear", "out", out, (tokens, packed.out_features), out_dtype)
    return tokens


def check_gather_rows(
    out: torch.Tensor, x: torch.Tensor, rows: torch.Tensor
) -> tuple[int, int, int]:
    """See ``Ops.gather_rows``; gives (S, H, T)."""
    tokens, width = _sizes("gather_rows", "x", x, "[T,H]")
    act = _float("gather_rows", "x", x)
    _is("gather_rows", "x", x, (tokens, width), act)
    count = _sizes("gather_rows", "rows", rows, "[S]")[0]
    _is("gather_rows", "rows", rows, (count,), _I64)
    _is("gather_rows", "out", out, (count, width), act)
    return count, width, tokens


def _check_logits(op: str, logits: torch.Tensor) -> torch.Size:
    shape = _sizes(op, "logits", logits, "[S,V]")
    if shape[1] < 1:
        raise KernelError(f"{op}: logits must have at least one column, got {list(shape)}")
    _is(op, "logits", logits, shape, _F32)
    return shape


def check_apply_penalties(
    logits: torch.Tensor,
    entry_rows: torch.Tensor,
    entry_ids: torch.Tensor,
    entry_output_counts: torch.Tensor,
    repetition: torch.Tensor,
    presence: torch.Tensor,
    frequency: torch.Tensor,
) -> torch.Size:
    """See ``Ops.apply_penalties``; gives [S, V]."""
    op = "apply_penalties"
    rows, _ = shape = _check_logits(op, logits)
    count = _sizes(op, "entry_rows", entry_rows, "[E]")[0]
    _is(op, "entry_rows", entry_rows, (count,), _I64)
    _is(op, "entry_ids", entry_ids, (count,), _I64)
    _is(op, "entry_output_counts", entry_output_counts, (count,), _I32)
    _is(op, "repetition", repetition, (rows,), _F32)
    _is(op, "presence", presence, (rows,), _F32)
    _is(op, "frequency", frequency, (rows,), _F32)
    return shape


def check_add_bias(
    logits: torch.Tensor,
    bias_rows: torch.Tensor,
    bias_ids: torch.Tensor,
    bias_values: torch.Tensor,
) -> torch.Size:
    """See ``Ops.add_bias``; gives [S, V]."""
    shape = _check_logits("add_bias", logits)
    count = _sizes("add_bias", "bias_rows", bias_rows, "[E]")[0]
    _is("add_bias", "bias_rows", bias_rows, (count,), _I64)
    _is("add_bias", "bias_ids", bias_ids, (count,), _I64)
    _is("add_bias", "bias_values", bias_values, (count,), _F32)
    return shape


def check_apply_token_mask(logits: torch.Tensor, mask: torch.Tensor) -> torch.Size:
    """See ``Ops.apply_token_mask``; gives [S, V]."""
    rows, vocab = shape = _check_logits("apply_token_mask", logits)
    _is("apply_token_mask", "mask", mask, (rows, -(-vocab // 32)), _I32)
    return shape


def check_sample(
    out_ids: torch.Tensor,
    logits: torch.Tensor,
    temperature: torch.Tensor,
    top_k: torch.Tensor,
    top_p: torch.Tensor,
    min_p: torch.Tensor,
    seeds: torch.Tensor,
    positions: torch.Tensor,
) -> torch.Size:
    """See ``Ops.sample``; gives [S, V]."""
    shape = _check_logits("sample", logits)
    rows = (shape[0],)
    _is("sample", "out_ids", out_ids, rows, _I64)
    _is("sample", "temperature", temperature, rows, _F32)
    _is("sample", "top_k", top_k, rows, _I32)
    _is("sample", "top_p", top_p, rows, _F32)
    _is("sample", "min_p", min_p, rows, _F32)
    _is("sample", "seeds", seeds, rows, _I64)
    _is("sample", "positions", positions, rows, _I64)
    return shape


def check_logprobs(
    out_logprobs: torch.Tensor,
    out_ids: torch.Tensor,
    out_ranks: torch.Tensor,
    logits: torch.Tensor,
    chosen: torch.Tensor,
    k: int,
) -> torch.Size:
    """See ``Ops.logprobs``; gives [S, V]."""
    rows, vocab = shape = _check_logits("logprobs", logits)
    if not 0 <= k <= vocab:
        raise KernelError(f"logprobs: k must be between 0 and the vocabulary, {vocab}, got {k}")
    _is("logprobs", "out_logprobs", out_logprobs, (rows, k + 1), _F32)
    _is("logprobs", "out_ids", out_ids, (rows, k + 1), _I64)
    _is("logprobs", "out_ranks", out_ranks, (rows,), _I64)
    _is("logprobs", "chosen", chosen, (rows,), _I64)
    return shape
