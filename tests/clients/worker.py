"""A process with one client library, asked for one case after the other."""

from __future__ import annotations

import json
import os
import select
import subprocess
from pathlib import Path
from typing import Any

from tests.clients.libraries import ROOT, Library

__all__ = ["Worker"]

ANSWER_S = 120.0
"""Importing a library takes long on a busy machine; the limit only ends what hangs."""

_FOREIGN = ("MILLRACE_", "OPENAI_", "ANTHROPIC_", "LANGCHAIN_", "LANGSMITH_", "LITELLM_")
_QUIET = {
    # The libraries would ask the network for prices and send traces to it.
    "LITELLM_LOCAL_MODEL_COST_MAP": "True",
    "OPENAI_AGENTS_DISABLE_TRACING": "1",
}


class Worker:
    """The running process; ``version`` is the library's. Ends with the context."""

    def __init__(self, library: Library, url: str, key: str, model: str, log: Path) -> None:
        clean = {name: text for name, text in os.environ.items() if not name.startswith(_FOREIGN)}
        with log.open("wb") as stderr:
            self._process = subprocess.Popen(
                library.command(url, key, model),
                cwd=ROOT,
                env={**clean, **_QUIET, "PYTHONPATH": str(ROOT)},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=stderr,
                bufsize=0,
            )
        self._log = log
        self.version = ""

    def __enter__(self) -> Worker:
        try:
            self.version = self._answer()["version"]
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def run(self, api: str, case: str) -> tuple[str, str]:
        """Return the verdict and a note.

        Raises RuntimeError if the process ends or gives no answer in time.
        """
        assert self._process.stdin is not None
        self._process.stdin.write(f"{api} {case}\n".encode())
        answer = self._answer()
        return answer["verdict"], answer["note"]

    def _answer(self) -> Any:
        assert self._process.stdout is not None
        ready, _, _ = select.select([self._process.stdout], [], [], ANSWER_S)
        line = self._process.stdout.readline() if ready else b""
        if not line:
            how = "ended" if ready else f"gave no answer in {ANSWER_S:g} s"
            raise RuntimeError(f"the client {how}; its output is in {self._log}")
        return json.loads(line)

    def stop(self) -> None:
        """End the process."""
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                pipe.close()
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
