"""A program on a pseudo terminal, for tests that type and look."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import os
import pty
import re
import signal
import struct
import sys
import termios
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

_STEERING = re.compile(r"\x1b(?:\[[0-9;?]*[A-Za-z]|\][^\x07]*\x07|[=>])")


class Terminal:
    """80 columns by 24 lines; everything shown is kept as one text without colours."""

    def __init__(self, master: int, process: asyncio.subprocess.Process) -> None:
        self._master = master
        self.process = process
        self._raw = b""
        self._changed = asyncio.Event()
        self._from = 0

    @property
    def text(self) -> str:
        return _STEERING.sub("", self._raw.decode("utf-8", "replace"))

    @property
    def raw(self) -> bytes:
        return self._raw

    def type(self, text: str) -> None:
        os.write(self._master, text.encode())

    async def interrupt(self, wanted: str) -> str:
        """Press Ctrl-C until ``wanted`` is shown.

        A signal that comes between a prompt and the wait for a key is seen at the next signal.
        """
        for _ in range(9):
            self.type("\x03")
            with contextlib.suppress(AssertionError):
                return await self.expect(wanted, patience_s=2)
        return await self.expect(wanted, patience_s=2)

    async def expect(self, wanted: str, *, patience_s: float = 40) -> str:
        """Wait until ``wanted`` is shown after what was expected before; return what came till
        then.
        """
        try:
            async with asyncio.timeout(patience_s):
                while (found := self.text.find(wanted, self._from)) < 0:
                    self._changed.clear()
                    await self._changed.wait()
        except TimeoutError:
            raise AssertionError(f"{wanted!r} is not in {self.text[self._from :]!r}") from None
        before = self.text[self._from : found]
        self._from = found + len(wanted)
        return before

    def read(self) -> None:
        try:
            chunk = os.read(self._master, 1 << 16)
        except OSError:  # the program is gone
            chunk = b""
        if not chunk:
            asyncio.get_running_loop().remove_reader(self._master)
        self._raw += chunk
        self._changed.set()


def _enter_terminal() -> None:
    """In the child: the terminal is its own, and Ctrl-C does what it does there.

    Who is started in the background ignores SIGINT, and so does all that it starts.
    """
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)
    signal.signal(signal.SIGINT, signal.SIG_DFL)


@asynccontextmanager
async def terminal(*arguments: str, **environment: str) -> AsyncIterator[Terminal]:
    """Run ``python -m server ARGUMENTS`` on a terminal of its own."""
    master, slave = pty.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "server",
        *arguments,
        stdin=slave,
        stdout=slave,
        stderr=slave,
        env={**os.environ, "TERM": "xterm-256color", **environment},
        start_new_session=True,
        preexec_fn=_enter_terminal,
    )
    os.close(slave)
    shown = Terminal(master, process)
    asyncio.get_running_loop().add_reader(master, shown.read)
    try:
        yield shown
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        await process.wait()
        asyncio.get_running_loop().remove_reader(master)
        os.close(master)
