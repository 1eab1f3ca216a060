"""What a model said: content and tool calls, read as strictly as a client would."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import Any

from engine.train.dialogue import Record

__all__ = ["Call", "Reply", "canonical", "parse_reply", "reference_calls"]

_THOUGHT = re.compile(r"\A\s*<think>.*?</think>\s*", re.DOTALL)
_BEGIN, _END = "<tool_call>", "</tool_call>"


@dataclass(frozen=True, slots=True)
class Call:
    """One tool call."""

    name: str
    arguments: Record


@dataclass(frozen=True, slots=True)
class Reply:
    """An assistant turn as the model wrote it."""

    text: str
    """All of it, unedited."""
    content: str
    """What stands before the first call."""
    calls: tuple[Call, ...]
    """The calls that could be read."""
    num_broken: int
    """Calls begun that are not closed, not JSON, or not an object of name and arguments."""
    complete: bool
    """Whether the model ended it itself."""

    @property
    def attempts_call(self) -> bool:
        """Whether a call was begun, well or badly."""
        return bool(self.calls) or self.num_broken > 0

    def message(self) -> Record:
        """The turn as a message of a dialogue that goes on."""
        if not self.calls or self.num_broken:
            return {"role": "assistant", "content": self.text}
        calls = [{"name": call.name, "arguments": call.arguments} for call in self.calls]
        return {"role": "assistant", "content": self.content, "tool_calls": calls}


def parse_reply(text: str, *, complete: bool = True) -> Reply:
    """Reads a turn in Qwen3's form: thoughts, content, then calls in their tags."""
    content, *blocks = _THOUGHT.sub("", text).split(_BEGIN)
    read = [_read_call(block) for block in blocks]
    calls = tuple(call for call in read if call is not None)
    return Reply(text, content.strip(), calls, len(read) - len(calls), complete)


def _read_call(block: str) -> Call | None:
    body, end, _ = block.partition(_END)
    try:
        # JSON has no NaN, which Python's reader would let through.
        value = json.loads(body, parse_constant=_refuse)
    except (ValueError, RecursionError):
        return None
    if not end or not isinstance(value, dict) or set(value) != {"name", "arguments"}:
        return None
    name, arguments = value["name"], value["arguments"]
    if not isinstance(name, str) or not isinstance(arguments, dict):
        return None
    return Call(name, arguments)


def _refuse(constant: str) -> Any:
    raise ValueError(f"{constant} is not JSON")


def reference_calls(message: Record) -> tuple[Call, ...]:
    """The calls of a recorded assistant turn."""
    calls = message.get("tool_calls") or []
    return tuple(Call(call["name"], call["arguments"]) for call in calls)


def canonical(value: Any, *, relaxed: bool = False) -> str:
    """A text that two values share exactly if they are equal as JSON.

    Numbers are equal by value, whether written 1 or 1.0; true is not 1; keys have no order. With
    `relaxed`, strings are equal whatever their case and the spaces around them.
    """
    return json.dumps(_normal(value, relaxed=relaxed), sort_keys=True, ensure_ascii=False)


def _normal(value: Any, *, relaxed: bool) -> Any:
    if isinstance(value, dict):
        return {key: _normal(item, relaxed=relaxed) for key, item in value.items()}
    if isinstance(value, list):
        return [_normal(item, relaxed=relaxed) for item in value]
    if isinstance(value, float) and value.is_integer():
        return int(value)
    if isinstance(value, str) and relaxed:
        return value.strip().casefold()
    return value
