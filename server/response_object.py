"""The Responses API's objects as this server writes them: responses, messages, usage, errors."""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec
import orjson

from server.events import ResponseFailed, TokenLogprob

__all__ = [
    "derived_id",
    "error_event",
    "failed_event",
    "function_call_item",
    "function_output_item",
    "message_item",
    "new_id",
    "output_text",
    "reasoning_item",
    "response_object",
    "usage_object",
]


def new_id(prefix: str) -> str:
    """Return a fresh id that cannot be guessed: the prefix and 128 random bits."""
    return f"{prefix}_{secrets.token_hex(16)}"


def derived_id(prefix: str, turn_id: str, number: int) -> str:
    """Return the id of a turn's ``number``-th part: the same on every server that makes it."""
    digest = hashlib.blake2b(f"{turn_id}/{prefix}/{number}".encode(), digest_size=16)
    return f"{prefix}_{digest.hexdigest()}"


def response_object(
    response_id: str, created_at: int, model: str, fields: Mapping[str, Any]
) -> dict[str, Any]:
    """Return a response that has just begun; ``fields`` are those that echo the request."""
    return {
        "id": response_id,
        "object": "response",
        "created_at": created_at,
        "status": "in_progress",
        "background": False,
        "completed_at": None,
        "error": None,
        "incomplete_details": None,
        "instructions": None,
        "max_output_tokens": None,
        "max_tool_calls": None,
        "metadata": {},
        "model": model,
        "output": [],
        "parallel_tool_calls": True,
        "previous_response_id": None,
        "service_tier": "default",
        "store": False,
        "temperature": 1.0,
        "text": {"format": {"type": "text"}},
        "tool_choice": "auto",
        "tools": [],
        "top_logprobs": 0,
        "top_p": 1.0,
        "truncation": "disabled",
        "usage": None,
        **fields,
    }


def output_text(text: str, logprobs: Sequence[TokenLogprob] = ()) -> dict[str, Any]:
    """Return a part of generated text."""
    return {
        "type": "output_text",
        "annotations": [],
        "logprobs": msgspec.to_builtins(list(logprobs)),
        "text": text,
    }


def message_item(item_id: str, status: str, content: list[dict[str, Any]]) -> dict[str, Any]:
    """Return an answer's message; ``status`` is in_progress, completed or incomplete."""
    return {
        "id": item_id,
        "type": "message",
        "status": status,
        "role": "assistant",
        "content": content,
    }


def reasoning_item(item_id: str, status: str, content: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the reasoning before an answer."""
    return {
        "id": item_id,
        "type": "reasoning",
        "status": status,
        "summary": [],
        "content": content,
    }


def function_call_item(
    item_id: str, status: str, call_id: str, name: str, arguments: str
) -> dict[str, Any]:
    """Return a call of a function; ``arguments`` is JSON text."""
    return {
        "id": item_id,
        "type": "function_call",
        "status": status,
        "call_id": call_id,
        "name": name,
        "arguments": arguments,
    }


def function_output_item(item_id: str, call_id: str, output: str) -> dict[str, Any]:
    """Return what a function answered to a call."""
    return {
        "id": item_id,
        "type": "function_call_output",
        "status": "completed",
        "call_id": call_id,
        "output": output,
    }


def usage_object(
    prompt_tokens: int, cached_tokens: int, completion_tokens: int, reasoning_tokens: int = 0
) -> dict[str, Any]:
    """Return what a turn cost, in tokens; reasoning is part of the completion."""
    return {
        "input_tokens": prompt_tokens,
        "input_tokens_details": {"cached_tokens": cached_tokens, "cache_write_tokens": 0},
        "output_tokens": completion_tokens,
        "output_tokens_details": {"reasoning_tokens": reasoning_tokens},
        "total_tokens": prompt_tokens + completion_tokens,
    }


def failed_event(response: Mapping[str, Any], code: str, message: str) -> ResponseFailed:
    """Return the terminal event that ends ``response`` with an error."""
    error = {"code": code, "message": message}
    return ResponseFailed(response={**response, "status": "failed", "error": error})


def error_event(message: str, code: str = "server_error", param: str | None = None) -> bytes:
    """Return the JSON of the stream event ``error``, which stands outside a turn's log."""
    return orjson.dumps(
        {"type": "error", "code": code, "message": message, "param": param, "sequence_number": 0}
    )
