"""Engines of this process on the kernels that a test names."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from engine.config import Device
from tests.engine.harness import Engine

__all__ = ["engine_on"]


@contextmanager
def engine_on(backend: str, model: Path, device: torch.device, **settings: Any) -> Iterator[Engine]:
    """An engine on ``backend``, for short requests; ``device`` is where the GPU kernels run."""
    place = Device.CUDA if backend == "triton" and device.type == "cuda" else Device.CPU
    usual = {"max_model_len": 64, "max_num_seqs": 4, "max_num_tokens": 16, "device": place,
             "kv_memory_bytes": 1 << 20}  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MILLRACE_KERNELS", backend)
        # Triton's interpreter is NumPy, which warns of infinities that kernels count on.
        with np.errstate(all="ignore"):
            yield Engine(model, **{**usual, **settings})
