"""What a client library's cases share, and how they are asked for.

A worker is one process with one library. It reads lines ``API CASE`` and answers each with one line
of JSON: ``{"verdict": …, "note": …}``. Runs in the libraries' own environment, so nothing of the
project is imported here.
"""

from __future__ import annotations

import asyncio
import inspect
import json
import re
import sys
import traceback
from collections.abc import Callable, Mapping
from importlib.metadata import version
from typing import Any, NamedTuple, TypeVar

from pydantic import BaseModel, ConfigDict

__all__ = [
    "ANSWER",
    "BEGINNING",
    "CALCULATOR",
    "CHAT_TOOLS",
    "HELLO",
    "RESPONSE_TOOLS",
    "STORY",
    "SUM",
    "TOO_LONG",
    "Absent",
    "Calculation",
    "Refused",
    "Target",
    "calculator",
    "raised",
    "refusal",
    "serve",
]

HELLO = "Hello, how are you?"
STORY = "Tell me about the weather."
BEGINNING = "Once upon a time"
SUM = "What is 17 % of 2,340?"
ANSWER = "397.8"
TOO_LONG = "word " * 6000
"""More tokens than the bundled model's context has."""
CALCULATOR: dict[str, Any] = {
    "name": "calculator",
    "description": "Calculate the value of a math expression",
    "parameters": {
        "type": "object",
        "properties": {"expression": {"type": "string"}},
        "required": ["expression"],
        "additionalProperties": False,
    },
}
"""As the bundled model has learned it: what is tested is the wire, not the model's wisdom."""
CHAT_TOOLS: Any = [{"type": "function", "function": CALCULATOR}]
RESPONSE_TOOLS: Any = [{"type": "function", "strict": True, **CALCULATOR}]


class Calculation(BaseModel):
    """Calculate the value of a math expression"""

    # The libraries name a tool after it.
    model_config = ConfigDict(title="calculator")

    expression: str


class Refused(Exception):
    """The server does not offer this, and said so in the library's own typed error."""


def refusal(error: Exception, named: object, field: str) -> Refused:
    """Return the refusal that an error is if it names the field; else raise the error."""
    if named != field:
        raise error
    return Refused(f"{type(error).__name__} 400, {field}")


class Absent(Exception):
    """The server has no such endpoint."""


class Target(NamedTuple):
    """The server that is asked."""

    url: str
    """With the path /v1."""
    key: str
    model: str


def calculator(expression: str) -> str:
    """Calculate the value of a math expression"""
    assert re.fullmatch(r"[\d\s.+*/()-]{1,80}", expression), expression
    return f"{eval(expression):g}"


E = TypeVar("E", bound=BaseException)


async def raised(kind: type[E], call: Callable[[], object]) -> E:
    """Return the exception of the library's own type that a call, awaited if need be, ends with."""
    try:
        result = call()
        if inspect.isawaitable(result):
            await result
    except kind as error:
        return error
    raise AssertionError(f"no {kind.__name__} was raised")


async def _run(case: Callable[[], object]) -> str:
    note = case()
    if inspect.isawaitable(note):
        note = await note
    return str(note or "")


def _verdict(run: Callable[[Any], str], case: Callable[[], object] | None) -> dict[str, str]:
    if case is None:
        return {"verdict": "none", "note": ""}
    try:
        return {"verdict": "ok", "note": run(_run(case))}
    except Refused as refusal:
        return {"verdict": "refused", "note": str(refusal)}
    except Absent as absence:
        return {"verdict": "absent", "note": str(absence)}
    except Exception as error:
        traceback.print_exc()
        return {"verdict": "fail", "note": f"{type(error).__name__}: {error}"[:300]}


def serve(package: str, apis: Callable[[Target], Mapping[str, object]]) -> None:
    """Answer until the input ends. The cases of an API are the methods of its object."""
    lines, sys.stdout = sys.stdout, sys.stderr  # libraries print what they like
    cases = apis(Target(*sys.argv[1:4]))
    print(json.dumps({"version": version(package)}), file=lines, flush=True)
    with asyncio.Runner() as runner:
        for line in sys.stdin:
            api, name = line.split()
            answer = _verdict(runner.run, getattr(cases.get(api), name, None))
            print(json.dumps(answer), file=lines, flush=True)
