"""Models, tokens, health, metrics and the document itself in the OpenAPI document."""

from __future__ import annotations

from typing import Any

from server.openapi.parts import (
    Schema,
    array,
    boolean,
    enum,
    integer,
    json_body,
    nullable,
    obj,
    operation,
    ref,
    string,
)

__all__ = ["PATHS", "SCHEMAS"]

SCHEMAS: dict[str, Schema] = {
    "Model": obj(
        {
            "id": string(),
            "object": enum("model"),
            "created": integer("When this server began to offer it, Unix seconds."),
            "owned_by": string(),
            "max_model_len": integer("Most tokens of prompt and answer together.", 1),
        }
    ),
    "ModelList": obj({"object": enum("list"), "data": array(ref("Model"))}),
    "TokenizeRequest": obj(
        {},
        {
            "model": nullable(string()),
            "prompt": nullable(string("Either this")),
            "messages": nullable(array({"type": "object"}, "or this, as in Chat Completions.")),
            "add_special_tokens": nullable(boolean("No effect: the models here have none.")),
            "return_token_strs": nullable(boolean("Also return each token's text.")),
            "add_generation_prompt": nullable(boolean()),
            "continue_final_message": nullable(boolean()),
            "chat_template_kwargs": nullable({"type": "object"}),
        },
    ),
    "Tokens": obj(
        {
            "count": integer(least=0),
            "max_model_len": integer(least=1),
            "tokens": ref("TokenIds"),
            "token_strs": nullable(array(string())),
        }
    ),
    "DetokenizeRequest": obj({"tokens": ref("TokenIds")}, {"model": nullable(string())}),
    "Detokenized": obj({"prompt": string()}),
    "Health": obj({"status": enum("ok")}),
    "Ready": obj({"status": enum("ready"), "model": string()}),
}

_MODEL = {
    "name": "model",
    "in": "path",
    "required": True,
    "schema": {"type": "string"},
    "description": "A model's name; it may contain a slash.",
}


def _text(media: str, text: str) -> dict[str, Any]:
    return {"description": text, "content": {media: {"schema": {"type": "string"}}}}


PATHS: dict[str, dict[str, Any]] = {
    "/v1/models": {
        "get": operation("List models", "Models", {200: json_body(ref("ModelList"), "Models.")})
    },
    "/v1/models/{model}": {
        "get": operation(
            "Describe a model",
            "Models",
            {200: json_body(ref("Model"), "The model.")},
            errors=(404,),
            parameters=(_MODEL,),
        )
    },
    "/tokenize": {
        "post": operation(
            "Text or messages to token ids",
            "Tokens",
            {200: json_body(ref("Tokens"), "The token ids.")},
            errors=(400, 404, 413, 415),
            body=ref("TokenizeRequest"),
        )
    },
    "/detokenize": {
        "post": operation(
            "Token ids to text",
            "Tokens",
            {200: json_body(ref("Detokenized"), "The text, control tokens spelt out.")},
            errors=(400, 404, 413, 415),
            body=ref("DetokenizeRequest"),
        )
    },
    "/health": {
        "get": operation(
            "Is the process alive?",
            "Service",
            {200: json_body(ref("Health"), "It is.")},
            is_open=True,
        )
    },
    "/ready": {
        "get": operation(
            "Are requests served?",
            "Service",
            {200: json_body(ref("Ready"), "They are.")},
            errors=(503,),
            is_open=True,
        )
    },
    "/metrics": {
        "get": operation(
            "Metrics for Prometheus",
            "Service",
            {200: _text("text/plain", "Text format 0.0.4.")},
            is_open=True,
        )
    },
    "/openapi.json": {
        "get": operation(
            "This document",
            "Service",
            {200: json_body({"type": "object"}, "OpenAPI 3.2.")},
            is_open=True,
        )
    },
}
