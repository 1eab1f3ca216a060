"""Attention by the GPU kernels with small tiles, so that short contexts have many of them."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from types import ModuleType

import torch

from kernels.gpu import attention, attention_plan
from kernels.gpu.attention_plan import AttentionPlan, AttentionShape, Tiles
from kernels.gpu.workspace import Workspace
from kernels.reference import ReferenceOps
from tests.kernels.comparisons import F32, Ragged, assert_close, poison, ragged_batch

ORACLE = ReferenceOps()
SMALL = Tiles(
    rows=16, keys=16, split=32, num_warps=4, num_stages=2, programs_per_processor=1,
    merged_together=2,
)  # fmt: skip
LARGER = replace(SMALL, rows=32)


@dataclass(frozen=True)
class Setting:
    """How a batch is run."""

    decode: Tiles = SMALL
    prefill: Tiles = LARGER
    programs: int = 5
    folds: bool = False
    most_new: int | None = None
    slots: int | None = None
    """Not more partial results than this, where there would be room for more."""


USUAL = Setting()


class FewSlots(AttentionShape):
    """A shape whose cache is too small for all the partial results there could be."""

    limit = 0

    def num_slots(self, split: int) -> int:
        return min(self.limit, super().num_slots(split))

    def __eq__(self, other: object) -> bool:
        return AttentionShape(**asdict(self)) == other

    __hash__ = AttentionShape.__hash__


def make_plan(
    batch: Ragged, setting: Setting = USUAL, module: ModuleType = attention_plan
) -> AttentionPlan:
    shape = AttentionShape.of(batch.q, batch.k_cache, batch.block_tables, setting.most_new)
    if setting.slots is not None:
        shape = FewSlots(**vars(shape))
        object.__setattr__(shape, "limit", setting.slots)
    plan: AttentionPlan = module.plan_attention(
        Workspace(batch.q.device), batch.query_starts, batch.context_lens, shape,
        setting.decode, setting.prefill, setting.programs, setting.folds,
    )  # fmt: skip
    return plan


def on(device: torch.device, batch: Ragged) -> Ragged:
    """The batch with its tensors there."""
    return Ragged(**{name: tensor.to(device) for name, tensor in vars(batch).items()})


def run(
    batch: Ragged,
    setting: Setting = USUAL,
    scales: tuple[torch.Tensor, torch.Tensor] | None = None,
    scale: float | None = None,
    module: ModuleType = attention,
    planner: ModuleType = attention_plan,
) -> torch.Tensor:
    """What the kernels give, in a poisoned buffer."""
    out = poison(*batch.q.shape, dtype=batch.q.dtype).to(batch.q.device)
    module.attend_paged(
        make_plan(batch, setting, planner), out, batch.q, batch.k_cache, batch.v_cache,
        batch.block_tables, batch.q.shape[2] ** -0.5 if scale is None else scale, scales,
    )  # fmt: skip
    return out.cpu()


def check(
    device: torch.device,
    new: list[int],
    context: list[int],
    setting: Setting = USUAL,
    *,
    q_heads: int = 4,
    kv_heads: int = 2,
    head_dim: int = 32,
    block: int = 16,
    act: torch.dtype = F32,
    cache: torch.dtype = F32,
    padded_tokens: int = 0,
    module: ModuleType = attention,
    planner: ModuleType = attention_plan,
) -> None:
    """The kernels agree with the oracle."""
    batch = ragged_batch(
        new=new, context=context, q_heads=q_heads, kv_heads=kv_heads, head_dim=head_dim,
        block=block, act=act, cache=cache, padded_tokens=padded_tokens,
    )  # fmt: skip
    there = on(device, batch)
    sizes = replace(batch, v_cache=batch.v_cache.abs())
    # Weights of the softmax are rounded where queries and cache are narrow both.
    share = 0.0 if F32 in (act, cache) else float(torch.finfo(act).eps)
    scale = 2 * head_dim**-0.5  # neither flat nor all one key's
    got = run(there, setting, scale=scale, module=module, planner=planner)
    slack = share * sizes.run(ORACLE, scale)
    assert_close(got, batch.run(ORACLE, scale), slack=slack)
