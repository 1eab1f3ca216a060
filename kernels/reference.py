"""The oracle: every op in plain torch, written to be read beside its formula. Never optimised.

All arithmetic is in float64 and rounded once on the store, so a backend that computes in float32
must agree to within float32's rounding (plus one rounding of the stored dtype).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from kernels import checks
from kernels.interface import KernelError, PackedLinear
from kernels.noise import uniforms
from kernels.quantised import QuantisedWeight, check_quantised, dequantise

__all__ = ["ReferenceLinear", "ReferenceOps", "check_ragged", "keep_mask", "normalise"]

_F64 = torch.float64


@dataclass(frozen=True)
class ReferenceLinear:
    """The weight as it came."""

    weight: torch.Tensor

    @property
    def out_features(self) -> int:
        """Rows of the weight."""
        return self.weight.shape[0]

    @property
    def in_features(self) -> int:
        """Columns of the weight."""
        return self.weight.shape[1]

    @property
    def nbytes(self) -> int:
        """Bytes of the weight."""
        return self.weight.numel() * self.weight.element_size()


def _check_range(op: str, name: str, values: torch.Tensor, end: int) -> None:
    """All ``values`` must be in ``[0, end)``."""
    if values.numel() and (int(values.min()) < 0 or int(values.max()) >= end):
        found = f"{int(values.min())}..{int(values.max())}"
        raise KernelError(f"{op}: {name} must be in 0..{end - 1}, got {found}")


def normalise(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """RMSNorm over the last dimension, in float64."""
    x = x.to(_F64)
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps) * weight.to(_F64)


def _rotate(x: torch.Tensor, cos_sin: torch.Tensor) -> torch.Tensor:
    """Rotate ``x [T, heads, D]`` by ``cos_sin [T, D]``."""
    first, second = x.chunk(2, dim=-1)
    cos, sin = cos_sin.to(_F64)[:, None, :].chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


def keep_mask(
    z: torch.Tensor, top_k: torch.Tensor, top_p: torch.Tensor, min_p: torch.Tensor
) -> torch.Tensor:
    """Which tokens top-k, top-p and min-p leave, bool ``[S, V]``, for ``z <= 0`` (0 is the max)."""
    vocab = z.shape[1]
    k = torch.where((top_k <= 0) | (top_k > vocab), vocab, top_k).to(torch.int64)
    ordered = z.sort(dim=1, descending=True).values
    keep = z >= ordered.gather(1, k[:, None] - 1)

    weights = torch.where(ordered >= ordered.gather(1, k[:, None] - 1), ordered.exp(), 0.0)
    probs = weights / weights.sum(1, keepdim=True)
    before = probs.cumsum(1) - probs
    # The mass of strictly more likely tokens: that in front of the first token of equal z.
    index = torch.searchsorted(-ordered, -z)
    more_likely = before.gather(1, index)
    keep &= (more_likely < top_p[:, None]) | (top_p[:, None] >= 1) | (z == 0)
    return keep & ((z.exp() >= min_p[:, None]) | (z == 0))


class ReferenceOps:
    """See ``kernels.interface.Ops`` for what each op means."""

    name = "reference"
    batch_invariant = False  # torch's products choose another order of summation by shape

    def rounds_to(self, stored: torch.dtype) -> torch.dtype | None:
        """See ``Ops.rounds_to``."""
        return None

    def embed(self, out: torch.Tensor, ids: torch.Tensor, table: torch.Tensor) -> None:
        """See ``Ops.embed``."""
        checks.check_embed(out, ids, table)
        _check_range("embed", "ids", ids, table.shape[0])
        out.copy_(table[ids])

    def rms_norm(
        self, out: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, eps: float
    ) -> None:
        """See ``Ops.rms_norm``."""
        checks.check_rms_norm(out, x, weight)
        out.copy_(normalise(x, weight, eps))

    def add_rms_norm(
        self,
        out: torch.Tensor,
        residual: torch.Tensor,
        x: torch.Tensor,
        weight: torch.Tensor,
        eps: float,
    ) -> None:
        """See ``Ops.add_rms_norm``."""
        checks.check_add_rms_norm(out, residual, x, weight)
        residual.copy_(residual.to(_F64) + x.to(_F64))
        out.copy_(normalise(residual, weight, eps))

    def qk_norm_rope_write(
        self,
        q_out: torch.Tensor,
        qkv: torch.Tensor,
        q_weight: torch.Tensor,
        k_weight: torch.Tensor,
        cos_sin: torch.Tensor,
        positions: torch.Tensor,
        slots: torch.Tensor,
        k_cache: torch.Tensor,
        v_cache: torch.Tensor,
        eps: float,
    ) -> None:
        """See ``Ops.qk_norm_rope_write``."""
        _, q_heads, kv_heads, head_dim, _, block_size = checks.check_qk_norm_rope_write(
            q_out, qkv, q_weight, k_weight, cos_sin, positions, slots, k_cache, v_cache
        )
        _check_range("qk_norm_rope_write", "positions", positions, cos_sin.shape[0])
        _check_range("qk_norm_rope_write", "slots", slots, k_cache.shape[0] * block_size)
        heads = qkv.view(-1, q_heads + 2 * kv_heads, head_dim)
        q, k, v = heads.tensor_split((q_heads, q_heads + kv_heads), dim=1)
        angles = cos_sin[positions]
        q_out.copy_(_rotate(normalise(q, q_weight, eps), angles))
        k = _rotate(normalise(k, k_weight, eps), angles)
        block, offset = slots // block_size, slots % block_size
        k_cache[block, :, offset] = k.to(k_cache.dtype)
        v_cache[block, :, offset] = v.to(v_cache.dtype)

    def plan_attention(
        self,
        q: torch.Tensor,
        k_cache: torch.Tensor,
        block_tables: torch.Tensor,
        query_starts: torch.Tensor,
        context_lens: torch.Tensor,
        most_new: int | None = None,
    ) -> None:
        """See ``Ops.plan_attention``; there is nothing to plan."""

    def paged_attention(
        self,
        out: torch.Tensor,
        q: torch.Tensor,
        k_cache: torch.Tensor,
        v_cache: torch.Tensor,
        block_tables: torch.Tensor,
        query_starts: torch.Tensor,
        context_lens: torch.Tensor,
        scale: float,
        plan: object | None = None,
    ) -> None:
        """See ``Ops.paged_attention``."""
        _, _, kv_heads, _, _, block_size = checks.check_paged_attention(
            out, q, k_cache, v_cache, block_tables, query_starts, context_lens
        )
        check_ragged(q, k_cache, block_tables, query_starts, context_lens)
        group = q.shape[1] // kv_heads
        for row, length in enumerate(context_lens.tolist()):
            start, end = query_starts[row : row + 2].tolist()
            if start == end:
                continue
            blocks = block_tables[row, : -(-length // block_size)].long()
            # [blocks, Hkv, B, D] -> [Hq, length, D]
            k, v = (
                cache[blocks].transpose(1, 2).flatten(0, 1)[:length].transpose(0, 1).to(_F64)
                for cache in (k_cache, v_cache)
            )
            k, v = k.repeat_interleave(group, 0), v.repeat_interleave(group, 0)
            scores = q[start:end].transpose(0, 1).to(_F64) @ k.transpose(1, 2) * scale
            key = torch.arange(length, device=q.device)
            future = key[None, :] > key[length - (end - start) :, None]
            probs = scores.masked_fill(future, float("-inf")).softmax(-1)
            out[start:end] = (probs @ v).transpose(0, 1).to(out.dtype)

    def swiglu(self, out: torch.Tensor, gate_up: torch.Tensor) -> None:
        """See ``Ops.swiglu``."""
        checks.check_swiglu(out, gate_up)
        gate, up = gate_up.to(_F64).chunk(2, dim=1)
        out.copy_(gate * torch.sigmoid(gate) * up)

    def pack_linear(self, weight: torch.Tensor) -> PackedLinear:
        """See ``Ops.pack_linear``."""
        checks.check_weight(weight)
        return ReferenceLinear(weight.detach().clone())

    def pack_quantised(self, weight: QuantisedWeight) -> PackedLinear:
        """See ``Ops.pack_quantised``."""
        check_quantised(weight)
        return ReferenceLinear(dequantise(weight, _F64))

    def linear(self, out: torch.Tensor, x: torch.Tensor, packed: PackedLinear) -> None:
        """See ``Ops.linear``."""
        if not isinstance(packed, ReferenceLinear):
            raise KernelError(f"linear: packed is a {type(packed).__name__} of another backend")
        checks.check_linear(out, x, packed)
        out.copy_(x.to(_F64) @ packed.weight.to(_F64).T)

    def gather_rows(self, out: torch.Tensor, x: torch.Tensor, rows: torch.Tensor) -> None:
        """See ``Ops.gather_rows``."""
        checks.check_gather_rows(out, x, rows)
        _check_range("gather_rows", "rows", rows, x.shape[0])
        out.copy_(x[rows])

    def apply_penalties(
        self,
        logits: torch.Tensor,
        entry_rows: torch.Tensor,
        entry_ids: torch.Tensor,
        entry_output_counts: torch.Tensor,
        repetition: torch.Tensor,
        presence: torch.Tensor,
        frequency: torch.Tensor,
    ) -> None:
        """See ``Ops.apply_penalties``."""
        checks.check_apply_penalties(
            logits, entry_rows, entry_ids, entry_output_counts, repetition, presence, frequency
        )
        real = entry_rows < logits.shape[0]
        rows, ids = entry_rows[real], entry_ids[real]
        counts = entry_output_counts[real].to(_F64)
        _check_range("apply_penalties", "entry_rows", rows, logits.shape[0])
        _check_range("apply_penalties", "entry_ids", ids, logits.shape[1])
        values, factor = logits[rows, ids].to(_F64), repetition[rows].to(_F64)
        values = torch.where(values > 0, values / factor, values * factor)
        values = values - frequency[rows].to(_F64) * counts
        values = values - presence[rows].to(_F64) * (counts > 0)
        logits[rows, ids] = values.to(torch.float32)

    def add_bias(
        self,
        logits: torch.Tensor,
        bias_rows: torch.Tensor,
        bias_ids: torch.Tensor,
        bias_values: torch.Tensor,
    ) -> None:
        """See ``Ops.add_bias``."""
        checks.check_add_bias(logits, bias_rows, bias_ids, bias_values)
        real = bias_rows < logits.shape[0]
        rows, ids = bias_rows[real], bias_ids[real]
        _check_range("add_bias", "bias_rows", rows, logits.shape[0])
        _check_range("add_bias", "bias_ids", ids, logits.shape[1])
        logits[rows, ids] += bias_values[real]

    def apply_token_mask(self, logits: torch.Tensor, mask: torch.Tensor) -> None:
        """See ``Ops.apply_token_mask``."""
        checks.check_apply_token_mask(logits, mask)
        ids = torch.arange(logits.shape[1], device=logits.device)
        allowed = (mask[:, ids // 32] >> (ids % 32)) & 1
        logits.masked_fill_(allowed == 0, float("-inf"))

    def sample(
        self,
        out_ids: torch.Tensor,
        logits: torch.Tensor,
        temperature: torch.Tensor,
        top_k: torch.Tensor,
        top_p: torch.Tensor,
        min_p: torch.Tensor,
        seeds: torch.Tensor,
        positions: torch.Tensor,
    ) -> None:
        """See ``Ops.sample``."""
        checks.check_sample(out_ids, logits, temperature, top_k, top_p, min_p, seeds, positions)
        if not out_ids.numel():
            return
        scores = logits.to(_F64).masked_fill(logits.isnan(), float("-inf"))
        best = scores.max(dim=1, keepdim=True).values
        greedy = (scores == best).int().argmax(dim=1)  # argmax gives the first of equal ones
        warmth = torch.where(temperature == 0, 1.0, temperature).to(_F64)
        z = torch.where(scores == best, 0.0, (scores - best) / warmth[:, None])
        z = z.masked_fill(z.isnan(), float("-inf"))
        keep = keep_mask(z, top_k, top_p.to(_F64), min_p.to(_F64))
        noise = -torch.log(-torch.log1p(-uniforms(seeds, positions, logits.shape[1])))
        keys = torch.where(keep, z + noise, float("-inf"))
        drawn = (keys == keys.max(dim=1, keepdim=True).values).int().argmax(dim=1)
        empty = best[:, 0] == float("-inf")
        out_ids.copy_(torch.where((temperature == 0) | empty, greedy, drawn))

    def logprobs(
        self,
        out_logprobs: torch.Tensor,
        out_ids: torch.Tensor,
        out_ranks: torch.Tensor,
        logits: torch.Tensor,
        chosen: torch.Tensor,
        k: int,
    ) -> None:
        """See ``Ops.logprobs``."""
        checks.check_logprobs(out_logprobs, out_ids, out_ranks, logits, chosen, k)
        _check_range("logprobs", "chosen", chosen, logits.shape[1])
        logs = logits.to(_F64).log_softmax(dim=1)
        top = logits.sort(dim=1, descending=True, stable=True).indices[:, :k]
        ids = torch.cat((chosen[:, None], top), dim=1)
        out_ids.copy_(ids)
        out_logprobs.copy_(logs.gather(1, ids))
        out_ranks.copy_(1 + (logits > logits.gather(1, chosen[:, None])).sum(1))


def check_ragged(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    block_tables: torch.Tensor,
    query_starts: torch.Tensor,
    context_lens: torch.Tensor,
) -> None:
    """Check the values that describe a ragged batch (see ``Ops.paged_attention``)."""
    op = "paged_attention"
    starts, lengths = query_starts.tolist(), context_lens.tolist()
    if starts[0] != 0 or starts != sorted(starts) or starts[-1] > q.shape[0]:
        raise KernelError(
            f"{op}: query_starts must rise from 0 to at most {q.shape[0]}, got {starts}"
        )
    blocks, _, block_size, _ = k_cache.shape
    room = block_tables.shape[1] * block_size
    for row, length in enumerate(lengths):
        new = starts[row + 1] - starts[row]
        if new and not new <= length <= room:
            raise KernelError(f"{op}: context_lens[{row}] must be in {new}..{room}, got {length}")
        if new:
            used = block_tables[row, : -(-length // block_size)]
            _check_range(op, f"block_tables[{row}]", used, blocks)
