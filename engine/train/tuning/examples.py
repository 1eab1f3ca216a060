"""Examples to learn from: JSON Lines read, checked line by line, and brought into one shape.

A line is `{"messages": [...], "tools"?: [...]}`, as Chat Completions has them and as OpenAI's
fine-tuning files do, `{"prompt": ..., "completion": ...}` or `{"text": ...}`.
"""

from __future__ import annotations

import gzip
import json
import lzma
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from engine.errors import EngineError

__all__ = ["DataError", "Example", "Examples", "Problem", "read_examples"]

_ROLES = ("system", "user", "assistant", "tool")
_MAX_SHOWN = 60


@dataclass(frozen=True, slots=True)
class Problem:
    """What is wrong with one line."""

    line: int
    """Counted from 1."""
    text: str


class DataError(EngineError):
    """Examples that cannot be used. `problems` says why, line by line, where lines are at fault."""

    def __init__(self, message: str, problems: tuple[Problem, ...] = ()) -> None:
        super().__init__(message)
        self.problems = problems


@dataclass(frozen=True, slots=True)
class Example:
    """One example: a dialogue, or a plain text without messages."""

    line: int
    messages: tuple[dict[str, Any], ...] = ()
    """In Chat Completions' shape, arguments of tool calls as objects. The assistant's turns are
    what is learned, but those with ``"weight": 0``."""
    tools: tuple[dict[str, Any], ...] = ()
    """Function schemas in Chat Completions' shape."""
    text: str = ""
    """All of it is learned."""


@dataclass(frozen=True, slots=True)
class Examples:
    """What a file holds."""

    examples: tuple[Example, ...]
    """Each once."""
    problems: tuple[Problem, ...]
    num_lines: int
    """Lines that are not empty."""
    num_duplicates: int
    """Lines that repeat an earlier one, and are left out."""


class _Wrong(Exception):
    """The reason why a line cannot be used."""


def read_examples(path: Path) -> Examples:
    """Reads a `.jsonl`, `.jsonl.gz` or `.jsonl.xz` file; bad lines become problems.

    Raises `DataError` when the file as a whole cannot be read.
    """
    examples: list[Example] = []
    problems: list[Problem] = []
    seen: set[str] = set()
    num_lines = num_duplicates = 0
    for number, line in _lines(path):
        num_lines += 1
        try:
            record = _parse(line)
            example = _example(number, record)
        except _Wrong as error:
            problems.append(Problem(number, str(error)))
            continue
        key = json.dumps(record, sort_keys=True)
        if key in seen:
            num_duplicates += 1
        else:
            seen.add(key)
            examples.append(example)
    if not num_lines:
        raise DataError(f"{path} holds no examples; write one JSON object a line")
    return Examples(tuple(examples), tuple(problems), num_lines, num_duplicates)


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    try:
        with _open(path) as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    yield number, line
    except FileNotFoundError:
        raise DataError(f"there is no file {path}") from None
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 text: {error}") from error
    except (OSError, EOFError, lzma.LZMAError) as error:
        raise DataError(f"{path} cannot be read: {error}") from error


def _open(path: Path) -> TextIO:
    if path.suffix == ".gz":
        return gzip.open(path, "rt", encoding="utf-8-sig")
    if path.suffix == ".xz":
        return lzma.open(path, "rt", encoding="utf-8-sig")
    return path.open(encoding="utf-8-sig")


def _parse(line: str) -> dict[str, Any]:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise _Wrong(f"not JSON: {error}") from error
    if not isinstance(record, dict):
        raise _Wrong(f"a JSON {type(record).__name__}; each line must be an object")
    return record


def _example(number: int, record: dict[str, Any]) -> Example:
    if "messages" in record:
        return Example(number, _messages(record["messages"]), _tools(record.get("tools")))
    if "prompt" in record and "completion" in record:
        turns = [
            {"role": "user", "content": record["prompt"]},
            {"role": "assistant", "content": record["completion"]},
        ]
        return Example(number, _messages(turns))
    if "text" in record:
        text = record["text"]
        if not isinstance(text, str) or not text.strip():
            raise _Wrong(f"text is {_short(text)}; it must be a text that is not empty")
        return Example(number, text=text)
    keys = ", ".join(sorted(map(str, record))) or "none"
    raise _Wrong(f"an example has messages, or prompt and completion, or text; this one has {keys}")


