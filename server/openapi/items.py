"""Items of the Responses API and of conversations in the OpenAPI document."""

from __future__ import annotations

from server.openapi.parts import Schema, array, enum, nullable, obj, one_of, ref, string
from server.openapi.tools import GIVEN_CALL, GIVEN_OUTPUT, GIVEN_REASONING

__all__ = ["CONTENT_PARTS", "INPUT", "ITEMS", "METADATA"]

METADATA: Schema = {
    "type": "object",
    "additionalProperties": {"type": "string", "maxLength": 512},
    "propertyNames": {"maxLength": 64},
    "maxProperties": 16,
}

_GIVEN_PART = obj(
    {"type": enum("input_text", "output_text"), "text": string()},
    text="`output_text` in messages of the assistant, `input_text` in others.",
    is_open=True,
)
_GIVEN = obj(
    {
        "role": enum("user", "assistant", "system", "developer"),
        "content": one_of(string(), array(_GIVEN_PART, minItems=1)),
    },
    {"type": nullable(enum("message"))},
    is_open=True,
)

ITEMS = array(
    one_of(_GIVEN, GIVEN_CALL, GIVEN_OUTPUT, GIVEN_REASONING),
    "Messages, reasoning, calls and what came of them.",
    minItems=1,
    maxItems=2048,
)
INPUT = one_of(string(minLength=1), ITEMS, text="A text (one message of the user), or items.")

CONTENT_PARTS: dict[str, Schema] = {
    "InputText": obj({"type": enum("input_text"), "text": string()}),
    "OutputText": obj(
        {
            "type": enum("output_text"),
            "text": string(),
            "annotations": array({}, maxItems=0),
            "logprobs": array(ref("TokenLogprob")),
        }
    ),
}
