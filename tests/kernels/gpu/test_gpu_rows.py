"""Row ops, gating and rotary on the GPU, against the oracle; and bugs that this must find."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import pytest
import torch

from kernels import Ops, gpu
from kernels.fp8 import E4M3, Fp8Ops
from kernels.gpu import rotary, rows, swiglu
from kernels.interface import KernelError
from tests.kernels import comparisons as compare
from tests.kernels import comparisons_fp8 as compare_fp8
from tests.kernels.comparisons import BF16, EPS, F16, F32, poison, randn
from tests.kernels.gpu.planted import planted

# Triton's interpreter computes bfloat16 wrongly.
BRAIN = [(F32, BF16), (BF16, BF16), (BF16, F32)] if torch.cuda.is_available() else []
DTYPES = [(F32, F32), (F32, F16), (F16, F16), *BRAIN]
ACTS = [F32, F16, *([BF16] if BRAIN else [])]


@pytest.fixture
def fp8(ops: Ops) -> Fp8Ops:
    return cast(Fp8Ops, ops)


@pytest.mark.parametrize(("act", "weight"), DTYPES)
@pytest.mark.parametrize(
    ("tokens", "width"), [(0, 8), (1, 1), (5, 7), (3, 513), (19, 64), (2, 2048), (2, 5000)]
)
def test_row_ops(ops: Ops, tokens: int, width: int, act: torch.dtype, weight: torch.dtype) -> None:
    compare.embed(ops, tokens=tokens, vocab=33, width=width, act=act, weight=weight)
    compare.rms_norm(ops, tokens=tokens, width=width, act=act, weight=weight)
    compare.add_rms_norm(ops, tokens=tokens, width=width, act=act, weight=weight)
    compare.swiglu(ops, tokens=tokens, width=width, act=act)
    compare.gather_rows(ops, tokens=tokens + 1, rows=tokens, width=width, act=act)


@pytest.mark.parametrize("width", [16_000, 16_384, 17_000])
def test_wide_rows(ops: Ops, fp8: Fp8Ops, width: int) -> None:
    compare.add_rms_norm(ops, tokens=2, width=width)
    compare_fp8.rms_norm_fp8(fp8, tokens=2, width=width)
    compare_fp8.swiglu_fp8(fp8, tokens=2, width=width)


@pytest.mark.parametrize("act", ACTS)
@pytest.mark.parametrize(("tokens", "width"), [(0, 8), (1, 1), (9, 130), (4, 1025)])
def test_quantising(fp8: Fp8Ops, tokens: int, width: int, act: torch.dtype) -> None:
    compare_fp8.rms_norm_fp8(fp8, tokens=tokens, width=width, act=act)
    compare_fp8.add_rms_norm_fp8(fp8, tokens=tokens, width=width, act=act)
    compare_fp8.swiglu_fp8(fp8, tokens=tokens, width=width, act=act)


def test_every_float_rounds_to_the_nearest_e4m3(fp8: Fp8Ops) -> None:
    """The borders between neighbours, and floats on either side of each; saturation at the end."""
    numbers = torch.arange(0x7F, dtype=torch.uint8).view(E4M3).float()
    borders = (numbers[1:] + numbers[:-1]) / 2
    infinity = torch.tensor(float("inf"))
    beyond = torch.tensor([448.1, 464.0, 470.0, 1e9])
    row = torch.cat(
        (numbers, borders, borders.nextafter(-infinity), borders.nextafter(infinity), beyond)
    )
    row = torch.cat((row, -row))[None]
    values = torch.cat((torch.zeros_like(row), row), dim=1)  # a query, then no keys, then values
    want = row.clamp(-448, 448).to(E4M3)
    width = row.shape[1]
    k_cache, v_cache = (torch.zeros(1, 1, 1, width, dtype=E4M3) for _ in range(2))
    one = torch.ones(1)
    fp8.qk_norm_rope_write_fp8(
        poison(1, 1, width), torch.cat((row, values), dim=1), torch.ones(width), torch.ones(width),
        torch.zeros(1, width), torch.tensor([0]), torch.tensor([0]), k_cache, v_cache, one, one,
        EPS,
    )  # fmt: skip
    assert torch.equal(v_cache[0, 0].float(), want.float())


@pytest.mark.parametrize(("act", "weight"), DTYPES)
@pytest.mark.parametrize(
    ("tokens", "q_heads", "kv_heads", "head_dim", "block"),
    [
        (1, 1, 1, 2, 16), (6, 6, 3, 10, 5), (5, 16, 1, 64, 16), (3, 4, 4, 128, 1),
        (2, 2, 1, 256, 16), (0, 2, 1, 64, 16),
    ],
)  # fmt: skip
def test_qk_norm_rope_write(
    ops: Ops, fp8: Fp8Ops, tokens: int, q_heads: int, kv_heads: int, head_dim: int, block: int,
    act: torch.dtype, weight: torch.dtype,
) -> None:  # fmt: skip
    compare.qk_norm_rope_write(
        ops, tokens=tokens, q_heads=q_heads, kv_heads=kv_heads, head_dim=head_dim, block=block,
        act=act, weight=weight, cache=weight, padded=tokens // 3,
    )  # fmt: skip
    compare_fp8.qk_norm_rope_write_fp8(
        fp8, tokens=tokens, q_heads=q_heads, kv_heads=kv_heads, head_dim=head_dim, block=block,
        act=act,
    )  # fmt: skip


def test_a_row_has_the_same_bits_alone_and_in_a_batch(ops: Ops) -> None:
    for width in (64, 3000):
        x, weight = randn(11, width), randn(width, seed=1)
        norm, gated = poison(11, width), poison(11, width // 2)
        ops.rms_norm(norm, x, weight, EPS)
        ops.swiglu(gated, x)
        for i in (0, 7, 10):
            one, one_gated, residual = (
                poison(1, width),
                poison(1, width // 2),
                torch.zeros(1, width),
            )
            ops.add_rms_norm(one, residual, x[i : i + 1], weight, EPS)
            assert torch.equal(one[0], norm[i]), "the fused norm is the same norm"
            ops.swiglu(one_gated, x[i : i + 1])
            assert torch.equal(one_gated[0], gated[i])


def test_what_points_outside_reads_zeros_and_writes_nothing(ops: Ops) -> None:
    """Values are not checked, for that would wait for the device; memory is kept to instead."""
    out, table = poison(4, 8), randn(3, 8)
    ops.embed(out, torch.tensor([-1, 0, 3, 2**40]), table)
    assert torch.equal(out, torch.stack((0 * table[0], table[0], 0 * table[0], 0 * table[0])))
    ops.gather_rows(out, table, torch.tensor([-1, 2, 3, 1]))
    assert torch.equal(out[1::2], table[[2, 1]])
    caches = [poison(2, 1, 4, 8) for _ in range(2)]
    ops.qk_norm_rope_write(
        poison(3, 2, 8), randn(3, 32), randn(8), randn(8), compare.rotary_table(8, 8),
        torch.tensor([-1, 8, 2]), torch.tensor([-1, 8, 2**40]), caches[0], caches[1], EPS,
    )  # fmt: skip
    assert all(torch.equal(cache, poison(2, 1, 4, 8)) for cache in caches)


def test_bad_arguments_are_refused(fp8: Fp8Ops) -> None:
    x, out, scales = randn(3, 8), torch.zeros(3, 8, dtype=E4M3), poison(3)
    with pytest.raises(KernelError, match=r"rms_norm_fp8: out must be a contiguous torch\.float8"):
        fp8.rms_norm_fp8(x, scales, x, randn(8), EPS)
    with pytest.raises(KernelError, match="add_rms_norm_fp8: scales"):
        fp8.add_rms_norm_fp8(out, poison(4), x, x, randn(8), EPS)
    with pytest.raises(KernelError, match="swiglu_fp8: gate_up"):
        fp8.swiglu_fp8(out, scales, randn(3, 9))
    with pytest.raises(KernelError, match=r"k_cache must be one of .*float8.*, got torch\.float32"):
        fp8.qk_norm_rope_write_fp8(
            poison(3, 1, 8), randn(3, 24), randn(8), randn(8), randn(9, 8), torch.arange(3),
            torch.arange(3), poison(1, 1, 4, 8), poison(1, 1, 4, 8), randn(1), randn(1), EPS,
        )  # fmt: skip


BUGS: list[tuple[Any, str, str, str, dict[str, Any]]] = [
    (rows, "index[:, None] * width", "index[:, None] * (width - 1)", "embed", {"vocab": 9}),
    (rows, "tl.rsqrt(mean_square + eps)", "tl.rsqrt(mean_square)", "rms_norm", {}),
    (rows, "axis=1) / width", "axis=1) / COLS", "rms_norm", {}),
    (rows, "tl.store(residual_ptr + at, stored, mask=inside)", "pass", "add_rms_norm", {}),
    (rows, "stored.to(tl.float32)  #", "x - stored.to(tl.float32)  #", "add_rms_norm", {}),
    (rows, "/ LARGEST_E4M3  # 2^-100", "/ 240.0  # 2^-100", "rms_norm_fp8", {}),
    (rows, "7.888609052210118e-31", "1e-3", "rms_norm_fp8", {}),
    (rows, "tl.max(tl.abs(y), axis=1)", "tl.max(y, axis=1)", "rms_norm_fp8", {}),
    (swiglu, "at + width, mask", "at + width - 1, mask", "swiglu", {}),
    (swiglu, "gate * tl.sigmoid(gate) * up", "gate * tl.sigmoid(1.7 * gate) * up", "swiglu", {}),
    (swiglu, "cols = triton.next_power_of_2(width)", "cols = 64", "swiglu_fp8", {}),
]
HEADS = {"tokens": 5, "q_heads": 4, "kv_heads": 2, "head_dim": 16}
ROTARY_BUGS = [
    ("normed_first * cos - normed_second", "normed_first * cos + normed_second", ""),
    ("tl.where(of_query, q_second[None, :]", "tl.where(of_query, q_first[None, :]", ""),
    ("mean_square + eps", "mean_square", ""),
    ("offset = slot - block * block_size", "offset = slot - block * block_size - 1", ""),
    ("value_head = key_head - kv_heads", "value_head = 2 * kv_heads - 1 - key_head", ""),
    ("tl.store(v_cache_ptr + v_at + half, second", "tl.store(v_cache_ptr + v_at + half, first", ""),
    ("position * HEAD_DIM + half + dims", "position * HEAD_DIM + dims", ""),
    ("to_e4m3(turned_second / k_scale)", "to_e4m3(turned_second * k_scale)", "_fp8"),
    ("v_scale_ptr + value_head", "v_scale_ptr + key_head", "_fp8"),
]


def must_find(comparison: str, ops: Ops, **shape: Any) -> None:
    check = getattr(compare, comparison, None) or getattr(compare_fp8, comparison)
    with pytest.raises(AssertionError):
        check(ops, **shape)


@pytest.mark.parametrize(("module", "old", "new", "comparison", "shape"), BUGS)
def test_planted_bugs(
    ops: Ops, monkeypatch: pytest.MonkeyPatch, tmp_path: Path,
    module: Any, old: str, new: str, comparison: str, shape: dict[str, Any],
) -> None:  # fmt: skip
    name = "gated" if module is swiglu else "rows"
    monkeypatch.setattr(gpu, name, planted(module, old, new, tmp_path))
    must_find(comparison, ops, tokens=6, width=70, **shape)


@pytest.mark.parametrize(("old", "new", "kind"), ROTARY_BUGS)
def test_planted_bugs_of_rotary(
    ops: Ops, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, old: str, new: str, kind: str
) -> None:
    monkeypatch.setattr(gpu, "rotary", planted(rotary, old, new, tmp_path))
    must_find("qk_norm_rope_write" + kind, ops, **HEADS)
