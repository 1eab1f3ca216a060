"""The program of the child process that renders chat templates. It imports nothing of Millrace.

A template comes with a checkpoint, which may be hostile. Jinja's sandbox keeps it from objects it
must not touch, but not from looping for hours or from building a string of many gigabytes in one
operation. Only a process can be stopped for sure in both cases, so this one has an address space
limit and is killed by the kernel when it has used up its CPU time.

Frames on descriptor 0, a socket: four bytes of length (big endian), then JSON. The first frame in
is ``{"templates": {name: source}, "cpu_s", "memory_bytes", "max_chars"}`` and is not answered;
every other is ``{"name", "variables"}`` and is answered by ``{"text"}`` or ``{"error"}``.
"""

from __future__ import annotations

import json
import os
import resource
import signal
from datetime import datetime
from typing import Any

from jinja2 import Template, TemplateError, TemplateSyntaxError, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

__all__: list[str] = []

_MAX_ERROR_CHARS = 500


class _Generation(Extension):
    """``{% generation %}``: marks the assistant's part for training; here just its body."""

    tags = {"generation"}  # noqa: RUF012  (jinja2 declares it as an instance attribute)

    def parse(self, parser: Parser) -> nodes.Node:
        lineno = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body, lineno=lineno)


def _raise_exception(message: object) -> None:
    raise TemplateError(str(message))


def _strftime_now(pattern: str) -> str:
    return datetime.now().strftime(pattern)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


class _Renderer:
    """Compiles each template when it is first asked for."""

    def __init__(self, sources: dict[str, str], max_chars: int) -> None:
        self._environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols, _Generation]
        )
        self._environment.filters["tojson"] = _to_json
        self._environment.globals["raise_exception"] = _raise_exception
        self._environment.globals["strftime_now"] = _strftime_now
        self._sources = sources
        self._compiled: dict[str, Template] = {}
        self._max_chars = max_chars

    def answer(self, name: str, variables: dict[str, Any]) -> dict[str, str]:
        """Render one template; whatever goes wrong inside it becomes an error text."""
        try:
            if name not in self._compiled:
                self._compiled[name] = self._environment.from_string(self._sources[name])
            chunks, size = [], 0
            for chunk in self._compiled[name].generate(variables):
                chunks.append(chunk)
                size += len(chunk)
                if size > self._max_chars:
                    return {"error": f"its output is longer than {self._max_chars} characters"}
            return {"text": "".join(chunks)}
        except TemplateSyntaxError as error:
            reason = f"line {error.lineno}: {error.message}"
        except TemplateError as error:
            reason = str(error.message)
        except MemoryError:
            reason = "it ran out of its memory limit"
        except Exception as error:
            reason = f"{type(error).__name__}: {error}"
        return {"error": reason[:_MAX_ERROR_CHARS]}


def _read_exactly(size: int) -> bytes:
    chunks = []
    while size:
        chunk = os.read(0, min(size, 1 << 20))
        if not chunk:  # the server is gone
            raise SystemExit(0)
        chunks.append(chunk)
        size -= len(chunk)
    return b"".join(chunks)


def _receive() -> dict[str, Any]:
    frame = _read_exactly(int.from_bytes(_read_exactly(4), "big"))
    message: dict[str, Any] = json.loads(frame.decode("utf-8", "surrogatepass"))
    return message


def _send(message: dict[str, str]) -> None:
    body = json.dumps(message, ensure_ascii=False).encode("utf-8", "surrogatepass")
    frame = memoryview(len(body).to_bytes(4, "big") + body)
    while frame:
        frame = frame[os.write(0, frame) :]


def _limit(memory_bytes: int) -> None:
    resource.setrlimit(resource.RLIMIT_AS, (memory_bytes, memory_bytes))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
    if hasattr(resource, "RLIMIT_NPROC"):
        resource.setrlimit(resource.RLIMIT_NPROC, (0, 0))


def main() -> None:
    """Answer frames until standard input ends."""
    settings = _receive()
    _limit(settings["memory_bytes"])
    renderer = _Renderer(settings["templates"], settings["max_chars"])
    while True:
        request = _receive()
        # The default action of SIGPROF ends the process, in the middle of a C function too.
        signal.setitimer(signal.ITIMER_PROF, settings["cpu_s"])
        reply = renderer.answer(request["name"], request["variables"])
        signal.setitimer(signal.ITIMER_PROF, 0)
        _send(reply)


if __name__ == "__main__":
    main()
