"""The Responses API in the OpenAPI document."""

from __future__ import annotations

from typing import Any

from server.openapi.items import CONTENT_PARTS, INPUT, METADATA
from server.openapi.parts import (
    Schema,
    array,
    boolean,
    enum,
    event,
    integer,
    json_body,
    nullable,
    number,
    obj,
    one_of,
    operation,
    ref,
    string,
)
from server.openapi.resuming import IDEMPOTENCY_KEY, LAST_EVENT_ID, ON_DISCONNECT, query
from server.openapi.sampling import PRIORITY, RETURN_TOKEN_IDS, SAMPLING, STREAM
from server.openapi.tools import EFFORT, RESPONSE_TOOL_FIELDS, TEMPLATE_KWARGS
from server.openapi.tools import ITEM_SCHEMAS as TOOL_ITEMS
from server.openapi.tools import SCHEMAS as TOOL_SCHEMAS

__all__ = ["ITEM_SCHEMAS", "LIST_QUERY", "PATHS", "SCHEMAS"]

_IGNORED: Schema = {"description": "Accepted, and of no effect."}
_NULL: Schema = {"type": "null"}
_SAMPLING = {name: schema for name, schema in SAMPLING.items() if name != "prompt_logprobs"}

_TEXT_FORMAT = obj(
    {},
    {
        "format": nullable(obj({"type": enum("text")}, is_open=True)),
        "verbosity": nullable(enum("low", "medium", "high")),
    },
    is_open=True,
)

_INPUT = one_of(
    INPUT,
    array(
        {},
        "Nothing new: with `conversation.after`, a message of the user or an output of a call "
        "that is answered (again).",
        maxItems=0,
    ),
)

_REQUEST = obj(
    {"model": string("The served model's name."), "input": _INPUT},
    {
        "instructions": nullable(string("A system message in front of everything.")),
        "previous_response_id": nullable(
            string("Go on after this response; not with `conversation`.", minLength=1)
        ),
        "conversation": nullable(
            one_of(
                string(minLength=1),
                obj(
                    {"id": string(minLength=1)},
                    {
                        "after": nullable(
                            string(
                                "The item that the response goes after, in a branch of its own; "
                                "null: after nothing. Default: the head.",
                                minLength=1,
                                maxLength=128,
                            )
                        )
                    },
                    is_open=True,
                ),
                text="The conversation that is gone on with, and gets the new items.",
            )
        ),
        "store": nullable(boolean("Keep the response. Default true.")),
        "stream": STREAM,
        "background": nullable(boolean("Answer at once, and go on without the client.")),
        "on_disconnect": ON_DISCONNECT,
        "max_output_tokens": nullable(integer("Default: what fits.", 1)),
        "top_logprobs": nullable(integer("Log-probabilities with alternatives.", 0, 20)),
        "include": nullable(array(string(), "E.g. `message.output_text.logprobs`.", maxItems=32)),
        "metadata": nullable(METADATA),
        "truncation": nullable(enum("disabled", "auto")),
        "text": nullable(_TEXT_FORMAT),
        **RESPONSE_TOOL_FIELDS,
        "reasoning": nullable(obj({}, {"effort": EFFORT}, is_open=True)),
        "chat_template_kwargs": TEMPLATE_KWARGS,
        "priority": PRIORITY,
        "return_token_ids": RETURN_TOKEN_IDS,
        **_SAMPLING,
        "prompt": _NULL,
        "moderation": _NULL,
        "prompt_logprobs": _NULL,
        "generate": nullable({"const": True}),
        "n": nullable({"const": 1}),
        "access_programs": _IGNORED,
        "background_options": _IGNORED,
        "context_management": _IGNORED,
        "image": _IGNORED,
        "prompt_cache_key": _IGNORED,
        "prompt_cache_options": _IGNORED,
        "prompt_cache_retention": _IGNORED,
        "safety_identifier": _IGNORED,
        "service_tier": _IGNORED,
        "stream_options": _IGNORED,
        "user": _IGNORED,
    },
)

_USAGE = obj(
    {
        "input_tokens": integer(least=0),
        "input_tokens_details": obj(
            {"cached_tokens": integer(least=0), "cache_write_tokens": integer(least=0)}
        ),
        "output_tokens": integer(least=0),
        "output_tokens_details": obj({"reasoning_tokens": integer(least=0)}),
        "total_tokens": integer(least=0),
    }
)

