"""A Redis master with a replica, and three Sentinels that change their roles when one dies."""

from __future__ import annotations

import contextlib
import subprocess
from pathlib import Path
from typing import Any

import redis

from tests.chaos.processes import RedisServer, free_port, until

__all__ = ["SentinelStore"]

GROUP = "millrace"
NUM_SENTINELS = 3
FAILOVER_S = 30.0


class SentinelStore:
    """The same verbs as ``RedisServer``; ``kill`` is that of the master of the moment."""

    def __init__(self, directory: Path) -> None:
        first = RedisServer(directory / "first", durable=True)
        follow = ("--replicaof", "127.0.0.1", str(first.port))
        self._servers = [first, RedisServer(directory / "second", durable=True, more=follow)]
        self._ports = [free_port() for _ in range(NUM_SENTINELS)]
        self._directory = directory
        self._sentinels: list[subprocess.Popen[bytes]] = []

    @property
    def url(self) -> str:
        """Every Sentinel, and the group's name."""
        hosts = ",".join(f"127.0.0.1:{port}" for port in self._ports)
        return f"redis+sentinel://{hosts}/{GROUP}"

    @property
    def master(self) -> RedisServer:
        """Who the Sentinels say is the master."""
        port = self._master_port()
        (found,) = [server for server in self._servers if server.port == port]
        return found

    def start(self) -> None:
        """Start both servers and the Sentinels, and wait until these know of all."""
        for server in self._servers:
            server.start()
        for number, port in enumerate(self._ports):
            path = self._directory / f"sentinel-{number}.conf"
            path.write_text(
                f"port {port}\nbind 127.0.0.1\ndir {self._directory}\n"
                f"sentinel monitor {GROUP} 127.0.0.1 {self._servers[0].port} 2\n"
                # Sentinels that are hastier take a new master for dead on a machine that is busy.
                f"sentinel down-after-milliseconds {GROUP} 2000\n"
                f"sentinel failover-timeout {GROUP} 6000\n"
            )
            self._sentinels.append(
                subprocess.Popen(
                    ["redis-server", str(path), "--sentinel"],
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,
                    stderr=subprocess.DEVNULL,
                )
            )
        until(self._settled, FAILOVER_S, "the Sentinels know each other and a replica")

    def fail_over(self) -> None:
        """Kill the master, wait for the new one, and bring the old one back as its replica."""
        old = self.master
        old.kill()
        until(lambda: self._master_port() not in (None, old.port), FAILOVER_S, "another master")
        old.start()
        until(self._settled, FAILOVER_S, "a replica again")

    def depose(self) -> None:
        """Have the Sentinels make the replica master while the master lives."""
        assert self._ask("FAILOVER")

    def journal(self, response_id: str) -> list[dict[str, Any]] | None:
        """A turn's log on the master."""
        return self.master.journal(response_id)

    def stop(self) -> None:
        """End everything. Idempotent."""
        for process in self._sentinels:
            process.kill()
            process.wait()
        self._sentinels = []
        for server in self._servers:
            server.stop()

    def _ask(self, *words: str) -> Any:
        for port in self._ports:
            with contextlib.suppress(redis.RedisError), redis.Redis(port=port) as client:
                return client.execute_command("SENTINEL", *words, GROUP)
        return None

    def _master_port(self) -> int | None:
        answer = self._ask("GET-MASTER-ADDR-BY-NAME")
        return int(answer[1]) if answer else None

    def _settled(self) -> bool:
        sentinels, replicas = self._ask("SENTINELS"), self._ask("REPLICAS")
        if not sentinels or not replicas or len(sentinels) < NUM_SENTINELS - 1:
            return False
        states = [_fields(one) for one in replicas]
        return any(one["flags"] == "slave" and one["master-link-status"] == "ok" for one in states)


def _fields(row: Any) -> dict[str, str]:
    """A Sentinel's row, whether the client has made a dict of its pairs or not."""
    if isinstance(row, dict):
        return {_word(key): _word(value) for key, value in row.items()}
    words = [_word(word) for word in row]
    return dict(zip(words[::2], words[1::2], strict=True))


def _word(value: object) -> str:
    return value.decode() if isinstance(value, bytes) else str(value)
