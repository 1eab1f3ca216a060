"""Large random models without large files: the engine's loader makes the weights up on the device.

A checkpoint of ``tests.bench.checkpoints.make_hollow`` has all the names and sizes and no data, so
what is exercised is the whole of the loading but for reading bytes.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch

from engine.loader import WeightSource
from engine.tensor_file import TensorFile

__all__ = ["bytes_of", "made_up_weights"]


def _made_up(source: WeightSource, name: str, file: TensorFile, out: torch.Tensor) -> None:
    """In place of ``WeightSource._copy``: numbers as of a fresh model, never zeros."""
    if out.dim() == 1:
        out.fill_(1)
    else:
        out.normal_(0, out.shape[1] ** -0.5)


@contextlib.contextmanager
def made_up_weights() -> Iterator[None]:
    """Within the block, tensors that a loader takes are random instead of read."""
    with mock.patch.object(WeightSource, "_copy", _made_up):
        yield


def bytes_of(thing: Any, seen: set[int] | None = None) -> int:
    """Bytes of all tensors that an object of ours holds, each memory once."""
    seen = set() if seen is None else seen
    if id(thing) in seen:
        return 0
    seen.add(id(thing))
    if isinstance(thing, torch.Tensor):
        memory = thing.untyped_storage()
        if memory.data_ptr() in seen:
            return 0
        seen.add(memory.data_ptr())
        return memory.nbytes()
    if isinstance(thing, dict):
        parts = list(thing.values())
    elif isinstance(thing, list | tuple):
        parts = list(thing)
    elif type(thing).__module__.startswith(("engine.models", "kernels.")):
        parts = [getattr(thing, name) for name in _attributes(thing)]
    else:
        return 0
    return sum(bytes_of(part, seen) for part in parts)


def _attributes(thing: Any) -> list[str]:
    slots = [name for kind in type(thing).__mro__ for name in getattr(kind, "__slots__", ())]
    return [*getattr(thing, "__dict__", {}), *slots]
