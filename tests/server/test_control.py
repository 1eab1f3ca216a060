"""Leaving, cancelling and asking twice: a turn's contracts with its clients, on two servers."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any, NamedTuple

import aiohttp
import jsonschema
import pytest

from server import idempotency
from server.openapi.document import document
from server.state import JOURNALS, METRICS, STORE, TAKEOVER, TURNS
from server.store import StoreKind
from tests.server.edge import read_samples
from tests.server.scripted import ScriptedEngine, say
from tests.server.serving import Served, memory_store, read_events, serving

CHAT = "/v1/chat/completions"
BODY: dict[str, Any] = {"model": "scripted", "messages": [{"role": "user", "content": "hi"}]}
KEY = {"Idempotency-Key": "once"}


class Pair(NamedTuple):
    """Two servers on one store; ``gate`` lets their engines speak after the first token."""

    here: Served
    there: Served
    gate: asyncio.Event

    @property
    def requests(self) -> int:
        return len(self.here.engine.requests) + len(self.there.engine.requests)


@asynccontextmanager
async def pair() -> AsyncIterator[Pair]:
    gate = asyncio.Event()
    store = await memory_store()
    engines = [ScriptedEngine(lambda _: say("hello", hold=gate)) for _ in range(2)]
    async with serving(engines[0], store) as here, serving(engines[1], store) as there:
        yield Pair(here, there, gate)
    await store.close()


async def begin(server: Served, **fields: Any) -> tuple[str, Any]:
    """Begin a stream and read up to its first words: its id, and the open answer."""
    answer = await server.client.post(CHAT, json={**BODY, "stream": True, **fields})
    async for _, _, chunk in read_events(answer):
        if chunk["choices"][0]["delta"].get("content"):
            return chunk["id"], answer
    raise AssertionError("the stream ended")


def outcomes(server: Served) -> dict[tuple[str, str], float]:
    samples = read_samples(server.app[METRICS].render().decode())
    return {
        (contract, outcome): value
        for contract in ("finish", "linger", "cancel")
        for outcome in ("ran_on", "cancelled", "resumed", "finished")
        if (
            value := samples.get(
                f"millrace_disconnects_total{{contract={contract},outcome={outcome}}}", 0
            )
        )
    }


async def status_of(server: Served, stream_id: str) -> str:
    last = await server.app[JOURNALS].stored.last(f"resp_{stream_id.partition('-')[2]}")
    assert last is not None
    status: str = getattr(last.event, "response", {}).get("status", "in_progress")
    return status


@pytest.mark.parametrize(
    ("contract", "status", "counted"),
    [
        (None, "cancelled", ("cancel", "cancelled")),
        ("cancel", "cancelled", ("cancel", "cancelled")),
        ("finish", "completed", ("finish", "ran_on")),
        ("linger=60", "completed", ("linger", "finished")),
        ({"linger": 60}, "completed", ("linger", "finished")),
        ("linger=0.01", "cancelled", ("linger", "cancelled")),
    ],
)
async def test_leaving(contract: Any, status: str, counted: tuple[str, str]) -> None:
    async with pair() as servers:
        stream_id, answer = await begin(servers.here, on_disconnect=contract)
        answer.close()
        turn = servers.here.app[TURNS].get(f"resp_{stream_id.partition('-')[2]}")
        assert turn is not None
        if status == "cancelled":
            await turn.ended()
        else:
            while turn.audience._size:
                await asyncio.sleep(0)
            servers.gate.set()
            await turn.ended()
        assert await status_of(servers.here, stream_id) == status
        assert outcomes(servers.here) == {counted: 1}
        await servers.here.idle()


@pytest.mark.parametrize("elsewhere", [False, True])
async def test_coming_back_within_the_linger_keeps_the_turn(elsewhere: bool) -> None:
    async with pair() as servers:
        stream_id, answer = await begin(servers.here, on_disconnect="linger=0.5")
        answer.close()
        reader = servers.there if elsewhere else servers.here
        async with reader.client.get(f"{CHAT}/{stream_id}?stream=true") as resumed:
            # Longer than the linger: only its being watched keeps the turn.
            while outcomes(servers.here) != {("linger", "resumed"): 1}:
                await asyncio.sleep(0.01)
            servers.gate.set()
            frames = [frame async for frame in read_events(resumed)]
        assert frames[-1][2] == "[DONE]"
        assert await status_of(servers.here, stream_id) == "completed"


@pytest.mark.parametrize("elsewhere", [False, True])
async def test_cancel_from_any_server_is_idempotent(elsewhere: bool) -> None:
    schemas = document("0")["components"]
    async with pair() as servers:
        stream_id, answer = await begin(servers.here)
        other = servers.there if elsewhere else servers.here
        bodies = []
        for _ in range(2):
            status, body = await other.post(f"{CHAT}/{stream_id}/cancel", None)
            assert status == 200, body
            bodies.append(body)
        assert bodies[0] == bodies[1]
        body = bodies[0]
        assert (body["id"], body["status"]) == (stream_id, "cancelled")
        assert body["choices"][0]["message"]["content"] == "h"
        assert body["choices"][0]["finish_reason"] == "cancelled"
        jsonschema.validate(
            body, {"$ref": "#/components/schemas/ChatCompletionEnded", "components": schemas}
        )
        rest = [chunk async for _, _, chunk in read_events(answer)]
        assert rest[-2]["error"]["code"] == "cancelled"
        assert (await other.post(f"{CHAT}/chatcmpl-{'0' * 32}/cancel", None))[0] == 404
        await servers.here.idle()


async def test_cancelling_a_response_on_another_server() -> None:
    async with pair() as servers:
        body = {"model": "scripted", "input": "hi", "background": True}
        _, response = await servers.here.post("/v1/responses", body)
        path = f"/v1/responses/{response['id']}/cancel"
        status, ended = await servers.there.post(path, None)
        assert (status, ended["status"]) == (200, "cancelled")
        assert await servers.there.post(path, None) == (200, ended)
        assert await servers.here.post(path, None) == (200, ended)


@pytest.mark.parametrize("elsewhere", [False, True])
@pytest.mark.parametrize("path", [CHAT, "/v1/completions", "/v1/responses"])
@pytest.mark.parametrize("stream", [False, True])
async def test_a_retried_post_runs_once(path: str, stream: bool, elsewhere: bool) -> None:
    asked = {
        CHAT: BODY,
        "/v1/completions": {"model": "scripted", "prompt": "hi"},
        "/v1/responses": {"model": "scripted", "input": "hi"},
    }[path]
    async with pair() as servers:
        second = servers.there if elsewhere else servers.here

        async def ask(server: Served) -> bytes:
            body = {**asked, "stream": stream}
            async with server.client.post(path, json=body, headers=KEY) as answer:
                assert answer.status == 200, await answer.text()
                return await answer.read()

        both = [asyncio.create_task(ask(server)) for server in (servers.here, second)]
        while not servers.requests:
            await asyncio.sleep(0)
        servers.gate.set()
        first, again = await asyncio.gather(*both)
        assert first == again
        assert await ask(second) == first
        assert servers.requests == 1


async def test_a_key_is_for_one_request() -> None:
    async with pair() as servers:
        servers.gate.set()
        assert (await servers.here.post(CHAT, BODY, headers=KEY))[0] == 200
        status, body = await servers.there.post(CHAT, {**BODY, "seed": 1}, headers=KEY)
        assert (status, body["error"]["code"]) == (422, "idempotency_key_reused")
        for bad in ("", "x" * 256, "é"):
            status, body = await servers.here.post(
                CHAT, BODY, headers={"Idempotency-Key": bad.encode().decode("latin-1")}
            )
            assert (status, body["error"]["param"]) == (400, "Idempotency-Key")


async def test_keys_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(idempotency, "MAX_KEYS", 2)
    async with pair() as servers:
        servers.gate.set()
        answers = [
            await servers.here.post(CHAT, BODY, headers={"Idempotency-Key": key})
            for key in ("one", "two", "three", "one")
        ]
        assert [status for status, _ in answers] == [200, 200, 429, 200]
        assert answers[0] == answers[3]


async def test_a_refused_request_may_be_sent_again() -> None:
    async with pair() as servers:
        servers.gate.set()
        servers.here.app[TURNS].draining = True
        assert (await servers.here.post(CHAT, BODY, headers=KEY))[0] == 503
        servers.here.app[TURNS].draining = False
        assert (await servers.here.post(CHAT, BODY, headers=KEY))[0] == 200


async def test_a_conversation_is_made_once() -> None:
    async with pair() as servers:
        made = [
            await server.post("/v1/conversations", {"metadata": {"a": "b"}}, headers=KEY)
            for server in (servers.here, servers.there, servers.here)
        ]
        assert made[0] == made[1] == made[2]
        assert made[0][0] == 200
        other = await servers.here.post("/v1/conversations", {"metadata": {"a": "b"}})
        assert other[1]["id"] != made[0][1]["id"]


@pytest.mark.parametrize(
    "wrong", ["linger", "linger=", "linger=-1", "linger=9999", "stay", 3, [], {"linger": "x"}, {}]
)
async def test_wrong_contracts_are_refused(wrong: Any) -> None:
    async with serving() as server:
        status, body = await server.post(CHAT, {**BODY, "on_disconnect": wrong})
        assert status == 400
        assert body["error"]["param"].startswith("on_disconnect")
        assert not server.engine.requests


async def test_readers_of_a_server_that_ends_are_sent_on() -> None:
    """Their connections end without a terminal event, and the other server has the rest."""
    async with pair() as servers:
        here, there = servers.here, servers.there
        here.app[STORE].kind = StoreKind.REDIS
        stream_id, answer = await begin(here, on_disconnect="linger=60")
        socket = await here.client.ws_connect("/v1/responses")
        create = {"type": "response.create", "model": "scripted", "input": "hi"}
        await socket.send_json(create)
        events = [await socket.receive_json()]
        while events[-1]["type"] != "response.output_text.delta":
            events.append(await socket.receive_json())
        whole = asyncio.create_task(here.client.post(CHAT, json=BODY))
        while here.app[TURNS].live < 3:
            await asyncio.sleep(0)
        await here.app[TURNS].drain(0.0)
        message = await socket.receive()
        while message.type is aiohttp.WSMsgType.TEXT:
            events.append(message.json())
            message = await socket.receive()
        assert message.data == aiohttp.WSCloseCode.SERVICE_RESTART
        rest = [chunk async for *_, chunk in read_events(answer)]
        assert not any(chunk["choices"][0]["finish_reason"] for chunk in rest)
        refused = await whole
        assert refused.status == 503
        assert (await refused.json())["error"]["code"] == "server_draining"
        await there.app[TAKEOVER].scan()
        servers.gate.set()
        path = f"/v1/responses/{events[0]['response']['id']}?stream=true"
        headers = {"Last-Event-ID": str(events[-1]["sequence_number"])}
        more = await there.client.get(path, headers=headers)
        events += [event async for *_, event in read_events(more)]
        assert [event["sequence_number"] for event in events] == list(range(len(events)))
        assert events[-1]["response"]["output"][0]["content"][0]["text"] == "hello"
        again = await there.client.get(f"{CHAT}/{stream_id}")
        assert (await again.json())["choices"][0]["message"]["content"] == "hello"
        await here.idle()
        await there.idle()


async def test_a_response_that_the_store_lost_while_it_ran_is_there_again() -> None:
    """Its record comes back with its log, though nothing is written meanwhile."""
    async with pair() as servers:
        here, there = servers.here, servers.there
        body = {"model": "scripted", "input": "hi", "background": True}
        async with here.client.post("/v1/responses", json=body) as answer:
            path = f"/v1/responses/{(await answer.json())['id']}"
        await here.app[STORE].redis.flushall()
        shown = await there.client.get(path)
        async with asyncio.timeout(20):
            while shown.status != 200:
                await asyncio.sleep(0.05)
                shown = await there.client.get(path)
        assert (await shown.json())["status"] == "in_progress"
        servers.gate.set()
        answer = await there.client.get(f"{path}?stream=true")
        events = [event async for *_, event in read_events(answer)]
        assert [event["sequence_number"] for event in events] == list(range(len(events)))
        assert (await (await there.client.get(path)).json())["status"] == "completed"
        await here.idle()
