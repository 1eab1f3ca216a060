"""The GPU ops in Triton, behind ``Ops`` and ``Fp8Ops``.

One op family a module: ``@triton.jit`` functions, and under them the launchers that these methods
call. A method checks shapes and dtypes, looks at no value (that would wait for the device), and
launches; grids depend on shapes only, so calls can be recorded into a CUDA graph. Instead of
checking values, kernels keep out of other memory: an id or slot outside its tensor reads zeros and
writes nothing.

On the CPU the same kernels run in Triton's interpreter, for tests: set ``TRITON_INTERPRET=1``
before triton is imported.
"""

from __future__ import annotations

from functools import cache

import torch

from kernels import checks, fp8
from kernels.interface import BackendUnavailable, KernelError, PackedLinear
from kernels.quantised import QuantisedWeight, check_quantised

try:
    import triton
except ImportError as error:
    raise BackendUnavailable(
        "GPU kernels need triton, which is not installed: pip install 'millrace[gpu]'"
    ) from error

if triton.knobs.runtime.interpret:
    from kernels.gpu.interpreted import let_ranges_end_at_tensors, patch_once_a_launch

    let_ranges_end_at_tensors()
    patch_once_a_launch()

from kernels.gpu import logits as logit_ops
from kernels.gpu import rotary, rows, sampling
from kernels.gpu import swiglu as gated
from kernels.gpu.attention import attend_paged, plan_step
from kernels.gpu.attention_plan import AttentionPlan
from kernels.gpu.linear_fp8 import multiplies_e4m3
from kernels.gpu.packed import DenseLinear, QuantisedLinear, pack_dense, pack_quantised, run_linear
from kernels.gpu.workspace import Workspace

__all__ = ["GpuFp8Ops", "GpuOps", "load"]


class GpuOps:
    """See ``kernels.interface.Ops`` for what each op means.

    Args:
        batch_invariant: the kernels' block sizes do not depend on how many tokens there are.
    """

    name = "triton"

    def __init__(self, *, batch_invariant: bool = False) -> None:
        self.batch_invariant = batch_invariant
        self._workspaces: dict[torch.device, Workspace] = {}

    def _workspace(self, device: torch.device) -> Workspace:
        """Memory for launches on this device, which are of one stream at a time."""
        if device not in self._workspaces:
            self._workspaces[device] = Workspace(device)
        return self._workspaces[device]

    def rounds_to(self, stored: torch.dtype) -> torch.dtype | None:
        """See ``Ops.rounds_to``."""
        return None

    def embed(self, out: torch.Tensor, ids: torch.Tensor, table: torch.Tensor) -> None:
        """See ``Ops.embed``."""
        checks.check_embed(out, ids, table)
        rows.take_rows(out, table, ids)

    def gather_rows(self, out: torch.Tensor, x: torch.Tensor, rows_: torch.Tensor) -> None:
        """See ``Ops.gather_rows``."""
        checks.check_gather_rows(out, x, rows_)
        rows.take_rows(out, x, rows_)

    def rms_norm(
        self, out: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, eps: float
    ) -> None:
        """See ``Ops.rms_norm``."""
        checks.check_rms_norm(out, x, weight)
        rows.rms_norm(out, x, weight, eps)

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
        rows.add_rms_norm(out, residual, x, weight, eps)

    def swiglu(self, out: torch.Tensor, gate_up: torch.Tensor) -> None:
        """See ``Ops.swiglu``."""
        checks.check_swiglu(out, gate_up)
        gated.swiglu(out, gate_up)

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
        checks.check_qk_norm_rope_write(
            q_out, qkv, q_weight, k_weight, cos_sin, positions, slots, k_cache, v_cache
        )
        rotary.qk_norm_rope_write(
            q_out, qkv, q_weight, k_weight, cos_sin, positions, slots, k_cache, v_cache, eps
        )

    def plan_attention(
        self,
        q: torch.Tensor,
        k_cache: torch.Tensor,
        block_tables: torch.Tensor,
        query_starts: torch.Tensor,
        context_lens: torch.Tensor,
        most_new: int | None = None,
    ) -> AttentionPlan | None:
        """See ``Ops.plan_attention``; None where there is nothing to attend to."""
        return plan_step(
            self._workspace(q.device), q, k_cache, block_tables, query_starts, context_lens,
            most_new=most_new, invariant=self.batch_invariant,
        )  # fmt: skip

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
        checks.check_paged_attention(
            out, q, k_cache, v_cache, block_tables, query_starts, context_lens
        )
        if plan is None:
            plan = self.plan_attention(q, k_cache, block_tables, query_starts, context_lens)
        attend_paged(plan, out, q, k_cache, v_cache, block_tables, scale)

    def pack_linear(self, weight: torch.Tensor) -> PackedLinear:
        """See ``Ops.pack_linear``."""
        checks.check_weight(weight)
        return pack_dense(weight)

    def pack_quantised(self, weight: QuantisedWeight) -> PackedLinear:
        """See ``Ops.pack_quantised``."""
        check_quantised(weight)
        return pack_quantised(weight)

    def linear(self, out: torch.Tensor, x: torch.Tensor, packed: PackedLinear) -> None:
        """See ``Ops.linear``."""
        if not isinstance(packed, DenseLinear | QuantisedLinear):
            raise KernelError(f"linear: packed is a {type(packed).__name__} of another backend")
        checks.check_linear(out, x, packed)
        run_linear(out, x, packed, batch_invariant=self.batch_invariant)

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
        logit_ops.apply_penalties(
            logits, entry_rows, entry_ids, entry_output_counts, repetition, presence, frequency
        )

    def add_bias(
        self,
        logits: torch.Tensor,
        bias_rows: torch.Tensor,
        bias_ids: torch.Tensor,
        bias_values: torch.Tensor,
    ) -> None:
        """See ``Ops.add_bias``."""
        checks.check_add_bias(logits, bias_rows, bias_ids, bias_values)
        logit_ops.add_bias(logits, bias_rows, bias_ids, bias_values)

    def apply_token_mask(self, logits: torch.Tensor, mask: torch.Tensor) -> None:
        """See ``Ops.apply_token_mask``."""
        checks.check_apply_token_mask(logits, mask)
        logit_ops.apply_token_mask(logits, mask)

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
        sampling.sample(out_ids, logits, temperature, top_k, top_p, min_p, seeds, positions)

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
        logit_ops.logprobs(out_logprobs, out_ids, out_ranks, logits, chosen, k)


