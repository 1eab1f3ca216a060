"""Tools of a request: function schemas, the server's own tools, and how they are to be used.

Chat Completions wraps a function (``{"type": "function", "function": {…}}``), the Responses API
does not; there ``{"type": "millrace:calculator"}`` asks for a tool that the server runs itself.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, Literal, cast

import orjson

from server.agent.tools import BUILTIN_TOOLS
from server.dialects.fields import Fields, show
from server.errors import ApiError, invalid
from server.request import ToolOptions

__all__ = [
    "MAX_NAME_CHARS",
    "MAX_TOOLS",
    "echoed_tools",
    "read_arguments",
    "read_chat_tools",
    "read_response_tools",
    "thinking_kwargs",
]

MAX_TOOLS = 128
MAX_NAME_CHARS = 64
MAX_DESCRIPTION_CHARS = 8192
MAX_SCHEMA_BYTES = 65536
"""Of one function's parameters, as JSON."""
MAX_TOOLS_BYTES = 262144
"""Of all functions together."""
MAX_SCHEMA_DEPTH = 32
MAX_ARGUMENTS_CHARS = 262144
EFFORTS = ("none", "minimal", "low", "medium", "high", "xhigh")

_NAME = re.compile(rf"[A-Za-z0-9_.:-]{{1,{MAX_NAME_CHARS}}}")
_MODES = ("none", "auto", "required")
_FUNCTION_FIELDS = ("name", "description", "parameters", "strict")


def read_chat_tools(fields: Fields) -> ToolOptions:
    """Read ``tools``, ``tool_choice`` and ``parallel_tool_calls`` of Chat Completions.

    Raises ApiError 400 naming the tool and field at fault.
    """
    functions = []
    for one in _each(fields):
        kind = one.required("type")
        if kind in BUILTIN_TOOLS:
            raise _unsupported(one, f"the server runs {show(kind)} in the Responses API only")
        if kind != "function":
            raise _unsupported(one, "only tools of the type 'function' can be called")
        one.refuse_unknown(("type", "function"))
        one.required("function")
        inner = one.inner("function")
        assert inner is not None
        inner.refuse_unknown(_FUNCTION_FIELDS)
        functions.append(_function(inner))
    return _options(fields, functions, {}, max_calls=None)


def read_response_tools(fields: Fields) -> ToolOptions:
    """Read the same, and ``max_tool_calls``, of the Responses API; raises the same."""
    functions: list[dict[str, Any]] = []
    builtin: dict[str, str] = {}
    for one in _each(fields):
        kind = one.required("type")
        if isinstance(kind, str) and kind in BUILTIN_TOOLS:
            one.refuse_unknown(("type",))
            tool = BUILTIN_TOOLS[kind]
            functions.append(tool.function())
            builtin[tool.name] = kind
        elif kind == "function":
            one.refuse_unknown(("type", *_FUNCTION_FIELDS))
            functions.append(_function(one))
        else:
            kinds = ", ".join(f"'{name}'" for name in ("function", *BUILTIN_TOOLS))
            raise _unsupported(one, f"the tools here are: {kinds}")
    max_calls = fields.integer("max_tool_calls", least=1)
    return _options(fields, functions, builtin, max_calls=max_calls)


def echoed_tools(tools: ToolOptions) -> dict[str, Any]:
    """Return the fields of a response object that repeat what ``read_response_tools`` read."""
    shown: list[dict[str, Any]] = []
    for one in tools.functions:
        function = one["function"]
        if (kind := tools.builtin.get(function["name"])) is not None:
            shown.append({"type": kind})
            continue
        shown.append(
            {
                "type": "function",
                "name": function["name"],
                "description": function.get("description"),
                "parameters": function["parameters"],
                # The model is not held to the schema, whatever was asked for.
                "strict": False,
            }
        )
    choice: str | dict[str, str] = tools.choice
    if tools.name is not None:
        kind = tools.builtin.get(tools.name)
        choice = {"type": "function", "name": tools.name} if kind is None else {"type": kind}
    return {
        "tools": shown,
        "tool_choice": choice,
        "parallel_tool_calls": tools.parallel,
        "max_tool_calls": tools.max_calls,
    }


def read_arguments(fields: Fields) -> str:
    """Read ``arguments`` of a call that was made before: JSON text of bounded length."""
    return fields.string("arguments", max_len=MAX_ARGUMENTS_CHARS) or "{}"


def thinking_kwargs(fields: Fields, name: str) -> dict[str, Any]:
    """Return what a reasoning effort says to the chat template: to think or not to."""
    if fields.string(name) is None:
        return {}
    effort = fields.choice(name, EFFORTS, "medium")
    return {"enable_thinking": effort not in ("none", "minimal")}


