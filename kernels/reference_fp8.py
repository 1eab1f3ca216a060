"""The oracle of ``Fp8Ops``: the oracle's own results, quantised. Never optimised."""

from __future__ import annotations

import torch

from kernels import fp8
from kernels.fp8 import E4M3, LARGEST_E4M3, SMALLEST_ROW
from kernels.reference import ReferenceOps, normalise

__all__ = ["ReferenceFp8Ops", "to_e4m3"]

_F64 = torch.float64


def to_e4m3(x: torch.Tensor) -> torch.Tensor:
    """Round float64 to e4m3: to nearest, ties to even, saturating."""
    # torch rounds through float32, which moves no number to the other side of a tie by more than
    # float32's own rounding.
    return x.clamp(-LARGEST_E4M3, LARGEST_E4M3).to(torch.float32).to(E4M3)


def _quantise(out: torch.Tensor, scales: torch.Tensor, y: torch.Tensor) -> None:
    """Store float64 ``y [T, W]`` by rows."""
    if not y.numel():
        return
    exact = y.abs().amax(dim=1).clamp(min=SMALLEST_ROW) / LARGEST_E4M3
    scales.copy_(exact)
    out.copy_(to_e4m3(y / exact[:, None]))


class ReferenceFp8Ops(ReferenceOps):
    """See ``kernels.fp8.Fp8Ops`` for what each op means."""

    def rms_norm_fp8(
        self,
        out: torch.Tensor,
        scales: torch.Tensor,
        x: torch.Tensor,
        weight: torch.Tensor,
        eps: float,
    ) -> None:
        """See ``Fp8Ops.rms_norm_fp8``."""
        fp8.check_rms_norm_fp8(out, scales, x, weight)
        _quantise(out, scales, normalise(x, weight, eps))

    def add_rms_norm_fp8(
        self,
        out: torch.Tensor,
        scales: torch.Tensor,
        residual: torch.Tensor,
        x: torch.Tensor,
        weight: torch.Tensor,
        eps: float,
    ) -> None:
        """See ``Fp8Ops.add_rms_norm_fp8``."""
        fp8.check_add_rms_norm_fp8(out, scales, residual, x, weight)
        residual.copy_(residual.to(_F64) + x.to(_F64))
        _quantise(out, scales, normalise(residual, weight, eps))

    def swiglu_fp8(self, out: torch.Tensor, scales: torch.Tensor, gate_up: torch.Tensor) -> None:
        """See ``Fp8Ops.swiglu_fp8``."""
        fp8.check_swiglu_fp8(out, scales, gate_up)
        gate, up = gate_up.to(_F64).chunk(2, dim=1)
        _quantise(out, scales, gate * torch.sigmoid(gate) * up)

    def qk_norm_rope_write_fp8(
        self,
        q_out: torch.Tensor,
        qkv: torch.Tensor,
        q_weight: torch.Tensor,
        k_weight: torch.Tensor,
        cos_sin: torch.Tensor,
        positions: torch.Tensor,
        slots: torch.Tensor,
        k_cache: torch.Tensor,
        v_cache: torch.Tensor,
        k_scale: torch.Tensor,
        v_scale: torch.Tensor,
        eps: float,
    ) -> None:
        """See ``Fp8Ops.qk_norm_rope_write_fp8``."""
        *_, block_size = fp8.check_qk_norm_rope_write_fp8(
            q_out, qkv, q_weight, k_weight, cos_sin, positions, slots, k_cache, v_cache, k_scale,
            v_scale,
        )  # fmt: skip
        wide = [torch.zeros(k_cache.shape, device=k_cache.device) for _ in range(2)]
        self.qk_norm_rope_write(
            q_out, qkv, q_weight, k_weight, cos_sin, positions, slots, wide[0], wide[1], eps
        )
        block, offset = slots // block_size, slots % block_size
        for cache, values, scale in zip((k_cache, v_cache), wide, (k_scale, v_scale), strict=True):
            written = values[block, :, offset].to(_F64)  # [T, Hkv, D]
            cache[block, :, offset] = to_e4m3(written / scale.to(_F64)[None, :, None])

    def paged_attention_fp8(
        self,
        out: torch.Tensor,
        q: torch.Tensor,
        k_cache: torch.Tensor,
        v_cache: torch.Tensor,
        k_scale: torch.Tensor,
        v_scale: torch.Tensor,
        block_tables: torch.Tensor,
        query_starts: torch.Tensor,
        context_lens: torch.Tensor,
        scale: float,
        plan: object | None = None,
    ) -> None:
        """See ``Fp8Ops.paged_attention_fp8``."""
        fp8.check_paged_attention_fp8(
            out, q, k_cache, v_cache, k_scale, v_scale, block_tables, query_starts, context_lens
        )
        # In float32, whose rounding of a product with the scale is that of float32 arithmetic.
        k, v = (
            cache.to(torch.float32) * head_scale[None, :, None, None]
            for cache, head_scale in ((k_cache, k_scale), (v_cache, v_scale))
        )
        self.paged_attention(out, q, k, v, block_tables, query_starts, context_lens, scale)