_RESPONSE = obj(
    {
        "id": string(),
        "object": enum("response"),
        "created_at": integer("Unix seconds."),
        "status": enum("in_progress", "completed", "incomplete", "failed", "cancelled"),
        "background": boolean(),
        "completed_at": nullable(integer("Unix seconds.")),
        "error": nullable(obj({"code": string(), "message": string()})),
        "incomplete_details": nullable(obj({"reason": string()})),
        "instructions": nullable(string()),
        "max_output_tokens": nullable(integer()),
        "max_tool_calls": nullable(integer()),
        "metadata": METADATA,
        "model": string(),
        "output": array(ref("Item")),
        "parallel_tool_calls": boolean(),
        "previous_response_id": nullable(string()),
        "service_tier": string(),
        "store": boolean(),
        "temperature": number(),
        "text": obj({"format": obj({"type": enum("text")})}),
        "tool_choice": one_of(string(), {"type": "object"}),
        "tools": array({"type": "object"}),
        "top_logprobs": integer(),
        "top_p": number(),
        "truncation": string(),
        "usage": nullable(ref("ResponseUsage")),
    },
    {
        "conversation": obj({"id": string()}),
        "seed": integer("With it, the same request gives the same answer."),
    },
)

_MESSAGE = obj(
    {
        "id": string(),
        "type": enum("message"),
        "status": enum("in_progress", "completed", "incomplete"),
        "role": enum("user", "assistant", "system", "developer"),
        "content": array(one_of(ref("InputText"), ref("OutputText"))),
    }
)
ITEM_SCHEMAS: dict[str, Schema] = {"Message": _MESSAGE, **TOOL_ITEMS}

SCHEMAS: dict[str, Schema] = {
    "ResponseRequest": _REQUEST,
    "Response": _RESPONSE,
    "ResponseUsage": _USAGE,
    **ITEM_SCHEMAS,
    "Item": one_of(*(ref(name) for name in ITEM_SCHEMAS)),
    **CONTENT_PARTS,
    **TOOL_SCHEMAS,
    "ItemList": obj(
        {
            "object": enum("list"),
            "data": array(ref("Item")),
            "first_id": nullable(string()),
            "last_id": nullable(string()),
            "has_more": boolean(),
        }
    ),
    "DeletedResponse": obj(
        {"id": string(), "object": enum("response"), "deleted": {"const": True}}
    ),
}

_ID = {
    "name": "id",
    "in": "path",
    "required": True,
    "schema": {"type": "string"},
    "description": "A response's id.",
}


LIST_QUERY = (
    query("after", string(), "The id of the last item that is known."),
    query("limit", integer("", 1, 100), "Default 20."),
    query("order", enum("asc", "desc"), "Default desc: the newest first."),
)

_STREAM_QUERY = (
    query("stream", enum("true", "false", "1", "0"), "Follow the events."),
    query("starting_after", integer("", 0), "Only events after this sequence number."),
    LAST_EVENT_ID,
)

_RESPONSE_OR_STREAM = json_body(
    ref("Response"),
    "The response; with `stream` its events, whose `id` is their sequence number.",
    events=event(ref("ResponseEvent")),
)

_SOCKET_TEXT = """With `Upgrade: websocket` this is a WebSocket: send messages of the type
`response.create` with the fields of the POST's body, get the response's events as messages.
Without, it is refused."""


def _operation(summary: str, responses: dict[int, dict[str, Any]], **more: Any) -> dict[str, Any]:
    return operation(summary, "Responses", responses, **more)


PATHS: dict[str, dict[str, Any]] = {
    "/v1/responses": {
        "post": _operation(
            "Make a response",
            {200: _RESPONSE_OR_STREAM},
            errors=(400, 404, 409, 413, 415, 422, 429, 500, 503),
            body=ref("ResponseRequest"),
            parameters=(IDEMPOTENCY_KEY,),
        ),
        "get": _operation(
            "Open a WebSocket",
            {101: {"description": "The WebSocket is open."}},
            errors=(405, 429),
            text=_SOCKET_TEXT,
        ),
    },
    "/v1/responses/{id}": {
        "get": _operation(
            "Return a stored response, or follow its events",
            {200: _RESPONSE_OR_STREAM},
            errors=(400, 404, 503),
            parameters=(_ID, *_STREAM_QUERY),
        ),
        "delete": _operation(
            "Delete a response",
            {200: json_body(ref("DeletedResponse"), "It is deleted.")},
            errors=(404, 503),
            parameters=(_ID,),
        ),
    },
    "/v1/responses/{id}/cancel": {
        "post": _operation(
            "End a response that is being made",
            {200: json_body(ref("Response"), "The response as it is now.")},
            errors=(404, 503),
            parameters=(_ID,),
        )
    },
    "/v1/responses/{id}/input_items": {
        "get": _operation(
            "List what a response was given",
            {200: json_body(ref("ItemList"), "Items.")},
            errors=(400, 404, 503),
            parameters=(_ID, *LIST_QUERY),
        )
    },
}
