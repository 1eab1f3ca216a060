"""Real processes to harm: Redis, and a server with its engine, on ports that stay the same."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import orjson
import psutil
import redis

from tests.e2e.live import LiveServer

__all__ = ["RedisServer", "Replica", "free_port", "until"]

REDIS_START_S = 10.0
TIGHT = (
    "--max-model-len", "1024", "--max-num-seqs", "8", "--max-num-tokens", "256",
    "--kv-memory", "4MiB", "--drain-seconds", "0.05",
)  # fmt: skip
"""Little room, so that chunks, queues and preemptions happen with a handful of clients; and less
time at its end than an answer takes."""


def free_port() -> int:
    """A port of the loopback that nobody listens on."""
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


def until(condition: Any, limit_s: float, what: str) -> None:
    """Ask again and again, from a thread of one's own; the limit only ends a failing run."""
    give_up_s = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < give_up_s, f"after {limit_s:.0f} s still not: {what}"
        time.sleep(0.02)


class RedisServer:
    """A ``redis-server`` with a directory and a port of its own.

    ``durable`` writes every command to disk before its answer; otherwise a kill loses everything.
    """

    def __init__(self, directory: Path, *, durable: bool, more: Sequence[str] = ()) -> None:
        self.directory = directory
        self.port = free_port()
        self._durable = durable
        self._more = list(more)
        self._process: subprocess.Popen[bytes] | None = None
        directory.mkdir(parents=True, exist_ok=True)

    @property
    def url(self) -> str:
        """Its address."""
        return f"redis://127.0.0.1:{self.port}"

    @property
    def pid(self) -> int:
        """Its process."""
        assert self._process is not None
        return self._process.pid

    def start(self) -> None:
        """Start it, on what its directory holds, and wait until it answers."""
        durable = "yes" if self._durable else "no"
        options = ["--port", str(self.port), "--dir", str(self.directory), "--save", ""]
        options += ["--appendonly", durable, "--appendfsync", "always", *self._more]
        self._process = subprocess.Popen(
            ["redis-server", *options, "--bind", "127.0.0.1"],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        until(self._answers, REDIS_START_S, "Redis answers")

    def _answers(self) -> bool:
        with contextlib.suppress(redis.RedisError), self.client() as client:
            return bool(client.ping())
        return False

    def client(self) -> redis.Redis:
        """A client of it, for one look."""
        return redis.Redis(port=self.port, socket_timeout=5.0)

    def kill(self) -> None:
        """SIGKILL."""
        assert self._process is not None
        self._process.kill()
        self._process.wait()

    def journal(self, response_id: str) -> list[dict[str, Any]] | None:
        """A turn's stored log, read past the server; None where there is none."""
        with self.client() as client:
            rows: Any = client.xrange(f"millrace:journal:{response_id}")
        # An entry without an event marks that another server took the turn over.
        events = [orjson.loads(fields[b"d"]) for _, fields in rows if b"d" in fields]
        return events or None

    def stop(self) -> None:
        """End it. Idempotent."""
        if self._process is not None and self._process.poll() is None:
            self._process.send_signal(signal.SIGCONT)
            self._process.kill()
            self._process.wait()


class Replica:
    """One ``millrace serve`` that keeps its port over restarts."""

    def __init__(
        self,
        redis_url: str,
        arguments: Sequence[str] = (),
        environment: dict[str, str] | None = None,
    ) -> None:
        self.port = free_port()
        self._arguments = ["--port", str(self.port), "--redis-url", redis_url]
        self._arguments += ["--log-level", "warning", *TIGHT, *arguments]
        self._environment = environment
        self._live: LiveServer | None = None
        self._past_logs: list[str] = []

    @property
    def url(self) -> str:
        """Its base URL."""
        return f"http://127.0.0.1:{self.port}"

    @property
    def live(self) -> LiveServer:
        """The process that runs now."""
        assert self._live is not None
        return self._live

    @property
    def log(self) -> str:
        """All that it printed, over all its lives."""
        return "".join([*self._past_logs, self._live.log if self._live else ""])

    def start(self) -> None:
        """Start it and wait until it listens."""
        self._live = LiveServer(self._arguments, self._environment)

    def ready(self) -> bool:
        """Whether it serves now."""
        with contextlib.suppress(OSError):
            return self.live.get("/ready")[0] == 200
        return False

    def engine(self) -> psutil.Process:
        """The engine's process; raises LookupError while there is none."""
        for child in psutil.Process(self.live.pid).children(recursive=True):
            with contextlib.suppress(psutil.Error):
                if child.name() == "millrace-engine" and child.status() != psutil.STATUS_ZOMBIE:
                    return child
        raise LookupError("there is no engine process now")

    def kill(self) -> None:
        """SIGKILL the server; its engine notices and ends by itself."""
        os.kill(self.live.pid, signal.SIGKILL)

    def terminate(self) -> int:
        """SIGTERM the server, and return its exit status once it has ended."""
        return self.live.stop()

    def restart(self) -> None:
        """Start it anew after its end."""
        self.collect()
        self.start()

    def collect(self) -> None:
        """Take the log of a process that ended, and release what it left."""
        assert self._live is not None
        self._live.stop()
        self._past_logs.append(self._live.log)
        self._live = None

    def stop(self) -> int:
        """End it as an operator does, or else by force. Idempotent."""
        if self._live is None:
            return 0
        tree: list[psutil.Process] = []
        with contextlib.suppress(psutil.NoSuchProcess):
            tree = psutil.Process(self._live.pid).children(recursive=True)
        for one in tree:
            with contextlib.suppress(psutil.Error):
                one.resume()
        try:
            return self._live.stop()
        except subprocess.TimeoutExpired:
            # It was killed then: how a server ends in time is tested elsewhere.
            return -signal.SIGKILL
        finally:
            self._live = None
            for one in tree:
                with contextlib.suppress(psutil.Error):
                    one.kill()

    def num_sockets(self) -> int:
        """Connections that the server has to clients; those to Redis are its own to keep."""
        kinds = psutil.Process(self.live.pid).net_connections(kind="tcp")
        return sum(
            one.status in ("ESTABLISHED", "CLOSE_WAIT") and one.laddr.port == self.port
            for one in kinds
        )

    def rss_bytes(self) -> int:
        """Resident memory of the server's process."""
        return int(psutil.Process(self.live.pid).memory_info().rss)
