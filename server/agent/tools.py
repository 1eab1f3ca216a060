"""The tools that this server runs itself: what the model is told of them, and what they do.

Names, descriptions and parameters are those that the bundled model was trained on.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from server.agent.calculator import CalculatorError, calculate
from server.agent.clock import UnknownPlace, time_in

__all__ = ["BUILTIN_TOOLS", "BuiltinTool", "error_output", "run_tool"]

MAX_ARGUMENT_CHARS = 4096


class BuiltinTool(NamedTuple):
    """One tool. ``kind`` is its type in a request; ``answer`` takes its only parameter."""

    kind: str
    name: str
    description: str
    parameter: str
    answer: Callable[[str], Mapping[str, Any]]

    def function(self) -> dict[str, Any]:
        """Return what the model is told, in Chat Completions' shape."""
        return {
            "type": "function",
            "function": {
                "name": self.name,
                "description": self.description,
                "parameters": {
                    "type": "object",
                    "properties": {self.parameter: {"type": "string"}},
                    "required": [self.parameter],
                },
            },
        }


BUILTIN_TOOLS: dict[str, BuiltinTool] = {
    tool.kind: tool
    for tool in (
        BuiltinTool(
            "millrace:calculator",
            "calculator",
            "Calculate the value of a math expression",
            "expression",
            lambda expression: {"result": calculate(expression)},
        ),
        BuiltinTool(
            "millrace:current_time",
            "get_current_time",
            "Get the current time in a city",
            "city",
            lambda city: {"time": time_in(city)},
        ),
    )
}
"""By ``kind``."""


def run_tool(kind: str, arguments: str) -> str:
    """Return what a tool says to a call with ``arguments`` (JSON text), as JSON text.

    What cannot be done is an answer too: the model reads the error and may do better.
    """
    tool = BUILTIN_TOOLS[kind]
    try:
        given = json.loads(arguments) if len(arguments) <= MAX_ARGUMENT_CHARS else None
    except (ValueError, RecursionError):
        given = None
    value = given.get(tool.parameter) if isinstance(given, dict) else None
    if isinstance(value, int | float) and not isinstance(value, bool):
        value = str(value)
    if not isinstance(value, str):
        return error_output(f"the arguments must be an object with the string '{tool.parameter}'")
    try:
        return json.dumps(tool.answer(value), ensure_ascii=False)
    except (CalculatorError, UnknownPlace) as error:
        return error_output(str(error))


def error_output(message: str) -> str:
    """Return a tool's answer that says what went wrong."""
    return json.dumps({"error": message}, ensure_ascii=False)
