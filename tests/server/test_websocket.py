"""The WebSocket of the Responses API: lanes, cancels, faults, departures."""

from __future__ import annotations

import asyncio
import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from tests.server.scripted import Script, ScriptedEngine, say
from tests.server.serving import serving

CREATE = {"type": "response.create", "model": "scripted", "input": "hi"}
TERMINAL = ("response.completed", "response.incomplete", "response.failed", "response.cancelled")


async def events_until_end(socket: Any) -> list[dict[str, Any]]:
    events: list[dict[str, Any]] = []
    while not events or events[-1]["type"] not in TERMINAL:
        events.append(await socket.receive_json())
    return events


def text_of(events: list[dict[str, Any]]) -> str:
    return "".join(event.get("delta", "") for event in events)


async def test_turns_one_after_the_other() -> None:
    async with serving(ScriptedEngine(say("héllo"))) as server:
        async with server.client.ws_connect("/v1/responses") as socket:
            for _ in range(2):
                await socket.send_json(CREATE)
            for _ in range(2):
                events = await events_until_end(socket)
                assert [event["sequence_number"] for event in events] == list(range(len(events)))
                assert text_of(events) == "héllo"
                assert not any("stream_id" in event for event in events)
        await server.idle()


async def test_lanes_run_at_once_and_are_told_apart() -> None:
    engine = ScriptedEngine(
        lambda request: say(bytes(request.prompt_ids[7:-2]).decode() * 5), step_s=0.002
    )
    async with serving(engine) as server:
        async with server.client.ws_connect("/v1/responses") as socket:
            names = [f'lane "{number}" é' for number in range(8)]
            for number, name in enumerate(names):
                await socket.send_json({**CREATE, "input": str(number), "stream_id": name})
            lanes: dict[str, list[dict[str, Any]]] = defaultdict(list)
            order: list[str] = []
            while len([name for name in names if _ended(lanes[name])]) < len(names):
                event = await socket.receive_json()
                lanes[event["stream_id"]].append(event)
                order.append(event["stream_id"])
        for number, name in enumerate(names):
            events = lanes[name]
            assert [event["sequence_number"] for event in events] == list(range(len(events)))
            assert text_of(events) == str(number) * 5
        assert order != sorted(order), "the lanes ran one after the other"
        await server.idle()


def _ended(events: list[dict[str, Any]]) -> bool:
    return bool(events) and events[-1]["type"] in TERMINAL


@pytest.mark.parametrize("how", ["response_id", "stream_id", "neither"])
async def test_cancel(how: str) -> None:
    engine = ScriptedEngine(say("abc", hold=asyncio.Event()))
    async with serving(engine) as server:
        async with server.client.ws_connect("/v1/responses") as socket:
            lane = {"stream_id": "x"} if how == "stream_id" else {}
            await socket.send_json({**CREATE, **lane})
            created = await socket.receive_json()
            named = {"response_id": created["response"]["id"]} if how == "response_id" else lane
            await socket.send_json({"type": "response.cancel", **named})
            events = await events_until_end(socket)
            assert events[-1]["type"] == "response.cancelled"
            await socket.send_json({"type": "response.cancel", **named})
            error = await socket.receive_json()
            assert (error["type"], error["status"]) == ("error", 404)
        await server.idle()


MESSAGES: list[tuple[Any, str | None]] = [
    ("{", "invalid_json"),
    ("", "invalid_json"),
    ("[]", None),
    ('"response.create"', None),
    ("{}", "missing_required_parameter"),
    ({"type": 3}, "invalid_value"),
    ({"type": "response.explode"}, "invalid_value"),
    ({**CREATE, "stream_id": 4}, "invalid_type"),
    ({**CREATE, "stream_id": ""}, "empty_string"),
    ({**CREATE, "model": "gpt"}, "model_not_found"),
    ({**CREATE, "input": None}, "missing_required_parameter"),
    ({**CREATE, "temperature": 9}, "invalid_value"),
    ({**CREATE, "background": True}, None),
    ({**CREATE, "previous_response_id": "resp_0"}, "previous_response_not_found"),
    ({**CREATE, "conversation": "conv_0"}, "conversation_not_found"),
    ({"type": "response.cancel", "response_id": "resp_0"}, "response_not_found"),
    (b"\x00\x01", "invalid_message"),
]


@pytest.mark.parametrize(("message", "code"), MESSAGES)
async def test_bad_messages_are_answered_and_the_connection_stays(
    message: Any, code: str | None
) -> None:
    async with serving(ScriptedEngine(say("ok"))) as server:
        async with server.client.ws_connect("/v1/responses") as socket:
            if isinstance(message, bytes):
                await socket.send_bytes(message)
            else:
                await socket.send_str(message if isinstance(message, str) else json.dumps(message))
            error = await socket.receive_json()
            assert error["type"] == "error"
            assert error["status"] >= 400
            assert error["error"]["code"] == code
            assert error["error"]["message"]
            await socket.send_json(CREATE)
            assert text_of(await events_until_end(socket)) == "ok"
        await server.idle()


async def test_error_goes_to_its_lane() -> None:
    async with serving() as server, server.client.ws_connect("/v1/responses") as socket:
        await socket.send_json({**CREATE, "input": [], "stream_id": "x"})
        error = await socket.receive_json()
        assert (error["stream_id"], error["error"]["param"]) == ("x", "input")


