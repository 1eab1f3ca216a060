"""Ops of a device under tests that know only the CPU, which is where the oracle's tensors are."""

from __future__ import annotations

from typing import Any, cast

import numpy as np
import torch

from kernels import Ops

__all__ = ["on_device"]


class _OnDevice:
    """Each call gets copies of its tensors on ``device``, and what it wrote comes back."""

    def __init__(self, ops: Any, device: torch.device) -> None:
        self._ops, self._device = ops, device

    def __getattr__(self, name: str) -> Any:
        member = getattr(self._ops, name)
        return self._wrapped(member) if callable(member) and name != "rounds_to" else member

    def _wrapped(self, op: Any) -> Any:
        def call(*arguments: Any) -> Any:
            tensors = {id(x): x for x in arguments if isinstance(x, torch.Tensor)}
            moved = {key: x.to(self._device) for key, x in tensors.items()}
            # Triton's interpreter is NumPy, which warns of infinities that kernels count on.
            with np.errstate(all="ignore"):
                result = op(*(moved.get(id(x), x) for x in arguments))
            for key, mine in tensors.items():
                if mine is not moved[key]:
                    mine.copy_(moved[key])
            return result

        return call


def on_device(ops: Any, device: torch.device) -> Ops:
    """The same ops for tensors on the CPU."""
    return cast(Ops, _OnDevice(ops, device))
