"""Steps that are recorded once and replayed: CUDA graphs, and what stands in for them on a CPU.

A recorded step has one size and fixed addresses, so there is one for each of a few batch sizes, and
a batch goes to the next larger one. What a call allocates while it is recorded comes from one pool
of memory for all of them, since they are replayed one at a time; the largest is recorded first,
and the smaller ones find room in what it left.

Only the two calls in ``CudaRecorder`` know CUDA. ``Repeater`` calls the step again on the same
buffers, which is all that a replay does to them.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Collection
from functools import partial
from typing import Any, Protocol

import torch

__all__ = ["CudaRecorder", "Graphs", "Recorded", "Recorder", "Repeater", "bucket_sizes"]


class Recorded(Protocol):
    """A call that can be made again."""

    def replay(self) -> object:
        """Do to the same memory what the call did, in the order of the current stream."""
        ...


class Recorder(Protocol):
    """What makes calls repeatable."""

    def record(self, call: Callable[[], None]) -> Recorded:
        """Record a call; it is made at least once meanwhile, on what its buffers hold then.

        The call launches work on the device and waits for none of it.
        """
        ...


class CudaRecorder:
    """Records CUDA graphs.

    Args:
        device: a CUDA device.
    """

    def __init__(self, device: torch.device) -> None:
        self._stream: Any = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._pool = torch.cuda.graph_pool_handle()

    def record(self, call: Callable[[], None]) -> Recorded:
        """See ``Recorder.record``."""
        # The first call compiles kernels and lets workspaces grow, which no graph may contain.
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            call()
        torch.cuda.current_stream().wait_stream(self._stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool, stream=self._stream):
            call()
        return graph


class _Again:
    def __init__(self, call: Callable[[], None]) -> None:
        self.replay = call


class Repeater:
    """Records nothing: a replay is another call."""

    def record(self, call: Callable[[], None]) -> Recorded:
        """See ``Recorder.record``."""
        call()
        return _Again(call)


class Graphs:
    """One step, recorded for several batch sizes.

    Args:
        recorder: of the device.
        step: computes a batch of so many rows; those beyond the real ones are padding.
        sizes: numbers of rows, the largest batch among them.
        on_progress: told the fraction of sizes that are recorded.
    """

    def __init__(
        self,
        recorder: Recorder,
        step: Callable[[int], None],
        sizes: Collection[int],
        on_progress: Callable[[float], None] = lambda fraction: None,
    ) -> None:
        self._sizes = sorted(sizes)
        self._recorded: dict[int, Recorded] = {}
        for size in reversed(self._sizes):
            self._recorded[size] = recorder.record(partial(step, size))
            on_progress(len(self._recorded) / len(self._sizes))

    def replay(self, num_rows: int) -> None:
        """Compute a batch with ``num_rows`` real rows, at most the largest size."""
        self._recorded[self._sizes[bisect_left(self._sizes, num_rows)]].replay()


def bucket_sizes(max_rows: int) -> list[int]:
    """Batch sizes up to ``max_rows``, a few rows apart: 8, and an eighth of the size from 128 on.

    Weights are read once for all rows, so padding costs next to nothing; below 9 rows it would.
    """
    sizes = [size for size in (1, 2, 3, 4, 6, 8) if size < max_rows]
    size = 16
    while size < max_rows:
        sizes.append(size)
        size += max(8, 1 << max(0, size.bit_length() - 4))
    return [*sizes, max_rows]
