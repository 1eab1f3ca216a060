"""Attention over caches in e4m3, each head of keys and of values with its own scale."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from kernels.fp8 import E4M3, Fp8Ops
from kernels.gpu import GpuFp8Ops
from kernels.interface import KernelError
from kernels.reference_fp8 import ReferenceFp8Ops, to_e4m3
from tests.kernels.comparisons import F32, Ragged, assert_close, poison, ragged_batch
from tests.kernels.gpu.attention_runs import on, run


def quantised(batch: Ragged) -> tuple[Ragged, tuple[torch.Tensor, torch.Tensor]]:
    """The batch with its caches in e4m3, and their scales."""
    heads = torch.arange(1, batch.k_cache.shape[1] + 1, dtype=F32)
    scales = (0.01 * heads, 0.02 / heads)
    k_cache, v_cache = (
        to_e4m3(cache.double() / scale.double()[None, :, None, None])
        for cache, scale in zip((batch.k_cache, batch.v_cache), scales, strict=True)
    )
    return replace(batch, k_cache=k_cache, v_cache=v_cache), scales


def wanted(batch: Ragged, scales: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    out = poison(*batch.q.shape, dtype=batch.q.dtype)
    ReferenceFp8Ops().paged_attention_fp8(
        out, batch.q, batch.k_cache, batch.v_cache, *scales, batch.block_tables,
        batch.query_starts, batch.context_lens, batch.q.shape[2] ** -0.5,
    )  # fmt: skip
    return out


@pytest.mark.parametrize(("group", "head_dim", "block"), [(4, 64, 16), (1, 128, 32), (8, 32, 8)])
def test_scaled_caches(device: torch.device, group: int, head_dim: int, block: int) -> None:
    batch, scales = quantised(
        ragged_batch(new=[1, 20, 0, 3], context=[70, 33, 9, 40], q_heads=2 * group, kv_heads=2,
                     head_dim=head_dim, block=block, padded_tokens=2)
    )  # fmt: skip
    k_scale, v_scale = (scale.to(device) for scale in scales)
    assert_close(run(on(device, batch), scales=(k_scale, v_scale)), wanted(batch, scales))


def test_every_number_of_e4m3_is_read(device: torch.device) -> None:
    """Attention to one key gives its value."""
    numbers = torch.arange(256, dtype=torch.uint8)
    numbers[[0x7F, 0xFF]] = 0  # NaN
    batch = ragged_batch(new=[1], context=[1], q_heads=1, kv_heads=1, head_dim=256)
    block = int(batch.block_tables[0, 0])
    v_cache = torch.zeros(batch.v_cache.shape).to(E4M3)
    v_cache[block, 0, 0] = numbers.view(E4M3)
    batch = on(device, replace(batch, k_cache=torch.zeros_like(v_cache), v_cache=v_cache))
    scales = (torch.ones(1, device=device), torch.full((1,), 0.5, device=device))
    assert torch.equal(run(batch, scales=scales)[0, 0], numbers.view(E4M3).float() * 0.5)


def test_reading_what_was_written(device: torch.device) -> None:
    """The scales of the write are those of the read: the result is near the unquantised one's."""
    ops = GpuFp8Ops()
    assert isinstance(ops, Fp8Ops)
    plain = ragged_batch(new=[1, 20], context=[40, 20], q_heads=4, kv_heads=2, head_dim=32)
    batch, (k_scale, v_scale) = quantised(plain)
    there = on(device, batch)
    out = poison(*batch.q.shape).to(device)
    ops.paged_attention_fp8(
        out, there.q, there.k_cache, there.v_cache, k_scale.to(device), v_scale.to(device),
        there.block_tables, there.query_starts, there.context_lens, 32**-0.5,
    )  # fmt: skip
    exact = plain.run(ReferenceFp8Ops())
    assert float((out.cpu() - exact).abs().max()) < 0.2
    assert float((out.cpu() - exact).pow(2).mean().sqrt()) < 0.03


def test_wrong_arguments_are_refused(device: torch.device) -> None:
    batch, (k_scale, v_scale) = quantised(
        ragged_batch(new=[1], context=[4], q_heads=2, kv_heads=2, head_dim=16)
    )
    rest = batch.block_tables, batch.query_starts, batch.context_lens, 1.0
    for ops in (GpuFp8Ops(), ReferenceFp8Ops()):
        out = poison(*batch.q.shape)
        with pytest.raises(KernelError, match="paged_attention_fp8: v_scale"):
            ops.paged_attention_fp8(
                out, batch.q, batch.k_cache, batch.v_cache, k_scale, v_scale[:1], *rest
            )
        with pytest.raises(KernelError, match="paged_attention: k_cache must be one of"):
            ops.paged_attention_fp8(
                out, batch.q, batch.k_cache.float(), batch.v_cache, k_scale, v_scale, *rest
            )
