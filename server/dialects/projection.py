"""What the projections of Chat Completions and Completions have in common."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import msgspec

from engine import ModelInfo
from server.dialects.fields import Fields
from server.errors import ApiError, invalid
from server.events import (
    Discontinuity,
    Event,
    OutputItemDone,
    ResponseCancelled,
    ResponseFailed,
    ResponseIncomplete,
)
from server.request import Shape
from server.transports.sse import Frame

__all__ = [
    "DONE",
    "Head",
    "Shape",
    "as_cut",
    "failure",
    "fingerprint",
    "finish_of",
    "frame",
    "read_shape",
    "usage_of",
]

DONE = Frame(b"[DONE]")
"""The last frame of every stream."""

_ENCODER = msgspec.json.Encoder()

_UNAVAILABLE = frozenset({"engine_died", "engine_closed", "store_unavailable"})
"""Errors of a turn that pass: the same request may be sent again."""


def read_shape(fields: Fields, *, stream: bool) -> Shape:
    """Read ``stream_options`` and ``return_token_ids``."""
    token_ids = fields.boolean("return_token_ids", False)
    options = fields.inner("stream_options")
    if options is None:
        return Shape(token_ids=token_ids)
    if not stream:
        raise invalid(
            f"'{fields.at('stream_options')}' is only allowed when 'stream' is true.",
            param=fields.at("stream_options"),
            code="invalid_value",
        )
    # OpenAI pads its frames against eavesdroppers who measure lengths; TLS ends before us.
    options.boolean("include_obfuscation", False)
    options.refuse_unknown(("include_usage", "continuous_usage_stats", "include_obfuscation"))
    include_usage = options.boolean("include_usage", False)
    continuous = options.boolean("continuous_usage_stats", False)
    return Shape(include_usage, include_usage and continuous, token_ids)


class Head:
    """The fields that every chunk of one answer begins with."""

    def __init__(self, *, prefix: str, kind: str, system_fingerprint: str) -> None:
        self._prefix = prefix
        self._kind = kind
        self._fingerprint = system_fingerprint
        self._fields: dict[str, Any] = {}

    def open(self, response: Mapping[str, Any]) -> None:
        """Take id, time and model from the response object of the turn's first event."""
        turn_id = str(response["id"])
        self._fields = {
            # The rest of the turn's own id: a stream can be found again by the id it shows.
            "id": f"{self._prefix}-{turn_id.partition('_')[2]}",
            "object": self._kind,
            "created": int(response["created_at"]),
            "model": response["model"],
            "system_fingerprint": self._fingerprint,
        }

    def with_fields(self, **fields: Any) -> dict[str, Any]:
        """Return one chunk's body."""
        assert self._fields, "a turn begins with response.created"
        return {**self._fields, **fields}


def frame(body: Mapping[str, Any]) -> Frame:
    """Return a chunk as a frame."""
    return Frame(_ENCODER.encode(body))


def finish_of(event: OutputItemDone) -> dict[str, Any]:
    """Return the fields of a choice that say why it ended."""
    finish: dict[str, Any] = {"finish_reason": event.finish_reason}
    if event.stop_reason is not None:
        finish["stop_reason"] = event.stop_reason
    return finish


def usage_of(response: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return a response object's usage in Chat Completions' shape, None if it has none."""
    usage = response.get("usage")
    if usage is None:
        return None
    return {
        "prompt_tokens": usage["input_tokens"],
        "completion_tokens": usage["output_tokens"],
        "total_tokens": usage["total_tokens"],
        "prompt_tokens_details": {
            "cached_tokens": usage["input_tokens_details"]["cached_tokens"],
        },
        "completion_tokens_details": {
            "reasoning_tokens": usage["output_tokens_details"]["reasoning_tokens"],
        },
    }


def failure(event: Event) -> ApiError | None:
    """Return the error of a turn that ended without an answer, None for any other event."""
    if isinstance(event, ResponseCancelled):
        return ApiError(
            503,
            "The turn was cancelled before it ended.",
            kind="server_error",
            code="cancelled",
        )
    if isinstance(event, Discontinuity):
        return ApiError(
            500,
            f"The event store lost part of this answer (events {event.first_lost} to "
            f"{event.last_lost}); what follows the gap is not shown.",
            kind="server_error",
            code="history_lost",
        )
    if not isinstance(event, ResponseFailed):
        return None
    error = event.response.get("error") or {}
    code = error.get("code") or "server_error"
    message = error.get("message") or "The turn failed."
    if code == "request_refused":
        return invalid(message, code=code)
    status = 503 if code in _UNAVAILABLE else 500
    return ApiError(status, message, kind="server_error", code=code)


def as_cut(event: Event) -> Event:
    """Return the event as a collector takes it of a turn that did not end by itself.

    Its answers are shown as far as they came, with "cancelled" for a finish reason.
    """
    if isinstance(event, OutputItemDone) and event.finish_reason is None:
        if event.item.get("status") != "incomplete":
            return event
        return msgspec.structs.replace(event, finish_reason="cancelled")
    if isinstance(event, ResponseCancelled | ResponseFailed):
        return ResponseIncomplete(sequence_number=event.sequence_number, response=event.response)
    return event


def fingerprint(info: ModelInfo) -> str:
    """Return ``system_fingerprint``: it changes when the same request may give other tokens."""
    text = f"{info.name}/{info.num_parameters}/{info.dtype}/{info.device}/{info.max_model_len}"
    if info.quantization is not None:
        text += f"/{info.quantization}"
    if info.kv_cache_dtype is not None:
        text += f"/kv-{info.kv_cache_dtype}"
    return "fp_" + hashlib.blake2b(text.encode(), digest_size=5).hexdigest()
