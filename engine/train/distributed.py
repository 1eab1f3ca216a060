"""The devices that train one model together: gradients are summed, everything else is equal.

Started by `torchrun`, each process has its own device; each packs the same batches and computes its
share of the rows, so the result is that of one device but for the order of sums.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

__all__ = ["Group"]


@dataclass(frozen=True, slots=True)
class Group:
    """This process's place among those that train together."""

    rank: int = 0
    size: int = 1

    @classmethod
    def join(cls, device_type: str) -> Group:
        """Joins the processes that `torchrun` started; alone where it did not."""
        if "RANK" not in os.environ:
            return cls()
        dist.init_process_group("nccl" if device_type == "cuda" else "gloo")
        return cls(dist.get_rank(), dist.get_world_size())

    def leave(self) -> None:
        """Ends the connection to the others."""
        if self.size > 1:
            dist.destroy_process_group()

    def add_up(self, tensors: list[Tensor]) -> None:
        """Replaces each tensor by its sum over all processes, in one message."""
        if self.size == 1:
            return
        joined = nn.utils.parameters_to_vector(tensors)
        dist.all_reduce(joined)
        with torch.no_grad():
            nn.utils.vector_to_parameters(joined, tensors)

    def agreed(self, value: float) -> float:
        """The first process's value: clocks differ, and learning rates must not."""
        if self.size == 1:
            return value
        values = [value]
        dist.broadcast_object_list(values)
        return values[0]
