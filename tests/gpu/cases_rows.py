"""Norms, rotation, gating and copies of rows, at decoding and at reading sizes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
import torch.nn.functional as F

from kernels.fp8 import E4M3
from kernels.gpu import GpuOps
from tests.bench.checkpoints import Shape
from tests.gpu.cases import Case, Named, Peers, compiled, fp8_of, of_bytes
from tests.gpu.setting import Setting
from tests.gpu.shapes import shape_of
from tests.gpu.timing import Call

__all__ = ["cases", "head_norm_rope"]

EPS = 1e-6
ROWS = (1, 64, 4096)
_Make = Callable[[Setting, GpuOps, Shape, int], Case]


def cases(setting: Setting) -> Iterator[Named]:
    """Every op of rows, for 0.6B and 8B."""
    makers = {
        "rms_norm": _rms_norm,
        "add_rms_norm": _add_rms_norm,
        "add_rms_norm_fp8": _add_rms_norm_fp8,
        "swiglu": _swiglu,
        "swiglu_fp8": _swiglu_fp8,
        "qk_norm_rope_write": _qk_norm_rope_write,
        "embed": _embed,
    }
    for model in ("0.6b", "8b"):
        for name, make in makers.items():
            for rows in ROWS:
                case = partial(_case, make, model, setting.size(rows, 4))
                default = model == "8b" and rows == 4096 and name not in ("rms_norm", "embed")
                yield f"{name}-{model}-{rows}", case, default


def _case(make: _Make, model: str, rows: int, setting: Setting, ops: GpuOps) -> Case:
    return make(setting, ops, shape_of(setting, model), rows)


def _new(setting: Setting, *sizes: int) -> torch.Tensor:
    return torch.randn(*sizes, device=setting.device).to(setting.act)


def _both(setting: Setting, function: Call) -> Peers:
    """torch's steps as they are, and compiled into one."""
    return {"torch": lambda: function, "compiled": lambda: compiled(setting, function)}


def _rms_norm(setting: Setting, ops: GpuOps, shape: Shape, rows: int) -> Case:
    x, weight = _new(setting, rows, shape.hidden_size), _new(setting, shape.hidden_size)
    out = torch.empty_like(x)
    return Case(
        lambda: ops.rms_norm(out, x, weight, EPS),
        of_bytes(x, out, weight, flops=4 * x.numel()),
        _both(setting, lambda: F.rms_norm(x, weight.shape, weight, EPS)),
        out,
    )


def _add_rms_norm(setting: Setting, ops: GpuOps, shape: Shape, rows: int) -> Case:
    x, residual = (_new(setting, rows, shape.hidden_size) for _ in range(2))
    weight, out, mine = _new(setting, shape.hidden_size), torch.empty_like(x), residual.clone()
    x *= 1e-6  # so that the sums stay near, however often it is added

    def torchs() -> torch.Tensor:
        residual.add_(x)
        return F.rms_norm(residual, weight.shape, weight, EPS)

    peers = _both(setting, torchs)
    peers["flashinfer"] = lambda: _flashinfer_norm(x.clone(), residual.clone(), weight)
    return Case(
        lambda: ops.add_rms_norm(out, mine, x, weight, EPS),
        of_bytes(x, out, residual, residual, weight, flops=5 * x.numel()),
        peers,
        out,
    )


def _flashinfer_norm(x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor) -> Call:
    import flashinfer  # type: ignore[import-not-found]

    return lambda: flashinfer.norm.fused_add_rmsnorm(x, residual, weight, EPS)


