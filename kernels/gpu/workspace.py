"""Device memory that launchers need for themselves, at addresses that stay.

A recorded CUDA graph holds the addresses it was recorded with. So a buffer is allocated once, only
ever replaced by a larger one, and the smaller one is kept for the graphs that know it. Sizes are
rounded up to a power of two: what is kept is together smaller than what is in use.
"""

from __future__ import annotations

import torch

__all__ = ["Workspace"]


class Workspace:
    """Named buffers on one device, for launches of one stream at a time."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._buffers: dict[str, torch.Tensor] = {}
        self._outgrown: list[torch.Tensor] = []

    @property
    def nbytes(self) -> int:
        """Bytes of device memory held."""
        held = [*self._buffers.values(), *self._outgrown]
        return sum(buffer.numel() * buffer.element_size() for buffer in held)

    def take(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """A tensor of this shape at the start of the buffer ``name``, its values undefined."""
        numel = 1
        for size in shape:
            numel *= size
        buffer = self._buffers.get(name)
        if buffer is None or buffer.numel() < numel:
            if buffer is not None:
                self._outgrown.append(buffer)
            rounded = 1 << max(numel - 1, 0).bit_length()
            buffer = torch.empty(rounded, dtype=dtype, device=self._device)
            self._buffers[name] = buffer
        return buffer[:numel].view(shape)
