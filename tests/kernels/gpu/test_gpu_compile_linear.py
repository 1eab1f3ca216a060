"""The products' kernels compile for Hopper (and, where they serve it, Ampere) without a GPU.

In a process of its own: in this one triton's functions are the interpreter's.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

COMPILE = """
import triton.language as tl
from triton import compile
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from kernels.gpu.linear import linear_kernel
from kernels.gpu.linear_fp8 import linear_fp8_kernel
from kernels.gpu.linear_stream import add_parts_kernel, stream_kernel
from kernels.gpu.quantise import quantise_groups_kernel, quantise_rows_kernel
from kernels.gpu.tuning import rules_of

def build(fn, types, op, capability=(9, 0), which=-1, **more):
    rule = rules_of(capability)[op][which].config
    constants = {**rule.constants, **more}
    types = {**{name: "i32" for name in fn.arg_names}, **types}
    types.update({name: "constexpr" for name in constants})
    aligned = {
        (index,): [["tt.divisibility", 16]]
        for index, name in enumerate(fn.arg_names)
        if types[name].startswith("*") or name in ("width", "features")
    }
    values = {(fn.arg_names.index(name),): value for name, value in constants.items()}
    source = ASTSource(fn, {name: types[name] for name in fn.arg_names}, values, aligned)
    target = GPUTarget("cuda", 10 * capability[0] + capability[1], 32)
    options = {"num_warps": rule.num_warps, "num_stages": rule.num_stages}
    built = compile(source, target=target, options=options)
    assert built.asm["cubin"]
    room = (227 if capability >= (9, 0) else 99) * 1024
    assert built.metadata.shared <= room, (op, built.metadata.shared)
    return built.asm["ptx"]

for capability in ((9, 0), (8, 0)):
    ptx = build(linear_kernel, {"out": "*bf16", "x": "*bf16", "weight": "*bf16"}, "linear",
                capability, COMPUTE=tl.bfloat16)
    assert ("wgmma" if capability == (9, 0) else "mma.sync") in ptx
    assert "cp.async" in ptx  # loads that are not pipelined would be several times slower
    build(linear_kernel, {"out": "*fp32", "x": "*fp32", "weight": "*bf16"}, "linear_float32",
          capability, COMPUTE=tl.float32)
    for data, scales, more in (
        ("*fp8e4nv", "*fp32", dict(INT4=False, DECODE=False, SCALING=0)),
        ("*fp8e4nv", "*fp32", dict(INT4=False, DECODE=False, SCALING=2)),
        ("*u8", "*fp32", dict(INT4=False, DECODE=True, SCALING=0)),
        ("*i8", "*fp32", dict(INT4=False, DECODE=False, SCALING=0)),
        ("*u8", "*bf16", dict(INT4=True, DECODE=False, SCALING=1)),
    ):
        if data == "*fp8e4nv" and capability < (8, 9):
            continue
        ptx = build(stream_kernel, {"out": "*fp32", "x": "*bf16", "weight": data, "scales": scales},
                    "linear_stream", capability, **more)
        assert "cp.async" in ptx
for blockwise in (False, True):
    for tiles in (False, True):
        matrix = "tensordesc<fp8e4nv[128,128]>" if tiles else "*fp8e4nv"
        types = {"out": "*bf16", "x": matrix, "x_scales": "*fp32", "weight": matrix,
                 "w_scales": "*fp32"}
        ptx = build(linear_fp8_kernel, types, "linear_fp8", BLOCKWISE=blockwise, DESCRIPTORS=tiles)
        assert "wgmma" in ptx and ".e4m3" in ptx
        assert ("cp.async.bulk.tensor" in ptx) == tiles
dense = {"out": "*bf16", "x": "*bf16", "weight": "*bf16"}
wide = {"out": "*fp32", "x": "*fp32", "weight": "*bf16"}
narrow = {"out": "*bf16", "x": "*fp8e4nv", "x_scales": "*fp32", "weight": "*fp8e4nv",
          "w_scales": "*fp32"}
few = {"out": "*fp32", "x": "*bf16", "weight": "*fp8e4nv", "scales": "*fp32"}
for fn, op, types, more in (
    (linear_kernel, "linear", dense, dict(COMPUTE=tl.bfloat16)),
    (linear_kernel, "linear_float32", wide, dict(COMPUTE=tl.float32)),
    (linear_fp8_kernel, "linear_fp8", narrow, dict(BLOCKWISE=True, DESCRIPTORS=False)),
    (stream_kernel, "linear_stream", few, dict(INT4=False, DECODE=False, SCALING=2)),
):
    for name in (op, f"{op}_invariant"):
        for which in range(len(rules_of((9, 0))[name])):
            build(fn, types, name, which=which, **more)
build(add_parts_kernel, {"out": "*bf16", "parts": "*fp32", "scales": "*fp32"}, "add_parts",
      SCALED=True, SPLITS=4)
types = {"out": "*fp8e4nv", "scales": "*fp32", "x": "*bf16"}
build(quantise_rows_kernel, types, "quantise_rows")
build(quantise_groups_kernel, types, "quantise_groups", GROUP=128)
print("compiled")
"""


@pytest.mark.timeout(240)
def test_products_compile(tmp_path: Path) -> None:
    variables = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    run = subprocess.run(
        [sys.executable, "-c", COMPILE],
        env=variables,
        capture_output=True,
        text=True,
        timeout=230,
        check=False,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    assert run.stdout == "compiled\n"
