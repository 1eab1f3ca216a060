"""The events of a response in the OpenAPI document, made from the events' own types."""

from __future__ import annotations

import inspect
from typing import Any

import msgspec

from server import events
from server.openapi.parts import Schema, enum, integer, nullable, obj, one_of, ref, string

__all__ = ["SCHEMAS"]

_EVENTS: tuple[type[events.Event], ...] = (
    events.ResponseCreated,
    events.ResponseInProgress,
    events.ResponsePrompt,
    events.ResponseQueued,
    events.OutputItemAdded,
    events.ContentPartAdded,
    events.OutputTextDelta,
    events.OutputTextDone,
    events.ReasoningTextDelta,
    events.ReasoningTextDone,
    events.FunctionCallArgumentsDelta,
    events.FunctionCallArgumentsDone,
    events.ContentPartDone,
    events.OutputItemDone,
    events.Discontinuity,
    *events.TERMINAL_EVENTS,
)
# The types of these fields say no more than "an object".
_OBJECTS = {
    "response": ref("Response"),
    "item": ref("Item"),
    "part": one_of(ref("OutputText"), ref("ReasoningText")),
}
_DESCRIBED_ELSEWHERE = ("TokenLogprob", "TopLogprob")


def _event(schema: Schema) -> Schema:
    fields: dict[str, Any] = dict(schema["properties"])
    for name, component in _OBJECTS.items():
        if name in fields:
            fields[name] = component
    fields["sequence_number"] = integer("Dense from 0 within a response.", 0)
    required = [*schema["required"], "sequence_number"]
    return {
        **schema,
        "properties": fields,
        "required": required,
        "description": inspect.cleandoc(schema["description"]),
        "additionalProperties": False,
    }


def _schemas() -> dict[str, Schema]:
    _, components = msgspec.json.schema_components(
        _EVENTS, ref_template="#/components/schemas/{name}"
    )
    found = {
        name: _event(schema)
        for name, schema in components.items()
        if name not in _DESCRIBED_ELSEWHERE
    }
    found["StreamError"] = obj(
        {
            "type": enum("error"),
            "code": nullable(string()),
            "message": string(),
            "param": nullable(string()),
            "sequence_number": integer(least=0),
        },
        text="The stream ends early; it stands outside the response's events.",
    )
    found["ResponseEvent"] = one_of(
        *(ref(name) for name in found), text="The `data` of one server-sent event."
    )
    return found


SCHEMAS: dict[str, Schema] = _schemas()
