"""The command ``millrace serve`` as a process, with the bundled model."""

from __future__ import annotations

import asyncio
import os
import re
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

import engine

PEBBLE = Path(engine.__file__).parent / "assets" / "pebble"
needs_model = pytest.mark.skipif(
    not (PEBBLE / "model.safetensors").is_file(), reason="the bundled model is not built"
)


@asynccontextmanager
async def serving(*arguments: str) -> AsyncIterator[tuple[asyncio.subprocess.Process, str]]:
    """Run the real command on a free port; yield it and its address when it is ready."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "server", "serve", "--port=0", "--num-threads=1", *arguments),
        stdout=asyncio.subprocess.PIPE,
        env={**os.environ, "MILLRACE_KV_MEMORY": "32MiB"},
    )
    try:
        assert process.stdout is not None
        lines = []
        while line := (await process.stdout.readline()).decode():
            lines.append(line)
            if line.startswith("  store"):
                break
        (url,) = re.findall(r"API +(http://\S+)/v1", "".join(lines))
        yield process, url
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
