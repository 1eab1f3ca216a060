"""Completions in the OpenAPI document."""

from __future__ import annotations

from typing import Any

from server.dialects.completions import MAX_PROMPTS
from server.openapi.parts import (
    Schema,
    array,
    boolean,
    enum,
    integer,
    json_body,
    nullable,
    number,
    obj,
    one_of,
    operation,
    ref,
    string,
)
from server.openapi.resuming import (
    IDEMPOTENCY_KEY,
    ON_DISCONNECT,
    chunk_event,
    ended,
    projected_paths,
)
from server.openapi.sampling import (
    PRIORITY,
    RETURN_TOKEN_IDS,
    SAMPLING,
    STREAM,
    STREAM_OPTIONS,
    N,
)

__all__ = ["PATHS", "SCHEMAS"]

_IGNORED: Schema = {"description": "Accepted, and of no effect."}
_IDS = array(integer(least=0), minItems=1)

_REQUEST = obj(
    {
        "model": string("The served model's name."),
        "prompt": one_of(
            string(minLength=1),
            _IDS,
            array(one_of(string(minLength=1), _IDS), minItems=1, maxItems=MAX_PROMPTS),
            text="A text, token ids, or several of these.",
        ),
    },
    {
        "n": N,
        "best_of": nullable(integer("Only equal to `n`.", 1)),
        "echo": nullable(boolean("Put the prompt in front of the answer.")),
        "stream": STREAM,
        "stream_options": STREAM_OPTIONS,
        "max_tokens": nullable(integer("Most tokens of an answer. Default 16.", 1)),
        "logprobs": nullable(integer("Show log-probabilities, with so many alternatives.", 0, 20)),
        "on_disconnect": ON_DISCONNECT,
        "priority": PRIORITY,
        "return_token_ids": RETURN_TOKEN_IDS,
        "skip_special_tokens": nullable(boolean("Leave control tokens out of the text.")),
        **SAMPLING,
        "suffix": nullable({"const": ""}),
        "use_beam_search": nullable({"const": False}),
        "length_penalty": nullable({"const": 1}),
        "response_format": nullable(obj({"type": enum("text")})),
        "prompt_embeds": {"type": "null"},
        "user": _IGNORED,
        "metadata": _IGNORED,
        "store": _IGNORED,
    },
)

_LOGPROBS = nullable(
    obj(
        {
            "tokens": array(string()),
            "token_logprobs": array(nullable(number())),
            "top_logprobs": array(nullable({"type": "object", "additionalProperties": number()})),
            "text_offset": array(integer("In characters.", 0)),
        },
        text="Parallel arrays, one entry a token.",
    )
)


def _answer(finish: Schema, usage: Schema) -> Schema:
    choice = obj(
        {
            "index": integer("Prompt p, answer i: p * n + i.", 0),
            "text": string(),
            "logprobs": _LOGPROBS,
            "finish_reason": finish,
        },
        {
            "stop_reason": one_of(string(), integer()),
            "token_ids": ref("TokenIds"),
            "prompt_token_ids": ref("TokenIds"),
            "prompt_logprobs": ref("PromptLogprobs"),
        },
    )
    return obj(
        {
            "id": string(),
            "object": enum("text_completion"),
            "created": integer("Unix seconds."),
            "model": string(),
            "system_fingerprint": string(),
            "choices": array(choice),
        },
        {"usage": usage},
    )


_FINISH = enum("stop", "length", text="`length`: a limit cut the answer.")

SCHEMAS: dict[str, Schema] = {
    "CompletionRequest": _REQUEST,
    "Completion": _answer(_FINISH, ref("Usage")),
    "CompletionEnded": ended(_answer(_FINISH, ref("Usage"))),
    "CompletionChunk": _answer(nullable(_FINISH), nullable(ref("Usage"))),
}

PATHS: dict[str, dict[str, Any]] = {
    "/v1/completions": {
        "post": operation(
            "Continue plain prompts",
            "Completions",
            {
                200: json_body(
                    ref("Completion"),
                    "The answers; with `stream` as events, whose data are chunks or an error.",
                    events=chunk_event("CompletionChunk"),
                )
            },
            errors=(400, 404, 409, 413, 415, 422, 429, 500, 503),
            body=ref("CompletionRequest"),
            parameters=(IDEMPOTENCY_KEY,),
        )
    },
    **projected_paths("/v1/completions", "Completions", "Completion", "CompletionChunk"),
}
