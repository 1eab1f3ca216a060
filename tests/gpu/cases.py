"""What a row of the kernels' table measures."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar, cast

import torch

from kernels.fp8 import Fp8Ops
from kernels.gpu import GpuOps
from kernels.gpu.cost import Cost
from tests.gpu.parts import Absent
from tests.gpu.setting import Setting
from tests.gpu.timing import Call

__all__ = ["Case", "Maker", "Named", "compiled", "fp8_of", "of_bytes"]

Peers = dict[str, Callable[[], Call]]
"""Name -> what makes the call. Whatever either raises is why there is no figure."""
_Function = TypeVar("_Function", bound=Callable[..., Any])


class Case(NamedTuple):
    """One op at one size, its arguments ready."""

    ours: Call
    cost: Cost
    peers: Peers
    result: torch.Tensor | None = None
    """What ``ours`` writes, to be compared with what torch's call returns."""
    rate: str = "bf16"
    """Which of the measured rates bounds it."""
    tolerance: float = 0.02


Maker = Callable[[Setting, GpuOps], Case]
Named = tuple[str, Maker, bool]
"""Name of the row, what makes its case, whether it is run by default."""


def compiled(setting: Setting, function: _Function) -> _Function:
    """The function through ``torch.compile``, for these sizes; in a dry run without a compiler."""
    backend = "eager" if setting.dry else "inductor"
    made: Any = torch.compile(function, dynamic=False, backend=backend)
    return cast(_Function, made)


def fp8_of(ops: GpuOps) -> Fp8Ops:
    """The same ops. Raises Absent where the device has no 8-bit floats."""
    if not isinstance(ops, Fp8Ops):
        raise Absent("this device has no 8-bit floats")
    return ops


def of_bytes(*tensors: torch.Tensor, flops: int = 0) -> Cost:
    """The cost of passing over each of these once."""
    return Cost(sum(tensor.nbytes for tensor in tensors), flops)
