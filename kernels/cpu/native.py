"""The CPU ops in C++, behind ``Ops``.

Activations are float32 inside: that is the fast way on processors without 16-bit arithmetic, and
weights and cache stay in their 16 bits in memory. 16-bit activations work, through a float32 copy
in and a rounding copy out.

Every row has the same bits alone, in any batch, in any cut of its prompt and on any number of
threads: each sum runs in one fixed order (see ``tile.h`` and ``attention.cpp``).

Floors: a product reads ``O*H*sizeof(W)`` bytes and does ``2*T*H*O`` operations; on a core with two
256-bit FMA units that is 32 operations a cycle. Attention reads ``2*Hkv*D*sizeof(C)`` bytes for
each context token and does ``4*Hq*D`` operations for each pair in sight.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from kernels import checks
from kernels.interface import KernelError, PackedLinear

__all__ = ["NativeLinear", "NativeOps"]

_F32 = torch.float32
_DTYPE_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}  # as in api.h
_PANEL = 16  # as in tile.h

# p: pointer, i: int, l: int64, f: float. A leading "!" means that bad values are reported.
_SIGNATURES = {
    "embed": "!ipppLLL",
    "rms_norm": "ipppLLf",
    "add_rms_norm": "ippppLLf",
    "qk_norm_rope_write": "!iipppppppppLLLLLLLf",
    "paged_attention": "!ippppppp" + "L" * 8 + "f",
    "swiglu": "ppLL",
    "pack_linear": "ipLLp",
    "linear": "ipppLLL",
    "gather_rows": "!pppLLL",
    "apply_penalties": "!pppppppLLL",
    "add_bias": "!ppppLLL",
    "sample": "ppppppppLL",
    "logprobs": "!pppppLLL",
    "token_hashes": "pLLLL",
    "set_num_threads": "i",
}
_TYPES: dict[str, Any] = {
    "p": ctypes.c_void_p,
    "i": ctypes.c_int,
    "L": ctypes.c_int64,
    "f": ctypes.c_float,
}


def _bad_value(op: str, code: int, *arguments: tuple[str, torch.Tensor, str]) -> KernelError:
    """The error for a code of ``bad_value`` in api.h, given (name, tensor, what is right)."""
    name, tensor, right = arguments[code % 16 - 1]
    index = code // 16 - 1
    value = tensor.reshape(-1)[index].item()
    return KernelError(f"{op}: {name} must be {right}, but element {index} is {value}")


@dataclass(frozen=True)
class NativeLinear:
    """Panels of 16 output features, ``[ceil(O/16), H, 16]``, in the weight's own dtype."""

    panels: torch.Tensor
    out_features: int
    in_features: int
    code: int
    pointer: int

    @property
    def nbytes(self) -> int:
        """Bytes of the panels, padding included."""
        return self.panels.numel() * self.panels.element_size()


