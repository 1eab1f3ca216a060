"""Chat templates: finding those of a checkpoint and rendering them under a time and a memory
limit.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import weakref
from pathlib import Path
from typing import Any

from engine.errors import TemplateError, TokenizerError

__all__ = ["ChatTemplate", "find_templates"]

_CPU_S = 2.0
_WALL_S = 10.0  # for a machine so busy that the CPU time does not come
_MEMORY_BYTES = 512 << 20
_MAX_CHARS = 16 << 20
_MAX_FRAME_BYTES = 6 * _MAX_CHARS + 1024
_PROGRAM = Path(__file__).with_name("template_process.py")


def find_templates(directory: Path, config: dict[str, Any]) -> dict[str, str]:
    """Return the chat templates of a checkpoint by name; the main one is called ``default``.

    A file of its own goes before ``tokenizer_config.json`` (whose content is ``config``), as in
    Hugging Face's loader. Raises TokenizerError when a template file cannot be read.
    """
    found: dict[str, str] = {}
    inline = config.get("chat_template")
    if isinstance(inline, str):
        found["default"] = inline
    elif isinstance(inline, list):
        found |= {entry["name"]: entry["template"] for entry in inline if _is_named(entry)}
    try:
        json_file = directory / "chat_template.json"
        if json_file.is_file():
            source = json.loads(json_file.read_text("utf-8"))["chat_template"]
            if isinstance(source, str):
                found["default"] = source
        for extra in sorted(directory.glob("additional_chat_templates/*.jinja")):
            found[extra.stem] = extra.read_text("utf-8")
        jinja_file = directory / "chat_template.jinja"
        if jinja_file.is_file():
            found["default"] = jinja_file.read_text("utf-8")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise TokenizerError(f"the chat template in {directory} cannot be read: {error}") from error
    return found


def _is_named(entry: object) -> bool:
    return (
        isinstance(entry, dict)
        and isinstance(entry.get("name"), str)
        and isinstance(entry.get("template"), str)
    )


class ChatTemplate:
    """Renders a checkpoint's chat templates in a child process, which is killed when it runs away.

    Safe to use from several threads; renderings go one after another. ``render`` blocks (for a
    fraction of a millisecond as a rule), so an event loop calls it in an executor.

    Args:
        sources: Jinja text by name; ``tool_use`` is taken when there are tools, else ``default``.
        cpu_s: CPU seconds one rendering may take.
        memory_bytes: address space of the child.
        max_chars: longest output.
    """

    def __init__(
        self,
        sources: dict[str, str],
        *,
        cpu_s: float = _CPU_S,
        memory_bytes: int = _MEMORY_BYTES,
        max_chars: int = _MAX_CHARS,
    ) -> None:
        self._sources = sources
        self._cpu_s = cpu_s
        self._settings = {
            "templates": sources,
            "cpu_s": cpu_s,
            "memory_bytes": memory_bytes,
            "max_chars": max_chars,
        }
        self._lock = threading.Lock()
        self._child: _Child | None = None

    def mentions(self, variable: str) -> bool:
        """Return whether a template of the checkpoint uses ``variable`` at all."""
        return any(re.search(rf"\b{variable}\b", text) for text in self._sources.values())

    def start(self) -> None:
        """Start the child now, so that the first rendering does not wait for it."""
        with self._lock:
            self._ensure()

    def close(self) -> None:
        """End the child."""
        with self._lock:
            if self._child is not None:
                self._child.close()
                self._child = None

    def render(self, variables: dict[str, Any]) -> str:
        """Return the prompt's text.

        Raises TemplateError when the template refuses the messages, fails, or passes a limit.
        """
        name = self._choose(bool(variables.get("tools")))
        try:
            body = json.dumps({"name": name, "variables": variables}, ensure_ascii=False)
        except (TypeError, ValueError, RecursionError) as error:
            raise TemplateError(f"the messages cannot be given to the template: {error}") from error
        with self._lock:
            child = self._ensure()
            try:
                reply = child.ask(body.encode("utf-8", "surrogatepass"))
            except OSError as error:
                code = child.close()
                self._child = None
                raise TemplateError(f"the chat template {self._describe(code)}") from error
        if "text" not in reply:
            raise TemplateError(f"the chat template failed: {reply.get('error')}")
        return str(reply["text"])

    def _choose(self, with_tools: bool) -> str:
        if with_tools and "tool_use" in self._sources:
            return "tool_use"
        if "default" in self._sources:
            return "default"
        names = ", ".join(sorted(self._sources)) or "none"
        raise TemplateError(f"the model has no default chat template (it has: {names})")

    def _ensure(self) -> _Child:
        if self._child is None:
            self._child = _Child(self._settings)
        return self._child

    def _describe(self, code: int | None) -> str:
        if code in (-signal.SIGPROF, -signal.SIGKILL, None):
            return f"ran longer than its limit of {self._cpu_s:g} s and was stopped"
        return f"ended its process (exit status {code})"


class _Child:
    """One process of ``template_process.py`` and the socket to it."""

    def __init__(self, settings: dict[str, Any]) -> None:
        ours, theirs = socket.socketpair()
        with theirs:
            process = subprocess.Popen[bytes](
                # -I keeps this directory, whose module names shadow Python's own, out of sys.path.
                [sys.executable, "-I", str(_PROGRAM)],
                stdin=theirs.fileno(),
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                env={name: os.environ[name] for name in ("TZ", "LANG") if name in os.environ},
                process_group=0,  # Ctrl-C in the terminal is for the server to handle
            )
        self._socket = ours
        self._process = process
        self._finalizer = weakref.finalize(self, _end, process, ours)
        self._deadline = 0.0
        with contextlib.suppress(OSError):  # a child that died at once is noticed by ask()
            self._send(json.dumps(settings).encode())

    def ask(self, body: bytes) -> dict[str, Any]:
        """Send one request and wait for its answer. Raises OSError when none comes in time."""
        self._send(body)
        size = int.from_bytes(self._receive(4), "big")
        if size > _MAX_FRAME_BYTES:
            raise OSError(f"a reply of {size} bytes")
        try:
            reply = json.loads(self._receive(size).decode("utf-8", "surrogatepass"))
        except ValueError as error:
            raise OSError("a damaged reply") from error
        if not isinstance(reply, dict):
            raise OSError("a damaged reply")
        return reply

    def close(self) -> int | None:
        """End the process; return its exit status, None if it had to be killed."""
        self._socket.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(0.2)
        code = self._process.poll()
        self._finalizer()
        return code

    def _send(self, body: bytes) -> None:
        self._deadline = time.monotonic() + _WALL_S
        self._socket.settimeout(_WALL_S)
        self._socket.sendall(len(body).to_bytes(4, "big") + body)

    def _receive(self, size: int) -> bytes:
        chunks = []
        while size:
            self._socket.settimeout(max(0.001, self._deadline - time.monotonic()))
            chunk = self._socket.recv(min(size, 1 << 20))
            if not chunk:
                raise OSError("the process ended")
            chunks.append(chunk)
            size -= len(chunk)
        return b"".join(chunks)


def _end(process: subprocess.Popen[bytes], connection: socket.socket) -> None:
    connection.close()
    if process.poll() is None:
        process.kill()
    process.wait()