class GpuFp8Ops(GpuOps):
    """The same on devices that know e4m3; see ``kernels.fp8.Fp8Ops``."""

    def rms_norm_fp8(
        self,
        out: torch.Tensor,
        scales: torch.Tensor,
        x: torch.Tensor,
        weight: torch.Tensor,
        eps: float,
    ) -> None:
        """See ``Fp8Ops.rms_norm_fp8``."""
        fp8.check_rms_norm_fp8(out, scales, x, weight)
        rows.rms_norm(out, x, weight, eps, scales)

    def add_rms_norm_fp8(
        self,
        out: torch.Tensor,
        scales: torch.Tensor,
        residual: torch.Tensor,
        x: torch.Tensor,
        weight: torch.Tensor,
        eps: float,
    ) -> None:
        """See ``Fp8Ops.add_rms_norm_fp8``."""
        fp8.check_add_rms_norm_fp8(out, scales, residual, x, weight)
        rows.add_rms_norm(out, residual, x, weight, eps, scales)

    def swiglu_fp8(self, out: torch.Tensor, scales: torch.Tensor, gate_up: torch.Tensor) -> None:
        """See ``Fp8Ops.swiglu_fp8``."""
        fp8.check_swiglu_fp8(out, scales, gate_up)
        gated.swiglu(out, gate_up, scales)

    def qk_norm_rope_write_fp8(
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
        k_scale: torch.Tensor,
        v_scale: torch.Tensor,
        eps: float,
    ) -> None:
        """See ``Fp8Ops.qk_norm_rope_write_fp8``."""
        fp8.check_qk_norm_rope_write_fp8(
            q_out, qkv, q_weight, k_weight, cos_sin, positions, slots, k_cache, v_cache, k_scale,
            v_scale,
        )  # fmt: skip
        rotary.qk_norm_rope_write(
            q_out, qkv, q_weight, k_weight, cos_sin, positions, slots, k_cache, v_cache, eps,
            (k_scale, v_scale),
        )  # fmt: skip

    def paged_attention_fp8(
        self,
        out: torch.Tensor,
        q: torch.Tensor,
        k_cache: torch.Tensor,
        v_cache: torch.Tensor,
        k_scale: torch.Tensor,
        v_scale: torch.Tensor,
        block_tables: torch.Tensor,
        query_starts: torch.Tensor,
        context_lens: torch.Tensor,
        scale: float,
        plan: object | None = None,
    ) -> None:
        """See ``Fp8Ops.paged_attention_fp8``."""
        fp8.check_paged_attention_fp8(
            out, q, k_cache, v_cache, k_scale, v_scale, block_tables, query_starts, context_lens
        )
        if plan is None:
            plan = self.plan_attention(q, k_cache, block_tables, query_starts, context_lens)
        attend_paged(plan, out, q, k_cache, v_cache, block_tables, scale, (k_scale, v_scale))


@cache
def load(device_type: str = "cuda", *, batch_invariant: bool = False) -> GpuOps:
    """The GPU ops for ``cuda`` devices or, in the interpreter, for the ``cpu``.

    They are ``Fp8Ops`` too where the device knows e4m3. Raises BackendUnavailable where there is no
    such device, or triton would compile for the CPU.
    """
    if device_type == "cuda" and not torch.cuda.is_available():
        raise BackendUnavailable("no kernels for device 'cuda': torch finds no GPU")
    interpreted = device_type == "cpu" and triton.knobs.runtime.interpret
    if device_type != "cuda" and not interpreted:
        raise BackendUnavailable(
            f"the triton kernels need a CUDA device, got {device_type!r}; for tests on the CPU set "
            "TRITON_INTERPRET=1"
        )
    kind = GpuFp8Ops if multiplies_e4m3(torch.device(device_type)) else GpuOps
    return kind(batch_invariant=batch_invariant)