def _messages(value: object) -> tuple[dict[str, Any], ...]:
    if not isinstance(value, list) or not value:
        raise _Wrong("messages must be a list that is not empty")
    messages = tuple(_message(f"messages[{index}]", one) for index, one in enumerate(value))
    answers = [one for one in messages if one["role"] == "assistant"]
    if not answers:
        raise _Wrong("there is no assistant turn to learn")
    if all(one["weight"] == 0 for one in answers):
        raise _Wrong("every assistant turn has weight 0; nothing is left to learn")
    return messages


def _message(where: str, value: object) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise _Wrong(f"{where} is {_short(value)}; it must be an object")
    role = "system" if value.get("role") == "developer" else value.get("role")
    if role not in _ROLES:
        raise _Wrong(f"{where}.role is {_short(role)}; it must be one of {', '.join(_ROLES)}")
    content = _content(where, value.get("content"))
    message: dict[str, Any] = {"role": role, "content": content}
    calls = value.get("tool_calls")
    if role == "assistant":
        message["weight"] = value.get("weight", 1)
        if message["weight"] not in (0, 1):
            raise _Wrong(f"{where}.weight is {_short(message['weight'])}; it must be 0 or 1")
        if isinstance(thought := value.get("reasoning_content"), str) and thought.strip():
            message["reasoning_content"] = thought
        if calls:
            message["tool_calls"] = _calls(f"{where}.tool_calls", calls)
    elif calls:
        raise _Wrong(f"{where}.tool_calls: only the assistant calls tools, not the {role}")
    if role == "tool":
        message |= {key: value[key] for key in ("tool_call_id", "name") if key in value}
    elif not content.strip() and not calls:
        raise _Wrong(f"{where}.content is empty")
    return message


def _content(where: str, value: object) -> str:
    if value is None:
        return ""
    if isinstance(value, str):
        return value
    if isinstance(value, list):
        texts = [one.get("text") if isinstance(one, dict) else None for one in value]
        if all(isinstance(text, str) for text in texts):
            return "".join(map(str, texts))
        raise _Wrong(f"{where}.content has parts that are not text; only text can be learned")
    raise _Wrong(f"{where}.content is {_short(value)}; it must be a text")


def _calls(where: str, value: object) -> list[dict[str, Any]]:
    if not isinstance(value, list):
        raise _Wrong(f"{where} is {_short(value)}; it must be a list")
    calls = []
    for index, one in enumerate(value):
        call = one.get("function", one) if isinstance(one, dict) else None
        if not isinstance(call, dict) or not isinstance(call.get("name"), str):
            raise _Wrong(f"{where}[{index}] must have a function with a name")
        arguments = call.get("arguments", {})
        if isinstance(arguments, str):
            try:
                arguments = json.loads(arguments)
            except ValueError as error:
                raise _Wrong(f"{where}[{index}]: the arguments are not JSON: {error}") from error
        if not isinstance(arguments, dict):
            raise _Wrong(f"{where}[{index}]: the arguments must be a JSON object")
        function = {"name": call["name"], "arguments": arguments}
        own_id = {"id": one["id"]} if "id" in one else {}
        calls.append({**own_id, "type": "function", "function": function})
    return calls


def _tools(value: object) -> tuple[dict[str, Any], ...]:
    if value is None:
        return ()
    if not isinstance(value, list):
        raise _Wrong(f"tools is {_short(value)}; it must be a list of function schemas")
    tools = []
    for index, one in enumerate(value):
        function = one.get("function", one) if isinstance(one, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise _Wrong(f"tools[{index}] must be a function schema with a name")
        tools.append({"type": "function", "function": function})
    return tuple(tools)


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= _MAX_SHOWN else text[: _MAX_SHOWN - 1] + "…"
