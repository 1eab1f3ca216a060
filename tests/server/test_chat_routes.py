"""Chat Completions and Completions over HTTP, on the scripted engine."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest

from engine import FinishReason, Request
from tests.server.edge import Edge, datas, serving
from tests.server.scripted import EOS, Script, ScriptedEngine, say

MESSAGES = [{"role": "user", "content": "Hi"}]
CHAT = {"model": "scripted", "messages": MESSAGES}
TEXT = {"model": "scripted", "prompt": "Hi"}


async def no_turn(edge: Edge) -> None:
    """Wait until no turn and no engine request is left."""
    while (await edge.metrics())["millrace_turns_in_flight"] or edge.engine.running:
        await asyncio.sleep(0)


async def test_a_chat_is_answered_whole_and_streamed() -> None:
    async with serving(ScriptedEngine(say("Grüß Gott"))) as edge:
        whole = (await edge.post("/v1/chat/completions", CHAT)).body
        assert whole["choices"][0]["message"]["content"] == "Grüß Gott"
        assert whole["choices"][0]["finish_reason"] == "stop"
        prompt = len(edge.engine.requests[0].prompt_ids)
        # "Grüß Gott" has eleven bytes, and there is the end token.
        assert whole["usage"]["prompt_tokens"] == prompt
        assert whole["usage"]["completion_tokens"] == 12
        assert whole["usage"]["total_tokens"] == prompt + 12

        options = {"stream": True, "stream_options": {"include_usage": True}}
        *frames, done = datas(await edge.stream("/v1/chat/completions", {**CHAT, **options}))
        assert done == "[DONE]"
        *chunks, last = [json.loads(frame) for frame in frames]
        text = "".join(c["choices"][0]["delta"].get("content", "") for c in chunks)
        assert text == "Grüß Gott"
        assert last["choices"] == []
        assert last["usage"] == whole["usage"]
        assert len({chunk["id"] for chunk in [*chunks, last]}) == 1


async def test_settings_reach_the_engine() -> None:
    body = {
        **CHAT,
        "max_tokens": 7,
        "min_tokens": 2,
        "temperature": 0.25,
        "top_k": 3,
        "top_p": 0.75,
        "min_p": 0.125,
        "repetition_penalty": 1.5,
        "presence_penalty": 0.5,
        "frequency_penalty": -0.5,
        "logit_bias": {"65": 2},
        "seed": 11,
        "stop_token_ids": [66],
        "ignore_eos": True,
        "logprobs": True,
        "top_logprobs": 1,
        "prompt_logprobs": 2,
        "n": 2,
    }
    async with serving(ScriptedEngine(say("abc"))) as edge:
        assert (await edge.post("/v1/chat/completions", body)).status == 200
        first, second = edge.engine.requests
    sampling = first.sampling
    assert (sampling.max_tokens, sampling.min_tokens) == (7, 2)
    assert (sampling.temperature, sampling.top_k, sampling.top_p) == (0.25, 3, 0.75)
    assert (sampling.min_p, sampling.repetition_penalty) == (0.125, 1.5)
    assert (sampling.presence_penalty, sampling.frequency_penalty) == (0.5, -0.5)
    assert sampling.logit_bias == {65: 2.0}
    assert sampling.stop_token_ids == (66,)
    assert sampling.ignore_eos
    assert (sampling.logprobs, sampling.prompt_logprobs) == (1, 2)
    assert (sampling.seed, second.sampling.seed) == (11, 12)
    assert second.sampling.prompt_logprobs is None


async def test_completions_of_token_ids_return_token_ids() -> None:
    """The way benchmarks drive a server."""
    body = {
        "model": "scripted",
        "prompt": [72, 105],
        "max_tokens": 3,
        "ignore_eos": True,
        "return_token_ids": True,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    async with serving(ScriptedEngine(Script(steps=[[65], [66], [67], [68]]))) as edge:
        *frames, _ = datas(await edge.stream("/v1/completions", body))
        chunks = [json.loads(frame) for frame in frames]
        choices = [chunk["choices"][0] for chunk in chunks if chunk["choices"]]
        assert choices[0]["prompt_token_ids"] == [72, 105]
        ids = [token for choice in choices for token in choice.get("token_ids", [])]
        assert ids == [65, 66, 67]
        assert choices[-1]["finish_reason"] == "length"
        assert chunks[-1]["usage"]["completion_tokens"] == 3
        whole = await edge.post(
            "/v1/completions", {**body, "stream": False, "stream_options": None}
        )
        assert whole.body["choices"][0]["token_ids"] == ids


async def test_several_prompts_each_get_n_answers() -> None:
    """By default the scripted engine repeats the prompt."""
    body = {"model": "scripted", "prompt": ["one", "two"], "n": 2, "echo": True}
    async with serving() as edge:
        choices = (await edge.post("/v1/completions", body)).body["choices"]
        assert [choice["index"] for choice in choices] == [0, 1, 2, 3]
        texts = [choice["text"] for choice in choices]
        assert texts == ["oneone", "oneone", "twotwo", "twotwo"]
        *frames, _ = datas(await edge.stream("/v1/completions", {**body, "stream": True}))
        streamed = ["", "", "", ""]
        for frame in frames:
            choice = json.loads(frame)["choices"][0]
            streamed[choice["index"]] += choice["text"]
        assert streamed == texts


async def test_a_stop_string_ends_the_answer() -> None:
    async with serving(ScriptedEngine(say("one STOP two"))) as edge:
        choice = (await edge.post("/v1/completions", {**TEXT, "stop": ["STOP"]})).body["choices"][0]
        assert choice["text"] == "one "
        assert choice["finish_reason"] == "stop"
        assert choice["stop_reason"] == "STOP"


async def test_the_end_token_is_shown_among_ids_and_not_in_the_text() -> None:
    async with serving(ScriptedEngine(say("ok"))) as edge:
        body = {**TEXT, "return_token_ids": True, "logprobs": 0}
        choice = (await edge.post("/v1/completions", body)).body["choices"][0]
        assert choice["text"] == "ok"
        assert choice["token_ids"] == [111, 107, EOS]
        assert len(choice["logprobs"]["tokens"]) == 3


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions"])
async def test_an_engine_that_dies_is_said(path: str) -> None:
    body: dict[str, Any] = CHAT if path.endswith("chat/completions") else TEXT
    async with serving(ScriptedEngine(say("Hello", dies_after=2))) as edge:
        answer = await edge.post(path, body)
        assert answer.status == 503
        assert answer.error["code"] == "engine_died"
        *_, error, done = datas(await edge.stream(path, {**body, "stream": True}))
        assert json.loads(error)["error"]["code"] == "engine_died"
        assert done == "[DONE]"
        await no_turn(edge)


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions"])
async def test_a_client_that_leaves_ends_its_turn(path: str, stream: bool) -> None:
    hold = asyncio.Event()
    body: dict[str, Any] = CHAT if path.endswith("chat/completions") else TEXT
    async with serving(ScriptedEngine(say("Hello", hold=hold))) as edge:
        request = asyncio.create_task(edge.client.post(path, json={**body, "stream": stream}))
        while not edge.engine.running:
            await asyncio.sleep(0)
        if stream:
            (await request).close()
        else:
            request.cancel()
            await asyncio.gather(request, return_exceptions=True)
        await no_turn(edge)
        samples = await edge.metrics()
        dialect = "chat" if path.endswith("chat/completions") else "completions"
        assert samples[f"millrace_turns_total{{dialect={dialect},status=cancelled}}"] == 1


async def test_metrics_add_up_over_turns() -> None:
    def script(request: Request) -> Script:
        end = FinishReason.LENGTH if request.sampling.max_tokens < 9 else FinishReason.STOP
        return say("abcdefgh", end=end)

    async with serving(ScriptedEngine(script)) as edge:
        for max_tokens in (4, 20, 20):
            body = {**TEXT, "max_tokens": max_tokens}
            assert (await edge.post("/v1/completions", body)).status == 200
        await edge.post("/v1/chat/completions", CHAT)
        refused = await edge.post("/v1/chat/completions", {**CHAT, "n": 0})
        assert refused.status == 400
        samples = await edge.metrics()
        prompt = sum(len(request.prompt_ids) for request in edge.engine.requests)
    started = {key: value for key, value in samples.items() if "turns_started_total" in key}
    ended = {key: value for key, value in samples.items() if "millrace_turns_total" in key}
    assert sum(started.values()) == sum(ended.values()) == 4
    assert ended["millrace_turns_total{dialect=completions,status=incomplete}"] == 1
    assert ended["millrace_turns_total{dialect=completions,status=completed}"] == 2
    # Four tokens of the cut one, eight and an end token of each other.
    assert samples["millrace_turn_completion_tokens_total"] == 4 + 3 * 9
    assert samples["millrace_turn_prompt_tokens_total"] == prompt
    assert samples["millrace_time_to_first_token_seconds_count"] == 4
    assert samples["millrace_inter_token_seconds_count"] <= 4 + 3 * 9 - 4


@pytest.mark.parametrize(
    ("headers", "data", "status", "code"),
    [
        ({"Content-Type": "application/json"}, b"", 400, "invalid_json"),
        ({"Content-Type": "application/json"}, b"{", 400, "invalid_json"),
        ({"Content-Type": "application/json"}, b'"\xff"', 400, "invalid_json"),
        ({"Content-Type": "application/json"}, b"[]", 400, None),
        ({"Content-Type": "text/plain"}, b"{}", 415, "unsupported_media_type"),
        ({"Content-Type": "application/x-www-form-urlencoded"}, b"a=b", 415, None),
    ],
)
async def test_bodies_that_are_no_json_objects(
    headers: dict[str, str], data: bytes, status: int, code: str | None
) -> None:
    async with serving() as edge:
        answer = await edge.send("POST", "/v1/chat/completions", headers=headers, data=data)
        assert answer.status == status
        assert code in (None, answer.error["code"])
        assert not edge.engine.requests


async def test_a_prompt_longer_than_the_context() -> None:
    async with serving(ScriptedEngine(say("x"), max_model_len=16)) as edge:
        long = [{"role": "user", "content": "a" * 16}]
        asked: list[tuple[str, dict[str, Any]]] = [
            ("/v1/completions", {**TEXT, "prompt": "a" * 16}),
            ("/v1/completions", {**TEXT, "prompt": [65] * 16}),
            ("/v1/chat/completions", {**CHAT, "messages": long}),
        ]
        for path, body in asked:
            answer = await edge.post(path, body)
            assert answer.status == 400
            assert answer.error["code"] == "context_length_exceeded"
            assert answer.error["param"] == ("messages" if "messages" in body else "prompt")
            # The words that clients know it by, see server/prompting.py.
            assert "prompt is too long" in answer.error["message"].lower()
            assert "this model's maximum context length is 16" in answer.error["message"]
        assert (await edge.post("/v1/completions", {**TEXT, "prompt": "a" * 15})).status == 200
