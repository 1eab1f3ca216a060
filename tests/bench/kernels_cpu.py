"""The CPU ops one by one: time, share of what the processor can do, torch in the same run.

    python -m tests.bench.kernels_cpu                    all ops, one thread, about two minutes
    python -m tests.bench.kernels_cpu --threads 2
    python -m tests.bench.kernels_cpu --only linear attention

The floor of an op is the larger of its operations over the measured multiply-add rate and its bytes
over the measured memory bandwidth; ``share`` is that over the time. A share above 1 means that the
data came from a cache. Each time is the best of many calls. torch's side does the same arithmetic
in float32, on float32 weights and contiguous caches, which are twice the bytes.
"""

from __future__ import annotations

import argparse
import ctypes
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F

from kernels import Ops, cpu
from tests.bench.report import Report

BF16 = torch.bfloat16
Call = Callable[[], object]


class Case(NamedTuple):
    """One op at one size."""

    op: str
    size: str
    operations: float
    bytes: float
    ours: Call
    torchs: Call


class Roof(NamedTuple):
    """The measured ceilings."""

    flops: float
    bandwidth: float


def measure_roof(threads: int) -> Roof:
    """Compile and run the two loops of ``roofline.cpp``."""
    source = Path(__file__).with_name("roofline.cpp")
    with tempfile.TemporaryDirectory() as name:
        target = Path(name) / "roofline.so"
        compiler = shutil.which("c++") or "g++"
        flags = ["-O3", "-march=native", "-ffp-contract=fast", "-shared", "-fPIC", "-pthread", "-w"]
        subprocess.run([compiler, *flags, str(source), "-o", str(target)], check=True)
        library = ctypes.CDLL(str(target))
    library.roofline_flops.restype = library.roofline_bandwidth.restype = ctypes.c_double
    data = torch.ones(64 * 2**20)
    address, count = ctypes.c_void_p(data.data_ptr()), ctypes.c_int64(data.numel())
    flops = max(library.roofline_flops(threads) for _ in range(5))
    reads = max(library.roofline_bandwidth(address, count, threads) for _ in range(10))
    return Roof(flops, reads)


def best_time(call: Call, budget_s: float) -> float:
    """The shortest of the calls that fit into the budget, in seconds."""
    call()
    best, end = float("inf"), time.perf_counter() + budget_s
    while time.perf_counter() < end:
        start = time.perf_counter()
        call()
        best = min(best, time.perf_counter() - start)
    return best


def linear_cases(ops: Ops) -> Iterator[Case]:
    """The products of the 46M and the 0.6B model."""
    for width, features in ((512, 1024), (512, 3072), (1536, 512), (1024, 6144), (1024, 65536)):
        weight = torch.randn(features, width)
        for dtype in (BF16, torch.float32):
            packed = ops.pack_linear(weight.to(dtype))
            for tokens in (1, 4, 16, 64, 512):
                if tokens * features > 2**22:
                    continue
                x, out = torch.randn(tokens, width), torch.empty(tokens, features)
                yield Case(
                    "linear", f"{tokens}x{width}x{features} {str(dtype)[6:]}",
                    2.0 * tokens * width * features, float(packed.nbytes),
                    partial(ops.linear, out, x, packed),
                    partial(torch.mm, x, weight.T, out=out),
                )  # fmt: skip


def attention_cases(ops: Ops) -> Iterator[Case]:
    """Decoding and reading, heads of the 46M and the 0.6B model, blocks of 16."""
    works = ((1, 1, 128), (1, 1, 2048), (16, 1, 512), (64, 1, 512), (1, 512, 512), (1, 2048, 2048))
    for q_heads, kv_heads, dim in ((8, 4, 64), (16, 8, 128)):
        for requests, new, context in works:
            yield attention_case(ops, requests, new, context, q_heads, kv_heads, dim)


def attention_case(
    ops: Ops, requests: int, new: int, context: int, q_heads: int, kv_heads: int, dim: int
) -> Case:
    """All requests alike; pages in random order."""
    pages = context // 16
    k, v = (torch.randn(requests * pages + 1, kv_heads, 16, dim).to(BF16) for _ in range(2))
    tables = (torch.randperm(requests * pages) + 1).int().view(requests, pages)
    starts = (torch.arange(requests + 1) * new).int()
    lengths = torch.full((requests,), context, dtype=torch.int32)
    q = torch.randn(requests * new, q_heads, dim)
    out = torch.empty_like(q)
    flat = torch.randn(requests, q_heads, new, dim)
    keys, values = (torch.randn(requests, kv_heads, context, dim) for _ in range(2))
    pairs = requests * (new * (context - new) + new * (new + 1) / 2)
    return Case(
        "attention", f"{requests}x{new} of {context}, {q_heads}/{kv_heads} heads of {dim}",
        4.0 * q_heads * dim * pairs, 4.0 * requests * context * kv_heads * dim,
        lambda: ops.paged_attention(out, q, k, v, tables, starts, lengths, dim**-0.5),
        lambda: F.scaled_dot_product_attention(
            flat, keys, values, is_causal=new > 1, enable_gqa=True
        ),
    )  # fmt: skip


