"""The terminal chat without terminal or network: what to send, what came back, what was typed."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from enum import Enum
from typing import Any, NamedTuple

import msgspec

from server.agent.tools import USEFUL_TOOLS

__all__ = ["Answer", "Command", "Dialogue", "EventLines", "Phase", "parse_line", "split_finished"]

_MAX_LINE = 80
_FENCE = re.compile(r" {0,3}(`{3,}|~{3,})")
_NEW_BLOCK = re.compile(r"(?![-*+>|]|\d{1,9}[.)])\S")
"""Begins a block that is no continuation of a list, a quotation or a table."""


class Phase(Enum):
    """Where an answer stands."""

    WAITING = "waiting"
    STREAMING = "streaming"
    COMPLETED = "completed"
    INCOMPLETE = "incomplete"
    CANCELLED = "cancelled"
    FAILED = "failed"
    REFUSED = "refused"
    """The server did not take the request; nothing of it is in the conversation."""

    @property
    def over(self) -> bool:
        """Whether no more events follow."""
        return self not in (Phase.WAITING, Phase.STREAMING)


_TERMINAL = {
    "response.completed": Phase.COMPLETED,
    "response.incomplete": Phase.INCOMPLETE,
    "response.failed": Phase.FAILED,
    "response.cancelled": Phase.CANCELLED,
}


class Command(NamedTuple):
    """A line that begins with a slash."""

    name: str
    argument: str


def parse_line(line: str) -> Command | str | None:
    """Return a command, the text to send, or None for an empty line. ``//`` sends a slash."""
    line = line.strip()
    if not line:
        return None
    if line.startswith("//"):
        return line[1:]
    if line.startswith("/"):
        name, _, argument = line[1:].partition(" ")
        return Command(name.lower(), argument.strip())
    return line


class Dialogue(msgspec.Struct):
    """The settings of a conversation."""

    model: str | None = None
    system: str | None = None
    temperature: float | None = None
    conversation_id: str | None = None
    tools: bool = False
    """Whether the model may use the server's own tools."""

    def request(self, text: str) -> dict[str, Any]:
        """Return the ``response.create`` event that asks for an answer to ``text``."""
        fields = {
            "model": self.model,
            "instructions": self.system,
            "temperature": self.temperature,
            "conversation": self.conversation_id,
            "tools": [{"type": kind} for kind in USEFUL_TOOLS] if self.tools else None,
        }
        return {
            "type": "response.create",
            "input": text,
            "store": True,
            **{name: value for name, value in fields.items() if value is not None},
        }


