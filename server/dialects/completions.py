"""Completions (POST /v1/completions), sans-I/O: plain prompts, as text or token ids.

``parse`` makes a TurnRequest of a body, ``CompletionStream`` makes chunks of a turn's events, and
``CompletionCollector`` one whole answer of them.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from typing import Any, NamedTuple, TypeVar

import msgspec

from engine import ModelInfo
from server.dialects.disconnect import read_disconnect
from server.dialects.fields import Fields, check_token_ids, read_model, show
from server.dialects.legacy_logprobs import LegacyLogprobs
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
from server.dialects.prompts import Decode, Prompts
from server.dialects.sampling import (
    MAX_CHOICES,
    MAX_TOP_LOGPROBS,
    SAMPLING_FIELDS,
    read_n,
    read_sampling,
)
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

__all__ = [
    "KNOWN_FIELDS",
    "CompletionCollector",
    "CompletionRequest",
    "CompletionStream",
    "parse",
]

DEFAULT_MAX_TOKENS = 16
"""OpenAI's default for this endpoint."""
MAX_PROMPTS = 128

_READ = frozenset(
    {
        "model",
        "prompt",
        "n",
        "best_of",
        "echo",
        "stream",
        "stream_options",
        "max_tokens",
        "logprobs",
        "on_disconnect",
        "priority",
        "return_token_ids",
        "skip_special_tokens",
    }
)
_IGNORED = frozenset({"user", "metadata", "store"})
_UNSUPPORTED: tuple[tuple[str, str, tuple[object, ...]], ...] = (
    ("suffix", "the model writes on from the prompt's end only", ("",)),
    ("use_beam_search", "tokens are sampled", (False,)),
    ("length_penalty", "it belongs to beam search, and tokens are sampled", (1, 1.0)),
    ("response_format", "JSON cannot be guaranteed yet", ({"type": "text"},)),
    ("prompt_embeds", "prompts are text or token ids", ()),
)
KNOWN_FIELDS = (
    _READ | SAMPLING_FIELDS | _IGNORED | {"best_of"} | {name for name, _, _ in _UNSUPPORTED}
)


class CompletionRequest(NamedTuple):
    """A parsed body."""

    turn: TurnRequest
    shape: Shape


def parse(body: object, model: ModelInfo, owner: str = "") -> CompletionRequest:
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
    prompts = _prompts(fields, model)
    n = _choices(fields, len(prompts))
    max_tokens = fields.integer("max_tokens", least=1)
    logprobs = fields.integer("logprobs", least=0, most=MAX_TOP_LOGPROBS)
    echo = fields.boolean("echo", False)
    sampling = read_sampling(
        fields,
        vocab_size=model.vocab_size,
        max_tokens=DEFAULT_MAX_TOKENS if max_tokens is None else max_tokens,
        logprobs=logprobs,
    )
    if echo and logprobs is not None:
        # An echoed prompt is shown with its own log-probabilities.
        sampling = msgspec.structs.replace(sampling, prompt_logprobs=logprobs)
    turn = TurnRequest(
        dialect="completions",
        model=name,
        prompts=prompts,
        n=n,
        sampling=sampling,
        priority=fields.integer("priority", least=-(2**31), most=2**31 - 1) or 0,
        stream=stream,
        return_token_ids=shape.token_ids or shape.continuous_usage,
        echo=echo,
        skip_special_tokens=fields.boolean("skip_special_tokens", True),
        owner=owner,
        shape=shape,
        on_disconnect=disconnect.contract,
        linger_s=disconnect.linger_s,
    )
    return CompletionRequest(turn, shape)


def _prompts(fields: Fields, model: ModelInfo) -> list[str | list[int]]:
    prompt = fields.required("prompt")
    path = fields.at("prompt")
    if isinstance(prompt, str):
        return [_filled(prompt, path)]
    if not isinstance(prompt, list):
        raise invalid(
            f"Invalid type for '{path}': expected a string, an array of strings, an array of token "
            f"ids or an array of such arrays, but got {show(prompt)}.",
            param=path,
            code="invalid_type",
        )
    fields.array("prompt", min_len=1)
    if not isinstance(prompt[0], str | list):
        return [_ids(prompt, path, model)]
    fields.array("prompt", max_len=MAX_PROMPTS)
    prompts: list[str | list[int]] = []
    for index, one in enumerate(prompt):
        at = f"{path}[{index}]"
        if isinstance(one, str):
            prompts.append(_filled(one, at))
        elif isinstance(one, list):
            prompts.append(_ids(_filled(one, at), at, model))
        else:
            raise invalid(
                f"Invalid type for '{at}': expected a string or an array of token ids, but got "
                f"{show(one)}.",
                param=at,
                code="invalid_type",
            )
    return prompts


_Prompt = TypeVar("_Prompt", str, list[Any])


def _filled(prompt: _Prompt, path: str) -> _Prompt:
    if not prompt:
        raise invalid(
            f"'{path}' is empty; a prompt has at least one token.", param=path, code="empty_prompt"
        )
    return prompt


def _ids(values: list[Any], path: str, model: ModelInfo) -> list[int]:
    if len(values) >= model.max_model_len:
        raise invalid(
            f"The prompt is too long: '{path}' has {len(values)} tokens, but this model's maximum "
            f"context length is {model.max_model_len} tokens, prompt and answer together.",
            param=path,
            code="context_length_exceeded",
        )
    return check_token_ids(values, path, model.vocab_size)


