"""The events of a turn: the Responses API's streaming events, which other dialects project.

An event is a frozen struct whose ``type`` is its tag on the wire. ``sequence_number`` is dense from
0 within a turn and is set by the journal when the event is appended. Fields that OpenAI does not
have (``token_ids``, ``ResponsePrompt``) are extensions; clients of the Responses API ignore them.

Order within one turn::

    created, in_progress, [prompt]*, [queued]*,
    per output item (reasoning, messages and calls; items of several choices interleave):
        output_item.added, its own events, output_item.done
    exactly one of: completed | incomplete | failed | cancelled

Own events of an item::

    message: content_part.added, output_text.delta*, output_text.done, content_part.done
    reasoning: content_part.added, reasoning_text.delta*, reasoning_text.done, content_part.done
    function_call: function_call_arguments.delta*, function_call_arguments.done
    function_call_output (what a tool of the server's own said): none

The k-th item of choice c of n has ``output_index`` c + k * n.
"""

from __future__ import annotations

from typing import Any

import msgspec

__all__ = [
    "TERMINAL_EVENTS",
    "ContentPartAdded",
    "ContentPartDone",
    "Discontinuity",
    "Event",
    "FunctionCallArgumentsDelta",
    "FunctionCallArgumentsDone",
    "OutputItemAdded",
    "OutputItemDone",
    "OutputTextDelta",
    "OutputTextDone",
    "ReasoningTextDelta",
    "ReasoningTextDone",
    "ResponseCancelled",
    "ResponseCompleted",
    "ResponseCreated",
    "ResponseFailed",
    "ResponseInProgress",
    "ResponseIncomplete",
    "ResponsePrompt",
    "ResponseQueued",
    "TokenLogprob",
    "TopLogprob",
    "decode_event",
    "encode_event",
]


class TopLogprob(msgspec.Struct, frozen=True):
    """An alternative at one position. ``bytes`` are the token's UTF-8 bytes."""

    token: str
    bytes: list[int]
    logprob: float


class TokenLogprob(msgspec.Struct, frozen=True):
    """The chosen token at one position with its alternatives, in OpenAI's shape."""

    token: str
    bytes: list[int]
    logprob: float
    top_logprobs: list[TopLogprob]


class Event(msgspec.Struct, frozen=True, kw_only=True, tag_field="type", omit_defaults=True):
    """Base of all events."""

    sequence_number: int = msgspec.UNSET  # type: ignore[assignment]


class _ResponseEvent(Event, frozen=True, kw_only=True):
    """An event that carries the whole response object as it stands at that moment."""

    response: dict[str, Any]


class ResponseCreated(_ResponseEvent, frozen=True, kw_only=True, tag="response.created"):
    """The turn exists and its journal is open."""


class ResponseInProgress(_ResponseEvent, frozen=True, kw_only=True, tag="response.in_progress"):
    """The engine has accepted the turn."""


class ResponsePrompt(Event, frozen=True, kw_only=True, tag="response.millrace.prompt"):
    """The prompt as the model saw it, for requests that want token ids, echo or its logprobs."""

    output_index: int
    token_ids: list[int]
    logprobs: list[TokenLogprob | None] | None = None
    """One entry a prompt token, the first None; or None as a whole when not asked for."""


class ResponseQueued(Event, frozen=True, kw_only=True, tag="response.millrace.queued"):
    """The turn still waits for its first token; comes while it does, about once a second at most.

    ``place`` is 1 for the next of the caller's key. ``wait_s`` is estimated from the engine's pace.
    """

    place: int
    wait_s: float | None = None


class OutputItemAdded(Event, frozen=True, kw_only=True, tag="response.output_item.added"):
    """A new output item begins."""

    output_index: int
    item: dict[str, Any]


class ContentPartAdded(Event, frozen=True, kw_only=True, tag="response.content_part.added"):
    """A part of an item begins."""

    item_id: str
    output_index: int
    content_index: int
    part: dict[str, Any]


class OutputTextDelta(
    Event, frozen=True, kw_only=True, omit_defaults=False, tag="response.output_text.delta"
):
    """Text that one or more engine steps added.

    ``delta`` may be empty when ``token_ids`` hold part of a character.
    """

    item_id: str
    output_index: int
    content_index: int
    delta: str
    logprobs: list[TokenLogprob] = []
    """One entry a token; empty when not asked for."""
    token_ids: list[int] | None = None
    """Only when the request asked for them."""


