"""What backends with 8-bit floats offer besides: ``Fp8Ops``, and its argument checks.

The 8-bit float is e4m3 (``torch.float8_e4m3fn``; Micikevicius et al. 2022, arXiv:2209.05433): no
infinities, largest number 448. Rounding is to nearest, ties to even, and saturates at 448.
Letters and rules are those of ``kernels.interface``. Backends without these ops do not have the
methods; ``isinstance(ops, Fp8Ops)`` tells.
"""

from __future__ import annotations

from typing import Protocol, runtime_checkable

import torch

from kernels import checks
from kernels.interface import KernelError, Ops

__all__ = [
    "E4M3",
    "LARGEST_E4M3",
    "SMALLEST_ROW",
    "Fp8Ops",
    "check_add_rms_norm_fp8",
    "check_paged_attention_fp8",
    "check_qk_norm_rope_write_fp8",
    "check_rms_norm_fp8",
    "check_swiglu_fp8",
]

E4M3 = torch.float8_e4m3fn
LARGEST_E4M3 = 448.0
SMALLEST_ROW = 2.0**-100  # a row's largest element counts as no smaller, so no scale is zero


@runtime_checkable
class Fp8Ops(Ops, Protocol):
    """Ops whose results are quantised on the store, for products and caches in e4m3.

    Rows are quantised by ``scale[t] = max(max_i |y[t, i]|, 2^-100) / 448`` and
    ``out = e4m3(y / scale)``, where ``y`` is the unquantised op's result before any rounding. So
    ``out * scale`` is ``y`` within half a step of e4m3, and nothing saturates.
    """

    def rms_norm_fp8(
        self,
        out: torch.Tensor,
        scales: torch.Tensor,
        x: torch.Tensor,
        weight: torch.Tensor,
        eps: float,
    ) -> None:
        """``rms_norm``, quantised by row.

        Args:
            out: ``[T, H]`` e4m3.
            scales: ``[T]`` float32, written.
            x: ``[T, H]`` act.
            weight: ``[H]`` W.
            eps: added to the mean square.

        Cost: ``T*H*(sizeof(act) + 1)`` bytes.
        """

    def add_rms_norm_fp8(
        self,
        out: torch.Tensor,
        scales: torch.Tensor,
        residual: torch.Tensor,
        x: torch.Tensor,
        weight: torch.Tensor,
        eps: float,
    ) -> None:
        """``add_rms_norm``, its norm quantised by row; the residual stays act.

        Args:
            out: ``[T, H]`` e4m3.
            scales: ``[T]`` float32, written.
            residual: ``[T, H]`` act, updated in place.
            x: ``[T, H]`` act.
            weight: ``[H]`` W.
            eps: added to the mean square.

        Cost: ``T*H*(3*sizeof(act) + 1)`` bytes.
        """

    def swiglu_fp8(self, out: torch.Tensor, scales: torch.Tensor, gate_up: torch.Tensor) -> None:
        """``swiglu``, quantised by row.

        Args:
            out: ``[T, I]`` e4m3.
            scales: ``[T]`` float32, written.
            gate_up: ``[T, 2*I]`` act: the gates, then the ups.

        Cost: ``T*I*(2*sizeof(act) + 1)`` bytes.
        """

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
        """``qk_norm_rope_write`` into caches of e4m3: stored is ``e4m3(x / scale[head])``.

        What does not fit saturates at ``448 * scale``. The scales are the checkpoint's or
        calibrated ones; a cache cannot have dynamic ones, since its blocks outlive a step.

        Args:
            q_out: ``[T, Hq, D]`` act, not quantised.
            qkv: as ``qk_norm_rope_write``, and so the six after it but for the caches' dtype.
            q_weight: ``[D]`` W.
            k_weight: ``[D]`` W.
            cos_sin: ``[P, D]`` float32.
            positions: ``[T]`` int64.
            slots: ``[T]`` int64.
            k_cache: ``[N, Hkv, B, D]`` e4m3.
            v_cache: ``[N, Hkv, B, D]`` e4m3.
            k_scale: ``[Hkv]`` float32 > 0.
            v_scale: ``[Hkv]`` float32 > 0.
            eps: added to the mean square.
        """

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
        """``paged_attention`` over caches of e4m3: a key is ``stored * k_scale[head]``.

        Queries are not quantised, and the weights of the softmax are rounded to no less than act.

        Args:
            out: ``[T, Hq, D]`` act; rows from ``query_starts[R]`` on are left as they are.
            q: ``[T, Hq, D]`` act.
            k_cache: ``[N, Hkv, B, D]`` e4m3, as ``qk_norm_rope_write_fp8`` writes it.
            v_cache: ``[N, Hkv, B, D]`` e4m3.
            k_scale: ``[Hkv]`` float32 > 0.
            v_scale: ``[Hkv]`` float32 > 0.
            block_tables: as ``paged_attention``, and so the four after it.
            query_starts: ``[R+1]`` int32.
            context_lens: ``[R]`` int32.
            scale: multiplies the scores, usually ``D**-0.5``.
            plan: of ``plan_attention``.
        """


