"""As ``comparisons``, for the ops that quantise to e4m3."""

from __future__ import annotations

import torch

from kernels.fp8 import E4M3, Fp8Ops
from kernels.reference_fp8 import ReferenceFp8Ops
from tests.kernels.comparisons import EPS, F32, assert_close, poison, randn, rotary_table

ORACLE = ReferenceFp8Ops()


def assert_same_codes(got: torch.Tensor, want: torch.Tensor) -> None:
    """The same e4m3 numbers, but for a few that lie within float32's rounding of a tie."""
    steps = []
    for codes in (got.view(torch.uint8).int(), want.view(torch.uint8).int()):
        size = codes & 0x7F
        assert bool((size < 0x7F).all()), "NaN"
        steps.append(torch.where(codes >= 0x80, -size, size))
    apart = (steps[0] - steps[1]).abs()
    assert int(apart.max() if apart.numel() else 0) <= 1
    assert int(apart.sum()) <= got.numel() // 500


def _outs(tokens: int, width: int) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.zeros(tokens, width, dtype=E4M3), poison(tokens)


def _assert_same_rows(
    got: tuple[torch.Tensor, torch.Tensor], want: tuple[torch.Tensor, torch.Tensor]
) -> None:
    assert_close(got[1], want[1], floor=0.0)
    assert_same_codes(got[0], want[0])


def _rows(tokens: int, width: int, act: torch.dtype) -> torch.Tensor:
    """Rows of very different sizes, one of them zero."""
    x = randn(tokens, width, dtype=act)
    x[::3] *= 1e-3
    x[1::3] *= 30
    x[2::5] = 0
    return x


def rms_norm_fp8(
    ops: Fp8Ops, *, tokens: int, width: int, act: torch.dtype = F32, weight: torch.dtype = F32
) -> None:
    x, scale = _rows(tokens, width, act), randn(width, seed=1, dtype=weight)
    want, got = _outs(tokens, width), _outs(tokens, width)
    ORACLE.rms_norm_fp8(*want, x, scale, EPS)
    ops.rms_norm_fp8(*got, x, scale, EPS)
    _assert_same_rows(got, want)


def add_rms_norm_fp8(
    ops: Fp8Ops, *, tokens: int, width: int, act: torch.dtype = F32, weight: torch.dtype = F32
) -> None:
    x, scale = _rows(tokens, width, act), randn(width, seed=1, dtype=weight)
    residual = randn(tokens, width, seed=2, dtype=act)
    sums = residual.clone()
    want, got = _outs(tokens, width), _outs(tokens, width)
    ORACLE.add_rms_norm_fp8(*want, residual, x, scale, EPS)
    ops.add_rms_norm_fp8(*got, sums, x, scale, EPS)
    assert torch.equal(sums, residual)
    _assert_same_rows(got, want)


def swiglu_fp8(ops: Fp8Ops, *, tokens: int, width: int, act: torch.dtype = F32) -> None:
    gate_up = _rows(tokens, 2 * width, act)
    want, got = _outs(tokens, width), _outs(tokens, width)
    ORACLE.swiglu_fp8(*want, gate_up)
    ops.swiglu_fp8(*got, gate_up)
    _assert_same_rows(got, want)


def qk_norm_rope_write_fp8(
    ops: Fp8Ops,
    *,
    tokens: int,
    q_heads: int,
    kv_heads: int,
    head_dim: int,
    block: int = 16,
    act: torch.dtype = F32,
) -> None:
    """Scales so small that some of what is stored saturates."""
    blocks = 2 + tokens // block
    qkv = randn(tokens, (q_heads + 2 * kv_heads) * head_dim, dtype=act)
    q_weight, k_weight = (randn(head_dim, seed=s, dtype=act) for s in (1, 2))
    positions = torch.arange(tokens) * 3
    slots = torch.randperm((blocks - 1) * block, generator=torch.Generator().manual_seed(2))
    slots = slots[:tokens] + block
    caches = [torch.zeros(blocks, kv_heads, block, head_dim, dtype=E4M3) for _ in range(4)]
    k_scale, v_scale = (0.002 + 0.02 * randn(kv_heads, seed=s).abs() for s in (3, 4))
    want, got = (poison(tokens, q_heads, head_dim, dtype=act) for _ in range(2))
    table = rotary_table(3 * tokens, head_dim)
    cases: list[tuple[Fp8Ops, torch.Tensor]] = [(ORACLE, want), (ops, got)]
    for number, (one, out) in enumerate(cases):
        one.qk_norm_rope_write_fp8(
            out, qkv, q_weight, k_weight, table, positions, slots, caches[2 * number],
            caches[2 * number + 1], k_scale, v_scale, EPS,
        )  # fmt: skip
    assert_close(got, want)
    assert_same_codes(caches[2], caches[0])
    assert_same_codes(caches[3], caches[1])
