"""Schemas that several dialects share: errors, sampling, log-probabilities, usage."""

from __future__ import annotations

from server.dialects.sampling import MAX_CHOICES, MAX_STOP_STRINGS, MAX_TOP_LOGPROBS
from server.openapi.parts import (
    Schema,
    array,
    boolean,
    integer,
    nullable,
    number,
    obj,
    one_of,
    ref,
    string,
)

__all__ = ["PRIORITY", "RETURN_TOKEN_IDS", "SAMPLING", "SCHEMAS", "STREAM", "STREAM_OPTIONS", "N"]

TOKEN_IDS = array(integer(least=0), "Token ids.")

N = nullable(integer("How many answers each prompt gets.", 1, MAX_CHOICES))
STREAM = nullable(boolean("Send the answer as server-sent events while it grows."))
STREAM_OPTIONS = nullable(
    obj(
        {},
        {
            "include_usage": nullable(boolean("End the stream with a chunk that has the usage.")),
            "continuous_usage_stats": nullable(boolean("Put the usage so far into every chunk.")),
            "include_obfuscation": nullable(boolean("Accepted and ignored.")),
        },
        text="Only with `stream`.",
    )
)
PRIORITY = nullable(integer("Lower goes first.", -(2**31), 2**31 - 1))
RETURN_TOKEN_IDS = nullable(boolean("Show the token ids of prompt and answer."))

SAMPLING: dict[str, Schema] = {
    "temperature": nullable(number("0 is greedy. Default 1.", 0, 2)),
    "top_k": nullable(integer("Only the k most likely tokens; 0 or -1 is off.", -1)),
    "top_p": nullable(
        {
            **number("Only the most likely tokens that together have this probability.", None, 1),
            "exclusiveMinimum": 0,
        }
    ),
    "min_p": nullable(
        number("Only tokens with at least this part of the likeliest one's probability.", 0, 1)
    ),
    "repetition_penalty": nullable(
        {
            **number("Divides the likelihood of what was there before; 1 is off.", None, 100),
            "exclusiveMinimum": 0,
        }
    ),
    "presence_penalty": nullable(number("", -2, 2)),
    "frequency_penalty": nullable(number("", -2, 2)),
    "logit_bias": nullable(
        {
            "type": "object",
            "propertyNames": {"pattern": "^[0-9]+$"},
            "additionalProperties": nullable(number("", -100, 100)),
            "description": "Token id to what is added to its logit.",
        }
    ),
    "seed": nullable(
        integer("The same seed and request give the same answer.", -(2**63), 2**63 - 1)
    ),
    "stop": nullable(
        one_of(
            string(minLength=1),
            array(string(minLength=1), maxItems=MAX_STOP_STRINGS),
            text="The answer ends before the first of these.",
        )
    ),
    "include_stop_str_in_output": nullable(boolean("Keep the stop string in the answer.")),
    "stop_token_ids": nullable(array(integer(least=0), "The answer also ends at these.")),
    "ignore_eos": nullable(boolean("Go on after the model's own end token.")),
    "min_tokens": nullable(integer("The answer does not end before it has so many tokens.", 0)),
    "prompt_logprobs": nullable(
        integer("Show the prompt's log-probabilities, with so many alternatives.", 0, 20)
    ),
    "deadline_s": nullable(
        {
            "type": "number",
            "exclusiveMinimum": 0,
            "maximum": 3600,
            "description": "Seconds within which the answer must begin. A request that cannot is "
            "refused with 429, or ends incomplete with the reason `deadline`; one that has begun "
            "is left alone. Of a key's requests with equal priorities the earliest goes first; "
            "those without a deadline go as if they had 60 s.",
        }
    ),
}
"""What every request body with sampling has."""

_TOP_LOGPROB = {
    "token": string("The token as text."),
    "bytes": array(integer("", 0, 255), "The token's UTF-8 bytes."),
    "logprob": number("Natural logarithm of the probability."),
}

SCHEMAS: dict[str, Schema] = {
    "Error": obj(
        {
            "error": obj(
                {
                    "message": string("What was wrong, with which value, what would be right."),
                    "type": string("The kind of error."),
                    "param": nullable(string("The field at fault.")),
                    "code": nullable(string("A stable word for programs.")),
                }
            )
        },
        text="Every error has this shape.",
    ),
    "TopLogprob": obj(_TOP_LOGPROB),
    "TokenLogprob": obj(
        {
            **_TOP_LOGPROB,
            "top_logprobs": array(
                ref("TopLogprob"), f"The likeliest tokens there, at most {MAX_TOP_LOGPROBS}."
            ),
        }
    ),
    "PromptLogprobs": array(
        nullable(ref("TokenLogprob")), "One a token of the prompt; the first is null."
    ),
    "TokenIds": TOKEN_IDS,
    "Usage": obj(
        {
            "prompt_tokens": integer(least=0),
            "completion_tokens": integer(least=0),
            "total_tokens": integer(least=0),
        },
        {
            "prompt_tokens_details": obj({"cached_tokens": integer(least=0)}),
            "completion_tokens_details": obj({"reasoning_tokens": integer(least=0)}),
        },
        text="What the request cost, in tokens.",
    ),
}