def _check_quantised(
    op: str, out: torch.Tensor, scales: torch.Tensor, shape: tuple[int, int]
) -> None:
    for name, tensor, size, dtype in (
        ("out", out, shape, E4M3),
        ("scales", scales, shape[:1], torch.float32),
    ):
        if tensor.dtype is not dtype or tensor.shape != size or not tensor.is_contiguous():
            raise KernelError(
                f"{op}: {name} must be a contiguous {dtype} {list(size)}, "
                f"got {tensor.dtype} {list(tensor.shape)} with strides {list(tensor.stride())}"
            )


def check_rms_norm_fp8(
    out: torch.Tensor, scales: torch.Tensor, x: torch.Tensor, weight: torch.Tensor
) -> torch.Size:
    """See ``Fp8Ops.rms_norm_fp8``; gives [T, H]."""
    shape = checks.check_rms_norm(x, x, weight)
    _check_quantised("rms_norm_fp8", out, scales, (shape[0], shape[1]))
    return shape


def check_add_rms_norm_fp8(
    out: torch.Tensor,
    scales: torch.Tensor,
    residual: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
) -> torch.Size:
    """See ``Fp8Ops.add_rms_norm_fp8``; gives [T, H]."""
    shape = checks.check_add_rms_norm(x, residual, x, weight)
    _check_quantised("add_rms_norm_fp8", out, scales, (shape[0], shape[1]))
    return shape


def check_swiglu_fp8(
    out: torch.Tensor, scales: torch.Tensor, gate_up: torch.Tensor
) -> tuple[int, int]:
    """See ``Fp8Ops.swiglu_fp8``; gives (T, I)."""
    if gate_up.dim() != 2 or gate_up.shape[1] % 2 or gate_up.dtype not in checks.FLOAT_DTYPES:
        raise KernelError(
            f"swiglu_fp8: gate_up must be [T,2*I] of an activation dtype, "
            f"got {gate_up.dtype} {list(gate_up.shape)}"
        )
    if not gate_up.is_contiguous():
        raise KernelError("swiglu_fp8: gate_up must be contiguous")
    tokens, width = gate_up.shape[0], gate_up.shape[1] // 2
    _check_quantised("swiglu_fp8", out, scales, (tokens, width))
    return tokens, width


def check_qk_norm_rope_write_fp8(
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
) -> tuple[int, int, int, int, int, int]:
    """See ``Fp8Ops.qk_norm_rope_write_fp8``; gives (T, Hq, Hkv, D, N, B)."""
    sizes = checks.check_qk_norm_rope_write(
        q_out, qkv, q_weight, k_weight, cos_sin, positions, slots, k_cache, v_cache, (E4M3,)
    )
    _check_head_scales("qk_norm_rope_write_fp8", k_scale, v_scale, sizes[2])
    return sizes


def _check_head_scales(
    op: str, k_scale: torch.Tensor, v_scale: torch.Tensor, kv_heads: int
) -> None:
    for name, scale in (("k_scale", k_scale), ("v_scale", v_scale)):
        if (
            scale.dtype is not torch.float32
            or scale.shape != (kv_heads,)
            or not scale.is_contiguous()
        ):
            raise KernelError(
                f"{op}: {name} must be a contiguous float32 [{kv_heads}], "
                f"got {scale.dtype} {list(scale.shape)}"
            )


def check_paged_attention_fp8(
    out: torch.Tensor,
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    k_scale: torch.Tensor,
    v_scale: torch.Tensor,
    block_tables: torch.Tensor,
    query_starts: torch.Tensor,
    context_lens: torch.Tensor,
) -> tuple[int, int, int, int, int, int]:
    """See ``Fp8Ops.paged_attention_fp8``; gives (T, Hq, Hkv, D, N, B)."""
    sizes = checks.check_paged_attention(
        out, q, k_cache, v_cache, block_tables, query_starts, context_lens, (E4M3,)
    )
    _check_head_scales("paged_attention_fp8", k_scale, v_scale, sizes[2])
    return sizes
