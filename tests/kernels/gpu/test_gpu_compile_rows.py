"""The kernels on rows and logits compile for Hopper, and but for FP8 for Ampere, without a GPU.

In a process of its own: in this one triton's functions are the interpreter's.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import kernels

ROOT = Path(kernels.__file__).resolve().parents[1]
COMPILE = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from kernels.gpu import logits, rotary, rows, sampling, swiglu
from kernels.gpu.tuning import rules_of

TYPES = {
    "eps": "fp32", "ids_ptr": "*i64", "index_ptr": "*i64", "rows_ptr": "*i64", "seed_ptr": "*i64",
    "positions_ptr": "*i64", "slots_ptr": "*i64", "chosen_ptr": "*i64", "seeds_ptr": "*i64",
    "position_ptr": "*i64", "out_ids_ptr": "*i64", "out_ranks_ptr": "*i64", "mask_ptr": "*i32",
    "limits_ptr": "*i64", "lows_ptr": "*i64", "parts_ptr": "*i64", "first_ptr": "*i32",
    "drawn_ptr": "*i32", "top_k_ptr": "*i32", "top_ids_ptr": "*i32", "beaten_by_ptr": "*i32",
}
BF16 = {name: "*bf16" for name in (
    "out_ptr", "table_ptr", "residual_ptr", "x_ptr", "weight_ptr", "gate_up_ptr", "q_out_ptr",
    "qkv_ptr", "q_weight_ptr", "k_weight_ptr", "k_cache_ptr", "v_cache_ptr")}

def build(fn, op, types, capability, **constants):
    rules = rules_of(capability)[op] if op else [None]
    for found in rules if capability == (9, 0) else rules[-1:]:
        rule = found.config if found else None
        values = {**(dict(rule.constants) if rule else {}), **constants}
        if op == "rms_norm":
            values["COLS"] = found.bounds.get("H", 16384)
        values = {name: value for name, value in values.items() if name in fn.arg_names}
        known = {**TYPES, **types}
        signature = {
            name: "constexpr" if name in values
            else known.get(name, "*fp32" if name.endswith("_ptr") else "i32")
            for name in fn.arg_names
        }
        places = {(fn.arg_names.index(name),): value for name, value in values.items()}
        aligned = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(fn.arg_names)
                   if name.endswith("_ptr") or name in ("width", "vocab")}
        source = ASTSource(fn, signature, places, aligned)
        target = GPUTarget("cuda", 10 * capability[0] + capability[1], 32)
        options = {"num_warps": rule.num_warps if rule else 4}
        built = triton.compile(source, target=target, options=options)
        assert built.asm["cubin"] and built.metadata.shared <= 99 * 1024
    return built.asm["ptx"]

def build_all(capability):
    def one(fn, op, types=(), **constants):
        return build(fn, op, dict(types), capability, **constants)

    fp8 = {**BF16, **{name: "*fp8e4nv" for name in ("out_ptr", "k_cache_ptr", "v_cache_ptr")}}
    kinds = [(False, BF16), (True, fp8)] if capability >= (8, 9) else [(False, BF16)]
    one(rows._take_rows, "take_rows", BF16)
    for quantises, types in kinds:
        for adds in (False, True):
            ptx = one(rows._rms_norm, "rms_norm", types, ADDS=adds, QUANTISES=quantises)
            assert "ld.global.v4" in ptx or "ld.global.L1" in ptx  # whole vectors
            assert ("e4m3x2" in ptx) == quantises
        one(swiglu._swiglu, "swiglu_fp8" if quantises else "swiglu", types, QUANTISES=quantises,
            COLS=4096 if quantises else 1024)
        for head_dim in (64, 128, 256):
            one(rotary._qk_norm_rope_write, "qk_norm_rope_write", types, HEAD_DIM=head_dim,
                HALF=head_dim // 2, QUANTISES=quantises)
    for penalises in (False, True):
        one(logits._edit, "edit_logits", {"values_ptr": "*i32" if penalises else "*fp32"},
            PENALISES=penalises)
    one(logits._apply_token_mask, "token_mask")
    one(logits._chunk_tops, "logprobs", K=20)
    one(logits._merge_tops, None, K=20, CHUNKS=64, CANDIDATES=1024)
    one(sampling._largest, "sample")
    for counts in (False, True):
        for first in (False, True):
            one(sampling._narrow, "sample", FIRST=first, COUNTS=counts, CHUNKS=64)
        one(sampling._settle, None, COUNTS=counts, BITS=4, CHUNKS=64)
    for asked in (True, False):
        one(sampling._draw, "sample", LIMITED=asked, CHUNKS=64)
        one(sampling._pick, None, {"out_ptr": "*i64"}, WARM=asked, CHUNKS=64)

import sys
build_all((int(sys.argv[1][0]), int(sys.argv[1][1])))
print("compiled")
"""


@pytest.mark.timeout(240)
@pytest.mark.parametrize("architecture", ["90", "80"])
def test_rows_and_logits_compile(tmp_path: Path, architecture: str) -> None:
    run = subprocess.run(
        [sys.executable, "-c", COMPILE, architecture],
        env={
            **os.environ,
            "TRITON_INTERPRET": "0",
            "TRITON_CACHE_DIR": str(tmp_path),
            "PYTHONPATH": str(ROOT),
        },
        capture_output=True,
        text=True,
        timeout=220,
        check=False,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    assert run.stdout == "compiled\n"
