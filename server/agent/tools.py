"""The tools that this server runs itself: what the model is told of them, and what they do.

Names, descriptions and parameters are those that the bundled model was trained on. The two for
restaurants are a demonstration: the guide is of a town that does not exist.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from server.agent.calculator import CalculatorError, calculate
from server.agent.clock import UnknownPlace, time_in
from server.agent.dining import BookingError, book_table, find_restaurants

__all__ = ["BUILTIN_TOOLS", "USEFUL_TOOLS", "BuiltinTool", "error_output", "run_tool"]

MAX_ARGUMENT_CHARS = 4096


class ArgumentError(ValueError):
    """A call's arguments are not those that the tool takes."""


class BuiltinTool(NamedTuple):
    """One tool. ``kind`` is its type in a request; ``answer`` takes its checked arguments."""

    kind: str
    name: str
    description: str
    parameters: Mapping[str, Mapping[str, Any]]
    """JSON Schemas of strings and integers, by name."""
    required: tuple[str, ...]
    answer: Callable[[Mapping[str, Any]], Mapping[str, Any]]
    repeatable: bool = True
    """A call may be run twice, where the first result was lost with its server: nothing happens
    twice by it."""

    def function(self) -> dict[str, Any]:
        """Return what the model is told, in Chat Completions' shape."""
        return {
            "type": "function",
            "function": {
                "name": self.name,
                "description": self.description,
                "parameters": {
                    "type": "object",
                    "properties": {name: dict(schema) for name, schema in self.parameters.items()},
                    "required": list(self.required),
                },
            },
        }

    def checked(self, given: Any) -> dict[str, Any]:
        """Return the arguments that the tool knows, numbers and strings in the wanted type.

        Raises ArgumentError.
        """
        names = ", ".join(repr(name) for name in self.required)
        if not isinstance(given, dict):
            raise ArgumentError(f"the arguments must be an object with {names}")
        missing = [name for name in self.required if name not in given]
        if missing:
            raise ArgumentError(
                f"the arguments must be an object with {names}; '{missing[0]}' is missing"
            )
        return {
            name: _converted(name, given[name], schema["type"])
            for name, schema in self.parameters.items()
            if name in given
        }


def _converted(name: str, value: Any, wanted: str) -> str | int:
    if isinstance(value, str | int | float) and not isinstance(value, bool):
        if wanted == "string":
            return str(value)
        number = str(value).strip()
        if number.isascii() and number.isdecimal() and len(number) < 10:
            return int(number)
    article = "an" if wanted == "integer" else "a"
    raise ArgumentError(f"'{name}' must be {article} {wanted}")


_STRING = {"type": "string"}

BUILTIN_TOOLS: dict[str, BuiltinTool] = {
    tool.kind: tool
    for tool in (
        BuiltinTool(
            "millrace:calculator",
            "calculator",
            "Calculate the value of a math expression",
            {"expression": _STRING},
            ("expression",),
            lambda given: {"result": calculate(given["expression"])},
        ),
        BuiltinTool(
            "millrace:current_time",
            "get_current_time",
            "Get the current time in a city",
            {"city": _STRING},
            ("city",),
            lambda given: {"time": time_in(given["city"])},
        ),
        BuiltinTool(
            "millrace:demo_find_restaurant",
            "find_restaurant",
            "Find a restaurant",
            {"location": _STRING, "food": _STRING},
            ("location",),
            lambda given: find_restaurants(given["location"], given.get("food", "")),
        ),
        BuiltinTool(
            "millrace:demo_book_restaurant",
            "book_restaurant",
            "Book a table at a restaurant",
            {
                "restaurant": _STRING,
                "date": _STRING,
                "time": _STRING,
                "people": {"type": "integer"},
            },
            ("restaurant", "date", "time", "people"),
            lambda given: book_table(
                given["restaurant"], given["date"], given["time"], given["people"]
            ),
        ),
    )
}
"""By ``kind``."""
USEFUL_TOOLS = tuple(kind for kind in BUILTIN_TOOLS if not kind.startswith("millrace:demo_"))
"""The kinds of those that do what they say."""


def run_tool(kind: str, arguments: str) -> str:
    """Return what a tool says to a call with ``arguments`` (JSON text), as JSON text.

    What cannot be done is an answer too: the model reads the error and may do better.
    """
    tool = BUILTIN_TOOLS[kind]
    try:
        given = json.loads(arguments) if len(arguments) <= MAX_ARGUMENT_CHARS else None
    except (ValueError, RecursionError):
        given = None
    try:
        return json.dumps(tool.answer(tool.checked(given)), ensure_ascii=False)
    except (ArgumentError, CalculatorError, UnknownPlace, BookingError) as error:
        return error_output(str(error))


def error_output(message: str) -> str:
    """Return a tool's answer that says what went wrong."""
    return json.dumps({"error": message}, ensure_ascii=False)
