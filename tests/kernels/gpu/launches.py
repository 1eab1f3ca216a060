"""What a piece of code launches, counted."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from triton.runtime.interpreter import GridExecutor
from triton.runtime.jit import JITFunction

__all__ = ["counted_launches"]


@contextmanager
def counted_launches() -> Iterator[Counter[str]]:
    """Launches of Triton kernels within the block, by the kernel's name."""
    counts: Counter[str] = Counter()
    with pytest.MonkeyPatch.context() as patch:
        for owner, method in ((GridExecutor, "__call__"), (JITFunction, "run")):
            original = getattr(owner, method)

            def counting(self: Any, *args: Any, _run: Any = original, **kwargs: Any) -> Any:
                counts[self.fn.__name__] += 1
                return _run(self, *args, **kwargs)

            patch.setattr(owner, method, counting)
        yield counts