class Answer:
    """One answer as its events arrive. Times are of one monotonic clock, in seconds."""

    def __init__(self, asked_s: float) -> None:
        self._asked_s = asked_s
        self._first_s: float | None = None
        self._last_s = asked_s
        self._parts: list[str] = []
        self._calls: dict[str, Mapping[str, Any]] = {}
        self._lines: list[str] = []
        self.phase = Phase.WAITING
        self.response_id: str | None = None
        self.last_number: int | None = None
        """Sequence number of the latest event, from which the answer can be picked up again."""
        self.output_tokens: int | None = None
        self.problem: str | None = None
        self.problem_code: str | None = None
        self.lost_history = False

    @property
    def text(self) -> str:
        """What was answered so far."""
        return "".join(self._parts)

    def take_lines(self) -> list[str]:
        """Return what was called since the last time, a line a call."""
        lines, self._lines = self._lines, []
        return lines

    def feed(self, event: Mapping[str, Any], now_s: float) -> str:
        """Take one event; return the text that it adds."""
        if self.phase.over:
            return ""
        number = event.get("sequence_number")
        if isinstance(number, int):
            if self.last_number is not None and number <= self.last_number:
                return ""  # seen before the connection broke
            self.last_number = number
        kind = str(event.get("type"))
        if kind == "error":
            self._refuse(event)
        elif kind == "response.millrace.discontinuity":
            self.lost_history = True
        elif kind in _TERMINAL:
            self._end(_TERMINAL[kind], _mapping(event.get("response")), now_s)
        elif kind == "response.created":
            self.response_id = _mapping(event.get("response")).get("id")
        elif kind == "response.output_item.done":
            self._note_call(_mapping(event.get("item")))
        elif kind == "response.output_text.delta":
            return self._grow(str(event.get("delta", "")), now_s)
        return ""

    def break_off(self, problem: str) -> None:
        """End the answer because the connection is gone for good."""
        self.phase = Phase.FAILED
        self.problem = problem

    @property
    def first_token_s(self) -> float | None:
        """Seconds from the question to the first text."""
        return None if self._first_s is None else self._first_s - self._asked_s

    @property
    def tokens_per_s(self) -> float | None:
        """Speed after the first text, when there is enough of it to tell."""
        if self._first_s is None or not self.output_tokens or self.output_tokens < 2:
            return None
        elapsed_s = self._last_s - self._first_s
        return (self.output_tokens - 1) / elapsed_s if elapsed_s > 0 else None

    def summary(self) -> str:
        """Return one line on how it went."""
        parts = []
        if self.output_tokens is not None:
            parts.append(f"{self.output_tokens} token{'' if self.output_tokens == 1 else 's'}")
        if (speed := self.tokens_per_s) is not None:
            parts.append(f"{speed:,.1f} tokens/s" if speed < 100 else f"{speed:,.0f} tokens/s")
        if (first := self.first_token_s) is not None:
            parts.append(_first_text(first))
        if self.phase is Phase.INCOMPLETE:
            parts.append("cut off: the length limit was reached")
        if self.phase is Phase.CANCELLED:
            parts.append("stopped")
        if self.lost_history:
            parts.append("the server lost a part of it")
        return " · ".join(parts)

    def _note_call(self, item: Mapping[str, Any]) -> None:
        """Make a line of a call once its result is there."""
        if item.get("type") == "function_call":
            self._calls[str(item.get("call_id"))] = item
        elif item.get("type") == "function_call_output":
            call = self._calls.pop(str(item.get("call_id")), {})
            asked, said = _values(call.get("arguments")), _values(item.get("output"))
            self._lines.append(f"{call.get('name', 'a tool')}: {asked} → {said}")

    def _grow(self, delta: str, now_s: float) -> str:
        if delta and self._first_s is None:
            self._first_s = now_s
        self._last_s = now_s
        self.phase = Phase.STREAMING
        self._parts.append(delta)
        return delta

    def _end(self, phase: Phase, response: Mapping[str, Any], now_s: float) -> None:
        self.phase = phase
        self._last_s = self._last_s if self._first_s is not None else now_s
        tokens = _mapping(response.get("usage")).get("output_tokens")
        self.output_tokens = tokens if isinstance(tokens, int) else None
        if phase is Phase.FAILED:
            error = _mapping(response.get("error"))
            self.problem = str(error.get("message") or "the server gave no reason")

    def _refuse(self, event: Mapping[str, Any]) -> None:
        self.phase = Phase.FAILED if self.response_id else Phase.REFUSED
        error = event.get("error")
        problem = error if isinstance(error, Mapping) else event
        self.problem = str(problem.get("message") or "the server gave no reason")
        self.problem_code = problem.get("code")


def _first_text(seconds: float) -> str:
    return (
        f"first after {seconds * 1000:,.0f} ms" if seconds < 1 else f"first after {seconds:.1f} s"
    )


def _values(text: object) -> str:
    """Return the values of an object in JSON, on one line of bounded length."""
    try:
        value = json.loads(str(text))
    except (ValueError, RecursionError):
        value = text
    values = value.values() if isinstance(value, dict) else [value]
    line = ", ".join(one if isinstance(one, str) else json.dumps(one) for one in values)
    line = " ".join(line.split())
    return line if len(line) <= _MAX_LINE else f"{line[: _MAX_LINE - 1]}…"


def _mapping(value: object) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


class EventLines:
    """Server-sent events to the JSON objects in their ``data`` (WHATWG HTML, 9.2.6)."""

    def __init__(self) -> None:
        self._rest = b""
        self._data: list[bytes] = []

    def feed(self, chunk: bytes) -> Iterator[dict[str, Any]]:
        """Yield the events that ``chunk`` completes; what is no JSON object is passed over."""
        *lines, self._rest = (self._rest + chunk).split(b"\n")
        for line in lines:
            line = line.removesuffix(b"\r")
            if line.startswith(b"data:"):
                self._data.append(line[5:].removeprefix(b" "))
            elif not line and self._data:
                data, self._data = b"\n".join(self._data), []
                try:
                    event = json.loads(data)
                except ValueError:
                    continue
                if isinstance(event, dict):
                    yield event


def split_finished(text: str) -> tuple[str, str]:
    """Split Markdown that still grows into blocks that stay as they are and the rest.

    The split is at a blank line outside of fenced code, before a block that neither continues a
    list, a quotation or a table nor is indented.
    """
    fence: str | None = None
    split = position = 0
    after_blank = False
    for line in text.splitlines(keepends=True):
        if fence is None and after_blank and _NEW_BLOCK.match(line) and line.endswith("\n"):
            split = position
        mark = _FENCE.match(line)
        if mark is not None:
            if fence is None:
                fence = mark[1]
            elif mark[1].startswith(fence) and not line[mark.end() :].strip():
                fence = None
        after_blank = not line.strip()
        position += len(line)
    return text[:split], text[split:]
