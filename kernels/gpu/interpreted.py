"""One repair of Triton's interpreter, which runs the kernels on the CPU for tests.

It holds scalars as arrays of one element and, for a loop over a range that ends at one, converts
them with ``int``. NumPy from 2.4 on refuses that for arrays with a dimension.
"""

from __future__ import annotations

from typing import Any

from triton.runtime import interpreter

__all__ = ["let_ranges_end_at_tensors"]


def let_ranges_end_at_tensors() -> None:
    """Have the interpreter take an array's only element where Python wants an integer."""
    original = interpreter._patch_lang_tensor

    def patch(tensor: Any, *scope: Any) -> Any:
        result = original(tensor, *scope)
        tensor.__index__ = lambda self: int(self.handle.data.item())
        return result

    interpreter._patch_lang_tensor = patch
