"""The Responses API (POST /v1/responses and ``response.create`` on a WebSocket), sans-I/O.

Its events are the log's own, so there is no projection: ``parse`` checks a body, ``to_turn`` makes
a TurnRequest of it once the history it names has been loaded.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import msgspec

from engine import ModelInfo
from server.agent.history import items_to_messages
from server.dialects.disconnect import Disconnect, read_disconnect
from server.dialects.fields import Fields, read_model, show
from server.dialects.items import read_items, read_metadata
from server.dialects.sampling import MAX_TOP_LOGPROBS, SAMPLING_FIELDS, read_sampling
from server.dialects.tools import echoed_tools, read_response_tools, thinking_kwargs
from server.errors import invalid
from server.request import SamplingOptions, ToolOptions, TurnRequest

__all__ = ["ParsedResponse", "parse", "to_turn"]

LOGPROBS = "message.output_text.logprobs"
# What else may be included belongs to tools and inputs that there are none of.
_INCLUDABLE = (
    LOGPROBS,
    "code_interpreter_call.outputs",
    "computer_call_output.output.image_url",
    "file_search_call.results",
    "message.input_image.image_url",
    "reasoning.encrypted_content",
    "web_search_call.action.sources",
)
_READ = frozenset(
    {
        "model",
        "input",
        "instructions",
        "previous_response_id",
        "conversation",
        "store",
        "stream",
        "background",
        "max_output_tokens",
        "top_logprobs",
        "include",
        "metadata",
        "truncation",
        "text",
        "tools",
        "tool_choice",
        "parallel_tool_calls",
        "max_tool_calls",
        "reasoning",
        "chat_template_kwargs",
        "priority",
        "return_token_ids",
        "on_disconnect",
    }
)
_IGNORED = frozenset(
    {
        "access_programs",
        "background_options",
        "context_management",
        "image",
        "prompt_cache_key",
        "prompt_cache_options",
        "prompt_cache_retention",
        "safety_identifier",
        "service_tier",
        "stream_options",
        "user",
    }
)
_UNSUPPORTED: tuple[tuple[str, str, tuple[object, ...]], ...] = (
    ("prompt", "there are no stored prompt templates", ()),
    ("moderation", "there is no moderation", ()),
    ("generate", "a response without an answer cannot be prepared", (True,)),
    ("n", "one answer is made; Chat Completions can make several", (1,)),
    ("prompt_logprobs", "the Responses API has no place for them; Completions has", ()),
)
_KNOWN = _READ | SAMPLING_FIELDS | _IGNORED | {name for name, _, _ in _UNSUPPORTED}


class ParsedResponse(msgspec.Struct, frozen=True, kw_only=True):
    """A checked body; what it refers to is not loaded yet."""

    model: str
    input_items: list[dict[str, Any]]
    instructions: str | None
    previous_response_id: str | None
    conversation_id: str | None
    conversation_after: str | msgspec.UnsetType | None
    """The item that the turn goes after, None for nothing; unset: the head."""
    store: bool
    stream: bool
    background: bool
    disconnect: Disconnect
    sampling: SamplingOptions
    tools: ToolOptions
    template_kwargs: dict[str, Any]
    priority: int
    return_token_ids: bool
    echoed: dict[str, Any]
    """Fields of the response object that repeat the request."""


def parse(body: object, model: ModelInfo) -> ParsedResponse:
    """Check a request body.

    Raises ApiError: 400 naming the field at fault, or 404 for an unknown model.
    """
    fields = Fields(body)
    name = read_model(fields, model.name)
    fields.refuse_unknown(_KNOWN)
    for field, why, neutral in _UNSUPPORTED:
        fields.unsupported(field, why, *neutral)
    tools = read_response_tools(fields)
    _check_text(fields)
    fields.required("input")
    max_tokens = fields.integer("max_output_tokens", least=1)
    top_logprobs = fields.integer("top_logprobs", least=0, most=MAX_TOP_LOGPROBS)
    logprobs = top_logprobs if top_logprobs or _includes(fields, LOGPROBS) else None
    if logprobs is None and _includes(fields, LOGPROBS):
        logprobs = 0
    sampling = read_sampling(
        fields, vocab_size=model.vocab_size, max_tokens=max_tokens, logprobs=logprobs
    )
    previous, conversation, after = _links(fields)
    store = fields.boolean("store", True)
    background = fields.boolean("background", False)
    if background and not store:
        raise invalid("'background' needs 'store' to be true.", param="background")
    instructions = fields.string("instructions")
    metadata = read_metadata(fields)
    truncation = fields.choice("truncation", ("disabled", "auto"), "disabled")
    disconnect = read_disconnect(fields, "finish" if store else "cancel")
    if background and disconnect.contract == "cancel":
        raise invalid(
            "'on_disconnect' cannot be 'cancel' where 'background' is true.", param="on_disconnect"
        )
    echoed = {
        "background": background,
        "instructions": instructions,
        "max_output_tokens": max_tokens,
        "metadata": metadata,
        "previous_response_id": previous,
        "store": store,
        "temperature": _first(sampling.temperature, model.defaults.temperature),
        "top_logprobs": top_logprobs or 0,
        "top_p": _first(sampling.top_p, model.defaults.top_p),
        "truncation": truncation,
        **echoed_tools(tools),
    }
    if conversation is not None:
        echoed["conversation"] = {"id": conversation}
    return ParsedResponse(
        model=name,
        # Nothing new to say: what the branch ends with is to be answered (again).
        input_items=[] if after and fields.raw("input") == [] else read_items(fields, "input"),
        instructions=instructions,
        previous_response_id=previous,
        conversation_id=conversation,
        conversation_after=after,
        store=store,
        stream=fields.boolean("stream", False),
        background=background,
        disconnect=disconnect,
        sampling=sampling,
        tools=tools,
        template_kwargs=_template_kwargs(fields),
        priority=fields.integer("priority", least=-(2**31), most=2**31 - 1) or 0,
        return_token_ids=fields.boolean("return_token_ids", False),
        echoed=echoed,
    )


def to_turn(
    parsed: ParsedResponse,
    *,
    owner: str,
    turn_id: str,
    history: Sequence[dict[str, Any]] = (),
    previous_ids: Sequence[str] = (),
    keep_history: bool = False,
    after: str | msgspec.UnsetType | None = msgspec.UNSET,
) -> TurnRequest:
    """Return the turn: instructions, then the history, then the new input.

    With ``keep_history`` the history is stored with the turn: it is nowhere else. ``after`` is the
    item of the conversation that the turn's items go after.
    """
    messages = items_to_messages([*history, *parsed.input_items])
    if parsed.instructions is not None:
        messages.insert(0, {"role": "system", "content": parsed.instructions})
    return TurnRequest(
        dialect="responses",
        model=parsed.model,
        messages=messages,
        tools=parsed.tools,
        template_kwargs=parsed.template_kwargs,
        sampling=parsed.sampling,
        priority=parsed.priority,
        stream=parsed.stream,
        return_token_ids=parsed.return_token_ids,
        store=parsed.store,
        on_disconnect=parsed.disconnect.contract,
        linger_s=parsed.disconnect.linger_s,
        owner=owner,
        response_fields=parsed.echoed,
        turn_id=turn_id,
        conversation_id=parsed.conversation_id,
        conversation_after=after,
        previous_ids=list(previous_ids),
        input_items=[*history, *parsed.input_items] if keep_history else parsed.input_items,
    )


def _first(asked: float | None, advised: float | None) -> float:
    return next((value for value in (asked, advised) if value is not None), 1.0)


def _template_kwargs(fields: Fields) -> dict[str, Any]:
    """Read ``reasoning.effort`` and, which wins, ``chat_template_kwargs``."""
    reasoning = fields.inner("reasoning")
    effort = thinking_kwargs(reasoning, "effort") if reasoning is not None else {}
    return effort | (fields.mapping("chat_template_kwargs") or {})


def _check_text(fields: Fields) -> None:
    text = fields.inner("text")
    if text is None:
        return
    text.choice("verbosity", ("low", "medium", "high"), "medium")
    form = text.inner("format")
    if form is None:
        return
    kind = form.string("type")
    if kind != "text":
        raise invalid(
            f"'text.format.type' is {show(kind)}; only 'text' is supported: answers are plain "
            f"text, JSON cannot be guaranteed yet.",
            param="text.format.type",
            code="unsupported_parameter",
        )


def _includes(fields: Fields, name: str) -> bool:
    include = fields.array("include", max_len=32) or []
    for index, value in enumerate(include):
        if value not in _INCLUDABLE:
            words = ", ".join(f"'{word}'" for word in _INCLUDABLE)
            raise invalid(
                f"Invalid value for 'include[{index}]': {show(value)}; supported values are: "
                f"{words}.",
                param=f"include[{index}]",
                code="invalid_value",
            )
    return name in include


class _Links(NamedTuple):
    previous_response_id: str | None
    conversation_id: str | None
    conversation_after: str | msgspec.UnsetType | None


def _links(fields: Fields) -> _Links:
    """Read ``previous_response_id`` and ``conversation`` (an id, or an object with one)."""
    previous = fields.string("previous_response_id", empty=False, max_len=128)
    after: str | msgspec.UnsetType | None = msgspec.UNSET
    if isinstance(fields.raw("conversation"), dict):
        inner = fields.inner("conversation")
        assert inner is not None
        inner.required("id")
        conversation = inner.string("id", empty=False, max_len=128)
        if "after" in fields.raw("conversation"):
            # Here null says something: after nothing, a beginning of its own.
            after = inner.string("after", empty=False, max_len=128)
    else:
        conversation = fields.string("conversation", empty=False, max_len=128)
    if previous is not None and conversation is not None:
        raise invalid(
            "'previous_response_id' and 'conversation' cannot be used together.",
            param="previous_response_id",
            code="invalid_value",
        )
    return _Links(previous, conversation, after)
