"""The CPU ops in C++, behind ``Ops``.

Activations are float32 between the ops: that is the fast way on processors without 16-bit
arithmetic, and weights and cache stay in their 16 bits in memory. Where the processor multiplies
pairs of bfloat16 (AVX512-BF16), what meets bfloat16 weights or a bfloat16 cache is rounded to
bfloat16 too, which doubles the speed; sums stay float32. 16-bit activations work, through a float32
copy in and a rounding copy out.

Every row has the same bits alone, in any batch, in any cut of its prompt and on any number of
threads: each sum runs in one fixed order (see ``tile.h`` and ``attention.cpp``).

Floors: a product reads ``O*H*sizeof(W)`` bytes and does ``2*T*H*O`` operations; on a core with two
256-bit FMA units that is 32 operations a cycle, with pairs of bfloat16 64. Attention reads
``2*Hkv*D*sizeof(C)`` bytes for each context token and does ``4*Hq*D`` operations for each pair in
sight.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from kernels import checks
from kernels.cpu.binding import NativeLibrary
from kernels.cpu.ordinary import DTYPE_CODES, ordinary_attention, ordinary_qkv
from kernels.interface import KernelError, PackedLinear
from kernels.quantised import QuantisedWeight, check_quantised, dequantise

__all__ = ["NativeLinear", "NativeOps"]

_F32 = torch.float32
_PANEL = 16  # as in tile.h


def _bad_value(op: str, code: int, *arguments: tuple[str, torch.Tensor, str]) -> KernelError:
    """The error for a code of ``bad_value`` in api.h, given (name, tensor, what is right)."""
    name, tensor, right = arguments[code % 16 - 1]
    index = code // 16 - 1
    value = tensor.reshape(-1)[index].item()
    return KernelError(f"{op}: {name} must be {right}, but element {index} is {value}")


@dataclass(frozen=True)
class NativeLinear:
    """Panels of 16 output features, ``[ceil(O/16), H, 16]``, in the weight's own dtype.

    Where products round to bfloat16, ``[ceil(O/16), ceil(H/2), 16, 2]``.
    """

    panels: torch.Tensor
    out_features: int
    in_features: int
    code: int
    pointer: int

    @property
    def nbytes(self) -> int:
        """Bytes of the panels, padding included."""
        return self.panels.numel() * self.panels.element_size()


class NativeOps(NativeLibrary):
    """See ``kernels.interface.Ops`` for what each op means.

    The hot ops test for the ordinary case, float32 activations and all shapes right, in one
    expression; whatever is not that is looked at by ``kernels.checks``, which says what is wrong,
    and then goes through float32 copies.

    Args:
        path: the compiled library.
    """

    name = "cpu-native"
    batch_invariant = True

    def set_num_threads(self, count: int) -> None:
        """How many threads the ops may use, the calling one included."""
        self._set_num_threads(count)

    def rounds_to(self, stored: torch.dtype) -> torch.dtype | None:
        """See ``Ops.rounds_to``."""
        return stored if self._rounds(DTYPE_CODES[stored]) else None

    def embed(self, out: torch.Tensor, ids: torch.Tensor, table: torch.Tensor) -> None:
        """See ``Ops.embed``."""
        tokens, width = checks.check_embed(out, ids, table)
        wide = out if out.dtype is _F32 else torch.empty_like(out, dtype=_F32)
        code = self._embed(
            DTYPE_CODES[table.dtype], wide.data_ptr(), ids.data_ptr(), table.data_ptr(),
            tokens, width, table.shape[0],
        )  # fmt: skip
        if code:
            raise _bad_value("embed", code, ("ids", ids, f"in 0..{table.shape[0] - 1}"))
        if wide is not out:
            out.copy_(wide)

    def rms_norm(
        self, out: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, eps: float
    ) -> None:
        """See ``Ops.rms_norm``."""
        shape, code = x.shape, DTYPE_CODES.get(weight.dtype)
        if (
            len(shape) != 2 or code is None or x.dtype is not _F32 or out.dtype is not _F32
            or out.shape != shape or weight.shape != shape[1:]
            or not (x.is_contiguous() and out.is_contiguous() and weight.is_contiguous())
        ):  # fmt: skip
            checks.check_rms_norm(out, x, weight)
            wide = x.to(_F32)
            self.rms_norm(wide, wide, weight, eps)
            out.copy_(wide)
            return
        self._rms_norm(
            code, out.data_ptr(), x.data_ptr(), weight.data_ptr(), shape[0], shape[1], eps
        )

    def add_rms_norm(
        self,
        out: torch.Tensor,
        residual: torch.Tensor,
        x: torch.Tensor,
        weight: torch.Tensor,
        eps: float,
    ) -> None:
        """See ``Ops.add_rms_norm``."""
        shape, code = x.shape, DTYPE_CODES.get(weight.dtype)
        if (
            len(shape) != 2 or code is None or x.dtype is not _F32 or out.dtype is not _F32
            or residual.dtype is not _F32 or out.shape != shape or residual.shape != shape
            or weight.shape != shape[1:] or not (x.is_contiguous() and out.is_contiguous())
            or not (residual.is_contiguous() and weight.is_contiguous())
        ):  # fmt: skip
            checks.check_add_rms_norm(out, residual, x, weight)
            residual.add_(x)
            self.rms_norm(out, residual, weight, eps)
            return
        self._add_rms_norm(
            code, out.data_ptr(), residual.data_ptr(), x.data_ptr(), weight.data_ptr(),
            shape[0], shape[1], eps,
        )  # fmt: skip

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
        op = "qk_norm_rope_write"
        if not ordinary_qkv(
            q_out, qkv, q_weight, k_weight, cos_sin, positions, slots, k_cache, v_cache
        ):
            checks.check_qk_norm_rope_write(
                q_out, qkv, q_weight, k_weight, cos_sin, positions, slots, k_cache, v_cache
            )
            wide = torch.empty_like(q_out, dtype=_F32)
            self.qk_norm_rope_write(
                wide, qkv.to(_F32), q_weight, k_weight, cos_sin, positions, slots, k_cache,
                v_cache, eps,
            )  # fmt: skip
            q_out.copy_(wide)
            return
        tokens, q_heads, head_dim = q_out.shape
        blocks, kv_heads, block_size, _ = k_cache.shape
        table_len = cos_sin.shape[0]
        code = self._qk_norm_rope_write(
            DTYPE_CODES[q_weight.dtype], DTYPE_CODES[k_cache.dtype], q_out.data_ptr(),
            qkv.data_ptr(), q_weight.data_ptr(), k_weight.data_ptr(), cos_sin.data_ptr(),
            positions.data_ptr(), slots.data_ptr(), k_cache.data_ptr(), v_cache.data_ptr(),
            tokens, q_heads, kv_heads, head_dim, block_size, blocks, table_len, eps,
        )  # fmt: skip
        if code:
            last_slot = blocks * block_size - 1
            raise _bad_value(
                op, code, ("positions", positions, f"in 0..{table_len - 1}"),
                ("slots", slots, f"in 0..{last_slot}"),
            )  # fmt: skip

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
        if not ordinary_attention(
            out, q, k_cache, v_cache, block_tables, query_starts, context_lens
        ):
            checks.check_paged_attention(
                out, q, k_cache, v_cache, block_tables, query_starts, context_lens
            )
            wide = out.to(_F32)
            self.paged_attention(
                wide, q.to(_F32), k_cache, v_cache, block_tables, query_starts, context_lens, scale
            )
            out.copy_(wide)
            return
        tokens, q_heads, head_dim = q.shape
        blocks, kv_heads, block_size, _ = k_cache.shape
        requests, max_blocks = block_tables.shape
        code = self._paged_attention(
            DTYPE_CODES[k_cache.dtype], out.data_ptr(), q.data_ptr(), k_cache.data_ptr(),
            v_cache.data_ptr(), block_tables.data_ptr(), query_starts.data_ptr(),
            context_lens.data_ptr(), requests, tokens, q_heads, kv_heads, head_dim, block_size,
            blocks, max_blocks, scale,
        )  # fmt: skip
        if code:
            room = max_blocks * block_size
            raise _bad_value(
                "paged_attention", code,
                ("query_starts", query_starts, f"rising from 0 to at most {tokens}"),
                ("context_lens", context_lens, f"from the new tokens' number to {room}"),
                ("block_tables", block_tables, f"in 0..{blocks - 1}"),
            )  # fmt: skip

    def swiglu(self, out: torch.Tensor, gate_up: torch.Tensor) -> None:
        """See ``Ops.swiglu``."""
        shape = out.shape
        if (
            len(shape) != 2 or out.dtype is not _F32 or gate_up.dtype is not _F32
            or gate_up.shape != (shape[0], 2 * shape[1])
            or not (out.is_contiguous() and gate_up.is_contiguous())
        ):  # fmt: skip
            checks.check_swiglu(out, gate_up)
            wide = torch.empty_like(out, dtype=_F32)
            self.swiglu(wide, gate_up.to(_F32))
            out.copy_(wide)
            return
        self._swiglu(out.data_ptr(), gate_up.data_ptr(), shape[0], shape[1])

    def pack_linear(self, weight: torch.Tensor) -> PackedLinear:
        """See ``Ops.pack_linear``."""
        features, width = checks.check_weight(weight)
        if not weight.is_cpu:
            raise KernelError(f"pack_linear: weight must be on the CPU, got {weight.device}")
        code = DTYPE_CODES[weight.dtype]
        # Pairs of bfloat16 are whole.
        depth = width if self.rounds_to(weight.dtype) is None else width + width % 2
        panels = torch.empty(-(-features // _PANEL), depth, _PANEL, dtype=weight.dtype)
        self._pack_linear(code, weight.data_ptr(), features, width, panels.data_ptr())
        return NativeLinear(panels, features, width, code, panels.data_ptr())

    def pack_quantised(self, weight: QuantisedWeight) -> PackedLinear:
        """See ``Ops.pack_quantised``."""
        check_quantised(weight)
        return self.pack_linear(dequantise(weight, torch.bfloat16))

    def linear(self, out: torch.Tensor, x: torch.Tensor, packed: PackedLinear) -> None:
        """See ``Ops.linear``."""
        if type(packed) is not NativeLinear:
            raise KernelError(f"linear: packed is a {type(packed).__name__} of another backend")
        shape, features, width = x.shape, packed.out_features, packed.in_features
        if (
            len(shape) != 2 or shape[1] != width or x.dtype is not _F32 or out.dtype is not _F32
            or out.shape != (shape[0], features)
            or not (x.is_contiguous() and out.is_contiguous())
        ):  # fmt: skip
            checks.check_linear(out, x, packed)
            wide = out if out.dtype is _F32 else torch.empty_like(out, dtype=_F32)
            self.linear(wide, x.to(_F32), packed)
            if wide is not out:
                out.copy_(wide)
            return
        self._linear(
            packed.code, out.data_ptr(), x.data_ptr(), packed.pointer, shape[0], width, features
        )

    def gather_rows(self, out: torch.Tensor, x: torch.Tensor, rows: torch.Tensor) -> None:
        """See ``Ops.gather_rows``."""
        count, width, tokens = checks.check_gather_rows(out, x, rows)
        bytes_in_floats = width
        if x.dtype is not _F32:
            if width % 2:
                out.copy_(x[rows])
                return
            bytes_in_floats = width // 2
        code = self._gather_rows(
            out.data_ptr(), x.data_ptr(), rows.data_ptr(), count, bytes_in_floats, tokens
        )
        if code:
            raise _bad_value("gather_rows", code, ("rows", rows, f"in 0..{tokens - 1}"))

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
        rows, vocab = checks.check_apply_penalties(
            logits, entry_rows, entry_ids, entry_output_counts, repetition, presence, frequency
        )
        code = self._apply_penalties(
            logits.data_ptr(), entry_rows.data_ptr(), entry_ids.data_ptr(),
            entry_output_counts.data_ptr(), repetition.data_ptr(), presence.data_ptr(),
            frequency.data_ptr(), entry_rows.shape[0], rows, vocab,
        )  # fmt: skip
        if code:
            raise _bad_value(
                "apply_penalties", code, ("entry_rows", entry_rows, "at least 0"),
                ("entry_ids", entry_ids, f"in 0..{vocab - 1}"),
            )  # fmt: skip

    def add_bias(
        self,
        logits: torch.Tensor,
        bias_rows: torch.Tensor,
        bias_ids: torch.Tensor,
        bias_values: torch.Tensor,
    ) -> None:
        """See ``Ops.add_bias``."""
        rows, vocab = checks.check_add_bias(logits, bias_rows, bias_ids, bias_values)
        code = self._add_bias(
            logits.data_ptr(), bias_rows.data_ptr(), bias_ids.data_ptr(), bias_values.data_ptr(),
            bias_rows.shape[0], rows, vocab,
        )  # fmt: skip
        if code:
            raise _bad_value(
                "add_bias", code, ("bias_rows", bias_rows, "at least 0"),
                ("bias_ids", bias_ids, f"in 0..{vocab - 1}"),
            )  # fmt: skip

    def apply_token_mask(self, logits: torch.Tensor, mask: torch.Tensor) -> None:
        """See ``Ops.apply_token_mask``."""
        rows, vocab = checks.check_apply_token_mask(logits, mask)
        self._apply_token_mask(logits.data_ptr(), mask.data_ptr(), rows, vocab)

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
        rows, vocab = checks.check_sample(
            out_ids, logits, temperature, top_k, top_p, min_p, seeds, positions
        )
        self._sample(
            out_ids.data_ptr(), logits.data_ptr(), temperature.data_ptr(), top_k.data_ptr(),
            top_p.data_ptr(), min_p.data_ptr(), seeds.data_ptr(), positions.data_ptr(),
            rows, vocab,
        )  # fmt: skip

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
        rows, vocab = checks.check_logprobs(out_logprobs, out_ids, out_ranks, logits, chosen, k)
        code = self._logprobs(
            out_logprobs.data_ptr(), out_ids.data_ptr(), out_ranks.data_ptr(), logits.data_ptr(),
            chosen.data_ptr(), k, rows, vocab,
        )  # fmt: skip
        if code:
            raise _bad_value("logprobs", code, ("chosen", chosen, f"in 0..{vocab - 1}"))

    def token_hashes(self, seed: int, position: int, first_id: int, count: int) -> torch.Tensor:
        """The hash of ``kernels.noise`` as the C++ side computes it, int64 ``[count]``."""
        out = torch.empty(count, dtype=torch.int32)
        self._token_hashes(out.data_ptr(), seed, position, first_id, count)
        return out.to(torch.int64) & 0xFFFFFFFF
