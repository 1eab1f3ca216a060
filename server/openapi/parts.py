"""Short ways to write JSON Schemas (draft 2020-12) and OpenAPI operations."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

__all__ = [
    "Schema",
    "array",
    "boolean",
    "enum",
    "event",
    "integer",
    "json_body",
    "nullable",
    "number",
    "obj",
    "one_of",
    "operation",
    "ref",
    "string",
]

Schema = dict[str, Any]


def _with(schema: Schema, text: str) -> Schema:
    return {**schema, "description": text} if text else schema


def string(text: str = "", **more: Any) -> Schema:
    """Return the schema of a string."""
    return _with({"type": "string", **more}, text)


def integer(text: str = "", least: int | None = None, most: int | None = None) -> Schema:
    """Return the schema of an integer in a range."""
    return _with({"type": "integer", **_range(least, most)}, text)


def number(text: str = "", least: float | None = None, most: float | None = None) -> Schema:
    """Return the schema of a number in a range."""
    return _with({"type": "number", **_range(least, most)}, text)


def _range(least: float | None, most: float | None) -> Schema:
    bounds = {"minimum": least, "maximum": most}
    return {name: value for name, value in bounds.items() if value is not None}


def boolean(text: str = "") -> Schema:
    """Return the schema of true and false."""
    return _with({"type": "boolean"}, text)


def enum(*values: str, text: str = "") -> Schema:
    """Return the schema of a few words."""
    if len(values) == 1:
        return _with({"const": values[0]}, text)
    return _with({"type": "string", "enum": list(values)}, text)


def array(items: Schema, text: str = "", **more: Any) -> Schema:
    """Return the schema of an array."""
    return _with({"type": "array", "items": items, **more}, text)


def one_of(*schemas: Schema, text: str = "") -> Schema:
    """Return the schema of what fits one or more of ``schemas``."""
    return _with({"anyOf": list(schemas)}, text)


def nullable(schema: Schema) -> Schema:
    """Return the schema of what may also be null."""
    kind = schema.get("type")
    if isinstance(kind, str) and "enum" not in schema:
        return {**schema, "type": [kind, "null"]}
    return {"anyOf": [schema, {"type": "null"}]}


def obj(
    required: Mapping[str, Schema],
    optional: Mapping[str, Schema] | None = None,
    *,
    text: str = "",
    is_open: bool = False,
) -> Schema:
    """Return the schema of an object; others than the named fields only where ``is_open``."""
    schema: Schema = {
        "type": "object",
        "properties": {**required, **(optional or {})},
        "additionalProperties": is_open,
    }
    if required:
        schema["required"] = list(required)
    return _with(schema, text)


def ref(name: str) -> Schema:
    """Return a reference to a component's schema."""
    return {"$ref": f"#/components/schemas/{name}"}


def event(*data: Schema, last: str | None = None) -> Schema:
    """Return the schema of one server-sent event (OpenAPI 3.2, Sequential Media Types).

    Its ``data`` is JSON that fits one or more of the schemas, or the word ``last``.
    """
    json: Schema = {"contentMediaType": "application/json", "contentSchema": one_of(*data)}
    text = {"type": "string", **json} if last is None else one_of(enum(last), string(**json))
    return obj({"data": text}, {"event": string(), "id": string("Where to resume after it.")})


def json_body(schema: Schema, text: str, *, events: Schema | None = None) -> dict[str, Any]:
    """Return a body or a response in JSON; ``events``: or a stream of such server-sent events."""
    content = {"application/json": {"schema": schema}}
    if events is not None:
        content["text/event-stream"] = {"itemSchema": events}
    return {"description": text, "content": content}


_ERRORS = {
    400: "The request must be changed; `param` names the field.",
    401: "No API key, or not one of this server's.",
    405: "The address does not take this method.",
    404: "What the request names does not exist, or not for this caller.",
    409: "The object is in a state that does not allow this.",
    413: "The body is too large.",
    415: "The body is not `application/json`.",
    422: "The `Idempotency-Key` was used for another request.",
    429: "The server is full, or a limit of the key is reached; `Retry-After` says when to "
    "try again, `x-ratelimit-*` what is left.",
    500: "The server failed.",
    503: "Requests cannot be served now; `Retry-After` says when to try again.",
}


def operation(
    summary: str,
    tag: str,
    responses: Mapping[int, dict[str, Any]],
    *,
    errors: tuple[int, ...] = (),
    body: Schema | None = None,
    parameters: tuple[dict[str, Any], ...] = (),
    text: str = "",
    is_open: bool = False,
) -> dict[str, Any]:
    """Return an operation; ``is_open`` ones need no API key."""
    answers: dict[str, Any] = {str(status): answer for status, answer in responses.items()}
    for status in errors if is_open else sorted({*errors, 401}):
        answers[str(status)] = json_body(ref("Error"), _ERRORS[status])
    answers["default"] = json_body(ref("Error"), "Any other error.")
    result: dict[str, Any] = {"summary": summary, "tags": [tag], "responses": answers}
    if text:
        result["description"] = text
    if body is not None:
        result["requestBody"] = {
            "required": True,
            "content": {"application/json": {"schema": body}},
        }
    if parameters:
        result["parameters"] = list(parameters)
    if is_open:
        result["security"] = []
    return result
