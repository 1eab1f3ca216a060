"""Admission through HTTP: refusals in the dialects' shapes, places in the stream, deadlines."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import openai
import pytest

import server.guard.gate as gate_module
from engine import EngineStats
from server.guard.keys import hash_of
from server.state import GATE, METRICS, STORE, TURNS
from tests.server.scripted import Script, ScriptedEngine, say
from tests.server.serving import read_events, serving

ONE, TWO = {"Authorization": "Bearer one"}, {"Authorization": "Bearer two"}
CHAT = "/v1/chat/completions"


def chat(**fields: Any) -> dict[str, Any]:
    return {"model": "scripted", "messages": [{"role": "user", "content": "hi"}], **fields}


def key_file(tmp_path: Path, **limits: Any) -> Path:
    path = tmp_path / "keys"
    lines = [f"{name} = {value}" for name, value in limits.items()]
    text = "\n".join(["[[key]]", f'hash = "{hash_of("one")}"', *lines, "[[key]]", 'key = "two"'])
    path.write_text(text + "\n")
    path.chmod(0o600)
    return path


async def test_limits_are_refused_with_429_and_shown_in_headers(tmp_path: Path) -> None:
    async with serving(api_key_file=key_file(tmp_path, requests_per_minute=2)) as served:
        for left in ("1", "0"):
            async with served.client.post(CHAT, json=chat(), headers=ONE) as answer:
                assert answer.status == 200
                assert answer.headers["x-ratelimit-limit-requests"] == "2"
                assert answer.headers["x-ratelimit-remaining-requests"] == left
        for path, body in (
            (CHAT, chat()),
            ("/v1/completions", {"model": "scripted", "prompt": "a"}),
            ("/v1/responses", {"model": "scripted", "input": "a"}),
        ):
            async with served.client.post(path, json=body, headers=ONE) as answer:
                assert answer.status == 429
                assert 1 <= int(answer.headers["Retry-After"]) <= 60
                assert answer.headers["x-ratelimit-remaining-requests"] == "0"
                error = (await answer.json())["error"]
                assert (error["type"], error["code"]) == ("rate_limit_error", "rate_limit_exceeded")
        async with served.client.post(CHAT, json=chat(), headers=TWO) as answer:
            assert answer.status == 200
            assert "x-ratelimit-limit-requests" not in answer.headers
        text = served.app[METRICS].render().decode()
        assert 'millrace_turns_refused_total{code="rate_limit_exceeded"} 3.0' in text
        assert len(served.engine.requests) == 3


async def test_a_request_sent_again_is_charged_once(tmp_path: Path) -> None:
    async with serving(api_key_file=key_file(tmp_path, requests_per_minute=1)) as served:
        for _ in range(2):
            headers = {**ONE, "Idempotency-Key": "once"}
            status, answer = await served.post(CHAT, chat(), headers=headers)
            assert (status, answer["usage"]["completion_tokens"] > 0) == (200, True)
        status, _ = await served.post(CHAT, chat(), headers={**ONE, "Idempotency-Key": "new"})
        assert status == 429
        assert len(served.engine.requests) == 1


async def test_the_sdk_sees_a_rate_limit_error(tmp_path: Path) -> None:
    async with serving(api_key_file=key_file(tmp_path, requests_per_minute=1)) as served:
        client = openai.AsyncOpenAI(base_url=f"{served.url}/v1", api_key="one", max_retries=0)
        async with client:
            await client.responses.create(model="scripted", input="a")
            with pytest.raises(openai.RateLimitError) as caught:
                await client.responses.create(model="scripted", input="a")
        assert caught.value.response.headers["retry-after"]


async def test_turns_at_once_end_with_the_turn(tmp_path: Path) -> None:
    hold = asyncio.Event()
    engine = ScriptedEngine(say("abc", hold=hold))
    async with serving(engine, api_key_file=key_file(tmp_path, max_turns=1)) as served:
        async with served.client.post(CHAT, json=chat(stream=True), headers=ONE) as first:
            await first.content.readline()
            status, body = await served.post(CHAT, chat(), headers=ONE)
            assert (status, body["error"]["code"]) == (429, "too_many_turns")
            hold.set()
            await first.read()
        await served.idle()
        await asyncio.gather(*served.app[GATE]._settling)
        status, _ = await served.post(CHAT, chat(), headers=ONE)
        assert status == 200


async def test_weights_and_priorities_reach_the_engine(tmp_path: Path) -> None:
    async with serving(api_key_file=key_file(tmp_path, weight=4, priority=2)) as served:
        for headers in (ONE, TWO):
            for priority in (-5, 7):
                await served.post(CHAT, chat(priority=priority), headers=headers)
        one, two = served.engine.requests[0].tenant, served.engine.requests[2].tenant
        assert one
        assert one != two
        asked = [(r.tenant, r.weight, r.priority) for r in served.engine.requests]
        assert asked == [(one, 4.0, 2), (one, 4.0, 7), (two, 1.0, 0), (two, 1.0, 7)]


async def test_the_ledger_adds_up(tmp_path: Path) -> None:
    async with serving(api_key_file=key_file(tmp_path)) as served:
        used = []
        for _ in range(3):
            _, body = await served.post(CHAT, chat(), headers=ONE)
            used.append(body["usage"])
        await served.idle()
        await asyncio.gather(*served.app[GATE]._settling)
        owner = served.engine.requests[0].tenant
        redis = served.app[STORE].redis
        (key,) = [key async for key in redis.scan_iter(f"millrace:ledger:{owner}:*")]
        sums = await redis.hgetall(key)
        assert int(sums[b"turns"]) == 3
        assert int(sums[b"prompt_tokens"]) == sum(one["prompt_tokens"] for one in used)
        assert int(sums[b"completion_tokens"]) == sum(one["completion_tokens"] for one in used)


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gate_module, "TELL_S", 0.02)


def waiting_engine(hold: asyncio.Event) -> ScriptedEngine:
    """Its requests get their first token when ``hold`` is set."""
    return ScriptedEngine(lambda _: Script(steps=[[], [65]], hold=hold))


@pytest.mark.usefixtures("impatient")
async def test_who_waits_is_told_its_place() -> None:
    hold = asyncio.Event()
    engine = waiting_engine(hold)
    engine.stats = EngineStats(steps=1, generation_tokens=100, busy_s=1.0, waiting=1)
    async with serving(engine) as served:
        body = {"model": "scripted", "input": "hi", "stream": True}
        events: list[list[dict[str, Any]]] = []

        async def ask(number: int) -> None:
            events.append([])
            async with served.client.post("/v1/responses", json=body) as answer:
                async for raw in answer.content:
                    if raw.startswith(b"data: "):
                        events[number].append(json.loads(raw[6:]))

        tasks = [asyncio.create_task(ask(0))]
        while not events or not any("queued" in event["type"] for event in events[0]):
            await asyncio.sleep(0)
        tasks.append(asyncio.create_task(ask(1)))
        while len(events) < 2 or not any("queued" in event["type"] for event in events[1]):
            await asyncio.sleep(0)
        hold.set()
        await asyncio.gather(*tasks)
        for number in (0, 1):
            queued = [e for e in events[number] if e["type"] == "response.millrace.queued"]
            assert queued[0]["place"] == number + 1
            assert events[number][-1]["type"] == "response.completed"
            numbers = [event["sequence_number"] for event in events[number]]
            assert numbers == list(range(len(numbers)))
        await served.idle()


@pytest.mark.usefixtures("impatient")
async def test_the_sdk_passes_over_places_and_comments() -> None:
    hold = asyncio.Event()
    async with serving(waiting_engine(hold), keepalive_s=0.005) as served:
        client = openai.AsyncOpenAI(base_url=f"{served.url}/v1", api_key="none")
        async with client:
            kinds = []
            stream = await client.responses.create(model="scripted", input="hi", stream=True)
            async for event in stream:
                kinds.append(event.type)
                if str(event.type) == "response.millrace.queued":
                    hold.set()
            assert kinds[-1] == "response.completed"
            hold.clear()
            asyncio.get_running_loop().call_later(0.1, hold.set)
            chunks = await client.chat.completions.create(stream=True, **chat())
            text = ""
            async for chunk in chunks:
                text += chunk.choices[0].delta.content or ""
            assert text == "A"
            hold.clear()
            async with client.responses.stream(model="scripted", input="hi") as managed:
                async for one in managed:
                    if str(one.type) == "response.millrace.queued":
                        hold.set()
                assert (await managed.get_final_response()).output_text == "A"


@pytest.mark.usefixtures("impatient")
async def test_chat_streams_get_places_as_comments() -> None:
    hold = asyncio.Event()
    async with serving(waiting_engine(hold)) as served:
        async with served.client.post(CHAT, json=chat(stream=True)) as answer:
            async for raw in answer.content:
                if raw.startswith(b": queued "):
                    hold.set()
                    break
            rest = await answer.read()
        assert rest.endswith(b"data: [DONE]\n\n")


async def test_a_turn_that_does_not_begin_in_time_ends_incomplete() -> None:
    hold = asyncio.Event()
    async with serving(waiting_engine(hold)) as served:
        body = {"model": "scripted", "input": "hi", "deadline_s": 0.05}
        status, response = await served.post("/v1/responses", body)
        assert status == 200
        assert response["status"] == "incomplete"
        assert response["incomplete_details"] == {"reason": "deadline"}
        await served.idle()


async def test_a_turn_that_began_in_time_is_left_alone() -> None:
    hold = asyncio.Event()
    async with serving(ScriptedEngine(say("abc", hold=hold))) as served:
        body = {"model": "scripted", "input": "hi", "deadline_s": 60, "stream": True}
        last = None
        async with served.client.post("/v1/responses", json=body) as answer:
            async for kind, _, event in read_events(answer):
                if kind == "response.created":
                    turn = served.app[TURNS].get(event["response"]["id"])
                if kind == "response.output_text.delta":
                    assert turn is not None
                    turn._expire()
                    hold.set()
                last = kind
        assert last == "response.completed"


async def test_the_queue_is_bounded() -> None:
    hold = asyncio.Event()
    async with serving(waiting_engine(hold), max_queue=3) as served:
        asks = [asyncio.create_task(served.post(CHAT, chat())) for _ in range(10)]
        while sum(ask.done() for ask in asks) < 7:
            await asyncio.sleep(0)
        hold.set()
        answers = await asyncio.gather(*asks)
        refused = [body["error"]["code"] for status, body in answers if status == 429]
        assert refused == ["queue_full"] * 7
        await served.idle()
        assert len(served.engine.requests) == 3


async def test_the_engine_is_told_what_is_due_first() -> None:
    engine = ScriptedEngine(say("abc"))
    async with serving(engine) as served:
        for deadline_s in (None, 3600, None, 5):
            await served.post(CHAT, chat(deadline_s=deadline_s))
        names = dict(zip(("first", "patient", "second", "hurried"), engine.requests, strict=True))
    order = sorted(names, key=lambda name: names[name].due_s)
    assert order == ["hurried", "first", "second", "patient"]
