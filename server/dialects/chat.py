"""Chat Completions (POST /v1/chat/completions), sans-I/O.

``parse`` makes a TurnRequest of a body, ``ChatStream`` makes chunks of a turn's events, and
``ChatCollector`` one whole answer of them.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from typing import Any, NamedTuple

from engine import ModelInfo
from server.dialects.fields import Fields, read_model
from server.dialects.messages import read_messages
from server.dialects.projection import (
    DONE,
    Head,
    Shape,
    failure,
    finish_of,
    frame,
    read_shape,
    usage_of,
)
from server.dialects.sampling import MAX_TOP_LOGPROBS, SAMPLING_FIELDS, read_n, read_sampling
from server.errors import ApiError, invalid
from server.events import (
    Event,
    OutputItemAdded,
    OutputItemDone,
    OutputTextDelta,
    OutputTextDone,
    ResponseCompleted,
    ResponseCreated,
    ResponseIncomplete,
    ResponsePrompt,
    TokenLogprob,
)
from server.request import TurnRequest
from server.transports.sse import Frame

__all__ = ["KNOWN_FIELDS", "ChatCollector", "ChatRequest", "ChatStream", "parse"]

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
        "priority",
        "return_token_ids",
        "skip_special_tokens",
        "chat_template_kwargs",
        "add_generation_prompt",
        "continue_final_message",
    }
)
# They change nothing that this server does: who asks, what is kept, how it is billed or cached.
_IGNORED = frozenset(
    {
        "metadata",
        "parallel_tool_calls",
        "prediction",
        "prompt_cache_key",
        "prompt_cache_options",
        "prompt_cache_retention",
        "reasoning_effort",
        "safety_identifier",
        "service_tier",
        "store",
        "user",
        "verbosity",
    }
)
# Name, why not, and the values that ask for nothing.
_UNSUPPORTED: tuple[tuple[str, str, tuple[object, ...]], ...] = (
    ("tools", "the model cannot call tools yet", ([],)),
    ("functions", "the model cannot call functions yet", ([],)),
    ("tool_choice", "the model cannot call tools yet", ("none", "auto")),
    ("function_call", "the model cannot call functions yet", ("none", "auto")),
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
    messages = read_messages(fields)
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
        template_kwargs=fields.mapping("chat_template_kwargs") or {},
        add_generation_prompt=fields.boolean("add_generation_prompt", True),
        continue_final_message=_continues(fields, messages),
        n=read_n(fields),
        sampling=sampling,
        priority=fields.integer("priority", least=-(2**31), most=2**31 - 1) or 0,
        stream=stream,
        # Counting the tokens of a chunk takes their ids, shown or not.
        return_token_ids=shape.token_ids or shape.continuous_usage,
        skip_special_tokens=fields.boolean("skip_special_tokens", True),
        owner=owner,
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


def _continues(fields: Fields, messages: list[dict[str, Any]]) -> bool:
    if not fields.boolean("continue_final_message", False):
        return False
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


def _logprobs_body(entries: list[TokenLogprob] | None) -> dict[str, Any] | None:
    return None if entries is None else {"content": entries, "refusal": None}


class ChatStream:
    """Projects the events of one turn onto ``chat.completion.chunk`` frames."""

    def __init__(self, request: ChatRequest, system_fingerprint: str) -> None:
        self._shape = request.shape
        self._wants_logprobs = request.turn.sampling.logprobs is not None
        self._head = Head(
            prefix="chatcmpl", kind="chat.completion.chunk", system_fingerprint=system_fingerprint
        )
        self._first: dict[str, Any] = {}
        self._prompt_tokens = 0
        self._tokens = 0

    def feed(self, event: Event) -> Iterator[Frame]:
        """Yield the frames that show an event; the last event's end with ``[DONE]``."""
        match event:
            case OutputTextDelta():
                yield from self._text(event)
            case ResponseCreated():
                self._head.open(event.response)
            case ResponsePrompt():
                self._prompt(event)
            case OutputItemAdded():
                delta = {"role": "assistant", "content": "", "refusal": None}
                yield self._chunk(event.output_index, delta)
            case OutputItemDone() if event.finish_reason is not None:
                yield self._chunk(event.output_index, {}, **finish_of(event))
            case ResponseCompleted() | ResponseIncomplete():
                if self._shape.include_usage:
                    usage = usage_of(event.response)
                    yield frame(self._head.with_fields(choices=[], usage=usage))
                yield DONE
            case _ if (error := failure(event)) is not None:
                yield frame(error.body())
                yield DONE

    def _prompt(self, event: ResponsePrompt) -> None:
        self._prompt_tokens = len(event.token_ids)
        if self._shape.token_ids:
            self._first["prompt_token_ids"] = event.token_ids
        if event.logprobs is not None:
            self._first["prompt_logprobs"] = event.logprobs

    def _text(self, event: OutputTextDelta) -> Iterator[Frame]:
        ids = event.token_ids or []
        self._tokens += len(ids)
        if not (event.delta or event.logprobs or (ids and self._shape.token_ids)):
            return
        extra: dict[str, Any] = {"token_ids": ids} if self._shape.token_ids else {}
        logprobs = event.logprobs if self._wants_logprobs else None
        yield self._chunk(event.output_index, {"content": event.delta}, logprobs=logprobs, **extra)

    def _chunk(
        self,
        index: int,
        delta: dict[str, Any],
        *,
        logprobs: list[TokenLogprob] | None = None,
        finish_reason: str | None = None,
        **extra: Any,
    ) -> Frame:
        choice = {
            "index": index,
            "delta": delta,
            "logprobs": _logprobs_body(logprobs),
            "finish_reason": finish_reason,
            **extra,
        }
        body = self._head.with_fields(choices=[choice])
        if self._shape.include_usage:
            body["usage"] = self._usage_so_far() if self._shape.continuous_usage else None
        if self._first:
            # What is said of the prompt comes once, with the first chunk after it is known.
            body |= self._first
            self._first = {}
        return frame(body)

    def _usage_so_far(self) -> dict[str, int]:
        return {
            "prompt_tokens": self._prompt_tokens,
            "completion_tokens": self._tokens,
            "total_tokens": self._prompt_tokens + self._tokens,
        }


