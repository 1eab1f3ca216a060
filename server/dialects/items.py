"""Items of the Responses API, checked on the way in."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from server.dialects.fields import Fields, show
from server.dialects.tools import read_arguments
from server.errors import invalid
from server.response_object import (
    function_call_item,
    function_output_item,
    new_id,
    reasoning_item,
)

__all__ = ["read_items", "read_metadata"]

ROLES = ("user", "assistant", "system", "developer")
MAX_INPUT_ITEMS = 2048
MAX_ID_CHARS = 256

_NOT_TEXT = {
    "input_image": "images",
    "input_file": "files",
    "input_audio": "audio",
}


def read_items(fields: Fields, name: str) -> list[dict[str, Any]]:
    """Read a field that is a string (one message of the user) or an array of items.

    Each item gets an id. Raises ApiError 400 naming the item and part at fault.
    """
    given = fields.raw(name)
    path = fields.at(name)
    if isinstance(given, str):
        if not given:
            raise invalid(f"'{path}' must not be empty.", param=path, code="empty_string")
        return [_message("user", "input_text", [given])]
    if not isinstance(given, list):
        raise invalid(
            f"Invalid type for '{path}': expected a string or an array of items, but got "
            f"{show(given)}.",
            param=path,
            code="invalid_type",
        )
    items = fields.array(name, min_len=1, max_len=MAX_INPUT_ITEMS) or []
    return [_read_item(Fields(item, f"{path}[{index}]")) for index, item in enumerate(items)]


def _read_item(fields: Fields) -> dict[str, Any]:
    kind = fields.string("type") or "message"
    if kind == "function_call":
        return _read_call(fields)
    if kind == "function_call_output":
        return _read_output(fields)
    if kind == "reasoning":
        return _read_reasoning(fields)
    if kind != "message":
        raise invalid(
            f"'{fields.at('type')}' is '{kind}'; supported items are of the types 'message', "
            f"'function_call', 'function_call_output' and 'reasoning'.",
            param=fields.at("type"),
            code="unsupported_item_type",
        )
    fields.required("role")
    role = fields.choice("role", ROLES, "user")
    part_type = "output_text" if role == "assistant" else "input_text"
    return _message(role, part_type, _read_content(fields, part_type))


def _read_call(fields: Fields) -> dict[str, Any]:
    for name in ("call_id", "name", "arguments"):
        fields.required(name)
    status = fields.choice("status", ("completed", "incomplete", "in_progress"), "completed")
    return function_call_item(
        new_id("fc"),
        status,
        fields.string("call_id", empty=False, max_len=MAX_ID_CHARS) or "",
        fields.string("name", empty=False, max_len=256) or "",
        read_arguments(fields),
    )


def _read_output(fields: Fields) -> dict[str, Any]:
    for name in ("call_id", "output"):
        fields.required(name)
    if isinstance(fields.raw("output"), list):
        parts = enumerate(fields.array("output") or [])
        path = fields.at("output")
        texts = [
            _read_part(Fields(part, f"{path}[{index}]"), "input_text") for index, part in parts
        ]
    else:
        texts = [fields.string("output") or ""]
    call_id = fields.string("call_id", empty=False, max_len=MAX_ID_CHARS) or ""
    return function_output_item(new_id("fco"), call_id, "\n".join(texts))


def _read_reasoning(fields: Fields) -> dict[str, Any]:
    parts = fields.array("content") or []
    path = fields.at("content")
    texts = [
        _read_part(Fields(part, f"{path}[{index}]"), "reasoning_text")
        for index, part in enumerate(parts)
    ]
    content = [{"type": "reasoning_text", "text": text} for text in texts]
    return reasoning_item(new_id("rs"), "completed", content)


def _read_content(fields: Fields, part_type: str) -> list[str]:
    content = fields.required("content")
    if isinstance(content, str):
        return [content]
    path = fields.at("content")
    if not isinstance(content, list):
        raise invalid(
            f"Invalid type for '{path}': expected a string or an array of parts, but got "
            f"{show(content)}.",
            param=path,
            code="invalid_type",
        )
    parts = fields.array("content", min_len=1) or []
    return [
        _read_part(Fields(part, f"{path}[{index}]"), part_type) for index, part in enumerate(parts)
    ]


def _read_part(fields: Fields, part_type: str) -> str:
    fields.required("type")
    kind = fields.string("type") or ""
    if kind in _NOT_TEXT:
        raise invalid(
            f"'{fields.at('type')}' is '{kind}', but the model reads text only, not "
            f"{_NOT_TEXT[kind]}.",
            param=fields.at("type"),
            code="unsupported_content_type",
        )
    fields.choice("type", (part_type,), part_type)
    fields.required("text")
    return fields.string("text") or ""


def _message(role: str, part_type: str, texts: Sequence[str]) -> dict[str, Any]:
    content: list[dict[str, Any]] = [{"type": part_type, "text": text} for text in texts]
    if part_type == "output_text":
        for part in content:
            part |= {"annotations": [], "logprobs": []}
    return {
        "id": new_id("msg"),
        "type": "message",
        "status": "completed",
        "role": role,
        "content": content,
    }


def read_metadata(fields: Fields, name: str = "metadata") -> dict[str, str]:
    """Read up to 16 pairs of strings: keys of up to 64 characters, values of up to 512."""
    given = fields.mapping(name) or {}
    path = fields.at(name)
    if len(given) > 16:
        raise invalid(f"'{path}' has {len(given)} entries; at most 16 are allowed.", param=path)
    for key, value in given.items():
        if len(key) > 64 or not isinstance(value, str) or len(value) > 512:
            raise invalid(
                f"Invalid entry in '{path}': {show(key)}; keys are strings of up to 64 "
                f"characters, values strings of up to 512.",
                param=path,
                code="invalid_value",
            )
    return given