class NativeOps:
    """See ``kernels.interface.Ops`` for what each op means.

    Args:
        path: the compiled library.
    """

    name = "cpu-native"
    batch_invariant = True

    def __init__(self, path: Path) -> None:
        library = ctypes.CDLL(str(path))
        for op, signature in _SIGNATURES.items():
            function = getattr(library, f"millrace_{op}")
            function.restype = ctypes.c_int64 if signature.startswith("!") else None
            function.argtypes = [_TYPES[letter] for letter in signature.lstrip("!")]
            setattr(self, f"_{op}", function)

    # Set in __init__; ctypes functions take and give plain integers.
    _embed: Any
    _rms_norm: Any
    _add_rms_norm: Any
    _qk_norm_rope_write: Any
    _paged_attention: Any
    _swiglu: Any
    _pack_linear: Any
    _linear: Any
    _gather_rows: Any
    _apply_penalties: Any
    _add_bias: Any
    _sample: Any
    _logprobs: Any
    _token_hashes: Any
    _set_num_threads: Any

    def set_num_threads(self, count: int) -> None:
        """How many threads the ops may use, the calling one included."""
        self._set_num_threads(count)

    def embed(self, out: torch.Tensor, ids: torch.Tensor, table: torch.Tensor) -> None:
        """See ``Ops.embed``."""
        tokens, width = checks.check_embed(out, ids, table)
        wide = out if out.dtype is _F32 else torch.empty_like(out, dtype=_F32)
        code = self._embed(
            _DTYPE_CODES[table.dtype], wide.data_ptr(), ids.data_ptr(), table.data_ptr(),
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
        tokens, width = checks.check_rms_norm(out, x, weight)
        if x.dtype is not _F32:
            wide = x.to(_F32)
            self.rms_norm(wide, wide, weight, eps)
            out.copy_(wide)
            return
        self._rms_norm(
            _DTYPE_CODES[weight.dtype], out.data_ptr(), x.data_ptr(), weight.data_ptr(),
            tokens, width, eps,
        )  # fmt: skip

    def add_rms_norm(
        self,
        out: torch.Tensor,
        residual: torch.Tensor,
        x: torch.Tensor,
        weight: torch.Tensor,
        eps: float,
    ) -> None:
        """See ``Ops.add_rms_norm``."""
        tokens, width = checks.check_add_rms_norm(out, residual, x, weight)
        if x.dtype is not _F32:
            residual.add_(x)
            self.rms_norm(out, residual, weight, eps)
            return
        self._add_rms_norm(
            _DTYPE_CODES[weight.dtype], out.data_ptr(), residual.data_ptr(), x.data_ptr(),
            weight.data_ptr(), tokens, width, eps,
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
        tokens, q_heads, kv_heads, head_dim, blocks, block_size = checks.check_qk_norm_rope_write(
            q_out, qkv, q_weight, k_weight, cos_sin, positions, slots, k_cache, v_cache
        )
        wide = narrow = q_out
        if q_out.dtype is not _F32:
            wide, qkv = torch.empty_like(q_out, dtype=_F32), qkv.to(_F32)
        table_len = cos_sin.shape[0]
        code = self._qk_norm_rope_write(
            _DTYPE_CODES[q_weight.dtype], _DTYPE_CODES[k_cache.dtype], wide.data_ptr(),
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
        if wide is not narrow:
            narrow.copy_(wide)

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
    ) -> None:
        """See ``Ops.paged_attention``."""
        shape = checks.check_paged_attention(
            out, q, k_cache, v_cache, block_tables, query_starts, context_lens
        )
        tokens, q_heads, kv_heads, head_dim, blocks, block_size = shape
        requests, max_blocks = block_tables.shape
        wide = out
        if out.dtype is not _F32:
            wide, q = out.to(_F32), q.to(_F32)
        code = self._paged_attention(
            _DTYPE_CODES[k_cache.dtype], wide.data_ptr(), q.data_ptr(), k_cache.data_ptr(),
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
        if wide is not out:
            out.copy_(wide)

    def swiglu(self, out: torch.Tensor, gate_up: torch.Tensor) -> None:
        """See ``Ops.swiglu``."""
        tokens, width = checks.check_swiglu(out, gate_up)
        wide = out
        if out.dtype is not _F32:
            wide, gate_up = torch.empty_like(out, dtype=_F32), gate_up.to(_F32)
        self._swiglu(wide.data_ptr(), gate_up.data_ptr(), tokens, width)
        if wide is not out:
            out.copy_(wide)

    def pack_linear(self, weight: torch.Tensor) -> PackedLinear:
        """See ``Ops.pack_linear``."""
        features, width = checks.check_weight(weight)
        code = _DTYPE_CODES[weight.dtype]
        panels = torch.empty(-(-features // _PANEL), width, _PANEL, dtype=weight.dtype)
        self._pack_linear(code, weight.data_ptr(), features, width, panels.data_ptr())
        return NativeLinear(panels, features, width, code, panels.data_ptr())

    def linear(self, out: torch.Tensor, x: torch.Tensor, packed: PackedLinear) -> None:
        """See ``Ops.linear``."""
        if type(packed) is not NativeLinear:
            raise KernelError(f"linear: packed is a {type(packed).__name__} of another backend")
        tokens = checks.check_linear(out, x, packed)
        wide = out
        if x.dtype is not _F32:
            x = x.to(_F32)
            if out.dtype is not _F32:
                wide = torch.empty_like(out, dtype=_F32)
        self._linear(
            packed.code, wide.data_ptr(), x.data_ptr(), packed.pointer, tokens,
            packed.in_features, packed.out_features,
        )  # fmt: skip
        if wide is not out:
            out.copy_(wide)

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
