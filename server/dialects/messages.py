"""Chat messages of a request, checked and brought to the plain form that chat templates take."""

from __future__ import annotations

from typing import Any

from server.dialects.fields import Fields, show
from server.dialects.tools import MAX_TOOLS, read_arguments
from server.errors import invalid

__all__ = ["read_messages"]

ROLES = ("system", "developer", "user", "assistant", "tool")

_NOT_TEXT = {
    "image_url": "images",
    "input_image": "images",
    "input_audio": "audio",
    "audio": "audio",
    "file": "files",
    "input_file": "files",
    "video_url": "video",
}


def read_messages(fields: Fields) -> list[dict[str, Any]]:
    """Read ``messages`` in Chat Completions' shape; the contents become plain strings.

    Raises ApiError 400 naming the message and the part at fault.
    """
    fields.required("messages")
    given = fields.array("messages", min_len=1) or []
    path = fields.at("messages")
    return [_message(Fields(one, f"{path}[{index}]")) for index, one in enumerate(given)]


def _message(fields: Fields) -> dict[str, Any]:
    fields.required("role")
    role = fields.choice("role", ROLES, "user")
    message: dict[str, Any] = {
        # Templates know no developer; OpenAI gave the system's role that name.
        "role": "system" if role == "developer" else role,
    }
    calls = _tool_calls(fields) if role == "assistant" else []
    if fields.given("content") or not calls:
        message["content"] = _content(fields, role)
    else:
        message["content"] = ""
    if calls:
        message["tool_calls"] = calls
    if (name := fields.string("name", max_len=256)) is not None:
        message["name"] = name
    if role == "tool" and (call_id := fields.string("tool_call_id", max_len=256)) is not None:
        message["tool_call_id"] = call_id
    if role == "assistant":
        reasoning = fields.string("reasoning_content")
        if reasoning is not None:
            message["reasoning_content"] = reasoning
    return message


def _content(fields: Fields, role: str) -> str:
    content = fields.required("content")
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise invalid(
            f"Invalid type for '{fields.at('content')}': expected a string or an array of text "
            f"parts, but got {show(content)}.",
            param=fields.at("content"),
            code="invalid_type",
        )
    parts = fields.array("content", min_len=1) or []
    path = fields.at("content")
    return "\n".join(
        _part(Fields(part, f"{path}[{index}]"), role) for index, part in enumerate(parts)
    )


def _part(fields: Fields, role: str) -> str:
    fields.required("type")
    kind = fields.string("type") or ""
    if kind in _NOT_TEXT:
        raise invalid(
            f"'{fields.at('type')}' is '{kind}', but the model reads text only, not "
            f"{_NOT_TEXT[kind]}.",
            param=fields.at("type"),
            code="unsupported_content_type",
        )
    kinds = ("text", "refusal") if role == "assistant" else ("text",)
    fields.choice("type", kinds, "text")
    fields.required(kind)
    return fields.string(kind) or ""


def _tool_calls(fields: Fields) -> list[dict[str, Any]]:
    calls = fields.array("tool_calls", max_len=MAX_TOOLS) or []
    path = fields.at("tool_calls")
    checked: list[dict[str, Any]] = []
    for index, call in enumerate(calls):
        one = Fields(call, f"{path}[{index}]")
        one.choice("type", ("function",), "function")
        one.required("function")
        function = one.inner("function")
        assert function is not None
        function.required("name")
        checked.append(
            {
                "id": one.string("id", max_len=256) or "",
                "type": "function",
                "function": {
                    "name": function.string("name", empty=False, max_len=256),
                    "arguments": read_arguments(function),
                },
            }
        )
    return checked
