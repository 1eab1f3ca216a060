"""Ending tasks that run in the background.

``asyncio.wait_for`` (Python 3.11), which redis-py uses around every command, loses a cancellation
that comes just as the command completes. So one cancellation does not always end a task: it is
repeated, and a loop that nobody waits for looks whether it was asked to end.
"""

from __future__ import annotations

import asyncio

__all__ = ["asked_to_end", "end"]

AGAIN_S = 0.05


async def end(*tasks: asyncio.Task[None]) -> None:
    """Cancel tasks and wait until they have ended, whatever they raise."""
    pending = {task for task in tasks if not task.done()}
    while pending:
        for task in pending:
            task.cancel()
        _, pending = await asyncio.wait(pending, timeout=AGAIN_S)


def asked_to_end() -> bool:
    """Return whether the current task has been cancelled, though it still runs."""
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0
