"""/v1/models, /tokenize and /detokenize."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from typing import Any

import pytest

from tests.server.edge import Edge, serving
from tests.server.scripted import EOS, START


@pytest.fixture
async def edge() -> AsyncIterator[Edge]:
    async with serving() as edge:
        yield edge


async def test_the_served_model_is_listed_and_described(edge: Edge) -> None:
    listed = (await edge.get("/v1/models")).body
    assert listed["object"] == "list"
    (model,) = listed["data"]
    assert model["id"] == "scripted"
    assert model["object"] == "model"
    assert model["max_model_len"] == 4096
    assert 0 <= time.time() - model["created"] < 60
    assert (await edge.get("/v1/models/scripted")).body == model


@pytest.mark.parametrize("name", ["other", "Qwen/Qwen3-0.6B", "scripted/x", "%00", "a" * 3000])
async def test_other_models_are_not_found(edge: Edge, name: str) -> None:
    answer = await edge.get(f"/v1/models/{name}")
    assert answer.status == 404
    assert answer.error["code"] == "model_not_found"
    assert answer.error["param"] == "model"


async def test_text_goes_to_ids_and_back(edge: Edge) -> None:
    answer = await edge.post("/tokenize", {"prompt": "Grüß", "return_token_strs": True})
    ids = list("Grüß".encode())
    assert answer.body == {
        "count": 6,
        "max_model_len": 4096,
        "tokens": ids,
        "token_strs": ["G", "r", "\ufffd", "\ufffd", "\ufffd", "\ufffd"],
    }
    back = await edge.post("/detokenize", {"model": "scripted", "tokens": ids})
    assert back.body == {"prompt": "Grüß"}


async def test_an_empty_text_has_no_tokens(edge: Edge) -> None:
    # Only a missing prompt is an error; the empty one is a text like others.
    assert (await edge.post("/tokenize", {"prompt": ""})).body["tokens"] == []
    assert (await edge.post("/detokenize", {"tokens": []})).body == {"prompt": ""}


async def test_messages_go_through_the_chat_template(edge: Edge) -> None:
    messages = [{"role": "user", "content": [{"type": "text", "text": "Hi"}]}]
    answer = await edge.post("/tokenize", {"messages": messages})
    assert answer.body["tokens"] == [START, *b"user: Hi\n", START]
    body = {"messages": messages, "add_generation_prompt": False}
    assert (await edge.post("/tokenize", body)).body["tokens"] == [START, *b"user: Hi\n"]
    assert answer.body["token_strs"] is None


@pytest.mark.parametrize(
    ("path", "body", "status", "param"),
    [
        ("/tokenize", {}, 400, "prompt"),
        ("/tokenize", {"prompt": 3}, 400, "prompt"),
        ("/tokenize", {"prompt": "x", "messages": []}, 400, "prompt"),
        ("/tokenize", {"messages": []}, 400, "messages"),
        ("/tokenize", {"messages": [{"role": "user"}]}, 400, "messages[0].content"),
        ("/tokenize", {"prompt": "x", "model": "other"}, 404, "model"),
        ("/tokenize", {"prompt": "x", "promt": "y"}, 400, "promt"),
        ("/tokenize", {"prompt": "x", "return_token_strs": 1}, 400, "return_token_strs"),
        ("/detokenize", {}, 400, "tokens"),
        ("/detokenize", {"tokens": "x"}, 400, "tokens"),
        ("/detokenize", {"tokens": [1, -1]}, 400, "tokens[1]"),
        ("/detokenize", {"tokens": [EOS + 2]}, 400, "tokens[0]"),
        ("/detokenize", {"tokens": [1.5]}, 400, "tokens[0]"),
        ("/detokenize", {"tokens": [1], "model": 5}, 400, "model"),
    ],
)
async def test_wrong_bodies_name_the_field(
    edge: Edge, path: str, body: dict[str, Any], status: int, param: str
) -> None:
    answer = await edge.post(path, body)
    assert answer.status == status
    assert answer.error["param"] == param
