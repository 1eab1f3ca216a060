"""Rounding weights to 8 and 4 bits: to nearest, ties to even, nothing beyond the largest."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.quantisation import error_of, fits, quantise
from engine.quantised_tensors import join_rows
from kernels import QuantisedWeight, Scheme, dequantise
from kernels.cpu import load
from kernels.cpu.fallback import TorchOps
from kernels.quantised import check_quantised, unpack_int4
from kernels.reference import ReferenceOps

SCHEMES = [Scheme.FP8_ROW, Scheme.INT8_ROW, Scheme.INT4_GROUP]
E4M3 = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).to(torch.float64)
E4M3 = torch.tensor(sorted(set(E4M3[E4M3.isfinite()].tolist())), dtype=torch.float64)


def numbers(weight: QuantisedWeight) -> torch.Tensor:
    """What is multiplied by the scales, float64."""
    data = weight.data
    return (unpack_int4(data) if weight.scheme is Scheme.INT4_GROUP else data.float()).double()


def nearest(quotient: torch.Tensor, grid: torch.Tensor) -> torch.Tensor:
    """The grid's nearest number; of two, the one at an even place from zero."""
    places = torch.arange(len(grid)) - int((grid == 0).nonzero())
    distance = (quotient.flatten()[:, None] - grid).abs()
    best = distance.min(1, keepdim=True).values
    even_first = torch.where(distance == best, places.abs() % 2, 2)
    return grid[even_first.argmin(1)].view(quotient.shape)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_every_number_is_the_nearest(scheme: Scheme, dtype: torch.dtype) -> None:
    weight = torch.randn(9, 256, generator=torch.Generator().manual_seed(0)).to(dtype)
    weight[1] = 0
    weight[2] *= 1e-3
    weight[3, 0] = 100  # one large number makes the others small
    quantised = quantise(weight, scheme)
    check_quantised(quantised)
    assert (quantised.out_features, quantised.in_features) == (9, 256)
    columns = quantised.group_size or 256
    scales = quantised.scales.double().view(9, -1).repeat_interleave(columns, 1)
    largest = {Scheme.FP8_ROW: 448, Scheme.INT8_ROW: 127, Scheme.INT4_GROUP: 7}[scheme]
    grid = E4M3 if scheme is Scheme.FP8_ROW else torch.arange(-largest, largest + 1).double()
    assert torch.equal(numbers(quantised), nearest(weight.double() / scales, grid))
    top = weight.double().abs().view(9, -1, columns).amax(2)
    stored = quantised.scales.double().view(9, -1)
    assert torch.allclose(stored[top > 0], top[top > 0] / largest, rtol=2.0**-8)
    assert torch.equal(stored[top == 0], torch.ones_like(stored[top == 0]))


@pytest.mark.parametrize(
    ("scheme", "row", "wanted"),
    [
        # The largest number makes the scale 1; the rest are ties.
        (Scheme.INT8_ROW, [127.0, 0.5, 1.5, 2.5, -0.5, -1.5], [127, 0, 2, 2, 0, -2]),
        (Scheme.FP8_ROW, [448.0, 17.0, 19.0, -17.0, 2**-10], [448, 16, 20, -16, 0]),
        (Scheme.FP8_ROW, [448.0, 3 * 2**-10, 0.0, 0.0, 0.0], [448, 2**-8, 0, 0, 0]),
    ],
)  # fmt: skip
def test_ties_go_to_the_even_number(scheme: Scheme, row: list[float], wanted: list[float]) -> None:
    assert numbers(quantise(torch.tensor([row]), scheme))[0].tolist() == wanted


@settings(max_examples=50, deadline=None)
@given(st.lists(st.floats(-(2.0**100), 2.0**100, width=32), min_size=128, max_size=128))
def test_no_error_is_larger_than_half_a_step(values: list[float]) -> None:
    weight = torch.tensor([values])
    for scheme in SCHEMES:
        once = quantise(weight, scheme)
        assert bool(torch.isfinite(dequantise(once, torch.float64)).all())
        step = once.scales.double().max().item()
        bound = step * (16 if scheme is Scheme.FP8_ROW else 0.5)
        # The scale of 4-bit numbers has 8 bits, so the largest may be cut by that much more.
        assert error_of(weight, once).largest <= bound * 1.1 + 1e-300


def test_errors_are_those_of_the_types() -> None:
    weight = torch.randn(64, 256, generator=torch.Generator().manual_seed(1))
    rms = {scheme: error_of(weight, quantise(weight, scheme)).relative_rms for scheme in SCHEMES}
    assert 0.02 < rms[Scheme.FP8_ROW] < 0.03
    assert 0.005 < rms[Scheme.INT8_ROW] < 0.009
    assert 0.09 < rms[Scheme.INT4_GROUP] < 0.13
    assert error_of(torch.zeros(2, 8), quantise(torch.zeros(2, 8), Scheme.INT8_ROW)) == (0, 0)


def test_only_whole_groups_fit() -> None:
    assert fits(Scheme.FP8_ROW, 48)
    assert fits(Scheme.INT4_GROUP, 256)
    assert not fits(Scheme.INT4_GROUP, 192)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_rows_that_are_joined_are_those_of_the_whole(scheme: Scheme) -> None:
    weight = torch.randn(70, 128, generator=torch.Generator().manual_seed(2))
    whole = quantise(weight, scheme)
    joined = join_rows([quantise(weight[:30], scheme), quantise(weight[30:], scheme)])
    assert joined is not None
    assert torch.equal(joined.data.view(torch.uint8), whole.data.view(torch.uint8))
    assert torch.equal(joined.scales, whole.scales)
    other = quantise(weight, Scheme.INT8_ROW if scheme is Scheme.FP8_ROW else Scheme.FP8_ROW)
    assert join_rows([whole, other]) is None


def test_blocks_are_joined_only_at_their_borders() -> None:
    def blocks(rows: int) -> QuantisedWeight:
        data = torch.zeros(rows, 128).to(torch.float8_e4m3fn)
        return QuantisedWeight(data, torch.ones(-(-rows // 128), 1), Scheme.FP8_BLOCK, 128)

    assert join_rows([blocks(128), blocks(60)]) is not None
    assert join_rows([blocks(60), blocks(128)]) is None


@pytest.mark.parametrize("scheme", SCHEMES)
def test_backends_without_such_products_multiply_by_bfloat16(scheme: Scheme) -> None:
    weight = torch.randn(50, 128, generator=torch.Generator().manual_seed(3))
    quantised = quantise(weight, scheme)
    x = torch.randn(7, 128, generator=torch.Generator().manual_seed(4)).bfloat16().float()
    exact, got, plain = torch.empty(7, 50), torch.empty(7, 50), torch.empty(7, 50)
    oracle = ReferenceOps()
    oracle.linear(exact, x, oracle.pack_quantised(quantised))
    assert torch.equal(exact, (x.double() @ dequantise(quantised, torch.float64).T).float())
    for ops in (load(), TorchOps()):
        packed = ops.pack_quantised(quantised)
        ops.linear(got, x, packed)
        ops.linear(plain, x, ops.pack_linear(dequantise(quantised, torch.bfloat16)))
        assert torch.equal(got, plain)
        assert packed.nbytes >= 50 * 128 * 2
        assert 0 < ((got - exact).norm() / exact.norm()).item() < 2.0**-8
