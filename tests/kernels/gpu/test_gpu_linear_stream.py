"""Streaming products against float64: every scheme, odd shapes, split sums, planted bugs."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest
import torch

import kernels.gpu
from kernels.gpu import linear, linear_fp8, linear_stream, quantise
from kernels.gpu.tuning import config
from kernels.interface import KernelError
from kernels.quantised import QuantisedWeight, Scheme, check_quantised, dequantise, unpack_int4
from kernels.reference import ReferenceOps
from tests.kernels.comparisons import BF16, F16, F32, assert_close, poison, randn
from tests.kernels.gpu.planted import planted

F64 = torch.float64
ACTS = [F32, BF16, F16] if torch.cuda.is_available() else [F32]
SHAPES = [(1, 40, 33), (3, 256, 70), (16, 64, 200), (17, 136, 65), (64, 600, 40), (65, 200, 130)]
SHAPES += [(130, 130, 36), (0, 16, 16)]


def stored(
    scheme: Scheme, features: int, width: int, group: int = 0, scale_dtype: torch.dtype = F32
) -> QuantisedWeight:
    """Every number a scheme has, with scales that differ; sums of size one."""
    generator = torch.Generator().manual_seed(features + width)
    groups: tuple[int, ...] = (features,)
    if scheme is Scheme.INT4_GROUP:
        data = torch.randint(0, 256, (features, width // 2), generator=generator).to(torch.uint8)
        groups, largest = (features, -(-width // group)), 4.6
    elif scheme is Scheme.INT8_ROW:
        data = torch.randint(-128, 128, (features, width), generator=generator).to(torch.int8)
        largest = 74.0
    else:
        data = torch.randn(features, width, generator=generator).mul(60).to(torch.float8_e4m3fn)
        data.view(torch.uint8)[:, 0] = torch.arange(features) % 127  # subnormals and zero, no NaN
        largest = 60.0
        if scheme is Scheme.FP8_BLOCK:
            groups = (-(-features // 128), -(-width // 128))
    scales = (torch.rand(groups, generator=generator) + 0.5) / largest
    weight = QuantisedWeight(data, scales.to(scale_dtype), scheme, group)
    check_quantised(weight)
    return weight


def run(
    module: ModuleType,
    device: torch.device,
    shape: tuple[int, int, int],
    weight: QuantisedWeight,
    act: torch.dtype = F32,
    *,
    invariant: bool = False,
) -> torch.Tensor:
    """The product, after it was found right."""
    tokens, width, features = shape
    x = randn(tokens, width, dtype=act)
    moved = QuantisedWeight(
        weight.data.to(device), weight.scales.to(device), weight.scheme, weight.group_size
    )
    got = poison(tokens, features, dtype=act).to(device)
    module.linear_stream(got, x.to(device), moved, batch_invariant=invariant)
    wanted = (x.to(F64) @ dequantise(weight, F64).T).to(act)
    assert_close(got.cpu(), wanted, floor=3e-6 * width**0.5 + 2e-6)
    return got


CASES = [
    (Scheme.FP8_ROW, 0, F32),
    (Scheme.FP8_BLOCK, 128, F32),
    (Scheme.INT8_ROW, 0, F32),
    (Scheme.INT4_GROUP, 128, F16),
    (Scheme.INT4_GROUP, 32, BF16),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case[0].value}-{case[1]}")
@pytest.mark.parametrize("shape", SHAPES)
def test_stream(
    device: torch.device, shape: tuple[int, int, int], case: tuple[Scheme, int, torch.dtype]
) -> None:
    scheme, group, scale_dtype = case
    weight = stored(scheme, shape[2], shape[1], group, scale_dtype)
    for act in ACTS:
        run(linear_stream, device, shape, weight, act, invariant=shape[0] in (3, 65))


def test_the_shapes_are_split() -> None:
    """Or the second kernel would not be tested; a split may be empty, and one is not even."""
    assert config("linear_stream", (9, 0), T=64, O=40, H=600)["SPLITS"] == 4


def test_e4m3_without_instructions_for_it(
    device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on Ampere: numbers taken apart by shifts, every one of them right."""
    monkeypatch.setattr(linear_stream, "capability_of", lambda device: (8, 0))
    numbers = torch.arange(256, dtype=torch.uint8).repeat(2, 1)
    numbers[:, [0x7F, 0xFF]] = 0
    weight = QuantisedWeight(numbers.view(torch.float8_e4m3fn), torch.ones(2), Scheme.FP8_ROW)
    x, got = torch.eye(256), poison(256, 2)
    moved = QuantisedWeight(weight.data.to(device), weight.scales.to(device), Scheme.FP8_ROW)
    got = got.to(device)
    linear_stream.linear_stream(got, x.to(device), moved, batch_invariant=False)
    assert torch.equal(got.cpu(), dequantise(weight, F32).T)


