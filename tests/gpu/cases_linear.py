"""Products: bfloat16, FP8 and 4-bit weights, of the models' layers."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch

from engine.config import Quantization
from engine.quantisation import SCHEMES, quantise
from kernels import QuantisedWeight, Scheme
from kernels.gpu import GpuOps, linear, linear_fp8, linear_stream
from kernels.gpu.quantise import quantise_rows
from tests.gpu.cases import Case, Named
from tests.gpu.setting import Setting
from tests.gpu.shapes import shape_of
from tests.gpu.timing import Call

__all__ = ["cases"]

ROWS = (1, 16, 64, 256, 4096)
KINDS = ("bf16", "fp8", "int8", "int4")
DEFAULT = {("8b", kind, "gate_up", rows) for kind in ("bf16", "fp8") for rows in (1, 64, 4096)} | {
    ("8b", "fp8", "down", 1), ("8b", "bf16", "head", 256),
}  # fmt: skip


def sizes_of(setting: Setting, model: str) -> dict[str, tuple[int, int]]:
    """Part of a layer -> width and features of its weight."""
    shape = shape_of(setting, model)
    heads = (shape.num_heads + 2 * shape.num_kv_heads) * shape.head_dim
    return {
        "qkv": (shape.hidden_size, heads),
        "out": (shape.num_heads * shape.head_dim, shape.hidden_size),
        "gate_up": (shape.hidden_size, 2 * shape.intermediate_size),
        "down": (shape.intermediate_size, shape.hidden_size),
        "head": (shape.hidden_size, shape.vocab_size),
    }


def cases(setting: Setting) -> Iterator[Named]:
    """Every weight with every number of rows."""
    for model in ("0.6b", "8b"):
        for part, (width, features) in sizes_of(setting, model).items():
            for kind in KINDS:
                if part == "head" and kind != "bf16":
                    continue  # it stays as it is stored
                for rows in ROWS:
                    make = partial(_case, kind, setting.size(rows, 8), width, features)
                    default = (model, kind, part, rows) in DEFAULT
                    yield f"{kind}-{model}-{part}-{rows}", make, default


def _case(kind: str, rows: int, width: int, features: int, setting: Setting, ops: GpuOps) -> Case:
    x = torch.randn(rows, width, device=setting.device).to(setting.act)
    weight = torch.randn(features, width, device=setting.device).to(setting.act)
    out = torch.empty(rows, features, dtype=setting.act, device=setting.device)
    if kind == "bf16":
        return _dense(x, weight, out, ops)
    return _quantised(x, quantise(weight, SCHEMES[Quantization(kind)]), out, ops)


def _dense(x: torch.Tensor, weight: torch.Tensor, out: torch.Tensor, ops: GpuOps) -> Case:
    packed, size, torchs = ops.pack_linear(weight), out.element_size(), torch.empty_like(out)
    return Case(
        lambda: ops.linear(out, x, packed),
        linear.cost(len(x), x.shape[1], len(weight), size, size, size),
        {"torch": lambda: partial(torch.mm, x, weight.T, out=torchs)},
        out,
    )


def _quantised(x: torch.Tensor, weight: QuantisedWeight, out: torch.Tensor, ops: GpuOps) -> Case:
    packed, size = ops.pack_quantised(weight), out.element_size()
    rows, width = x.shape
    float8 = weight.scheme is Scheme.FP8_ROW
    many = float8 and rows > linear_stream.MAX_STREAM_ROWS
    if many:
        cost = linear_fp8.cost(rows, width, weight.out_features, size, blockwise=False)
    else:
        cost = linear_stream.cost(rows, weight, size, size)
    return Case(
        lambda: ops.linear(out, x, packed),
        cost,
        # Its activations are quantised before it is timed; ours as part of the op.
        {"torch": lambda: _scaled_mm(x, weight)} if float8 else {},
        out,
        "fp8" if many else "bf16",
        # Few rows of ours are not rounded to e4m3, all of torch's are.
        tolerance=0.06,
    )


def _scaled_mm(x: torch.Tensor, weight: QuantisedWeight) -> Call:
    numbers, scales = quantise_rows(x)
    return lambda: torch._scaled_mm(
        numbers,
        weight.data.T,
        scales[:, None],
        weight.scales[None, :],
        out_dtype=x.dtype,
        use_fast_accum=True,
    )
