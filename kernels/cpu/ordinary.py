"""Is a call the ordinary one? The cheapest tests that leave no room for a wrong address.

The two largest argument lists of the compiled ops; a decoding step asks for each layer.
"""

from __future__ import annotations

import torch

__all__ = ["DTYPE_CODES", "ordinary_attention", "ordinary_qkv"]

DTYPE_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}  # as in api.h
_F32, _I32, _I64 = torch.float32, torch.int32, torch.int64


def _ordinary_cache(k_cache: torch.Tensor, v_cache: torch.Tensor, head_dim: int) -> bool:
    shape, dtype = k_cache.shape, k_cache.dtype
    return (
        len(shape) == 4 and shape[3] == head_dim and v_cache.shape == shape
        and shape.numel() > 0 and dtype in DTYPE_CODES and v_cache.dtype is dtype
        and k_cache.is_contiguous() and v_cache.is_contiguous()
    )  # fmt: skip


def ordinary_qkv(
    q_out: torch.Tensor,
    qkv: torch.Tensor,
    q_weight: torch.Tensor,
    k_weight: torch.Tensor,
    cos_sin: torch.Tensor,
    positions: torch.Tensor,
    slots: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
) -> bool:
    """Float32 activations, and nothing for ``check_qk_norm_rope_write`` to refuse."""
    shape = q_out.shape
    if len(shape) != 3 or q_out.dtype is not _F32 or qkv.dtype is not _F32:
        return False
    tokens, heads, dim = shape
    weights, dtype = (dim,), q_weight.dtype
    return (
        dim % 2 == 0 and _ordinary_cache(k_cache, v_cache, dim)
        and qkv.shape == (tokens, (heads + 2 * k_cache.shape[1]) * dim)
        and dtype in DTYPE_CODES and k_weight.dtype is dtype and cos_sin.dtype is _F32
        and q_weight.shape == weights and k_weight.shape == weights
        and cos_sin.dim() == 2 and cos_sin.shape[1] == dim
        and positions.dtype is _I64 and slots.dtype is _I64
        and positions.shape == (tokens,) and slots.shape == (tokens,)
        and q_out.is_contiguous() and qkv.is_contiguous() and q_weight.is_contiguous()
        and k_weight.is_contiguous() and cos_sin.is_contiguous() and positions.is_contiguous()
        and slots.is_contiguous()
    )  # fmt: skip


def ordinary_attention(
    out: torch.Tensor,
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    block_tables: torch.Tensor,
    query_starts: torch.Tensor,
    context_lens: torch.Tensor,
) -> bool:
    """Float32 activations, and nothing for ``check_paged_attention`` to refuse."""
    shape, tables = q.shape, block_tables.shape
    return (
        len(shape) == 3 and len(tables) == 2 and out.shape == shape and q.dtype is _F32
        and out.dtype is _F32 and _ordinary_cache(k_cache, v_cache, shape[2])
        and shape[1] > 0 and shape[1] % k_cache.shape[1] == 0
        and block_tables.dtype is _I32 and query_starts.dtype is _I32
        and context_lens.dtype is _I32 and query_starts.shape == (tables[0] + 1,)
        and context_lens.shape == tables[:1] and q.is_contiguous() and out.is_contiguous()
        and block_tables.is_contiguous() and query_starts.is_contiguous()
        and context_lens.is_contiguous()
    )  # fmt: skip
