"""Paged attention of a ragged batch: which kernels, with which tiles.

Two kernels share a step's requests by their new tokens (see ``attention_plan``). Which request is
where is known on the device only, so both are launched, unless the shapes or ``most_new`` say that
none has many. Either finds its list empty in a few microseconds.

A query has the same bits alone and in any batch. With ``invariant`` also however its prompt was
cut: both kernels then take the same tiles, of 64 rows, since tensor cores may sum products in
another order for another size of instruction, and prefill closes its sums where decode does.
"""

from __future__ import annotations

from functools import cache

import torch

from kernels.fp8 import E4M3
from kernels.gpu.attention_decode import launch_decode
from kernels.gpu.attention_plan import AttentionPlan, AttentionShape, Tiles, plan_attention
from kernels.gpu.attention_prefill import launch_prefill
from kernels.gpu.tuning import capability_of, config
from kernels.gpu.workspace import Workspace
from kernels.interface import KernelError

__all__ = ["attend_paged", "plan_step", "tiles_of"]

_INTERPRETED_PROCESSORS = 4


@cache
def _num_processors(device: torch.device) -> int:
    if device.type != "cuda":
        return _INTERPRETED_PROCESSORS
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


def tiles_of(op: str, device: torch.device, group: int, head_dim: int, itemsize: int) -> Tiles:
    """The tuned tiles of ``attention_decode``, ``attention_prefill`` or ``attention_invariant``.

    Args:
        op: one of the three.
        device: where it will run.
        group: query heads that share a key-value head; a tile has at least that many rows.
        head_dim: D.
        itemsize: bytes of the numbers that are multiplied, which lie in shared memory.
    """
    found = config(op, capability_of(device), row_bytes=head_dim * itemsize)
    rows = max(found["ROWS"], 1 << (group - 1).bit_length())
    return Tiles(
        rows=rows,
        keys=found["KEYS"],
        split=found["SPLIT"],
        num_warps=found.num_warps,
        num_stages=found.num_stages,
        programs_per_processor=found["PROGRAMS"],
        merged_together=found["MERGED"],
    )


def plan_step(
    workspace: Workspace,
    q: torch.Tensor,
    k_cache: torch.Tensor,
    block_tables: torch.Tensor,
    query_starts: torch.Tensor,
    context_lens: torch.Tensor,
    *,
    most_new: int | None = None,
    invariant: bool = False,
) -> AttentionPlan | None:
    """Work lists for a step, for every layer whose tensors have the shapes of these.

    None if there is nothing to do. ``most_new`` is a bound on the new tokens of any request, where
    the caller knows one; other arguments as in ``Ops.paged_attention``.
    """
    shape = AttentionShape.of(q, k_cache, block_tables, most_new)
    if not shape.tokens or not shape.requests:
        return None
    agree = k_cache.dtype in (q.dtype, E4M3)
    itemsize = q.element_size() if agree else 4
    decode, prefill = (
        tiles_of(
            "attention_invariant" if invariant else op,
            q.device,
            shape.group,
            shape.head_dim,
            itemsize,
        )
        for op in ("attention_decode", "attention_prefill")
    )
    programs = _num_processors(q.device) * decode.programs_per_processor
    return plan_attention(
        workspace, query_starts, context_lens, shape, decode, prefill, programs, invariant
    )


def attend_paged(
    plan: object | None,
    out: torch.Tensor,
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    block_tables: torch.Tensor,
    scale: float,
    scales: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> None:
    """``Ops.paged_attention`` by a plan of ``plan_step``.

    ``scales`` are ``k_scale`` and ``v_scale``, ``[Hkv]`` float32, of caches in e4m3. Raises
    KernelError for a plan of another backend or for other shapes, whose lists would lead astray.
    """
    if plan is None:
        return
    if not isinstance(plan, AttentionPlan):
        raise KernelError(f"paged_attention: plan is a {type(plan).__name__} of another backend")
    shape = AttentionShape.of(q, k_cache, block_tables, plan.shape.most_new)
    if shape != plan.shape:
        raise KernelError(f"paged_attention: plan is for {plan.shape}, the call has {shape}")
    launch_decode(plan, out, q, k_cache, v_cache, block_tables, scale, scales)
    launch_prefill(plan, out, q, k_cache, v_cache, block_tables, scale, scales)