def _quantised(y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """By row, as ``Fp8Ops`` has it."""
    scales = y.abs().amax(1, keepdim=True).clamp(min=2.0**-100).float() / 448
    return (y / scales).to(E4M3), scales


def _add_rms_norm_fp8(setting: Setting, ops: GpuOps, shape: Shape, rows: int) -> Case:
    x, residual = (_new(setting, rows, shape.hidden_size) for _ in range(2))
    weight, mine = _new(setting, shape.hidden_size), residual.clone()
    out = torch.empty(x.shape, dtype=E4M3, device=x.device)
    scales = torch.empty(rows, device=x.device)
    x *= 1e-6

    def torchs() -> object:
        residual.add_(x)
        return _quantised(F.rms_norm(residual, weight.shape, weight, EPS))

    return Case(
        lambda: fp8_of(ops).add_rms_norm_fp8(out, scales, mine, x, weight, EPS),
        of_bytes(x, out, residual, residual, weight, flops=8 * x.numel()),
        _both(setting, torchs),
    )


def _gate(gate_up: torch.Tensor) -> torch.Tensor:
    gate, up = gate_up.chunk(2, dim=1)
    return F.silu(gate) * up


def _swiglu(setting: Setting, ops: GpuOps, shape: Shape, rows: int) -> Case:
    gate_up = _new(setting, rows, 2 * shape.intermediate_size)
    out = _new(setting, rows, shape.intermediate_size)
    return Case(
        lambda: ops.swiglu(out, gate_up),
        of_bytes(gate_up, out, flops=10 * out.numel()),
        _both(setting, lambda: _gate(gate_up)),
        out,
    )


def _swiglu_fp8(setting: Setting, ops: GpuOps, shape: Shape, rows: int) -> Case:
    gate_up = _new(setting, rows, 2 * shape.intermediate_size)
    out = torch.empty(rows, shape.intermediate_size, dtype=E4M3, device=setting.device)
    scales = torch.empty(rows, device=setting.device)
    return Case(
        lambda: fp8_of(ops).swiglu_fp8(out, scales, gate_up),
        of_bytes(gate_up, out, flops=13 * out.numel()),
        _both(setting, lambda: _quantised(_gate(gate_up))),
    )


def _embed(setting: Setting, ops: GpuOps, shape: Shape, rows: int) -> Case:
    table = _new(setting, shape.vocab_size, shape.hidden_size)
    ids = torch.randint(shape.vocab_size, (rows,), device=setting.device)
    out = _new(setting, rows, shape.hidden_size)
    return Case(
        lambda: ops.embed(out, ids, table),
        of_bytes(out, out, ids),
        {"torch": lambda: lambda: F.embedding(ids, table)},
        out,
        tolerance=0.0,
    )


def head_norm_rope(
    heads: torch.Tensor, weight: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
) -> torch.Tensor:
    """Norm and rotation of ``[T, heads, D]`` in torch's steps."""
    first, second = F.rms_norm(heads, weight.shape, weight, EPS).chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


def _qk_norm_rope_write(setting: Setting, ops: GpuOps, shape: Shape, rows: int) -> Case:
    dim, q_heads, kv_heads = shape.head_dim, shape.num_heads, shape.num_kv_heads
    qkv = _new(setting, rows, (q_heads + 2 * kv_heads) * dim)
    q_weight, k_weight = (_new(setting, dim) for _ in range(2))
    table = torch.randn(8192, dim, device=setting.device)
    blocks = rows // 16 + 2
    mine, theirs = ([_new(setting, blocks, kv_heads, 16, dim) for _ in range(2)] for _ in range(2))
    positions = torch.randint(8192, (rows,), device=setting.device)
    slots = torch.randperm((blocks - 1) * 16, device=setting.device)[:rows] + 16
    out = _new(setting, rows, q_heads, dim)

    def torchs() -> torch.Tensor:
        heads = qkv.view(rows, q_heads + 2 * kv_heads, dim)
        cos, sin = table[positions][:, None].to(qkv.dtype).chunk(2, dim=-1)
        block, offset = slots // 16, slots % 16
        keys = heads[:, q_heads : q_heads + kv_heads]
        theirs[0][block, :, offset] = head_norm_rope(keys, k_weight, cos, sin)
        theirs[1][block, :, offset] = heads[:, q_heads + kv_heads :]
        return head_norm_rope(heads[:, :q_heads], q_weight, cos, sin)

    return Case(
        lambda: ops.qk_norm_rope_write(
            out, qkv, q_weight, k_weight, table, positions, slots, mine[0], mine[1], EPS
        ),
        of_bytes(qkv, qkv, flops=10 * qkv.numel()),
        _both(setting, torchs),
        out,
    )