def _choices(fields: Fields, num_prompts: int) -> int:
    n = read_n(fields)
    if n * num_prompts > MAX_CHOICES:
        raise invalid(
            f"{num_prompts} prompts with n = {n} make {n * num_prompts} answers; at most "
            f"{MAX_CHOICES} are made for one request.",
            param="n",
            code="invalid_value",
        )
    best_of = fields.integer("best_of", least=1)
    if best_of is not None and best_of != n:
        raise invalid(
            f"'best_of' is {best_of} and 'n' is {n}; only best_of = n is supported: all answers "
            f"that are made are returned.",
            param="best_of",
            code="unsupported_parameter",
        )
    return n


class CompletionStream:
    """Projects the events of one turn onto ``text_completion`` frames."""

    def __init__(self, request: CompletionRequest, system_fingerprint: str, decode: Decode) -> None:
        self._shape = request.shape
        self._wants_logprobs = request.turn.sampling.logprobs is not None
        self._head = Head(
            prefix="cmpl", kind="text_completion", system_fingerprint=system_fingerprint
        )
        self._prompts = Prompts(request.turn, request.shape, decode)
        self._logprobs: dict[int, LegacyLogprobs] = defaultdict(LegacyLogprobs)
        self._tokens = 0

    def feed(self, event: Event) -> Iterator[Frame]:
        """Yield the frames that show an event; the last event's end with ``[DONE]``."""
        match event:
            case OutputTextDelta():
                yield from self._text(event)
            case ResponseCreated():
                self._head.open(event.response)
            case ResponsePrompt():
                self._prompts.add(event)
            case OutputItemAdded():
                yield from self._begin(event.output_index)
            case OutputItemDone() if event.finish_reason is not None:
                yield self._chunk(event.output_index, "", **finish_of(event))
            case ResponseCompleted() | ResponseIncomplete():
                if self._shape.include_usage:
                    usage = usage_of(event.response)
                    yield frame(self._head.with_fields(choices=[], usage=usage))
                yield DONE
            case _ if (error := failure(event)) is not None:
                yield frame(error.body())
                yield DONE

    def _begin(self, index: int) -> Iterator[Frame]:
        text = self._prompts.echo(index)
        extra = self._prompts.shown(index)
        if not text and not extra:
            return
        if self._shape.token_ids:
            extra["token_ids"] = []
        logprobs = None
        if self._wants_logprobs:
            logprobs = self._prompts.legacy(index, self._logprobs[index])
        yield self._chunk(index, text, logprobs=logprobs, **extra)

    def _text(self, event: OutputTextDelta) -> Iterator[Frame]:
        ids = event.token_ids or []
        self._tokens += len(ids)
        if not (event.delta or event.logprobs or (ids and self._shape.token_ids)):
            return
        extra: dict[str, Any] = {"token_ids": ids} if self._shape.token_ids else {}
        logprobs = None
        if self._wants_logprobs:
            logprobs = self._logprobs[event.output_index].add(event.logprobs)
        yield self._chunk(event.output_index, event.delta, logprobs=logprobs, **extra)

    def _chunk(
        self,
        index: int,
        text: str,
        *,
        logprobs: dict[str, Any] | None = None,
        finish_reason: str | None = None,
        **extra: Any,
    ) -> Frame:
        choice = {
            "index": index,
            "text": text,
            "logprobs": logprobs,
            "finish_reason": finish_reason,
            **extra,
        }
        body = self._head.with_fields(choices=[choice])
        if self._shape.include_usage:
            body["usage"] = self._usage_so_far() if self._shape.continuous_usage else None
        return frame(body)

    def _usage_so_far(self) -> dict[str, int]:
        prompt_tokens = self._prompts.num_tokens()
        return {
            "prompt_tokens": prompt_tokens,
            "completion_tokens": self._tokens,
            "total_tokens": prompt_tokens + self._tokens,
        }


class CompletionCollector:
    """Gathers the events of one turn into a ``text_completion``."""

    def __init__(self, request: CompletionRequest, system_fingerprint: str, decode: Decode) -> None:
        self._shape = request.shape
        self._wants_logprobs = request.turn.sampling.logprobs is not None
        self._head = Head(
            prefix="cmpl", kind="text_completion", system_fingerprint=system_fingerprint
        )
        self._prompts = Prompts(request.turn, request.shape, decode)
        self._choices: dict[int, dict[str, Any]] = {}
        self._texts: dict[int, str] = {}
        self._logprobs: dict[int, list[TokenLogprob]] = defaultdict(list)
        self._token_ids: dict[int, list[int]] = defaultdict(list)
        self._usage: dict[str, Any] | None = None
        self._error: ApiError | None = None

    def feed(self, event: Event) -> None:
        """Take in one event."""
        match event:
            case ResponseCreated():
                self._head.open(event.response)
            case ResponsePrompt():
                self._prompts.add(event)
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
        return self._head.with_fields(choices=choices, usage=self._usage)

    def _choice(self, event: OutputItemDone) -> dict[str, Any]:
        index = event.output_index
        echo = self._prompts.echo(index)
        choice: dict[str, Any] = {
            "index": index,
            "text": echo + self._texts.get(index, ""),
            "logprobs": self._legacy(index),
            **finish_of(event),
        }
        if self._shape.token_ids:
            choice["token_ids"] = self._token_ids[index]
        return choice | self._prompts.shown(index)

    def _legacy(self, index: int) -> dict[str, Any] | None:
        if not self._wants_logprobs:
            return None
        merged = LegacyLogprobs()
        prompt = self._prompts.legacy(index, merged)
        answer = merged.add(self._logprobs[index])
        return {name: prompt[name] + answer[name] for name in prompt}
