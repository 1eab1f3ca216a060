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

from kernels import checks
from kernels.interface import BackendUnavailable, PackedLinear

try:
    import triton
except ImportError as error:
    raise BackendUnavailable(
        "GPU kernels need triton, which is not installed: pip install 'millrace[gpu]'"
    ) from error

from kernels.gpu.attention import attend_paged, plan_step
from kernels.gpu.workspace import Workspace

if triton.knobs.runtime.interpret:
    from kernels.gpu.interpreted import let_ranges_end_at_tensors

    let_ranges_end_at_tensors()

__all__ = ["GpuOps", "load"]


class GpuOps:
    """See ``kernels.interface.Ops`` for what each op means."""

    name = "triton"
    batch_invariant = False

    def __init__(self) -> None:
        self._workspaces: dict[torch.device, Workspace] = {}

    def _workspace(self, device: torch.device) -> Workspace:
        """Memory for launches on this device, which are of one stream at a time."""
        if device not in self._workspaces:
            self._workspaces[device] = Workspace(device)
        return self._workspaces[device]

    def rounds_to(self, stored: torch.dtype) -> torch.dtype | None:
        """See ``Ops.rounds_to``."""
        return None

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
        checks.check_paged_attention(
            out, q, k_cache, v_cache, block_tables, query_starts, context_lens
        )
        workspace = self._workspace(q.device)
        plan = plan_step(workspace, q, k_cache, block_tables, query_starts, context_lens)
        attend_paged(plan, out, q, k_cache, v_cache, block_tables, scale)

    def pack_linear(self, weight: torch.Tensor) -> PackedLinear:
        """See ``Ops.pack_linear``."""
        checks.check_weight(weight)
        raise BackendUnavailable("linear is not written for GPUs yet")

    def linear(self, out: torch.Tensor, x: torch.Tensor, packed: PackedLinear) -> None:
        """See ``Ops.linear``."""
        checks.check_linear(out, x, packed)
        raise BackendUnavailable("linear is not written for GPUs yet")


@cache
def load() -> GpuOps:
    """The GPU ops, for CUDA devices and, interpreted, for the CPU.

    Raises BackendUnavailable where triton would have to compile for a device that is not there.
    """
    if not (triton.knobs.runtime.interpret or torch.cuda.is_available()):
        raise BackendUnavailable(
            "the triton kernels need a CUDA device; for tests on the CPU set TRITON_INTERPRET=1"
        )
    return GpuOps()
