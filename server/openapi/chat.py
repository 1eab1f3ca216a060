"""Chat Completions in the OpenAPI document."""

from __future__ import annotations

from typing import Any

from server.dialects.messages import ROLES
from server.dialects.tools import MAX_TOOLS
from server.openapi.parts import (
    Schema,
    array,
    boolean,
    enum,
    integer,
    json_body,
    nullable,
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
from server.openapi.tools import CHAT_TOOL_FIELDS, EFFORT, TEMPLATE_KWARGS, TOOL_CALL

__all__ = ["PATHS", "SCHEMAS"]

_ANY: Schema = {}
_IGNORED: Schema = {"description": "Accepted, and of no effect."}

_TEXT_PART = obj({"type": enum("text"), "text": string()}, is_open=True)
_REFUSAL_PART = obj({"type": enum("refusal"), "refusal": string()}, is_open=True)
_TOOL_CALL = obj(
    {"function": obj({"name": string(minLength=1)}, {"arguments": nullable(string())})},
    {"id": nullable(string()), "type": nullable(enum("function"))},
    is_open=True,
)
_MESSAGE = obj(
    {"role": enum(*ROLES)},
    {
        "content": nullable(one_of(string(), array(one_of(_TEXT_PART, _REFUSAL_PART), minItems=1))),
        "name": nullable(string()),
        "tool_call_id": nullable(string()),
        "tool_calls": nullable(array(_TOOL_CALL, maxItems=MAX_TOOLS)),
        "reasoning_content": nullable(string()),
    },
    text="Null content is allowed only beside an assistant's tool calls.",
    is_open=True,
)

_REQUEST = obj(
    {
        "model": string("The served model's name."),
        "messages": array(_MESSAGE, minItems=1),
    },
    {
        "n": N,
        "stream": STREAM,
        "stream_options": STREAM_OPTIONS,
        "max_tokens": nullable(integer("Most tokens of an answer. Default: what fits.", 1)),
        "max_completion_tokens": nullable(integer("The newer name of `max_tokens`.", 1)),
        "logprobs": nullable(boolean("Show the log-probability of every token.")),
        "top_logprobs": nullable(integer("With so many alternatives.", 0, 20)),
        "on_disconnect": ON_DISCONNECT,
        "priority": PRIORITY,
        "return_token_ids": RETURN_TOKEN_IDS,
        "skip_special_tokens": nullable(boolean("Leave control tokens out of the text.")),
        "chat_template_kwargs": TEMPLATE_KWARGS,
        "add_generation_prompt": nullable(boolean("End the prompt with the assistant's opening.")),
        "continue_final_message": nullable(
            boolean("Go on with the last message, which is the assistant's.")
        ),
        **SAMPLING,
        **CHAT_TOOL_FIELDS,
        "reasoning_effort": EFFORT,
        "functions": nullable(array(_ANY, "Replaced by `tools`: only empty.", maxItems=0)),
        "function_call": nullable(enum("none", "auto")),
        "response_format": nullable(obj({"type": enum("text")})),
        "modalities": nullable(array(enum("text"), minItems=1, maxItems=1)),
        "audio": {"type": "null"},
        "web_search_options": {"type": "null"},
        "moderation": {"type": "null"},
        "chat_template": {"type": "null"},
        "best_of": nullable({"const": 1}),
        "use_beam_search": nullable({"const": False}),
        "metadata": _IGNORED,
        "prediction": _IGNORED,
        "prompt_cache_key": _IGNORED,
        "prompt_cache_options": _IGNORED,
        "prompt_cache_retention": _IGNORED,
        "safety_identifier": _IGNORED,
        "service_tier": _IGNORED,
        "store": _IGNORED,
        "user": _IGNORED,
        "verbosity": _IGNORED,
    },
)

_LOGPROBS = nullable(obj({"content": array(ref("TokenLogprob")), "refusal": {"type": "null"}}))
_FINISH = enum("stop", "length", "tool_calls", text="`length`: a limit cut the answer.")
_CHOICE_EXTRA = {
    "stop_reason": one_of(
        string(), integer(), text="The stop string or stop token id that ended the answer."
    ),
    "token_ids": ref("TokenIds"),
}


def _head(kind: str) -> dict[str, Schema]:
    return {
        "id": string(),
        "object": enum(kind),
        "created": integer("Unix seconds."),
        "model": string(),
        "system_fingerprint": string(),
    }


_CALL_DELTA = obj(
    {
        "index": integer(least=0),
        "function": obj({"arguments": string("More of the JSON text.")}, {"name": string()}),
    },
    {"id": string(), "type": enum("function")},
    text="Id and name come once, with the first of a call.",
)
_PROMPT_EXTRA = {
    "prompt_token_ids": ref("TokenIds"),
    "prompt_logprobs": ref("PromptLogprobs"),
}

_ANSWER = obj(
    {
        **_head("chat.completion"),
        "choices": array(
            obj(
                {
                    "index": integer(least=0),
                    "message": obj(
                        {
                            "role": enum("assistant"),
                            "content": nullable(string()),
                            "refusal": {"type": "null"},
                            "annotations": array(_ANY, maxItems=0),
                        },
                        {
                            "reasoning_content": string("What the model thought before."),
                            "tool_calls": array(TOOL_CALL, minItems=1),
                        },
                    ),
                    "logprobs": _LOGPROBS,
                    "finish_reason": _FINISH,
                },
                _CHOICE_EXTRA,
            )
        ),
        "usage": ref("Usage"),
    },
    _PROMPT_EXTRA,
)

_CHUNK = obj(
    {
        **_head("chat.completion.chunk"),
        "choices": array(
            obj(
                {
                    "index": integer(least=0),
                    "delta": obj(
                        {},
                        {
                            "role": enum("assistant"),
                            "content": nullable(string()),
                            "refusal": {"type": "null"},
                            "reasoning_content": string(),
                            "tool_calls": array(_CALL_DELTA),
                        },
                    ),
                    "logprobs": _LOGPROBS,
                    "finish_reason": nullable(_FINISH),
                },
                _CHOICE_EXTRA,
            )
        ),
    },
    {"usage": nullable(ref("Usage")), **_PROMPT_EXTRA},
)

SCHEMAS: dict[str, Schema] = {
    "ChatCompletionRequest": _REQUEST,
    "ChatCompletion": _ANSWER,
    "ChatCompletionEnded": ended(_ANSWER),
    "ChatCompletionChunk": _CHUNK,
}

PATHS: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": {
        "post": operation(
            "Answer a conversation",
            "Chat Completions",
            {
                200: json_body(
                    ref("ChatCompletion"),
                    "The answer; with `stream` as events, whose data are chunks or an error.",
                    events=chunk_event("ChatCompletionChunk"),
                )
            },
            errors=(400, 404, 409, 413, 415, 422, 429, 500, 503),
            body=ref("ChatCompletionRequest"),
            parameters=(IDEMPOTENCY_KEY,),
        )
    },
    **projected_paths(
        "/v1/chat/completions", "Chat Completions", "ChatCompletion", "ChatCompletionChunk"
    ),
}
