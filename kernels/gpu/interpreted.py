"""Repairs of Triton's interpreter, which runs the kernels on the CPU for tests."""

from __future__ import annotations

import inspect
from typing import Any

from triton import language
from triton.runtime import interpreter

__all__ = ["let_ranges_end_at_tensors", "patch_once_a_launch"]


def let_ranges_end_at_tensors() -> None:
    """Have the interpreter take an array's only element where Python wants an integer.

    It holds scalars as arrays of one element and, for a loop over a range that ends at one,
    converts them with ``int``. NumPy from 2.4 on refuses that for arrays with a dimension.
    """
    original = interpreter._patch_lang_tensor

    def patch(tensor: Any, *scope: Any) -> Any:
        result = original(tensor, *scope)
        tensor.__index__ = lambda self: int(self.handle.data.item())
        return result

    interpreter._patch_lang_tensor = patch


def patch_once_a_launch() -> None:
    """Have the interpreter replace the language's functions once a launch.

    It does so again at every call of one jitted function by another, ``tl.sum`` included, which
    changes nothing and is most of the time that a small kernel takes.
    """
    original = interpreter._patch_lang
    patched: set[Any] = set()  # modules, during a launch

    def patch(function: Any) -> Any:
        names = function.__globals__.values()
        wanted = {
            value
            for value in names
            if inspect.ismodule(value) and value in (language, language.core)
        }
        if wanted <= patched:
            return None  # of a nested call, which throws it away
        scope = original(function)
        if not patched:
            restore = scope.restore

            def end_of_launch() -> None:
                patched.clear()
                restore()

            scope.restore = end_of_launch
        patched.update(wanted)
        return scope

    interpreter._patch_lang = patch