class ChatCollector:
    """Gathers the events of one turn into a ``chat.completion``."""

    def __init__(self, request: ChatRequest, system_fingerprint: str) -> None:
        self._shape = request.shape
        self._wants_logprobs = request.turn.sampling.logprobs is not None
        self._head = Head(
            prefix="chatcmpl", kind="chat.completion", system_fingerprint=system_fingerprint
        )
        self._choices: dict[int, dict[str, Any]] = {}
        self._texts: dict[int, str] = {}
        self._logprobs: dict[int, list[TokenLogprob]] = defaultdict(list)
        self._token_ids: dict[int, list[int]] = defaultdict(list)
        self._prompt: dict[str, Any] = {}
        self._usage: dict[str, Any] | None = None
        self._error: ApiError | None = None

    def feed(self, event: Event) -> None:
        """Take in one event."""
        match event:
            case ResponseCreated():
                self._head.open(event.response)
            case ResponsePrompt():
                if self._shape.token_ids:
                    self._prompt["prompt_token_ids"] = event.token_ids
                if event.logprobs is not None:
                    self._prompt["prompt_logprobs"] = event.logprobs
            case OutputTextDelta():
                self._logprobs[event.output_index] += event.logprobs
                self._token_ids[event.output_index] += event.token_ids or []
            case OutputTextDone():
                self._texts[event.output_index] = event.text
            case OutputItemDone() if event.finish_reason is not None:
                self._choices[event.output_index] = self._choice(event)
            case ResponseCompleted() | ResponseIncomplete():
                self._usage = usage_of(event.response)
            case _:
                self._error = failure(event) or self._error

    def result(self) -> dict[str, Any]:
        """Return the body of the answer. Raises ApiError when the turn failed."""
        if self._error is not None:
            raise self._error
        choices = [self._choices[index] for index in sorted(self._choices)]
        return self._head.with_fields(choices=choices, usage=self._usage, **self._prompt)

    def _choice(self, event: OutputItemDone) -> dict[str, Any]:
        index = event.output_index
        logprobs = self._logprobs[index] if self._wants_logprobs else None
        choice: dict[str, Any] = {
            "index": index,
            "message": {
                "role": "assistant",
                "content": self._texts.get(index, ""),
                "refusal": None,
                "annotations": [],
            },
            "logprobs": _logprobs_body(logprobs),
            **finish_of(event),
        }
        if self._shape.token_ids:
            choice["token_ids"] = self._token_ids[index]
        return choice
