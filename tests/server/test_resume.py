"""Streams of Chat Completions and Completions that are cut and go on: the rest, byte for byte."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Iterable
from typing import Any

import msgspec
import pytest

from server.dialects import chat, completions
from server.dialects.chat_answers import ChatStream
from server.dialects.completions import CompletionStream
from server.dialects.positions import (
    START,
    Placed,
    Position,
    read_position,
    stream_id_of,
    turn_id_of,
)
from server.events import Discontinuity, Event
from server.state import JOURNALS, STORE
from server.transports.sse import Frame, encode_frames
from tests.server.scripted import ScriptedEngine, say
from tests.server.serving import Served, memory_store, read_events, serving
from tests.server.turn_events import MODEL, TURN_ID, Answer, Step, failed_turn, logprob, turn_events

CHAT = "/v1/chat/completions"
TEXT = "/v1/completions"
BODIES: dict[str, dict[str, Any]] = {
    CHAT: {"model": "scripted", "messages": [{"role": "user", "content": "hi"}]},
    TEXT: {"model": "scripted", "prompt": "hi", "max_tokens": 64},
}
EVERYTHING = {
    "n": 2,
    "stream_options": {"include_usage": True, "continuous_usage_stats": True},
    "return_token_ids": True,
    "prompt_logprobs": 1,
}
SHAPES: list[tuple[str, dict[str, Any]]] = [
    (CHAT, {}),
    (CHAT, {"stream_options": {"include_usage": True}}),
    (CHAT, {**EVERYTHING, "logprobs": True, "top_logprobs": 2}),
    (TEXT, {}),
    (TEXT, {**EVERYTHING, "echo": True, "logprobs": 2}),
]


def _decode(ids: Iterable[int]) -> str:
    return "".join(chr(65 + token) for token in ids)


def projection(path: str, body: dict[str, Any]) -> Callable[[Event], Iterable[Frame]]:
    body = {**BODIES[path], "model": MODEL.name, "stream": True, **body}
    if path == CHAT:
        return ChatStream(chat.parse(body, MODEL), "fp").feed
    return CompletionStream(completions.parse(body, MODEL), "fp", _decode).feed


def numbered(events: list[Event]) -> list[Event]:
    for number, event in enumerate(events):
        msgspec.structs.force_setattr(event, "sequence_number", number)
    return events


def made_up_turn(seed: int) -> list[Event]:
    draw = random.Random(seed)
    if draw.random() < 0.2:
        return numbered(failed_turn())
    answers = []
    for _ in range(draw.choice([1, 2])):
        steps = [
            Step(text, [draw.randrange(20)], [logprob(text, -0.5, ("x", -1.0))])
            for text in draw.choices(["a", "", "é", "two words"], k=draw.randrange(5))
        ]
        answers.append(Answer(steps, draw.choice(["stop", "length"])))
    return turn_events(answers)


@pytest.mark.parametrize(("path", "body"), SHAPES)
@pytest.mark.parametrize("seed", range(8))
def test_the_rest_of_a_stream_is_what_was_left_to_send(
    path: str, body: dict[str, Any], seed: int
) -> None:
    events = made_up_turn(seed)
    prefix = "chatcmpl" if path == CHAT else "cmpl"
    stream_id = stream_id_of(prefix, TURN_ID)

    def frames(begin: Position) -> list[Frame]:
        placed = Placed(projection(path, body), stream_id, begin)
        return [frame for event in events for frame in placed.feed(event)]

    whole = frames(START)
    assert whole[-1].data == b"[DONE]"
    assert len({frame.id for frame in whole}) == len(whole)
    for received, frame in enumerate(whole, start=1):
        assert frame.id is not None
        begin = read_position(frame.id, stream_id)
        assert begin is not None
        assert encode_frames(frames(begin)) == encode_frames(whole[received:])


def test_positions() -> None:
    mine = "chatcmpl-" + "0" * 32
    assert read_position(f"{mine}:7", mine) == Position(8, 0)
    assert read_position(f"{mine}:7.2", mine) == Position(7, 2)
    assert read_position("7", mine) == Position(8, 0)
    for wrong in ("", "x", "-1", "7.", f"{mine}:", f"cmpl-{'0' * 32}:7", "9" * 20, "٣"):
        assert read_position(wrong, mine) is None
    assert turn_id_of("chatcmpl", mine) == "resp_" + "0" * 32
    for wrong in ("resp_" + "0" * 32, "cmpl-" + "0" * 32, "chatcmpl-0", "chatcmpl-" + "G" * 32):
        assert turn_id_of("chatcmpl", wrong) is None


def test_a_gap_is_told_and_ends_the_stream() -> None:
    events = turn_events([Answer([Step("a"), Step("b")])])
    gap = Discontinuity(sequence_number=4, first_lost=4, last_lost=4)
    placed = Placed(projection(CHAT, {}), "chatcmpl-x")
    frames = [frame for event in [*events[:4], gap, *events[5:]] for frame in placed.feed(event)]
    assert b'"code":"history_lost"' in frames[-2].data
    assert frames[-1].data == b"[DONE]"
    assert sum(frame.data == b"[DONE]" for frame in frames) == 1


async def read_some(server: Served, path: str, body: dict[str, Any], count: int) -> list[Any]:
    """Read so many frames of a new stream, and leave."""
    got = []
    answer = await server.client.post(path, json={**BODIES[path], "stream": True, **body})
    async for frame in read_events(answer):
        got.append(frame)
        if len(got) == count:
            break
    answer.close()
    return got


@pytest.mark.parametrize(("path", "body"), SHAPES)
@pytest.mark.parametrize("elsewhere", [False, True])
async def test_a_cut_stream_goes_on_live(path: str, body: dict[str, Any], elsewhere: bool) -> None:
    """On the server that runs the turn, or on another: first what is there, then what comes."""
    gate = asyncio.Event()

    def script(_: Any) -> Any:
        return say("Grüß Gott", hold=gate)

    store = await memory_store()
    body = {**body, "on_disconnect": "finish"}
    async with serving(ScriptedEngine(script), store) as here, serving(store=store) as there:
        first = await read_some(here, path, body, 1)
        stream_id = first[0][2]["id"]
        reader = there if elsewhere else here
        url = f"{path}/{stream_id}?stream=true"
        after_id = {"Last-Event-ID": str(first[0][1])}
        async with reader.client.get(url, headers=after_id) as resumed:
            assert resumed.status == 200, await resumed.text()
            gate.set()
            rest = [frame async for frame in read_events(resumed)]
        async with reader.client.get(url) as again:
            whole = [frame async for frame in read_events(again)]
        assert first + rest == whole
        assert whole[-1][2] == "[DONE]"
        for number in range(len(whole)):
            async with reader.client.get(
                url, headers={"Last-Event-ID": str(whole[number][1])}
            ) as cut:
                assert [frame async for frame in read_events(cut)] == whole[number + 1 :]
        status, answer = await reader.get(f"{path}/{stream_id}")
        assert (status, answer["id"]) == (200, stream_id)
    await store.close()


async def test_starting_after_an_event() -> None:
    async with serving(ScriptedEngine(say("abc"))) as server:
        whole = await read_some(server, CHAT, {}, 99)
        stream_id = whole[0][2]["id"]
        number = int(whole[1][1].rpartition(":")[2])
        url = f"{CHAT}/{stream_id}?stream=true&starting_after={number}"
        async with server.client.get(url) as rest:
            assert [frame async for frame in read_events(rest)] == whole[2:]


async def test_streams_belong_to_their_key(tmp_path: Any) -> None:
    keys = tmp_path / "keys"
    keys.write_text("key-one-1234567890\nkey-two-1234567890\n")
    keys.chmod(0o600)
    one, two = ({"Authorization": f"Bearer key-{name}-1234567890"} for name in ("one", "two"))
    async with serving(ScriptedEngine(say("abc")), api_key_file=keys, headers=one) as server:
        frames = await read_some(server, CHAT, {}, 99)
        stream_id = frames[0][2]["id"]
        for suffix in ("", "?stream=true"):
            assert (await server.get(f"{CHAT}/{stream_id}{suffix}", headers=two))[0] == 404
        assert (await server.post(f"{CHAT}/{stream_id}/cancel", None, headers=two))[0] == 404
        assert (await server.get(f"{CHAT}/{stream_id}"))[0] == 200
        # The same turn is no completion.
        assert (await server.get(f"{TEXT}/{stream_id}"))[0] == 404
        assert (await server.get(f"{TEXT}/{stream_id.replace('chatcmpl', 'cmpl')}"))[0] == 404
        status, body = await server.get(
            f"{CHAT}/{stream_id}?stream=true", headers={"Last-Event-ID": "cmpl-x:1"}
        )
        assert (status, body["error"]["param"]) == (400, "Last-Event-ID")
        store, journals = server.app[STORE], server.app[JOURNALS]
        assert 0 < await store.redis.ttl(journals.stored.view_key(f"resp_{stream_id[9:]}")) <= 600
        assert not await store.redis.exists(journals.stored.work_key(f"resp_{stream_id[9:]}"))
