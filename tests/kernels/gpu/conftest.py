"""The GPU kernels' tests run on a GPU where there is one, and in Triton's interpreter elsewhere.

The interpreter has to be chosen before triton is imported. Whole runs of the tests import it early
(transformers does), so ``tests/conftest.py`` chooses too.
"""

from __future__ import annotations

import os
import sys
from typing import Any

import pytest
import torch

if not torch.cuda.is_available() and "triton" not in sys.modules:
    os.environ["TRITON_INTERPRET"] = "1"


@pytest.fixture(scope="session")
def device() -> torch.device:
    """Where the tensors of a test lie."""
    if torch.cuda.is_available():
        return torch.device("cuda")
    assert os.environ.get("TRITON_INTERPRET") == "1", "triton was imported without its interpreter"
    return torch.device("cpu")


@pytest.fixture(scope="session", autouse=True)
def _indices_of_the_interpreter() -> None:
    """Triton 3.6 makes a loop's bounds of arrays of one element, which NumPy 2.4 refuses."""
    from triton.runtime import interpreter

    original = interpreter._patch_lang_tensor

    def patch(tensor: Any, scope: Any) -> None:
        original(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    interpreter._patch_lang_tensor = patch