class OutputTextDone(
    Event, frozen=True, kw_only=True, omit_defaults=False, tag="response.output_text.done"
):
    """The text of a part is final."""

    item_id: str
    output_index: int
    content_index: int
    text: str
    logprobs: list[TokenLogprob] = []


class ReasoningTextDelta(Event, frozen=True, kw_only=True, tag="response.reasoning_text.delta"):
    """Text that was added to the reasoning."""

    item_id: str
    output_index: int
    content_index: int
    delta: str
    token_ids: list[int] | None = None
    """Only when the request asked for them."""


class ReasoningTextDone(Event, frozen=True, kw_only=True, tag="response.reasoning_text.done"):
    """The reasoning is final."""

    item_id: str
    output_index: int
    content_index: int
    text: str


class FunctionCallArgumentsDelta(
    Event, frozen=True, kw_only=True, tag="response.function_call_arguments.delta"
):
    """JSON text that was added to a call's arguments, as the model wrote it."""

    item_id: str
    output_index: int
    delta: str
    token_ids: list[int] | None = None
    """Only when the request asked for them."""


class FunctionCallArgumentsDone(
    Event, frozen=True, kw_only=True, tag="response.function_call_arguments.done"
):
    """A call's arguments are final."""

    item_id: str
    output_index: int
    name: str
    arguments: str


class ContentPartDone(Event, frozen=True, kw_only=True, tag="response.content_part.done"):
    """A part is final."""

    item_id: str
    output_index: int
    content_index: int
    part: dict[str, Any]


class OutputItemDone(Event, frozen=True, kw_only=True, tag="response.output_item.done"):
    """An item is final.

    ``finish_reason`` ("stop", "length", "tool_calls"; only of a choice's last item) and
    ``stop_reason`` are extensions for other dialects.
    """

    output_index: int
    item: dict[str, Any]
    finish_reason: str | None = None
    stop_reason: str | int | None = None
    """The stop string or stop token id that ended the item, if one did."""


class ResponseCompleted(_ResponseEvent, frozen=True, kw_only=True, tag="response.completed"):
    """Terminal: every item ended by itself."""


class ResponseIncomplete(_ResponseEvent, frozen=True, kw_only=True, tag="response.incomplete"):
    """Terminal: at least one item was cut by a limit; ``incomplete_details.reason`` names it."""


class ResponseFailed(_ResponseEvent, frozen=True, kw_only=True, tag="response.failed"):
    """Terminal: the turn could not go on; ``response.error`` says why."""


class ResponseCancelled(_ResponseEvent, frozen=True, kw_only=True, tag="response.cancelled"):
    """Terminal: a client, or the server's drain, ended the turn."""


class Discontinuity(Event, frozen=True, kw_only=True, tag="response.millrace.discontinuity"):
    """The store lost part of the log: events from ``first_lost`` to ``last_lost`` are gone.

    It stands for them, so its ``sequence_number`` is ``last_lost``; it is never stored.
    """

    first_lost: int
    last_lost: int


TERMINAL_EVENTS = (ResponseCompleted, ResponseIncomplete, ResponseFailed, ResponseCancelled)

_AnyEvent = (
    ResponseCreated
    | ResponseInProgress
    | ResponsePrompt
    | ResponseQueued
    | OutputItemAdded
    | ContentPartAdded
    | OutputTextDelta
    | OutputTextDone
    | ReasoningTextDelta
    | ReasoningTextDone
    | FunctionCallArgumentsDelta
    | FunctionCallArgumentsDone
    | ContentPartDone
    | OutputItemDone
    | Discontinuity
    | ResponseCompleted
    | ResponseIncomplete
    | ResponseFailed
    | ResponseCancelled
)

encode_event = msgspec.json.Encoder().encode
"""Event to its JSON bytes; safe to share, an encoder keeps no state between calls."""
decode_event = msgspec.json.Decoder(_AnyEvent).decode
"""JSON bytes to the event they are of; raises msgspec.ValidationError on anything else."""
