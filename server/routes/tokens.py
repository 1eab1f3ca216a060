"""POST /tokenize and /detokenize, with the bodies that vLLM gave them."""

from __future__ import annotations

import asyncio
from typing import Any

from aiohttp import web

from engine import ModelInfo, TemplateError, Tokenizer
from server.dialects.fields import Fields, check_token_ids, read_model
from server.dialects.messages import read_messages
from server.errors import invalid
from server.routes.bodies import json_response, read_json
from server.state import ENGINE, TOKENIZER

__all__ = ["routes"]

_TOKENIZE = frozenset(
    {
        "model",
        "prompt",
        "messages",
        "add_special_tokens",
        "return_token_strs",
        "add_generation_prompt",
        "continue_final_message",
        "chat_template_kwargs",
    }
)
_DETOKENIZE = frozenset({"model", "tokens"})


async def tokenize(http: web.Request) -> web.Response:
    """Return the token ids of a text or a conversation."""
    info, tokenizer = http.app[ENGINE].info, http.app[TOKENIZER]
    fields = _fields(await read_json(http), info, _TOKENIZE)
    with_strings = fields.boolean("return_token_strs", False)
    # No begin- or end-of-sequence token belongs to the models served here: both values are true.
    fields.boolean("add_special_tokens", True)
    if fields.given("messages") == fields.given("prompt"):
        raise invalid("Give either 'prompt' or 'messages'.", param="prompt")
    if fields.given("messages"):
        ids = await _render(fields, tokenizer)
    else:
        # As the completions endpoint reads it: control tokens are meant as such.
        text = fields.string("prompt") or ""
        ids = await asyncio.to_thread(tokenizer.encode, text, parse_special=True)
    strings = None
    if with_strings:
        strings = await asyncio.to_thread(_strings, tokenizer, ids)
    return json_response(
        {
            "count": len(ids),
            "max_model_len": info.max_model_len,
            "tokens": ids,
            "token_strs": strings,
        }
    )


def _fields(body: object, info: ModelInfo, known: frozenset[str]) -> Fields:
    fields = Fields(body)
    if fields.given("model"):
        read_model(fields, info.name)
    fields.refuse_unknown(known)
    return fields


async def _render(fields: Fields, tokenizer: Tokenizer) -> list[int]:
    messages = read_messages(fields)
    variables: dict[str, Any] = fields.mapping("chat_template_kwargs") or {}
    generation = fields.boolean("add_generation_prompt", True)
    continues = fields.boolean("continue_final_message", False)

    def render() -> list[int]:
        return tokenizer.render_chat(
            messages,
            add_generation_prompt=generation,
            continue_final_message=continues,
            **variables,
        )

    try:
        return await asyncio.to_thread(render)
    except TemplateError as error:
        raise invalid(str(error), param="messages", code="template_error") from error


def _strings(tokenizer: Tokenizer, ids: list[int]) -> list[str]:
    return [tokenizer.token_bytes(token).decode(errors="replace") for token in ids]


async def detokenize(http: web.Request) -> web.Response:
    """Return the text of token ids; control tokens are spelt out."""
    info, tokenizer = http.app[ENGINE].info, http.app[TOKENIZER]
    fields = _fields(await read_json(http), info, _DETOKENIZE)
    fields.required("tokens")
    ids = check_token_ids(fields.array("tokens") or [], "tokens", info.vocab_size)
    text = await asyncio.to_thread(tokenizer.decode, ids, skip_special=False)
    return json_response({"prompt": text})


def routes() -> list[web.RouteDef]:
    """Return this module's routes."""
    return [web.post("/tokenize", tokenize), web.post("/detokenize", detokenize)]
