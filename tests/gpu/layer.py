"""One whole layer: our fused ops, the same with the fusions undone, and torch's.

``unfused`` keeps our products and our attention and does what the fused ops do between them in
torch's single steps: what fusing alone is worth. ``torch`` is cuBLAS, torch's attention over
contiguous keys and values, and the same steps; ``compiled`` that through ``torch.compile``.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
import torch.nn.functional as F

from kernels.gpu import GpuOps
from kernels.gpu.attention_plan import attention_cost
from kernels.gpu.cost import Cost
from tests.bench.checkpoints import Shape
from tests.gpu.cases import Case, Named, compiled
from tests.gpu.cases_rows import EPS, head_norm_rope
from tests.gpu.setting import Setting
from tests.gpu.shapes import shape_of

__all__ = ["cases"]

BLOCK = 16
CONTEXT = 1024


def cases(setting: Setting) -> Iterator[Named]:
    """One token and a batch, of both models, each fused and unfused."""
    for model in ("0.6b", "8b"):
        for rows in (1, 64):
            for fused in (True, False):
                name = f"{'fused' if fused else 'unfused'}-{model}-{rows}"
                make = partial(_case, model, setting.size(rows, 2), fused)
                yield name, make, rows == 1 and model == "8b"


class Layer:
    """The weights of a layer, a step's tensors, and the ways to compute it."""

    def __init__(self, setting: Setting, ops: GpuOps, shape: Shape, rows: int) -> None:
        self.ops, self.shape, self.rows = ops, shape, rows
        self.context = setting.size(CONTEXT, 48)
        device, act = setting.device, setting.act

        def new(*sizes: int) -> torch.Tensor:
            return torch.randn(*sizes, device=device).to(act)

        width, inner, dim = shape.hidden_size, shape.intermediate_size, shape.head_dim
        q_size, kv_size = shape.num_heads * dim, shape.num_kv_heads * dim
        self.matrices = {
            name: new(features, inputs) * inputs**-0.5
            for name, features, inputs in (
                ("qkv", q_size + 2 * kv_size, width), ("out", width, q_size),
                ("gate_up", 2 * inner, width), ("down", width, inner),
            )
        }  # fmt: skip
        self.packed = {name: ops.pack_linear(matrix) for name, matrix in self.matrices.items()}
        self.outs = {name: new(rows, len(matrix)) for name, matrix in self.matrices.items()}
        self.norm, self.head_norm = new(width), new(dim)
        self.residual, self.start = new(rows, width), new(rows, width) * 1e-3
        self.hidden, self.gated = new(rows, width), new(rows, inner)
        self.q, self.heads = (new(rows, shape.num_heads, dim) for _ in range(2))
        blocks = -(-self.context // BLOCK)
        self.k_cache, self.v_cache = (
            new(rows * blocks + 1, shape.num_kv_heads, BLOCK, dim) for _ in range(2)
        )
        self.tables = (torch.arange(rows * blocks, device=device) + 1).int().view(rows, blocks)
        self.positions = torch.full((rows,), self.context - 1, device=device)
        last = self.context - 1
        self.slots = self.tables[:, last // BLOCK].long() * BLOCK + last % BLOCK
        self.starts = torch.arange(rows + 1, device=device).int()
        self.lengths = torch.full((rows,), self.context, dtype=torch.int32, device=device)
        self.rope = torch.randn(self.context, dim, device=device)
        self.plan = ops.plan_attention(
            self.q, self.k_cache, self.tables, self.starts, self.lengths, 1
        )
        self.keys, self.values = (
            new(rows, shape.num_kv_heads, self.context, dim) for _ in range(2)
        )

    def fused(self) -> None:
        """As the engine's models compute it."""
        ops, outs, packed = self.ops, self.outs, self.packed
        ops.add_rms_norm(self.hidden, self.residual, self.start, self.norm, EPS)
        ops.linear(outs["qkv"], self.hidden, packed["qkv"])
        ops.qk_norm_rope_write(
            self.q, outs["qkv"], self.head_norm, self.head_norm, self.rope, self.positions,
            self.slots, self.k_cache, self.v_cache, EPS,
        )  # fmt: skip
        self._attend()
        ops.linear(outs["out"], self.heads.flatten(1), packed["out"])
        ops.add_rms_norm(self.hidden, self.residual, outs["out"], self.norm, EPS)
        ops.linear(outs["gate_up"], self.hidden, packed["gate_up"])
        ops.swiglu(self.gated, outs["gate_up"])
        ops.linear(outs["down"], self.gated, packed["down"])

    def unfused(self) -> None:
        """Our products and attention, torch's steps between them."""
        ops, outs, packed = self.ops, self.outs, self.packed
        ops.linear(outs["qkv"], self._normed(self.start), packed["qkv"])
        q, keys, values = self._rotated(outs["qkv"])
        block, offset = self.slots // BLOCK, self.slots % BLOCK
        self.k_cache[block, :, offset] = keys
        self.v_cache[block, :, offset] = values
        self.q.copy_(q)
        self._attend()
        ops.linear(outs["out"], self.heads.flatten(1), packed["out"])
        ops.linear(outs["gate_up"], self._normed(outs["out"]), packed["gate_up"])
        gate, up = outs["gate_up"].chunk(2, dim=1)
        ops.linear(outs["down"], F.silu(gate) * up, packed["down"])

    def torchs(self) -> torch.Tensor:
        """torch alone, on contiguous keys and values."""
        matrices = self.matrices
        q, keys, values = self._rotated(self._normed(self.start) @ matrices["qkv"].T)
        self.keys[:, :, self.context - 1] = keys
        self.values[:, :, self.context - 1] = values
        heads = F.scaled_dot_product_attention(
            q[:, :, None], self.keys, self.values, enable_gqa=True
        )
        hidden = self._normed(heads.flatten(1) @ matrices["out"].T)
        gate, up = (hidden @ matrices["gate_up"].T).chunk(2, dim=1)
        out: torch.Tensor = (F.silu(gate) * up) @ matrices["down"].T
        return out

    def cost(self) -> Cost:
        """The weights and the cache, once."""
        size = self.hidden.element_size()
        parameters = sum(matrix.numel() for matrix in self.matrices.values())
        return Cost(parameters * size, 2 * parameters * self.rows) + attention_cost(
            [1] * self.rows, [self.context] * self.rows, self.shape.num_heads,
            self.shape.num_kv_heads, self.shape.head_dim, size, size,
        )  # fmt: skip

    def _attend(self) -> None:
        self.ops.paged_attention(
            self.heads, self.q, self.k_cache, self.v_cache, self.tables, self.starts,
            self.lengths, self.shape.head_dim**-0.5, self.plan,
        )  # fmt: skip

    def _normed(self, x: torch.Tensor) -> torch.Tensor:
        self.residual.add_(x)
        return F.rms_norm(self.residual, self.norm.shape, self.norm, EPS)

    def _rotated(self, qkv: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        q_heads, kv_heads = self.shape.num_heads, self.shape.num_kv_heads
        heads = qkv.view(self.rows, q_heads + 2 * kv_heads, -1)
        q, keys, values = torch.split(heads, [q_heads, kv_heads, kv_heads], dim=1)
        cos, sin = self.rope[self.positions][:, None].to(qkv.dtype).chunk(2, dim=-1)
        norm = self.head_norm
        return head_norm_rope(q, norm, cos, sin), head_norm_rope(keys, norm, cos, sin), values


def _case(model: str, rows: int, fused: bool, setting: Setting, ops: GpuOps) -> Case:
    layer = Layer(setting, ops, shape_of(setting, model), rows)
    return Case(
        layer.fused if fused else layer.unfused,
        layer.cost(),
        {
            "torch": lambda: layer.torchs,
            "compiled": lambda: compiled(setting, layer.torchs),
        }
        if fused
        else {},
    )