def _each(fields: Fields) -> list[Fields]:
    tools = fields.array("tools", max_len=MAX_TOOLS) or []
    path = fields.at("tools")
    return [Fields(tool, f"{path}[{index}]") for index, tool in enumerate(tools)]


def _unsupported(fields: Fields, why: str) -> ApiError:
    path = fields.at("type")
    return invalid(
        f"'{path}' = {show(fields.raw('type'))} is not supported: {why}.",
        param=path,
        code="unsupported_parameter",
    )


def _function(fields: Fields) -> dict[str, Any]:
    """Read one function into the shape that chat templates take."""
    name = _name(fields)
    function: dict[str, Any] = {"name": name}
    description = fields.string("description", max_len=MAX_DESCRIPTION_CHARS)
    if description is not None:
        function["description"] = description
    # Accepted for the sake of clients that always send it; the answer says what it came to.
    fields.boolean("strict", False)
    function["parameters"] = _parameters(fields)
    return {"type": "function", "function": function}


def _name(fields: Fields) -> str:
    fields.required("name")
    name = fields.string("name") or ""
    if not _NAME.fullmatch(name):
        raise invalid(
            f"Invalid value for '{fields.at('name')}': {show(name)}; a function's name has 1 to "
            f"{MAX_NAME_CHARS} letters, digits, underscores, hyphens, dots or colons.",
            param=fields.at("name"),
            code="invalid_value",
        )
    return name


def _parameters(fields: Fields) -> dict[str, Any]:
    given = fields.mapping("parameters")
    path = fields.at("parameters")
    if not given:
        return {"type": "object", "properties": {}}
    if given.get("type", "object") != "object":
        raise invalid(
            f"Invalid value for '{path}.type': {show(given['type'])}; a function's parameters are "
            f"an 'object'.",
            param=f"{path}.type",
            code="invalid_value",
        )
    if not isinstance(given.get("properties", {}), dict):
        raise invalid(
            f"Invalid type for '{path}.properties': expected an object, but got "
            f"{show(given['properties'])}.",
            param=f"{path}.properties",
            code="invalid_type",
        )
    if _deeper_than(given, MAX_SCHEMA_DEPTH):
        raise invalid(f"'{path}' is nested more than {MAX_SCHEMA_DEPTH} deep.", param=path)
    size = len(orjson.dumps(given))
    if size > MAX_SCHEMA_BYTES:
        raise invalid(
            f"'{path}' has {size} bytes; at most {MAX_SCHEMA_BYTES} are allowed.", param=path
        )
    return given


def _deeper_than(value: object, depth: int) -> bool:
    layer = [value]
    for _ in range(depth):
        layer = [
            inner
            for outer in layer
            if isinstance(outer, dict | list)
            for inner in (outer.values() if isinstance(outer, dict) else outer)
        ]
        if not layer:
            return False
    return True


def _options(
    fields: Fields,
    functions: list[dict[str, Any]],
    builtin: dict[str, str],
    *,
    max_calls: int | None,
) -> ToolOptions:
    path = fields.at("tools")
    names = [one["function"]["name"] for one in functions]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise invalid(f"'{path}' has two tools of the name '{twice}'.", param=path)
    size = len(orjson.dumps(functions))
    if size > MAX_TOOLS_BYTES:
        raise invalid(
            f"'{path}' has {size} bytes; at most {MAX_TOOLS_BYTES} are allowed.", param=path
        )
    choice, name = _choice(fields, names)
    return ToolOptions(
        functions=functions,
        builtin=builtin,
        choice=choice,
        name=name,
        parallel=fields.boolean("parallel_tool_calls", True),
        max_calls=max_calls,
    )


def _choice(
    fields: Fields, names: Sequence[str]
) -> tuple[Literal["auto", "none", "required"], str | None]:
    given = fields.raw("tool_choice")
    path = fields.at("tool_choice")
    if not isinstance(given, dict):
        mode = fields.choice("tool_choice", _MODES, "auto")
        if mode == "required" and not names:
            raise invalid(f"'{path}' is 'required', but there are no 'tools'.", param=path)
        return cast(Literal["auto", "none", "required"], mode), None
    choice = Fields(given, path)
    kind = choice.required("type")
    if isinstance(kind, str) and kind in BUILTIN_TOOLS:
        name = BUILTIN_TOOLS[kind].name
    elif kind == "function":
        # Chat Completions wraps the name, the Responses API does not.
        name = _name(choice.inner("function") or choice)
    else:
        raise invalid(
            f"'{path}.type' = {show(kind)} is not supported: a choice is 'none', 'auto', "
            f"'required' or one function by its name.",
            param=f"{path}.type",
            code="unsupported_parameter",
        )
    if name not in names:
        raise invalid(
            f"'{path}' names the function '{name}', which is not among the 'tools'.", param=path
        )
    return "required", name
