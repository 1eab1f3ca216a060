"""The CPU ops in torch alone, for machines without a C++ compiler.

Same results within float32's rounding, but slower, with float32 copies of 16-bit weights, and not
batch-invariant: oneDNN picks another order of summation for another number of rows.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from kernels import checks
from kernels.interface import KernelError, PackedLinear
from kernels.quantised import QuantisedWeight, check_quantised, dequantise
from kernels.reference import ReferenceOps, check_ragged

__all__ = ["TorchLinear", "TorchOps"]

_F32 = torch.float32


@dataclass(frozen=True)
class TorchLinear:
    """The weight in float32, which every x86-64 machine multiplies at full speed."""

    weight: torch.Tensor

    @property
    def out_features(self) -> int:
        """Rows of the weight."""
        return self.weight.shape[0]

    @property
    def in_features(self) -> int:
        """Columns of the weight."""
        return self.weight.shape[1]

    @property
    def nbytes(self) -> int:
        """Bytes of the float32 copy."""
        return self.weight.numel() * 4


def _normalise(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    return F.rms_norm(x.to(_F32), (x.shape[-1],), weight.to(_F32), eps)


def _rotate(x: torch.Tensor, cos_sin: torch.Tensor) -> torch.Tensor:
    first, second = x.chunk(2, dim=-1)
    cos, sin = cos_sin[:, None, :].chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


class TorchOps(ReferenceOps):
    """The oracle's light ops as they are, and the heavy ones in torch's fused float32 forms."""

    name = "cpu-torch"
    batch_invariant = False

    def rms_norm(
        self, out: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, eps: float
    ) -> None:
        """See ``Ops.rms_norm``."""
        checks.check_rms_norm(out, x, weight)
        out.copy_(_normalise(x, weight, eps))

    def add_rms_norm(
        self,
        out: torch.Tensor,
        residual: torch.Tensor,
        x: torch.Tensor,
        weight: torch.Tensor,
        eps: float,
    ) -> None:
        """See ``Ops.add_rms_norm``."""
        checks.check_add_rms_norm(out, residual, x, weight)
        residual.add_(x)
        out.copy_(_normalise(residual, weight, eps))

    def qk_norm_rope_write(
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
        eps: float,
    ) -> None:
        """See ``Ops.qk_norm_rope_write``."""
        _, q_heads, kv_heads, head_dim, _, block_size = checks.check_qk_norm_rope_write(
            q_out, qkv, q_weight, k_weight, cos_sin, positions, slots, k_cache, v_cache
        )
        if not slots.numel():
            return
        if int(slots.min()) < 0 or int(slots.max()) >= k_cache.shape[0] * block_size:
            raise KernelError(f"qk_norm_rope_write: slots outside the cache: {slots.tolist()}")
        if int(positions.min()) < 0 or int(positions.max()) >= cos_sin.shape[0]:
            raise KernelError(f"qk_norm_rope_write: positions: {positions.tolist()}")
        heads = qkv.view(-1, q_heads + 2 * kv_heads, head_dim)
        q, k, v = heads.tensor_split((q_heads, q_heads + kv_heads), dim=1)
        angles = cos_sin[positions]
        q_out.copy_(_rotate(_normalise(q, q_weight, eps), angles))
        block, offset = slots // block_size, slots % block_size
        k_cache[block, :, offset] = _rotate(_normalise(k, k_weight, eps), angles).to(k_cache.dtype)
        v_cache[block, :, offset] = v.to(v_cache.dtype)

    def paged_attention(
        self,
        out: torch.Tensor,
        q: torch.Tensor,
        k_cache: torch.Tensor,
        v_cache: torch.Tensor,
        block_tables: torch.Tensor,
        query_starts: torch.Tensor,
        context_lens: torch.Tensor,
        scale: float,
        plan: object | None = None,
    ) -> None:
        """See ``Ops.paged_attention``."""
        *_, block_size = checks.check_paged_attention(
            out, q, k_cache, v_cache, block_tables, query_starts, context_lens
        )
        check_ragged(q, k_cache, block_tables, query_starts, context_lens)
        starts = query_starts.tolist()
        for row, length in enumerate(context_lens.tolist()):
            start, end = starts[row], starts[row + 1]
            if start == end:
                continue
            blocks = block_tables[row, : -(-length // block_size)].long()
            k, v = (
                cache[blocks].transpose(0, 1).flatten(1, 2)[:, :length].to(_F32)
                for cache in (k_cache, v_cache)
            )
            key = torch.arange(length)
            sees = key[None, :] <= key[length - (end - start) :, None]
            heads = F.scaled_dot_product_attention(
                q[start:end].transpose(0, 1).to(_F32)[None],
                k[None],
                v[None],
                attn_mask=sees[None, None] if end - start > 1 else None,
                scale=scale,
                enable_gqa=True,
            )
            out[start:end] = heads[0].transpose(0, 1).to(out.dtype)

    def swiglu(self, out: torch.Tensor, gate_up: torch.Tensor) -> None:
        """See ``Ops.swiglu``."""
        checks.check_swiglu(out, gate_up)
        gate, up = gate_up.to(_F32).chunk(2, dim=1)
        out.copy_(F.silu(gate) * up)

    def pack_linear(self, weight: torch.Tensor) -> PackedLinear:
        """See ``Ops.pack_linear``."""
        checks.check_weight(weight)
        return TorchLinear(weight.detach().to(_F32, copy=True))

    def pack_quantised(self, weight: QuantisedWeight) -> PackedLinear:
        """See ``Ops.pack_quantised``: rounded to bfloat16 like the C++ ops'."""
        check_quantised(weight)
        return self.pack_linear(dequantise(weight, torch.bfloat16))

    def linear(self, out: torch.Tensor, x: torch.Tensor, packed: PackedLinear) -> None:
        """See ``Ops.linear``."""
        if not isinstance(packed, TorchLinear):
            raise KernelError(f"linear: packed is a {type(packed).__name__} of another backend")
        checks.check_linear(out, x, packed)
        if out.dtype is _F32:
            torch.mm(x.to(_F32), packed.weight.T, out=out)
        else:
            out.copy_(x.to(_F32) @ packed.weight.T)
