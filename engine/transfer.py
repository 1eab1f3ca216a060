"""Arrays on their way to the device and back, without waiting for it.

A copy from ordinary memory waits for the device's queue, so what goes to a GPU goes from pinned
memory, and what comes back is copied there and read once an event says that it has arrived. On a
CPU nothing moves: the tensors are the arrays.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch

__all__ = ["Arrivals", "Staging", "to_device"]


class Staging:
    """Memory on the host for several arrays of one type, which go to the device in one copy.

    Args:
        size: most numbers in one copy.
        dtype: of the numbers.
        device: where they go.
        turns: pieces of memory that take turns. A piece is written again when all copies from it
            are done: with one step ahead, two steps' inputs may be under way.
    """

    def __init__(self, size: int, dtype: torch.dtype, device: torch.device, turns: int = 1) -> None:
        self._device = device
        self._tensors = [
            torch.empty(size, dtype=dtype, pin_memory=device.type == "cuda") for _ in range(turns)
        ]
        self._arrays = [tensor.numpy() for tensor in self._tensors]
        self._turn = 0

    def send(self, *arrays: npt.NDArray[np.signedinteger]) -> list[torch.Tensor]:
        """One tensor for each array; overwritten ``turns`` calls later."""
        sizes = [len(array) for array in arrays]
        total = sum(sizes)
        turn = self._turn = (self._turn + 1) % len(self._tensors)
        np.concatenate(arrays, out=self._arrays[turn][:total], casting="same_kind")
        sent = self._tensors[turn][:total]
        if self._device.type != "cpu":
            sent = sent.to(self._device, non_blocking=True)
        return list(torch.split(sent, sizes))


def to_device(array: npt.NDArray[np.generic], device: torch.device) -> torch.Tensor:
    """The array as a tensor there; on a CPU the same memory."""
    tensor = torch.from_numpy(array)
    if device.type == "cpu":
        return tensor
    # torch gives the pinned memory to nobody else before this copy is done.
    return tensor.pin_memory().to(device, non_blocking=True)


class Arrivals:
    """Results of one step on their way to the host, all of which are there after ``wait``.

    Args:
        device: where they come from.
    """

    def __init__(self, device: torch.device) -> None:
        self._event: torch.cuda.Event | None = None
        if device.type == "cuda":
            self._event = torch.cuda.Event()  # type: ignore[no-untyped-call]

    def bring(self, tensor: torch.Tensor, *, reused: bool = False) -> torch.Tensor:
        """The tensor on the host, to be read after ``wait``.

        On a CPU it is the tensor itself, or a copy where the next step overwrites it (``reused``).
        """
        if self._event is None:
            return tensor.clone() if reused else tensor
        host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
        host.copy_(tensor, non_blocking=True)
        self._event.record()
        return host

    def wait(self) -> None:
        """Return when everything is there."""
        if self._event is not None:
            self._event.synchronize()
