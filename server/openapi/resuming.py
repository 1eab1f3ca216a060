"""Resuming, cancelling, retrying and leaving in the OpenAPI document, the same in all dialects."""

from __future__ import annotations

import copy
from typing import Any

from server.dialects.disconnect import MAX_LINGER_S
from server.openapi.parts import (
    Schema,
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

__all__ = [
    "IDEMPOTENCY_KEY",
    "LAST_EVENT_ID",
    "ON_DISCONNECT",
    "chunk_event",
    "ended",
    "projected_paths",
    "query",
]

ON_DISCONNECT: Schema = nullable(
    one_of(
        enum("finish", "cancel"),
        string(pattern=r"^linger=\d{1,9}(\.\d{1,6})?$"),
        obj({"linger": number("Seconds.", 0, MAX_LINGER_S)}),
        text="What happens when the last client that follows the answer leaves: it is made to its "
        "end, it ends, or it ends unless somebody is back within so many seconds. Default: "
        "`finish` where the answer is stored, else `cancel`.",
    )
)


def _header(name: str, text: str, schema: Schema) -> dict[str, Any]:
    return {
        "name": name,
        "in": "header",
        "required": False,
        "schema": schema,
        "description": text,
    }


IDEMPOTENCY_KEY = _header(
    "Idempotency-Key",
    "Sent again with the same key and body, a request never runs twice: it gets the first one's "
    "answer. With another body it is refused (422).",
    string(minLength=1, maxLength=255),
)
LAST_EVENT_ID = _header(
    "Last-Event-ID",
    "Only what comes after the event with this `id`; it wins, and is what a browser sends.",
    string(),
)


def query(name: str, schema: Schema, text: str) -> dict[str, Any]:
    """Return a query parameter."""
    return {"name": name, "in": "query", "required": False, "schema": schema, "description": text}


def chunk_event(chunk: str) -> Schema:
    """Return the schema of a server-sent event of a stream of chunks."""
    return event(ref(chunk), ref("Error"), ref("StreamError"), last="[DONE]")


def ended(answer: Schema) -> Schema:
    """Return the schema of an answer that may have been cut by a cancel."""
    schema = copy.deepcopy(answer)
    fields = schema["properties"]
    fields["status"] = enum("completed", "incomplete", "failed", "cancelled")
    fields["usage"] = nullable(fields["usage"])
    choice = fields["choices"]["items"]["properties"]
    choice["finish_reason"] = one_of(choice["finish_reason"], enum("cancelled"))
    schema["required"] = [*schema["required"], "status"]
    return schema


def projected_paths(path: str, tag: str, answer: str, chunk: str) -> dict[str, dict[str, Any]]:
    """Return the paths of answers that are being made or are still kept, below ``path``."""
    one = {
        "name": "id",
        "in": "path",
        "required": True,
        "schema": {"type": "string"},
        "description": "The `id` that the answer and all of its chunks show.",
    }
    return {
        f"{path}/{{id}}": {
            "get": operation(
                "Show an answer again, or the rest of its stream",
                tag,
                {
                    200: json_body(
                        ref(answer),
                        "The whole answer, once it is made; or its chunks, byte for byte as the "
                        "first stream had them, each with the same `id`.",
                        events=chunk_event(chunk),
                    )
                },
                errors=(400, 404, 500, 503),
                parameters=(
                    one,
                    query("stream", enum("true", "false", "1", "0"), "Follow the stream."),
                    query("starting_after", integer("", 0), "Only what comes after this event."),
                    LAST_EVENT_ID,
                ),
                text="Possible while the answer is made and some minutes longer, on any server of "
                "a cluster, with the key that asked for it.",
            )
        },
        f"{path}/{{id}}/cancel": {
            "post": operation(
                "End an answer that is being made",
                tag,
                {200: json_body(ref(f"{answer}Ended"), "The answer as far as it came.")},
                errors=(404, 503),
                parameters=(one,),
            )
        },
    }
