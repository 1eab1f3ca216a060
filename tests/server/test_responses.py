"""/v1/responses over HTTP: whole, streamed, resumed, cancelled, deleted, chained."""

from __future__ import annotations

from tests.server.scripted import ScriptedEngine, say
from tests.server.serving import read_events, serving

BODY = {"model": "scripted", "input": "hi"}


async def test_whole_answer() -> None:
    async with serving(ScriptedEngine(say("Grüß dich"))) as server:
        status, body = await server.post("/v1/responses", BODY)
        assert status == 200
        assert body["status"] == "completed"
        assert body["object"] == "response"
        [message] = body["output"]
        assert message["role"] == "assistant"
        assert message["content"][0]["text"] == "Grüß dich"
        assert body["usage"]["output_tokens"] == len("Grüß dich".encode()) + 1
        await server.idle()


async def test_streamed_answer_is_dense_and_complete() -> None:
    async with serving(ScriptedEngine(say("Grüß dich"))) as server:
        async with server.client.post("/v1/responses", json={**BODY, "stream": True}) as answer:
            frames = [frame async for frame in read_events(answer)]
        assert [int(number or -1) for _, number, _ in frames] == list(range(len(frames)))
        assert all(event == data["type"] for event, _, data in frames)
        assert all(int(number or -1) == data["sequence_number"] for _, number, data in frames)
        types = [data["type"].removeprefix("response.") for _, _, data in frames]
        assert types[:4] == ["created", "in_progress", "output_item.added", "content_part.added"]
        assert types[-4:] == [
            "output_text.done",
            "content_part.done",
            "output_item.done",
            "completed",
        ]
        deltas = [data["delta"] for _, _, data in frames if data["type"].endswith("text.delta")]
        assert "".join(deltas) == "Grüß dich"
        await server.idle()
