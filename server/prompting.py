"""A request's prompts as token ids, and its sampling settings resolved: what the engine is sent."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import msgspec

from engine import ModelInfo, SamplingParams, TemplateError, Tokenizer, TokenizerError
from server.errors import ApiError, invalid
from server.request import TurnRequest

__all__ = ["Prompter", "draw_seed", "resolve_sampling", "with_tokens_spent"]

_T = TypeVar("_T")

EXECUTOR_CHARS = 8192
"""Longer texts are encoded in a thread: a character takes up to a microsecond."""
_OWN_ARGUMENTS = frozenset({"tools", "add_generation_prompt", "continue_final_message"})
"""Of ``Tokenizer.render_chat``: fields of the request of their own, if at all."""
_SEED_LIMIT = 2**63


def draw_seed() -> int:
    """Return a fresh seed; small enough to survive JavaScript's numbers."""
    return secrets.randbelow(2**53)


class Prompter:
    """Encodes and checks prompts against the loaded model."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._threads = ThreadPoolExecutor(2, thread_name_prefix="encode")

    def close(self) -> None:
        """End the threads; what they are doing is finished first."""
        self._threads.shutdown(wait=False, cancel_futures=True)

    async def encode(self, request: TurnRequest, info: ModelInfo) -> list[list[int]]:
        """Return the ids of each prompt.

        Raises ApiError 400 when a prompt is empty, too long or not of the model's vocabulary, or
        the chat template refuses the messages.
        """
        param = "prompt" if request.messages is None else "messages"
        if request.dialect == "responses":
            param = "input"
        try:
            if request.messages is not None:
                prompts = [await self._thread(self._render, request)]
            else:
                prompts = [await self._encode_one(prompt) for prompt in request.prompts or []]
        except TemplateError as error:
            raise invalid(str(error), param=param, code="template_error") from error
        except TokenizerError as error:
            raise invalid(str(error), param=param) from error
        for ids in prompts:
            _check(ids, info, param)
        return prompts

    async def _encode_one(self, prompt: str | list[int]) -> list[int]:
        if not isinstance(prompt, str):
            return prompt
        if len(prompt) <= EXECUTOR_CHARS:
            return self._encode_text(prompt)
        return await self._thread(self._encode_text, prompt)

    async def _thread(self, work: Callable[[_T], list[int]], argument: _T) -> list[int]:
        return await asyncio.get_running_loop().run_in_executor(self._threads, work, argument)

    def _encode_text(self, text: str) -> list[int]:
        # A raw prompt is a template written out by the client: control tokens are meant as such.
        return self._tokenizer.encode(text, parse_special=True)

    def _render(self, request: TurnRequest) -> list[int]:
        if clash := sorted(_OWN_ARGUMENTS.intersection(request.template_kwargs)):
            raise TemplateError(f"the template's variable {clash[0]} cannot be set from outside")
        if request.tools.active and not self._tokenizer.takes_tools:
            raise TemplateError("the model's chat template knows no tools; send none")
        ids = self._tokenizer.render_chat(
            request.messages or [],
            tools=request.tools.functions if request.tools.active else None,
            add_generation_prompt=request.add_generation_prompt,
            continue_final_message=request.continue_final_message,
            **request.template_kwargs,
        )
        if request.tools.opening:
            ids = [*ids, *self._tokenizer.encode(request.tools.opening, parse_special=True)]
        return ids


def _check(ids: list[int], info: ModelInfo, param: str) -> None:
    if not ids:
        raise invalid("The prompt is empty; it must have at least one token.", param=param)
    if len(ids) >= info.max_model_len:
        raise invalid(
            # LangChain, LiteLLM and others know this error by these words, not by its code.
            f"The prompt is too long: it has {len(ids)} tokens, but this model's maximum context "
            f"length is {info.max_model_len} tokens, of which at least one is for the answer.",
            param=param,
            code="context_length_exceeded",
        )
    if min(ids) < 0 or max(ids) >= info.vocab_size:
        wrong = next(token for token in ids if not 0 <= token < info.vocab_size)
        raise invalid(
            f"Token id {wrong} is not in the model's vocabulary (0 to {info.vocab_size - 1}).",
            param=param,
            code="invalid_token_id",
        )


def with_tokens_spent(request: TurnRequest, num_tokens: int) -> TurnRequest | None:
    """Return a request for the rest of an answer; None: its limit is reached."""
    sampling = request.sampling
    if sampling.max_tokens is None:
        return request
    left = sampling.max_tokens - num_tokens
    if left < 1:
        return None
    sampling = msgspec.structs.replace(
        sampling, max_tokens=left, min_tokens=min(sampling.min_tokens, left)
    )
    return msgspec.structs.replace(request, sampling=sampling)


def resolve_sampling(
    request: TurnRequest, info: ModelInfo, num_prompt: int, seed: int, *, first_choice: bool
) -> SamplingParams:
    """Return the engine's settings for one choice; ``max_tokens`` is capped by the context,
    and what the request does not say is as the checkpoint's makers advise.

    Prompt log-probabilities are computed once a prompt, with its first choice.
    """
    asked = request.sampling
    given = info.defaults
    room = info.max_model_len - num_prompt
    max_tokens = room if asked.max_tokens is None else min(asked.max_tokens, room)
    if max_tokens < 1:
        raise ApiError(400, "The answer must have room for at least one token.", param="max_tokens")

    def first(*values: float | None, otherwise: float) -> float:
        return next((value for value in values if value is not None), otherwise)

    return SamplingParams(
        max_tokens=max_tokens,
        min_tokens=min(asked.min_tokens, max_tokens),
        temperature=first(asked.temperature, given.temperature, otherwise=1.0),
        top_k=int(first(asked.top_k, given.top_k, otherwise=0)),
        top_p=first(asked.top_p, given.top_p, otherwise=1.0),
        min_p=first(asked.min_p, given.min_p, otherwise=0.0),
        repetition_penalty=first(asked.repetition_penalty, given.repetition_penalty, otherwise=1.0),
        presence_penalty=asked.presence_penalty,
        frequency_penalty=asked.frequency_penalty,
        logit_bias=asked.logit_bias,
        seed=seed % _SEED_LIMIT,
        stop_token_ids=asked.stop_token_ids,
        ignore_eos=asked.ignore_eos,
        logprobs=asked.logprobs,
        prompt_logprobs=asked.prompt_logprobs if first_choice else None,
    )
