"""The C++ sources as other processors would compile them: no intrinsics, 8 and 16 lanes."""

from __future__ import annotations

import pytest
import torch

from kernels import Ops, cpu
from kernels.cpu import build
from kernels.cpu.native import NativeOps
from tests.kernels import comparisons as compare
from tests.kernels.comparisons import BF16, F16, F32, poison, ragged_batch, randn


@pytest.fixture(params=[8, 16], scope="module")
def ops(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> NativeOps:
    target = tmp_path_factory.mktemp("portable") / f"kernels-{request.param}.so"
    try:
        build.compile_library(
            "native", target, f"-DMILLRACE_PORTABLE={request.param}", "-O1", "-Wno-psabi"
        )
    except build.BuildError as error:
        if "no C++ compiler" in str(error):
            pytest.skip(str(error))
        raise
    return NativeOps(target)


@pytest.mark.timeout(240)
@pytest.mark.parametrize("weight", [F32, BF16, F16])
def test_portable(ops: NativeOps, weight: torch.dtype) -> None:
    for width in (7, 64, 130):
        compare.embed(ops, tokens=5, vocab=33, width=width, weight=weight)
        compare.rms_norm(ops, tokens=5, width=width, weight=weight)
        compare.add_rms_norm(ops, tokens=5, width=width, weight=weight)
        compare.swiglu(ops, tokens=5, width=width)
    for tokens in (1, 2, 3, 5, 7, 12, 13, 65):
        compare.linear(ops, tokens=tokens, width=300, features=150, weight=weight)
        compare.linear(ops, tokens=tokens, width=33, features=17, weight=weight)
    for head_dim in (10, 32, 128):
        compare.qk_norm_rope_write(
            ops, tokens=9, q_heads=4, kv_heads=2, head_dim=head_dim, cache=weight, padded=2
        )
        compare.paged_attention(
            ops, new=[1, 0, 70, 2], context=[90, 3, 70, 37], q_heads=6, kv_heads=2,
            head_dim=head_dim, cache=weight,
        )  # fmt: skip


@pytest.mark.timeout(240)
def test_portable_logits(ops: NativeOps) -> None:
    compare.sample(ops, rows=300, vocab=17)
    compare.sample(ops, rows=200, vocab=1003)
    compare.logprobs(ops, rows=3, vocab=999, k=20)
    compare.apply_penalties(ops, rows=4, vocab=100, count=37)


@pytest.mark.timeout(240)
def test_portable_rows_do_not_depend_on_the_batch(ops: NativeOps) -> None:
    x, packed = randn(40, 300), ops.pack_linear(randn(150, 300, seed=1, dtype=BF16))
    whole = poison(40, 150)
    ops.linear(whole, x, packed)
    for count in range(1, 40):
        part = poison(count, 150)
        ops.linear(part, x[:count], packed)
        assert torch.equal(part, whole[:count])
    batch = ragged_batch(new=[80], context=[80], q_heads=4, kv_heads=2, head_dim=32)
    want = batch.run(ops)
    one = ragged_batch(new=[80], context=[80], q_heads=4, kv_heads=2, head_dim=32, block=5)
    assert torch.equal(one.run(ops), want)


def test_half_precision_portable(ops: NativeOps) -> None:
    halves_are_converted_exactly(ops)


def test_half_precision_native() -> None:
    halves_are_converted_exactly(cpu.load())


def halves_are_converted_exactly(ops: Ops) -> None:
    """Every 16-bit pattern of both kinds, up to float32; and float32 down, to nearest even."""
    for dtype in (F16, BF16):
        table = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
        table = table[~table.isnan()].view(1, -1).contiguous()
        out = poison(1, table.shape[1])
        ops.embed(out, torch.tensor([0]), table)
        assert torch.equal(out, table.float())
        # Halfway between neighbours, and a little to either side, through the value cache.
        steps = torch.tensor(sorted(set(table[0].tolist())))
        steps = steps[steps.isfinite()]
        middles = (steps[:-1].double() + steps[1:].double()) / 2
        values = torch.cat((middles, middles * (1 + 1e-6), middles * (1 - 1e-6))).float()
        values = values[: values.numel() // 64 * 64].view(-1, 64)
        tokens = values.shape[0]
        qkv = torch.cat((torch.ones(tokens, 128), values), dim=1).contiguous()
        caches = [torch.zeros(tokens, 1, 1, 64, dtype=dtype) for _ in range(2)]
        ones, where = torch.ones(64), torch.arange(tokens)
        ops.qk_norm_rope_write(
            poison(tokens, 1, 64), qkv, ones, ones, torch.ones(1, 64), torch.zeros_like(where),
            where, caches[0], caches[1], 1e-6,
        )  # fmt: skip
        assert torch.equal(caches[1].view(tokens, 64), values.to(dtype))
