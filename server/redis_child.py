"""A private ``redis-server``: on a socket in a directory of its own, in memory, ours alone."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import logging
import os
import shutil
import signal
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

__all__ = ["RedisChild", "RedisChildError"]

log = logging.getLogger("millrace.store")

START_TIMEOUT_S = 10.0
STOP_TIMEOUT_S = 5.0
RESTART_DELAY_S = 0.1
MAX_RESTARTS = 5
MAX_MEMORY = "1gb"
_PR_SET_PDEATHSIG = 1


class RedisChildError(Exception):
    """The private ``redis-server`` could not be started."""


def _die_with_parent() -> Callable[[], None] | None:
    """Return what the child does between fork and exec, so that it never outlives a killed parent.

    Linux only (prctl(2), PR_SET_PDEATHSIG). Elsewhere a parent killed by SIGKILL leaves the child.
    """
    if not sys.platform.startswith("linux"):
        return None
    # Looked up before the fork: between fork and exec nothing may take a lock or allocate much.
    prctl = ctypes.CDLL(None, use_errno=True).prctl
    parent = os.getpid()

    def arm() -> None:
        prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        if os.getppid() != parent:
            os._exit(1)

    return arm


class RedisChild:
    """A running ``redis-server``, started again (empty) if it dies."""

    def __init__(self, program: str, directory: Path) -> None:
        self._program = program
        self._directory = directory
        self._process: asyncio.subprocess.Process | None = None
        self._keeper: asyncio.Task[None] | None = None

    @classmethod
    async def start(cls, program: str) -> RedisChild:
        """Start ``program``; raises RedisChildError when it does not come up."""
        directory = await asyncio.to_thread(tempfile.mkdtemp, prefix="millrace-redis-")
        child = cls(program, Path(directory))
        try:
            await child._spawn()
        except BaseException:
            await child.close()
            raise
        child._keeper = asyncio.create_task(child._keep(), name="redis-child")
        return child

    @property
    def socket_path(self) -> Path:
        """The Unix socket it listens on."""
        return self._directory / "redis.sock"

    @property
    def pid(self) -> int | None:
        """Its process id, while it runs."""
        return self._process.pid if self._process else None

    async def close(self) -> None:
        """End the process and remove its directory. Idempotent."""
        if self._keeper is not None:
            self._keeper.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._keeper
        if self._process is not None and self._process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                self._process.terminate()
            try:
                async with asyncio.timeout(STOP_TIMEOUT_S):
                    await self._process.wait()
            except TimeoutError:
                self._process.kill()
                await self._process.wait()
        self._process = None
        await asyncio.to_thread(shutil.rmtree, self._directory, ignore_errors=True)

    async def _spawn(self) -> None:
        options = {
            "port": "0",
            "unixsocket": str(self.socket_path),
            "unixsocketperm": "700",
            "save": "",
            "appendonly": "no",
            "dir": str(self._directory),
            "daemonize": "no",
            "loglevel": "warning",
            "maxmemory": MAX_MEMORY,
            # All that we store has a time to live: what would go soonest goes first.
            "maxmemory-policy": "volatile-ttl",
        }
        arguments = [part for name, value in options.items() for part in (f"--{name}", value)]
        try:
            self._process = await asyncio.create_subprocess_exec(
                self._program,
                *arguments,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=asyncio.subprocess.DEVNULL,
                stderr=asyncio.subprocess.DEVNULL,
                # Ctrl-C in the terminal is for the server: it drains first.
                start_new_session=True,
                preexec_fn=_die_with_parent(),
            )
        except OSError as error:
            raise RedisChildError(f"cannot run {self._program}: {error.strerror}") from error
        await self._until_listening(self._process)

    async def _until_listening(self, process: asyncio.subprocess.Process) -> None:
        try:
            async with asyncio.timeout(START_TIMEOUT_S):
                while True:
                    if process.returncode is not None:
                        raise RedisChildError(
                            f"{self._program} ended at its start with code {process.returncode}"
                        )
                    with contextlib.suppress(OSError):
                        _, writer = await asyncio.open_unix_connection(self.socket_path)
                        writer.close()
                        await writer.wait_closed()
                        return
                    await asyncio.sleep(0.01)
        except TimeoutError:
            raise RedisChildError(
                f"{self._program} does not listen after {START_TIMEOUT_S:.0f} s"
            ) from None

    async def _keep(self) -> None:
        """Start the process again when it dies. What it held is lost; the journal notices."""
        failures = 0
        while failures < MAX_RESTARTS:
            assert self._process is not None
            code = await self._process.wait()
            log.error("the private redis-server ended (code %s); starting it again", code)
            await asyncio.sleep(RESTART_DELAY_S * 2**failures)
            try:
                await asyncio.to_thread(self.socket_path.unlink, missing_ok=True)
                await self._spawn()
                failures = 0
            except RedisChildError as error:
                failures += 1
                log.error("%s", error)
        log.critical("the private redis-server does not start; giving up")
