"""What Chat Completions sends of a turn's events, sans-I/O.

``ChatStream`` makes chunks of them, ``ChatCollector`` one whole answer. Both are projections: a
choice's reasoning is ``reasoning_content`` (vLLM's name for it), its calls are ``tool_calls``.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from typing import Any

from server.dialects.chat import ChatRequest
from server.dialects.projection import DONE, Head, failure, finish_of, frame, usage_of
from server.errors import ApiError
from server.events import (
    Event,
    FunctionCallArgumentsDelta,
    OutputItemAdded,
    OutputItemDone,
    OutputTextDelta,
    ReasoningTextDelta,
    ResponseCompleted,
    ResponseCreated,
    ResponseIncomplete,
    ResponsePrompt,
    TokenLogprob,
)
from server.transports.sse import Frame

__all__ = ["ChatCollector", "ChatStream"]


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
        self._n = request.turn.n
        self._begun: set[int] = set()
        """Choices whose role was sent."""
        self._calls: dict[int, int] = {}
        """Place of a call among its choice's, by the call's ``output_index``."""
        self._prompt_tokens = 0
        self._tokens = 0

    def feed(self, event: Event) -> Iterator[Frame]:
        """Yield the frames that show an event; the last event's end with ``[DONE]``."""
        match event:
            case OutputTextDelta():
                yield from self._text(event, {"content": event.delta}, event.logprobs)
            case ReasoningTextDelta():
                yield from self._text(event, {"reasoning_content": event.delta})
            case FunctionCallArgumentsDelta():
                call = {
                    "index": self._calls[event.output_index],
                    "function": {"arguments": event.delta},
                }
                yield from self._text(event, {"tool_calls": [call]})
            case ResponseCreated():
                self._head.open(event.response)
            case ResponsePrompt():
                self._prompt(event)
            case OutputItemAdded():
                yield from self._item(event.output_index, event.item)
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

    def _item(self, output_index: int, item: dict[str, Any]) -> Iterator[Frame]:
        choice = output_index % self._n
        delta: dict[str, Any] = {}
        if choice not in self._begun:
            self._begun.add(choice)
            content = "" if item["type"] == "message" else None
            delta = {"role": "assistant", "content": content, "refusal": None}
        if item["type"] == "function_call":
            place = sum(index % self._n == choice for index in self._calls)
            self._calls[output_index] = place
            call = _tool_call(item["call_id"], item["name"], "")
            delta["tool_calls"] = [{"index": place, **call}]
        if delta:
            yield self._chunk(output_index, delta)

    def _text(
        self,
        event: OutputTextDelta | ReasoningTextDelta | FunctionCallArgumentsDelta,
        delta: dict[str, Any],
        logprobs: list[TokenLogprob] | None = None,
    ) -> Iterator[Frame]:
        ids = event.token_ids or []
        self._tokens += len(ids)
        if not (event.delta or logprobs or (ids and self._shape.token_ids)):
            return
        extra: dict[str, Any] = {"token_ids": ids} if self._shape.token_ids else {}
        yield self._chunk(
            event.output_index, delta, logprobs=logprobs if self._wants_logprobs else None, **extra
        )

    def _chunk(
        self,
        output_index: int,
        delta: dict[str, Any],
        *,
        logprobs: list[TokenLogprob] | None = None,
        finish_reason: str | None = None,
        **extra: Any,
    ) -> Frame:
        choice = {
            "index": output_index % self._n,
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
        self._n = request.turn.n
        self._choices: dict[int, dict[str, Any]] = {}
        self._texts: dict[int, str] = {}
        self._reasoning: dict[int, str] = {}
        self._calls: dict[int, list[dict[str, Any]]] = defaultdict(list)
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
                self._logprobs[event.output_index % self._n] += event.logprobs
                self._token_ids[event.output_index % self._n] += event.token_ids or []
            case ReasoningTextDelta() | FunctionCallArgumentsDelta():
                self._token_ids[event.output_index % self._n] += event.token_ids or []
            case OutputItemDone():
                self._item(event)
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

    def _item(self, event: OutputItemDone) -> None:
        choice, item = event.output_index % self._n, event.item
        if item["type"] == "function_call":
            call = _tool_call(item["call_id"], item["name"], item["arguments"])
            self._calls[choice].append(call)
        else:
            texts = self._texts if item["type"] == "message" else self._reasoning
            text = "".join(part["text"] for part in item["content"])
            texts[choice] = texts.get(choice, "") + text
        if event.finish_reason is not None:
            self._choices[choice] = self._choice(choice, event)

    def _message(self, index: int) -> dict[str, Any]:
        calls = self._calls.get(index)
        message: dict[str, Any] = {
            "role": "assistant",
            "content": self._texts.get(index, None if calls else ""),
            "refusal": None,
            "annotations": [],
        }
        if index in self._reasoning:
            message["reasoning_content"] = self._reasoning[index]
        if calls:
            message["tool_calls"] = calls
        return message

    def _choice(self, index: int, event: OutputItemDone) -> dict[str, Any]:
        logprobs = self._logprobs[index] if self._wants_logprobs else None
        choice: dict[str, Any] = {
            "index": index,
            "message": self._message(index),
            "logprobs": _logprobs_body(logprobs),
            **finish_of(event),
        }
        if self._shape.token_ids:
            choice["token_ids"] = self._token_ids[index]
        return choice


def _tool_call(call_id: str, name: str, arguments: str) -> dict[str, Any]:
    return {
        "id": call_id,
        "type": "function",
        "function": {"name": name, "arguments": arguments},
    }