@pytest.mark.parametrize("scheme", [Scheme.INT8_ROW, Scheme.INT4_GROUP])
def test_a_row_has_the_same_bits_in_any_batch(device: torch.device, scheme: Scheme) -> None:
    group = 128 if scheme is Scheme.INT4_GROUP else 0
    weight = stored(scheme, 48, 600, group)
    whole = run(linear_stream, device, (40, 600, 48), weight, invariant=True)
    x = randn(40, 600).to(device)
    moved = QuantisedWeight(weight.data.to(device), weight.scales.to(device), scheme, group)
    for start, end in ((0, 1), (7, 40)):
        part = torch.empty(end - start, 48, device=device)
        rows = x[start:end].contiguous()
        linear_stream.linear_stream(part, rows, moved, batch_invariant=True)
        assert torch.equal(part, whole[start:end])


@pytest.mark.parametrize(
    ("old", "new", "scheme"),
    [
        ("low = ((b & 0xF)", "low = ((b >> 4)", Scheme.INT4_GROUP),
        ("high = ((b >> 4).to(tl.int8) - 8)", "high = (b >> 4).to(tl.int8)", Scheme.INT4_GROUP),
        ("n.to(tl.int64) * steps + step", "n.to(tl.int64) * steps", Scheme.INT4_GROUP),
        ("+ 2 * byte[None, :] + 1,", "+ 2 * byte[None, :],", Scheme.INT4_GROUP),
        ("n // BLOCK_K * steps + step", "n // BLOCK_K * steps", Scheme.FP8_BLOCK),
        ("(split + 1) * steps_each, steps", "(split + 1) * steps_each - 1, steps", Scheme.INT8_ROW),
        ("tl.static_range(SPLITS)", "tl.static_range(SPLITS - 1)", Scheme.INT8_ROW),
        ("    if SCALED:", "    if not SCALED:", Scheme.FP8_ROW),
    ],
)
def test_planted_bugs_are_caught(
    device: torch.device, old: str, new: str, scheme: Scheme, tmp_path: Path
) -> None:
    group = {Scheme.INT4_GROUP: 32, Scheme.FP8_BLOCK: 128}.get(scheme, 0)
    module = planted(linear_stream, old, new, tmp_path)
    with pytest.raises(AssertionError):
        run(module, device, (17, 904, 70), stored(scheme, 70, 904, group))


def test_two_numbers_of_four_bits_in_a_byte() -> None:
    assert unpack_int4(torch.tensor([[0x0F, 0x81]], dtype=torch.uint8)).tolist() == [[7, -8, -7, 0]]


def test_the_floor_of_a_layer_is_mostly_its_weight() -> None:
    """Qwen3-0.6B's gate and up for one token: 1024 x 6144 in 4.125 bits an element."""
    data = torch.zeros(6144, 512, dtype=torch.uint8)
    weight = QuantisedWeight(data, torch.zeros(6144, 8, dtype=BF16), Scheme.INT4_GROUP, 128)
    floor = linear_stream.cost(1, weight, 2, 2)
    assert floor.bytes == 1024 * 6144 * 4.125 / 8 + 2 * (1024 + 6144)
    assert floor.flops == 2 * 1024 * 6144
    dense = linear.cost(1, 1024, 6144, 2, 2, 2)
    assert 3.8 < dense.bytes / floor.bytes < 3.9
    assert dense.flops == floor.flops
    rows = linear_fp8.cost(512, 1024, 6144, 2, blockwise=False)
    blocks = linear_fp8.cost(512, 1024, 6144, 2, blockwise=True)
    assert rows.bytes == 1024 * (512 + 6144) + 4 * (512 + 6144) + 512 * 6144 * 2
    assert blocks.bytes - rows.bytes == 4 * (8 * (512 + 48) - 512 - 6144)
    assert quantise.cost(512, 1000, 2, groups=True).bytes == 512 * 1000 * 3 + 4 * 512 * 8


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case[0].value}-{case[1]}")
def test_the_backend_takes_them_all(
    device: torch.device, case: tuple[Scheme, int, torch.dtype]
) -> None:
    """Through the interface, beside the oracle; x is not rounded for so few rows."""
    gpu, oracle = kernels.gpu.load(device.type), ReferenceOps()
    weight = stored(case[0], 70, 256, *case[1:])
    moved = QuantisedWeight(weight.data.to(device), weight.scales.to(device), *case[:2])
    packed = gpu.pack_quantised(moved)
    assert packed.nbytes == weight.nbytes < 70 * 256 * 2
    x, got, want = randn(5, 256), poison(5, 70).to(device), poison(5, 70)
    gpu.linear(got, x.to(device), packed)
    oracle.linear(want, x, oracle.pack_quantised(weight))
    assert_close(got.cpu(), want, floor=1e-4)
    with pytest.raises(KernelError, match="of another backend"):
        gpu.linear(got, x.to(device), oracle.pack_quantised(weight))
    with pytest.raises(KernelError, match="pack_quantised: scales must be"):
        gpu.pack_quantised(replace(moved, scales=moved.scales[:-1]))