def torch_add_norm(residual: torch.Tensor, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """The two steps that ``add_rms_norm`` fuses."""
    return F.rms_norm(residual.add_(x), (1024,), weight, 1e-6)


def torch_swiglu(gate_up: torch.Tensor) -> torch.Tensor:
    """The two steps that ``swiglu`` fuses."""
    gate, up = gate_up.chunk(2, dim=1)
    return F.silu(gate) * up


def row_cases(ops: Ops) -> Iterator[Case]:
    """Norm, gate and rotary embedding at decoding and reading sizes."""
    for tokens in (1, 64, 512):
        x, residual, weight = torch.randn(tokens, 1024), torch.zeros(tokens, 1024), torch.ones(1024)
        out, gate_up = torch.empty_like(x), torch.randn(tokens, 6144)
        gated = torch.empty(tokens, 3072)
        yield Case(
            "add_rms_norm", f"{tokens}x1024", 5.0 * x.numel(), 16.0 * x.numel(),
            partial(ops.add_rms_norm, out, residual, x, weight, 1e-6),
            partial(torch_add_norm, residual, x, weight),
        )  # fmt: skip
        yield Case(
            "swiglu", f"{tokens}x3072", 20.0 * gated.numel(), 12.0 * gated.numel(),
            partial(ops.swiglu, gated, gate_up),
            partial(torch_swiglu, gate_up),
        )  # fmt: skip
        yield qkv_case(ops, tokens)


def qkv_case(ops: Ops, tokens: int) -> Case:
    """Norm, rotation and cache write of the 0.6B model's heads; torch does the same in steps."""
    qkv, q_out, ones = torch.randn(tokens, 4096), torch.empty(tokens, 16, 128), torch.ones(128)
    k_cache, v_cache = (torch.zeros(64, 8, 16, 128, dtype=BF16) for _ in range(2))
    table, where = torch.randn(1024, 128), torch.arange(tokens)
    block, offset = where // 16, where % 16

    def torchs() -> None:
        heads = qkv.view(tokens, 32, 128)
        cos, sin = table[where][:, None].chunk(2, dim=-1)
        first, second = F.rms_norm(heads[:, :24], (128,), ones, 1e-6).chunk(2, dim=-1)
        turned = torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
        k_cache[block, :, offset] = turned[:, 16:].to(BF16)
        v_cache[block, :, offset] = heads[:, 24:].to(BF16)

    return Case(
        "qk_norm_rope_write", f"{tokens}x4096", 10.0 * qkv.numel(), 7.0 * qkv.numel(),
        lambda: ops.qk_norm_rope_write(
            q_out, qkv, ones, ones, table, where, where, k_cache, v_cache, 1e-6
        ),
        torchs,
    )  # fmt: skip


def sample_cases(ops: Ops) -> Iterator[Case]:
    """Choosing tokens from the 0.6B model's vocabulary, with and without the filters."""
    rows, vocab = 16, 151_936
    logits = torch.randn(rows, vocab) * 3
    ids, seeds = torch.empty(rows, dtype=torch.int64), torch.arange(rows)
    for name, temperature, top_k, top_p in (
        ("greedy", 0.0, 0, 1.0), ("plain", 1.0, 0, 1.0), ("top-k 50, top-p 0.9", 1.0, 50, 0.9),
    ):  # fmt: skip
        warmth, k = torch.full((rows,), temperature), torch.full((rows,), top_k, dtype=torch.int32)
        p, floor = torch.full((rows,), top_p), torch.zeros(rows)

        def torchs(temperature: float = temperature, top_k: int = top_k) -> torch.Tensor:
            if temperature == 0:
                return logits.argmax(dim=1)
            kept = logits
            if top_k:
                ordered, _ = logits.sort(dim=1)
                kept = logits.masked_fill(logits < ordered[:, -top_k, None], float("-inf"))
            probs = kept.softmax(dim=1)
            return (probs / torch.empty_like(probs).exponential_()).argmax(dim=1)

        yield Case(
            "sample", f"{rows}x{vocab} {name}", 0.0, 4.0 * rows * vocab,
            partial(ops.sample, ids, logits, warmth, k, p, floor, seeds, seeds),
            torchs,
        )  # fmt: skip


def main() -> None:
    """Print the table and write the CSV."""
    groups = {
        "linear": linear_cases, "attention": attention_cases, "rows": row_cases,
        "sample": sample_cases,
    }  # fmt: skip
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=0.3, help="for each time")
    parser.add_argument("--only", nargs="*", choices=groups, default=list(groups))
    options = parser.parse_args()
    ops = cpu.load()
    cpu.set_num_threads(options.threads)
    torch.set_num_threads(options.threads)
    roof = measure_roof(options.threads)
    print(f"{roof.flops / 1e9:.0f} GFLOP/s, {roof.bandwidth / 1e9:.1f} GB/s, {ops.name}")
    columns = ["op", "size", "us", "GFLOP/s", "GB/s", "share", "torch us", "times torch"]
    report = Report(f"kernels-cpu-{options.threads}", columns)
    for name in options.only:
        for case in groups[name](ops):
            ours, torchs = (
                best_time(case.ours, options.seconds),
                best_time(case.torchs, options.seconds),
            )
            floor = max(case.operations / roof.flops, case.bytes / roof.bandwidth)
            figures = (
                case.op, case.size, ours * 1e6, case.operations / ours / 1e9,
                case.bytes / ours / 1e9, floor / ours, torchs * 1e6, torchs / ours,
            )  # fmt: skip
            report.add(**dict(zip(columns, figures, strict=True)))
    print(report.show())


if __name__ == "__main__":
    main()
