"""The attention kernels compile for Hopper and Ampere without a GPU, and fit in shared memory.

In a process of its own: in this one triton's functions are the interpreter's.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

COMPILE = """
from triton import compile
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from kernels.gpu.attention_decode import _decode, _merge
from kernels.gpu.attention_plan import _plan
from kernels.gpu.attention_prefill import _prefill
from kernels.gpu.tuning import config

POINTERS = {"k_scale_ptr": "fp32", "v_scale_ptr": "fp32", "sums_ptr": "fp32", "stats_ptr": "fp32"}

def build(fn, pointers, constants, capability=(9, 0), warps=4, stages=1):
    types = {}
    for name in fn.arg_names:
        if name in constants:
            types[name] = "constexpr"
        elif name.endswith("_ptr"):
            types[name] = "*" + {**POINTERS, **pointers}.get(name, "i32")
        else:
            types[name] = "fp32" if name == "scale" else "i32"
    aligned = {(index,): [["tt.divisibility", 16]] for index, name in enumerate(fn.arg_names)
               if types[name].startswith("*")}
    values = {(fn.arg_names.index(name),): value for name, value in constants.items()}
    built = compile(
        ASTSource(fn, types, values, aligned),
        target=GPUTarget("cuda", 10 * capability[0] + capability[1], 32),
        options={"num_warps": warps, "num_stages": stages},
    )
    room = (227 if capability >= (9, 0) else 99) * 1024
    assert built.asm["cubin"] and built.metadata.shared <= room, built.metadata.shared
    return built.asm["ptx"]

def attention(fn, op, cache, act, head_dim, capability=(9, 0), group=8, block=16):
    itemsize = {"bf16": 2, "fp16": 2, "fp32": 4}[act]
    rule = config(op, capability, row_bytes=head_dim * itemsize)
    constants = {
        "SCALED": cache == "fp8e4nv", "Q_HEADS": 8 * group, "KV_HEADS": 8, "HEAD_DIM": head_dim,
        "DIMS": head_dim, "BLOCK": block, "ROWS": rule["ROWS"], "KEYS": rule["KEYS"],
        "SPLIT": rule["SPLIT"],
    }
    if fn is _prefill:
        constants["FOLDS"] = op == "attention_invariant"
    pointers = {"out_ptr": act, "q_ptr": act, "k_ptr": cache, "v_ptr": cache}
    ptx = build(fn, pointers, constants, capability, rule.num_warps, rule.num_stages)
    assert "cp.async" in ptx  # loads that are not pipelined would be several times slower
    if act != "fp32":
        wide = rule["ROWS"] >= 64 and capability >= (9, 0)
        assert ("wgmma" if wide else "mma.sync") in ptx
    return ptx

for head_dim in (64, 128, 256):  # each of another rule
    for cache in ("bf16", "fp8e4nv"):
        for fn, op in ((_decode, "attention_decode"), (_prefill, "attention_prefill")):
            attention(fn, op, cache, "bf16", head_dim)
            attention(fn, "attention_invariant", cache, "bf16", head_dim, block=64)
for fn, op in ((_decode, "attention_decode"), (_prefill, "attention_prefill")):
    attention(fn, op, "bf16", "bf16", 128, group=16)
    attention(fn, op, "bf16", "bf16", 128, (8, 0), group=1)
merge = {"SCALED": True, "Q_HEADS": 64, "KV_HEADS": 8, "HEAD_DIM": 128, "DIMS": 128, "MOST": 8,
         "TOGETHER": 8}
build(_merge, {"out_ptr": "bf16"}, merge)
build(_plan, {}, {"DECODE_QUERIES": 2, "PREFILL_QUERIES": 16, "MOST": 8, "SPLIT": 512, "ALL": 256,
                  "CHUNK": 16})
print("compiled")
"""


@pytest.mark.timeout(240)
def test_attention_compiles(tmp_path: Path) -> None:
    run = subprocess.run(
        [sys.executable, "-c", COMPILE],
        env={**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=230,
        check=False,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    assert run.stdout == "compiled\n"
