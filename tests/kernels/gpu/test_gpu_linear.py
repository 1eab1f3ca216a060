"""Dense and FP8 products against float64, on shapes that fill no tile, and with planted bugs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch

from kernels.gpu import linear as dense
from kernels.gpu import linear_fp8 as fp8
from kernels.gpu import packed, quantise
from kernels.interface import KernelError
from kernels.quantised import QuantisedWeight, Scheme, check_quantised, dequantise
from tests.kernels.comparisons import BF16, F16, F32, assert_close, poison, randn
from tests.kernels.gpu.planted import planted

F64 = torch.float64
SHAPES = [(1, 40, 33), (3, 256, 70), (16, 33, 100), (17, 136, 129), (64, 48, 65), (65, 200, 130)]
SHAPES += [(130, 130, 36), (0, 16, 16)]
# The interpreter's bfloat16 is wrong, so there all is float32.
ACTS = [F32, BF16, F16] if torch.cuda.is_available() else [F32]


def floor(width: int) -> float:
    """What float32 sums of ``width`` products of standard normals may be off."""
    return float(2e-6 * width**0.5 + 1e-6)


def run_dense(
    module: ModuleType,
    device: torch.device,
    shape: tuple[int, int, int],
    act: torch.dtype = F32,
    stored: torch.dtype = F32,
    out_dtype: torch.dtype = F32,
    *,
    invariant: bool = False,
) -> None:
    tokens, width, features = shape
    x, weight = randn(tokens, width, dtype=act), randn(features, width, seed=1, dtype=stored)
    got = poison(tokens, features, dtype=out_dtype).to(device)
    module.linear(got, x.to(device), weight.to(device), batch_invariant=invariant)
    assert_close(got.cpu(), (x.to(F64) @ weight.to(F64).T).to(out_dtype), floor=floor(width))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("invariant", [False, True])
def test_dense(device: torch.device, shape: tuple[int, int, int], invariant: bool) -> None:
    for act in ACTS:
        for out in {act, F32}:
            run_dense(dense, device, shape, act, act, out, invariant=invariant)


@pytest.mark.parametrize("stored", [BF16, F16])
def test_weights_of_another_type_are_multiplied_in_float32(
    device: torch.device, stored: torch.dtype
) -> None:
    run_dense(dense, device, (5, 72, 40), F32, stored)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("    mask = (m < tokens)[:, None]", "    mask = (m < tokens - 1)[:, None]"),
        ("& (k < width)[None, :], other=0.0", "& (k < width - 1)[None, :], other=0.0"),
        ("index % group // rows", "index % group // GROUP_M"),
        ("rows = min(tiles_m - first, GROUP_M)", "rows = GROUP_M"),
        ("for start in range(0, width, BLOCK_K)", "for start in range(BLOCK_K, width, BLOCK_K)"),
        ("tl.num_programs(0)):", "tl.num_programs(0) + 1):"),
    ],
)
def test_planted_bugs_are_caught(device: torch.device, old: str, new: str, tmp_path: Path) -> None:
    module = planted(dense, old, new, tmp_path)
    # None of them writes beyond ``out``: that would harm the test, not fail it.
    with pytest.raises(AssertionError):
        for shape in ((65, 200, 130), (17, 136, 129)):
            run_dense(module, device, shape)


@pytest.mark.parametrize("act", ACTS)
def test_a_row_has_the_same_bits_in_any_batch(device: torch.device, act: torch.dtype) -> None:
    x, weight = randn(70, 200, dtype=act).to(device), randn(40, 200, seed=1, dtype=act).to(device)
    whole = torch.empty(70, 40, dtype=act, device=device)
    dense.linear(whole, x, weight, batch_invariant=True)
    for start, end in ((0, 1), (3, 20), (5, 70)):
        part = torch.empty(end - start, 40, dtype=act, device=device)
        dense.linear(part, x[start:end].contiguous(), weight, batch_invariant=True)
        assert torch.equal(part, whole[start:end])


def e4m3(x: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    return (x / scales).clamp(-448, 448).to(torch.float8_e4m3fn)


def run_quantise(module: ModuleType, device: torch.device, width: int) -> None:
    x = randn(5, width)
    x[2] = 0
    x[3] *= 1e-30
    numbers, scales = module.quantise_rows(x.to(device))
    top = x.abs().amax(1)
    wanted = torch.where(top > 0, top / 448, 1.0)
    assert torch.equal(scales.cpu(), wanted)
    assert torch.equal(numbers.cpu().view(torch.uint8), e4m3(x, wanted[:, None]).view(torch.uint8))
    numbers, scales = module.quantise_groups(x.to(device))
    assert scales.shape == (5, -(-width // 128))
    for index in range(scales.shape[1]):
        part = x[:, index * 128 : (index + 1) * 128]
        top = part.abs().amax(1)
        wanted = torch.where(top > 0, top / 448, 1.0)
        assert torch.equal(scales[:, index].cpu(), wanted)
        own = numbers.cpu()[:, index * 128 : (index + 1) * 128]
        assert torch.equal(own.view(torch.uint8), e4m3(part, wanted[:, None]).view(torch.uint8))


@pytest.mark.parametrize("width", [16, 130, 1300])
def test_rows_and_groups_of_activations(device: torch.device, width: int) -> None:
    run_quantise(quantise, device, width)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("largest = tl.maximum(largest, tl.abs(value))", "largest = tl.maximum(largest, value)"),
        ("1.0)\n    tl.store(scales + row, scale)", "0.5)\n    tl.store(scales + row, scale)"),
        ("to_e4m3(value / scale[:, None])", "to_e4m3(value / (scale[:, None] * 1.01))"),
        ("row * groups + group, scale", "row * groups + group, top"),
    ],
)  # fmt: skip
def test_planted_bugs_in_rounding_are_caught(
    device: torch.device, old: str, new: str, tmp_path: Path
) -> None:
    module = planted(quantise, old, new, tmp_path)
    with pytest.raises(AssertionError):
        run_quantise(module, device, 1300)


def float8_weight(scheme: Scheme, features: int, width: int) -> QuantisedWeight:
    """Any numbers but NaN; scales that differ from block to block."""
    generator = torch.Generator().manual_seed(features + width)
    numbers = torch.randn(features, width, generator=generator).mul(60).to(torch.float8_e4m3fn)
    blocks = (-(-features // 128), -(-width // 128))
    shape = (features,) if scheme is Scheme.FP8_ROW else blocks
    scales = torch.rand(shape, generator=generator) / 50 + 1e-3
    group = 0 if scheme is Scheme.FP8_ROW else 128
    weight = QuantisedWeight(numbers, scales, scheme, group)
    check_quantised(weight)
    return weight


def run_fp8(
    module: ModuleType,
    device: torch.device,
    shape: tuple[int, int, int],
    scheme: Scheme,
    *,
    invariant: bool = False,
) -> None:
    tokens, width, features = shape
    weight = float8_weight(scheme, features, width)
    x = randn(tokens, width)
    quantiser = quantise.quantise_rows if scheme is Scheme.FP8_ROW else quantise.quantise_groups
    numbers, scales = quantiser(x.to(device))
    spread = scales.cpu().double().view(tokens, -1)
    spread = spread.repeat_interleave(-(-width // spread.shape[1]), 1)
    if scheme is Scheme.FP8_BLOCK:
        spread = scales.cpu().double().repeat_interleave(128, 1)[:, :width]
    wanted = (numbers.cpu().double() * spread) @ dequantise(weight, F64).T
    got = poison(tokens, features).to(device)
    run: Callable[..., None] = (
        module.linear_fp8_row if scheme is Scheme.FP8_ROW else module.linear_fp8_block
    )
    run(
        got,
        numbers,
        scales,
        weight.data.to(device),
        weight.scales.to(device),
        batch_invariant=invariant,
    )
    assert_close(got.cpu(), wanted.to(F32), floor=2 * floor(width))


@pytest.mark.parametrize("shape", [s for s in SHAPES if s[0]])
@pytest.mark.parametrize("scheme", [Scheme.FP8_ROW, Scheme.FP8_BLOCK])
def test_fp8(device: torch.device, shape: tuple[int, int, int], scheme: Scheme) -> None:
    run_fp8(fp8, device, shape, scheme, invariant=shape[0] == 17)


@pytest.mark.parametrize(
    ("old", "new", "scheme"),
    [
        ("n // BLOCK_K * steps + step", "n // BLOCK_K * steps", Scheme.FP8_BLOCK),
        ("w_scales + n // BLOCK_K", "w_scales + 0 * n", Scheme.FP8_BLOCK),
        ("m.to(tl.int64) * steps + step", "m.to(tl.int64) * steps", Scheme.FP8_BLOCK),
        ("total = total * x_scale[:, None]", "total = total", Scheme.FP8_ROW),
        ("(k < width)[None, :], other=0.0", "(k < width - 1)[None, :], other=0.0", Scheme.FP8_ROW),
        ("steps = tl.cdiv(width, BLOCK_K)", "steps = width // BLOCK_K", Scheme.FP8_ROW),
    ],
)
def test_planted_bugs_in_fp8_are_caught(
    device: torch.device, old: str, new: str, scheme: Scheme, tmp_path: Path
) -> None:
    module = planted(fp8, old, new, tmp_path)
    with pytest.raises(AssertionError):
        run_fp8(module, device, (65, 200, 130), scheme)


@pytest.mark.parametrize(
    ("scheme", "tokens"),
    [(Scheme.FP8_ROW, 64), (Scheme.FP8_ROW, 65), (Scheme.FP8_BLOCK, 1), (Scheme.FP8_BLOCK, 65)],
)
def test_few_rows_are_not_rounded_and_many_are(
    device: torch.device, scheme: Scheme, tokens: int
) -> None:
    weight = float8_weight(scheme, 40, 160)
    moved = QuantisedWeight(
        weight.data.to(device), weight.scales.to(device), scheme, weight.group_size
    )
    x = randn(tokens, 160)
    exact = x.double() @ dequantise(weight, F64).T
    held = packed.pack_quantised(moved)
    assert (held.out_features, held.in_features) == (40, 160)
    assert held.nbytes == weight.nbytes < 40 * 160 * 1.1
    got = poison(tokens, 40).to(device)
    packed.run_linear(got, x.to(device), held, batch_invariant=False)
    relative = ((got.cpu() - exact).norm() / exact.norm()).item()
    assert relative < 1e-6 if tokens <= 64 else 1e-3 < relative < 0.05
    rounded = poison(tokens, 40).to(device)
    packed.run_linear(rounded, x.to(device), held, batch_invariant=True)
    assert ((rounded.cpu() - exact).norm() / exact.norm()).item() > 1e-3


def test_weights_that_are_no_weights_are_refused() -> None:
    good = float8_weight(Scheme.FP8_BLOCK, 130, 140)
    wrong = [
        (good.data, good.scales, Scheme.FP8_BLOCK, 64),
        (good.data, good.scales[:1], Scheme.FP8_BLOCK, 128),
        (good.data, good.scales, Scheme.FP8_ROW, 0),
        (good.data.view(torch.int8), good.scales, Scheme.FP8_BLOCK, 128),
        (good.data.T, good.scales, Scheme.FP8_BLOCK, 128),
        (good.data[0], good.scales, Scheme.FP8_BLOCK, 128),
        (good.data, good.scales.double(), Scheme.FP8_BLOCK, 128),
        (good.data.view(torch.uint8), good.scales, Scheme.INT4_GROUP, 48),
    ]
    for arguments in wrong:
        with pytest.raises(KernelError, match="pack_quantised"):
            check_quantised(QuantisedWeight(*arguments))
