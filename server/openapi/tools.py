"""Tools in the OpenAPI document: what the model may call, and what came of it."""

from __future__ import annotations

from server.agent.tools import BUILTIN_TOOLS
from server.dialects.tools import (
    EFFORTS,
    MAX_ARGUMENTS_CHARS,
    MAX_DESCRIPTION_CHARS,
    MAX_NAME_CHARS,
    MAX_TOOLS,
)
from server.openapi.parts import (
    Schema,
    array,
    boolean,
    enum,
    integer,
    nullable,
    obj,
    one_of,
    ref,
    string,
)

__all__ = [
    "CHAT_TOOL_FIELDS",
    "EFFORT",
    "GIVEN_CALL",
    "GIVEN_OUTPUT",
    "GIVEN_REASONING",
    "ITEM_SCHEMAS",
    "RESPONSE_TOOL_FIELDS",
    "SCHEMAS",
    "TEMPLATE_KWARGS",
    "TOOL_CALL",
]

_NAME = string(pattern=f"^[A-Za-z0-9_.:-]{{1,{MAX_NAME_CHARS}}}$")
_FUNCTION = {
    "description": nullable(string(maxLength=MAX_DESCRIPTION_CHARS)),
    "parameters": nullable(
        {"type": "object", "description": "A JSON Schema of an object, which the model reads."}
    ),
    "strict": nullable(boolean("Accepted; the model is not held to the schema.")),
}
_BUILTIN = one_of(
    *(
        obj({"type": enum(kind)}, text=f"Run by this server: {tool.description}.")
        for kind, tool in BUILTIN_TOOLS.items()
    )
)
_MODE = enum(
    "none",
    "auto",
    "required",
    text="With `required` the answer is made to begin as a call; a model may still write it badly.",
)
_PARALLEL = nullable(boolean("Whether an answer may hold several calls. Default true."))
EFFORT = nullable(enum(*EFFORTS, text="`none` and `minimal` ask for an answer without reasoning."))
TEMPLATE_KWARGS = nullable(
    {"type": "object", "description": "More variables for the model's chat template."}
)

CHAT_TOOL_FIELDS: dict[str, Schema] = {
    "tools": nullable(
        array(
            obj({"type": enum("function"), "function": obj({"name": _NAME}, _FUNCTION)}),
            "Functions that the model may call and the client runs.",
            maxItems=MAX_TOOLS,
        )
    ),
    "tool_choice": nullable(
        one_of(
            _MODE,
            obj(
                {"type": enum("function"), "function": obj({"name": _NAME}, is_open=True)},
                is_open=True,
            ),
        )
    ),
    "parallel_tool_calls": _PARALLEL,
}

_NAMED = one_of(
    obj({"type": enum("function"), "name": _NAME}, is_open=True),
    obj({"type": enum(*BUILTIN_TOOLS)}, is_open=True),
)
RESPONSE_TOOL_FIELDS: dict[str, Schema] = {
    "tools": nullable(
        array(
            one_of(obj({"type": enum("function"), "name": _NAME}, _FUNCTION), _BUILTIN),
            "Functions that the model may call and the client runs, and tools of this server.",
            maxItems=MAX_TOOLS,
        )
    ),
    "tool_choice": nullable(one_of(_MODE, _NAMED)),
    "parallel_tool_calls": _PARALLEL,
    "max_tool_calls": nullable(integer("Most calls of this server's tools in one response.", 1)),
}

TOOL_CALL = obj(
    {
        "id": string(),
        "type": enum("function"),
        "function": obj({"name": string(), "arguments": string("JSON text.")}),
    }
)

_ARGUMENTS = string("JSON text.", maxLength=MAX_ARGUMENTS_CHARS)
GIVEN_CALL = obj(
    {
        "type": enum("function_call"),
        "call_id": string(minLength=1),
        "name": string(minLength=1),
        "arguments": _ARGUMENTS,
    },
    is_open=True,
)
GIVEN_OUTPUT = obj(
    {
        "type": enum("function_call_output"),
        "call_id": string(minLength=1),
        "output": one_of(
            string(), array(obj({"type": enum("input_text"), "text": string()}, is_open=True))
        ),
    },
    is_open=True,
)
GIVEN_REASONING = obj(
    {"type": enum("reasoning")},
    {
        "content": nullable(
            array(obj({"type": enum("reasoning_text"), "text": string()}, is_open=True))
        )
    },
    is_open=True,
)

_STATUS = enum("in_progress", "completed", "incomplete")
ITEM_SCHEMAS: dict[str, Schema] = {
    "FunctionCall": obj(
        {
            "id": string(),
            "type": enum("function_call"),
            "status": _STATUS,
            "call_id": string(),
            "name": string(),
            "arguments": string("JSON text."),
        }
    ),
    "FunctionCallOutput": obj(
        {
            "id": string(),
            "type": enum("function_call_output"),
            "status": _STATUS,
            "call_id": string(),
            "output": string(),
        },
        text="In an output: what a tool of this server said to the call of the same `call_id`.",
    ),
    "Reasoning": obj(
        {
            "id": string(),
            "type": enum("reasoning"),
            "status": _STATUS,
            "summary": array({}, maxItems=0),
            "content": array(ref("ReasoningText")),
        }
    ),
}
SCHEMAS: dict[str, Schema] = {
    "ReasoningText": obj({"type": enum("reasoning_text"), "text": string()}),
}
