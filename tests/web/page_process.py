"""The real server on a scripted engine in a process of its own, for tests that kill it.

``PageProcess`` is the test's side; run as a program, this module is the server.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Self, cast

from aiohttp import web

from engine import Request
from server.app import build_app
from server.settings import ServerSettings
from server.store import Store
from tests.server.scripted import Script, ScriptedEngine, byte_tokenizer, say

__all__ = ["PageProcess", "RedisProcess", "free_port"]

START_S = 60.0
LOOK_S = 0.02


def free_port() -> int:
    """Return a port that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _wait_for_port(port: int, process: subprocess.Popen[bytes]) -> None:
    give_up_s = time.monotonic() + START_S
    while True:
        try:
            socket.create_connection(("127.0.0.1", port), 1).close()
            return
        except OSError:
            assert process.poll() is None, "the process ended instead of listening"
            assert time.monotonic() < give_up_s, f"nobody listens on {port} after {START_S} s"
            time.sleep(LOOK_S)


class RedisProcess:
    """A redis-server that keeps nothing on disk."""

    def __init__(self, folder: Path) -> None:
        program = shutil.which("redis-server")
        assert program is not None
        self._port = free_port()
        options = ["--port", str(self._port), "--bind", "127.0.0.1", "--save", ""]
        self._process = subprocess.Popen([program, *options], cwd=folder, stdout=subprocess.DEVNULL)
        self.url = f"redis://127.0.0.1:{self._port}/0"

    def __enter__(self) -> Self:
        _wait_for_port(self._port, self._process)
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.wait()


class PageProcess:
    """A server on ``port`` that answers every question with ``answer``, as far as it is let."""

    def __init__(self, folder: Path, redis_url: str, answer: str, port: int) -> None:
        self._gate = folder / "gate"
        self._gate.touch()
        self._arguments = [f"--port={port}", f"--redis-url={redis_url}", f"--answer={answer}"]
        self._arguments.append(f"--gate={self._gate}")
        self._port = port
        self.url = f"http://127.0.0.1:{port}/"
        self._process = self._begin()

    def __enter__(self) -> Self:
        _wait_for_port(self._port, self._process)
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()

    def _begin(self) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", "tests.web.page_process", *self._arguments]
        root = Path(__file__).resolve().parents[2]
        return subprocess.Popen(command, cwd=root, env={**os.environ, "PYTHONPATH": str(root)})

    def let(self, steps: int) -> None:
        """Let answers go on to their step number ``steps``, counted from the process's start."""
        with self._gate.open("ab") as file:
            file.write(b"." * steps)

    def release(self) -> None:
        """Let answers go on to their end."""
        self.let(10_000)

    def kill(self) -> None:
        """End it by SIGKILL: it closes nothing and tells nobody."""
        self._process.send_signal(signal.SIGKILL)
        self._process.wait()

    def restart(self) -> None:
        """Start it again on the same port."""
        self._process = self._begin()
        _wait_for_port(self._port, self._process)


class _FileGate:
    """Lets one step pass for each byte of a file."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._passed = 0

    async def wait(self) -> bool:
        while self._path.stat().st_size <= self._passed:
            await asyncio.sleep(LOOK_S)
        self._passed += 1
        return True


async def _serve(port: int, redis_url: str, answer: str, gate: Path) -> None:
    def script(_: Request) -> Script:
        played = say(answer, per_step=4)
        played.hold = cast(asyncio.Event, _FileGate(gate))
        return played

    engine = ScriptedEngine(script)
    store = await Store.open(redis_url)
    app = build_app(ServerSettings(port=port), engine, byte_tokenizer(), store)
    runner = web.AppRunner(app, handler_cancellation=True)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", port).start()
    await asyncio.Event().wait()


def _main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--redis-url", required=True)
    parser.add_argument("--answer", required=True)
    parser.add_argument("--gate", type=Path, required=True)
    options = parser.parse_args()
    asyncio.run(_serve(options.port, options.redis_url, options.answer, options.gate))


if __name__ == "__main__":
    _main()
