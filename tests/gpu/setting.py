"""Where a run takes place: on a GPU, or dry, on the CPU in Triton's interpreter.

A dry run goes through every step of the scripts with tiny shapes, so that only CUDA itself is left
to fail later. Its figures mean nothing and are never kept.
"""

from __future__ import annotations

import gc
import os
import time
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch

__all__ = ["Setting", "dry_environment", "scratch_folder"]


@dataclass(frozen=True)
class Setting:
    """What a row must know of the run."""

    dry: bool
    device: torch.device
    out: Path
    """What is kept goes here."""
    until_s: float
    """Seconds since 1970 at which the part should be over."""

    @classmethod
    def find(cls, *, dry: bool, out: Path, until_s: float) -> Setting:
        """The setting of this process.

        Raises RuntimeError where there is no GPU and the run is not dry.
        """
        if not dry and not torch.cuda.is_available():
            raise RuntimeError("torch finds no GPU; --dry goes through the same steps on the CPU")
        device = torch.device("cpu" if dry else "cuda")
        return cls(dry, device, out, until_s)

    @property
    def left_s(self) -> float:
        """Seconds that the part may still take."""
        return self.until_s - time.time()

    @property
    def act(self) -> torch.dtype:
        """Type of activations and weights; the interpreter computes bfloat16 wrongly."""
        return torch.float32 if self.dry else torch.bfloat16

    def size(self, real: int, dry: int) -> int:
        """A size of the real run, or what stands for it in a dry one."""
        return min(real, dry) if self.dry else real

    def ops_for(self, settings: Mapping[str, Any]) -> AbstractContextManager[Any]:
        """Within it, engines with these settings get ops that can do it.

        A dry run's are the oracle's, whose rows are not the same in any batch; the CPU's are.
        """
        change = self.dry and settings.get("batch_invariant")
        return mock.patch.dict(os.environ, {"MILLRACE_KERNELS": "auto"} if change else {})

    def sync(self) -> None:
        """Wait for the device."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def forget(self) -> None:
        """Give the device back the memory that nothing uses any more."""
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    @property
    def name(self) -> str:
        """The device, for tables."""
        if self.device.type != "cuda":
            return "dry run on a CPU"
        properties = torch.cuda.get_device_properties(self.device)
        return f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB"


def dry_environment() -> dict[str, str]:
    """Variables of a dry run's processes, before triton is imported.

    Engines compute with the oracle's ops, which have everything that those of a GPU have.
    """
    return {
        "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1",
        "MILLRACE_KERNELS": "reference",
    }  # fmt: skip


def scratch_folder() -> str | None:
    """Where large files cost no disk, if there is such a place; None: the usual one."""
    memory = Path("/dev/shm")
    return str(memory) if memory.is_dir() and os.access(memory, os.W_OK) else None