async def test_lanes_and_queues_are_bounded() -> None:
    hold = asyncio.Event()
    engine = ScriptedEngine(say("ab", hold=hold))
    async with serving(engine, max_lanes=2) as server:
        async with server.client.ws_connect("/v1/responses") as socket:
            for name in ("a", "b", "c"):
                await socket.send_json({**CREATE, "stream_id": name})
            assert (await _next_error(socket))["code"] == "too_many_lanes"
            for _ in range(18):
                await socket.send_json({**CREATE, "stream_id": "a"})
            assert (await _next_error(socket))["code"] == "too_many_requests"
            hold.set()
        await server.idle()


async def _next_error(socket: Any) -> dict[str, Any]:
    while True:
        event = await socket.receive_json()
        if event["type"] == "error":
            return dict(event["error"])


async def test_unstored_response_can_be_followed_on_the_same_connection_only() -> None:
    engine = ScriptedEngine(say("yes"))
    async with serving(engine) as server:
        create = {**CREATE, "store": False}
        async with server.client.ws_connect("/v1/responses") as socket:
            await socket.send_json(create)
            first = (await events_until_end(socket))[-1]["response"]["id"]
            await socket.send_json({**create, "input": "two", "previous_response_id": first})
            second = (await events_until_end(socket))[-1]["response"]["id"]
            await socket.send_json({**create, "input": "three", "previous_response_id": second})
            await events_until_end(socket)
            prompt = bytes(i if i < 256 else ord("|") for i in engine.requests[-1].prompt_ids)
            assert prompt == (
                b"|user: hi\n|assistant: yes\n|user: two\n|assistant: yes\n|user: three\n|"
            )
        async with server.client.ws_connect("/v1/responses") as socket:
            await socket.send_json({**create, "previous_response_id": second})
            error = await socket.receive_json()
            assert error["error"]["code"] == "previous_response_not_found"


@pytest.mark.parametrize(("store", "ends_as"), [(True, "completed"), (False, "cancelled")])
async def test_departure(store: bool, ends_as: str) -> None:
    hold = asyncio.Event()
    engine = ScriptedEngine(say("hello", hold=hold))
    async with serving(engine) as server:
        async with server.client.ws_connect("/v1/responses") as socket:
            await socket.send_json({**CREATE, "store": store})
            response_id = (await socket.receive_json())["response"]["id"]
        if store:
            hold.set()
        await server.idle()
        if store:
            _, body = await server.get(f"/v1/responses/{response_id}")
            assert (body["status"], body["output"][0]["content"][0]["text"]) == (ends_as, "hello")
        else:
            assert engine.aborted == [engine.requests[0].request_id]


async def test_engine_death_ends_the_turn_not_the_connection() -> None:
    scripts = [Script(steps=[[97], [98]], dies_after=1), say("ok")]
    engine = ScriptedEngine(lambda _: scripts.pop(0))
    async with serving(engine) as server, server.client.ws_connect("/v1/responses") as socket:
        await socket.send_json(CREATE)
        assert (await events_until_end(socket))[-1]["type"] == "response.failed"
        await socket.send_json(CREATE)
        assert text_of(await events_until_end(socket)) == "ok"


async def test_message_that_is_too_large_closes() -> None:
    served = serving(max_body_bytes=1000)
    async with served as server, server.client.ws_connect("/v1/responses") as socket:
        await socket.send_json({**CREATE, "input": "x" * 2000})
        message = await socket.receive()
        assert message.type is aiohttp.WSMsgType.CLOSE
        assert message.data == aiohttp.WSCloseCode.MESSAGE_TOO_BIG


@pytest.mark.parametrize(
    ("origin", "allowed"),
    [("http://evil.example", False), ("null", False), ("http://good.example", True), (None, True)],
)
async def test_origins(origin: str | None, allowed: bool) -> None:
    headers = {} if origin is None else {"Origin": origin}
    async with serving(
        ScriptedEngine(say("ok")), allowed_origins=("http://good.example",)
    ) as server:
        if allowed:
            async with server.client.ws_connect("/v1/responses", headers=headers) as socket:
                await socket.send_json(CREATE)
                assert text_of(await events_until_end(socket)) == "ok"
        else:
            with pytest.raises(aiohttp.WSServerHandshakeError) as refused:
                await server.client.ws_connect("/v1/responses", headers=headers)
            assert refused.value.status == 403


async def test_own_page_may_connect_with_a_key_as_subprotocol(tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    keys.write_text("sesame\n")
    keys.chmod(0o600)
    async with serving(ScriptedEngine(say("ok")), api_key_file=keys) as server:
        headers = {"Origin": server.url}
        with pytest.raises(aiohttp.WSServerHandshakeError) as refused:
            await server.client.ws_connect("/v1/responses", headers=headers)
        assert refused.value.status == 401
        async with server.client.ws_connect(
            "/v1/responses", headers=headers, protocols=("millrace", "millrace-key.sesame")
        ) as socket:
            assert socket.protocol == "millrace"
            await socket.send_json(CREATE)
            assert text_of(await events_until_end(socket)) == "ok"


async def test_server_that_stops_says_so() -> None:
    async with serving() as server:
        socket = await server.client.ws_connect("/v1/responses")
        closing = asyncio.ensure_future(server.app.shutdown())
        message = await socket.receive()
        assert message.type is aiohttp.WSMsgType.CLOSE
        assert message.data == aiohttp.WSCloseCode.GOING_AWAY
        await closing
        await socket.close()


@pytest.mark.parametrize("body", [{"Content-Length": "5"}, {"Transfer-Encoding": "chunked"}])
async def test_an_upgrade_with_a_body_is_refused(body: dict[str, str]) -> None:
    async with serving() as server:
        # aiohttp's client would not send such a thing by itself.
        with pytest.raises(aiohttp.WSServerHandshakeError) as caught:
            await server.client.ws_connect("/v1/responses", headers=body)
        assert caught.value.status == 400
