"""Kernels: tensors and integers in, tensors out. No configuration objects, no engine types.

``select`` picks the backend of a device; ``Ops`` says what every backend offers.
"""

# This package sets no ``__version__``: transformers looks for a package called ``kernels`` and
# takes one with a version for the Hugging Face project of that name.

from __future__ import annotations

import os

import torch

from kernels.fp8 import E4M3, Fp8Ops
from kernels.interface import BackendUnavailable, KernelError, Ops, PackedLinear
from kernels.quantised import QuantisedWeight, Scheme, dequantise

__all__ = [
    "E4M3",
    "BackendUnavailable",
    "Fp8Ops",
    "KernelError",
    "Ops",
    "PackedLinear",
    "QuantisedWeight",
    "Scheme",
    "dequantise",
    "select",
]


def select(device: torch.device | str, *, batch_invariant: bool = False) -> Ops:
    """The ops for tensors on ``device``.

    With ``batch_invariant`` those that can be are so, at a price; the ops' own ``batch_invariant``
    says whether they are.

    ``MILLRACE_KERNELS`` in the environment overrides the choice: ``reference`` is the plain-torch
    oracle (any device), ``torch`` the compiler-free CPU backend, ``triton`` the GPU kernels (on the
    CPU in Triton's interpreter, for tests), ``auto`` (default) the best.

    Raises:
        BackendUnavailable: no backend for this device, or the override is not one of the above.
    """
    kind = torch.device(device).type
    forced = os.environ.get("MILLRACE_KERNELS", "auto")
    if forced == "reference":
        from kernels.reference_fp8 import ReferenceFp8Ops

        return ReferenceFp8Ops()
    if forced not in ("auto", "torch", "triton"):
        raise BackendUnavailable(
            f"MILLRACE_KERNELS must be auto, reference, torch or triton, got {forced!r}"
        )
    if forced == "triton" or (forced == "auto" and kind == "cuda"):
        from kernels import gpu

        return gpu.load(kind, batch_invariant=batch_invariant)
    if kind != "cpu":
        raise BackendUnavailable(
            f"no {forced} kernels for device {kind!r}: use 'cpu', or MILLRACE_KERNELS=reference"
        )
    if forced == "torch":
        from kernels.cpu.fallback import TorchOps

        return TorchOps()
    from kernels import cpu

    return cpu.load()
