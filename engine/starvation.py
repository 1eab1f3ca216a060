"""How long a process waited for a core: a machine too busy to run it is no hang of its own."""

from __future__ import annotations

import contextlib
import os
from typing import NamedTuple

__all__ = ["Starvation"]


class _Thread(NamedTuple):
    ran_ns: int
    waited_ns: int


class Starvation:
    """Watches a process's threads through Linux's scheduler statistics (schedstat in /proc).

    Where there are none, nothing is known and the answer is always zero.
    """

    def __init__(self, pid: int) -> None:
        self._folder = f"/proc/{pid}/task"
        self._threads: dict[str, _Thread] = {}

    def since_last_call(self, elapsed_s: float) -> float:
        """Seconds for which its most starved thread was ready and did not run.

        ``elapsed_s`` is the time since the last call. A wait is entered in the statistics when it
        is over; of one that goes on, the thread's state tells.
        """
        threads: dict[str, _Thread] = {}
        longest_s = 0.0
        with contextlib.suppress(OSError):
            for name in os.listdir(self._folder):
                thread = threads[name] = self._read(name)
                before = self._threads.get(name)
                if before is None:
                    continue
                waited_s = (thread.waited_ns - before.waited_ns) / 1e9
                if thread == before and self._is_ready(name):
                    waited_s = elapsed_s
                longest_s = max(longest_s, waited_s)
        self._threads = threads
        return longest_s

    def _read(self, name: str) -> _Thread:
        with open(f"{self._folder}/{name}/schedstat", "rb") as file:
            ran, waited, _ = file.read().split()
        return _Thread(int(ran), int(waited))

    def _is_ready(self, name: str) -> bool:
        with open(f"{self._folder}/{name}/stat", "rb") as file:
            # The name in parentheses may hold anything; the state follows the last of them.
            return file.read().rpartition(b")")[2].split()[0] == b"R"
