"""Long lists worked through a part at a time, so that the event loop is not held for all of it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from typing import TypeVar

__all__ = ["BATCH", "batches"]

BATCH = 256
"""Items worked through at once: a millisecond or two."""

T = TypeVar("T")


async def batches(items: Sequence[T]) -> AsyncIterator[Sequence[T]]:
    """Yield up to ``BATCH`` items at a time; between two parts whatever else is due runs."""
    for start in range(0, len(items), BATCH):
        if start:
            await asyncio.sleep(0)
        yield items[start : start + BATCH]
