"""Chat Completions (POST /v1/chat/completions), sans-I/O.

``parse`` makes a TurnRequest of a body; what is sent of the turn's events is in ``chat_answers``.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from engine import ModelInfo
from server.dialects.disconnect import read_disconnect
from server.dialects.fields import Fields, read_model
from server.dialects.messages import read_messages
from server.dialects.projection import Shape, read_shape
from server.dialects.sampling import MAX_TOP_LOGPROBS, SAMPLING_FIELDS, read_n, read_sampling
from server.dialects.tools import read_chat_tools, thinking_kwargs
from server.errors import invalid
from server.request import ToolOptions, TurnRequest

__all__ = ["KNOWN_FIELDS", "ChatRequest", "parse"]

_READ = frozenset(
    {
        "model",
        "messages",
        "n",
        "stream",
        "stream_options",
        "max_tokens",
        "max_completion_tokens",
        "logprobs",
        "top_logprobs",
        "on_disconnect",
        "priority",
        "return_token_ids",
        "skip_special_tokens",
        "chat_template_kwargs",
        "add_generation_prompt",
        "continue_final_message",
        "tools",
        "tool_choice",
        "parallel_tool_calls",
        "reasoning_effort",
    }
)
# They change nothing that this server does: who asks, what is kept, how it is billed or cached.
_IGNORED = frozenset(
    {
        "metadata",
        "prediction",
        "prompt_cache_key",
        "prompt_cache_options",
        "prompt_cache_retention",
        "safety_identifier",
        "service_tier",
        "store",
        "user",
        "verbosity",
    }
)
# Name, why not, and the values that ask for nothing.
_UNSUPPORTED: tuple[tuple[str, str, tuple[object, ...]], ...] = (
    ("functions", "OpenAI has replaced it by 'tools'", ([],)),
    ("function_call", "OpenAI has replaced it by 'tool_choice'", ("none", "auto")),
    (
        "response_format",
        "answers are plain text; JSON cannot be guaranteed yet",
        ({"type": "text"},),
    ),
    ("modalities", "the model writes text only", (["text"],)),
    ("audio", "the model writes text only", ()),
    ("web_search_options", "there is no web search", ()),
    ("moderation", "there is no moderation", ()),
    ("chat_template", "a client's template is never run; the model's own is used", ()),
    ("best_of", "only n answers are made, and all are returned", (1,)),
    ("use_beam_search", "tokens are sampled", (False,)),
)
KNOWN_FIELDS = _READ | SAMPLING_FIELDS | _IGNORED | {name for name, _, _ in _UNSUPPORTED}


class ChatRequest(NamedTuple):
    """A parsed body."""

    turn: TurnRequest
    shape: Shape


def parse(body: object, model: ModelInfo, owner: str = "") -> ChatRequest:
    """Check a request body and bring it to the common form.

    Raises ApiError: 400 naming the field at fault, or 404 for an unknown model.
    """
    fields = Fields(body)
    name = read_model(fields, model.name)
    fields.refuse_unknown(KNOWN_FIELDS)
    for field, why, neutral in _UNSUPPORTED:
        fields.unsupported(field, why, *neutral)
    stream = fields.boolean("stream", False)
    shape = read_shape(fields, stream=stream)
    disconnect = read_disconnect(fields, "cancel")
    messages = read_messages(fields)
    tools = read_chat_tools(fields)
    sampling = read_sampling(
        fields,
        vocab_size=model.vocab_size,
        max_tokens=_max_tokens(fields),
        logprobs=_logprobs(fields),
    )
    turn = TurnRequest(
        dialect="chat",
        model=name,
        messages=messages,
        tools=tools,
        template_kwargs={
            **thinking_kwargs(fields, "reasoning_effort"),
            **(fields.mapping("chat_template_kwargs") or {}),
        },
        add_generation_prompt=fields.boolean("add_generation_prompt", True),
        continue_final_message=_continues(fields, messages, tools),
        n=read_n(fields),
        sampling=sampling,
        priority=fields.integer("priority", least=-(2**31), most=2**31 - 1) or 0,
        stream=stream,
        # Counting the tokens of a chunk takes their ids, shown or not.
        return_token_ids=shape.token_ids or shape.continuous_usage,
        skip_special_tokens=fields.boolean("skip_special_tokens", True),
        owner=owner,
        shape=shape,
        on_disconnect=disconnect.contract,
        linger_s=disconnect.linger_s,
    )
    return ChatRequest(turn, shape)


def _max_tokens(fields: Fields) -> int | None:
    old = fields.integer("max_tokens", least=1)
    new = fields.integer("max_completion_tokens", least=1)
    if old is not None and new is not None and old != new:
        raise invalid(
            f"'max_tokens' is {old} and 'max_completion_tokens' is {new}; give one of them.",
            param="max_tokens",
            code="invalid_value",
        )
    return old if new is None else new


def _logprobs(fields: Fields) -> int | None:
    wanted = fields.boolean("logprobs", False)
    top = fields.integer("top_logprobs", least=0, most=MAX_TOP_LOGPROBS)
    if wanted:
        return top or 0
    if top:
        raise invalid(
            f"'top_logprobs' is {top}, but it needs 'logprobs' to be true.",
            param="top_logprobs",
            code="invalid_value",
        )
    return None


def _continues(fields: Fields, messages: list[dict[str, Any]], tools: ToolOptions) -> bool:
    if not fields.boolean("continue_final_message", False):
        return False
    if tools.opening:
        raise invalid(
            "'continue_final_message' cannot be used where 'tool_choice' asks for a call: a call "
            "begins a message.",
            param="tool_choice",
            code="invalid_value",
        )
    if fields.raw("add_generation_prompt") is True:
        raise invalid(
            "'continue_final_message' and 'add_generation_prompt' cannot both be true.",
            param="continue_final_message",
            code="invalid_value",
        )
    if messages[-1]["role"] != "assistant":
        raise invalid(
            f"'continue_final_message' needs the last message to be the assistant's, but its role "
            f"is '{messages[-1]['role']}'.",
            param="continue_final_message",
            code="invalid_value",
        )
    return True
