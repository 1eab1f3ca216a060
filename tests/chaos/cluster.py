"""A Redis and servers on it: what a scenario harms."""

from __future__ import annotations

import concurrent.futures
import contextlib
import os
import shutil
import struct
import tempfile
from collections.abc import Iterator, Sequence
from enum import Enum
from pathlib import Path

from tests.chaos.processes import RedisServer, Replica, until
from tests.chaos.sentinel import SentinelStore

__all__ = ["Cluster", "StoreType"]

READY_S = 300.0
CLOCK = Path(__file__).parent / "clock"


class StoreType(Enum):
    """What the servers keep their state in."""

    DURABLE = "a Redis that has everything on disk before it answers"
    FORGETFUL = "a Redis that keeps nothing over a restart"
    SENTINEL = "a master and a replica under Sentinels"


class Cluster:
    """A store and ``num_replicas`` servers on it, all in one temporary directory."""

    def __init__(
        self,
        num_replicas: int = 2,
        *,
        store: StoreType = StoreType.DURABLE,
        arguments: Sequence[str] = (),
    ) -> None:
        self.directory = Path(tempfile.mkdtemp(prefix="millrace-chaos-"))
        folder = self.directory / "redis"
        self.redis: RedisServer | SentinelStore
        if store is StoreType.SENTINEL:
            self.redis = SentinelStore(folder)
        else:
            self.redis = RedisServer(folder, durable=store is StoreType.DURABLE)
        self._clock = self.directory / "clock"
        self.move_clock(0.0)
        paths = [str(CLOCK), *filter(None, [os.environ.get("PYTHONPATH")])]
        environment = {"CHAOS_CLOCK": str(self._clock), "PYTHONPATH": os.pathsep.join(paths)}
        self.replicas = [
            Replica(self.redis.url, arguments, environment) for _ in range(num_replicas)
        ]

    def move_clock(self, by_s: float) -> None:
        """Set how far the servers' wall clock is off; it jumps at once."""
        with self._clock.open("r+b" if self._clock.exists() else "wb") as file:
            file.write(struct.pack("d", by_s))

    def start(self) -> None:
        """Start everything, the servers one beside the other."""
        self.redis.start()
        with concurrent.futures.ThreadPoolExecutor() as pool:
            list(pool.map(Replica.start, self.replicas))
        self.until_ready()

    def until_ready(self) -> None:
        """Wait until every server serves."""
        for replica in self.replicas:
            until(replica.ready, READY_S, f"{replica.url} is ready:\n{replica.log}")

    def stop(self) -> None:
        """End everything and remove the directory. Idempotent."""
        with contextlib.ExitStack() as stack:
            stack.callback(shutil.rmtree, self.directory, ignore_errors=True)
            stack.callback(self.redis.stop)
            for replica in self.replicas:
                stack.callback(replica.stop)

    @contextlib.contextmanager
    def running(self) -> Iterator[Cluster]:
        """Start, and stop in any case."""
        try:
            self.start()
            yield self
        finally:
            self.stop()
