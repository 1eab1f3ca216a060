"""The GPU kernels' tests run on a GPU where there is one, and in Triton's interpreter elsewhere.

The interpreter has to be chosen before triton is imported. Whole runs of the tests import it early
(transformers does), so ``tests/conftest.py`` chooses too.
"""

from __future__ import annotations

import os
import sys

import pytest
import torch

from kernels import Ops
from tests.kernels.gpu.on_device import on_device

if not torch.cuda.is_available() and "triton" not in sys.modules:
    os.environ["TRITON_INTERPRET"] = "1"


@pytest.fixture(scope="session")
def device() -> torch.device:
    """Where the tensors of a test lie."""
    if torch.cuda.is_available():
        return torch.device("cuda")
    assert os.environ.get("TRITON_INTERPRET") == "1", "triton was imported without its interpreter"
    return torch.device("cpu")


@pytest.fixture(scope="session")
def ops(device: torch.device) -> Ops:
    """The GPU ops, for tensors on the CPU as the comparisons with the oracle make them."""
    from kernels import gpu  # not before the interpreter is chosen

    return on_device(gpu.load(device.type), device)
