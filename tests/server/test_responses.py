"""/v1/responses over HTTP: whole, streamed, resumed, cancelled, deleted, chained."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from server.state import TURNS
from tests.server.scripted import Script, ScriptedEngine, say
from tests.server.serving import Served, read_events, serving

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


async def answer_id(server: Served, **fields: Any) -> str:
    status, body = await server.post("/v1/responses", {**BODY, **fields})
    assert status == 200, body
    return str(body["id"])


async def test_stored_answer_can_be_read_and_deleted() -> None:
    async with serving(ScriptedEngine(say("hello"))) as server:
        response_id = await answer_id(server, metadata={"a": "b"}, instructions="be kind")
        status, body = await server.get(f"/v1/responses/{response_id}")
        assert (status, body["status"], body["metadata"]) == (200, "completed", {"a": "b"})
        assert body["instructions"] == "be kind"
        _, items = await server.get(f"/v1/responses/{response_id}/input_items")
        assert [item["content"][0]["text"] for item in items["data"]] == ["hi"]
        assert (await server.delete(f"/v1/responses/{response_id}"))[1]["deleted"] is True
        for path in ("", "/input_items", "?stream=true"):
            status, body = await server.get(f"/v1/responses/{response_id}{path}")
            assert (status, body["error"]["code"]) == (404, "response_not_found")
        assert (await server.delete(f"/v1/responses/{response_id}"))[0] == 404


async def test_unstored_answer_cannot_be_read() -> None:
    async with serving(ScriptedEngine(say("hello"))) as server:
        response_id = await answer_id(server, store=False)
        assert (await server.get(f"/v1/responses/{response_id}"))[0] == 404
        status, body = await server.post(
            "/v1/responses", {**BODY, "previous_response_id": response_id}
        )
        assert (status, body["error"]["code"]) == (400, "previous_response_not_found")


async def test_resumed_stream_is_what_was_missed() -> None:
    async with serving(ScriptedEngine(say("hello"))) as server:
        all_events = await server.stream("/v1/responses", BODY)
        path = f"/v1/responses/{all_events[0]['response']['id']}?stream=true"
        for after in (0, 3, len(all_events) - 1, len(all_events) + 5):
            for options in (
                {"url": f"{path}&starting_after={after}"},
                {"url": path, "headers": {"Last-Event-ID": str(after)}},
            ):
                async with server.client.get(**options) as answer:
                    got = [data async for _, _, data in read_events(answer)]
                assert got == all_events[after + 1 :]


async def test_two_readers_of_a_running_turn_see_the_same() -> None:
    hold = asyncio.Event()
    async with serving(ScriptedEngine(say("hello", hold=hold))) as server:
        async with server.client.post("/v1/responses", json={**BODY, "stream": True}) as first:
            frames = read_events(first)
            _, _, created = await anext(frames)
            path = f"/v1/responses/{created['response']['id']}"
            async with server.client.get(f"{path}?stream=true") as second:
                others = read_events(second)
                assert (await anext(others))[2] == created
                status, body = await server.get(path)
                assert (status, body["status"]) == (200, "in_progress")
                hold.set()
                rest = [data async for _, _, data in frames]
                assert [data async for _, _, data in others] == rest
        await server.idle()


async def test_stored_turn_goes_on_without_its_client_and_can_be_picked_up() -> None:
    hold = asyncio.Event()
    async with serving(ScriptedEngine(say("hello", hold=hold))) as server:
        async with server.client.post("/v1/responses", json={**BODY, "stream": True}) as answer:
            seen = [(await anext(read_events(answer)))[2]]
        response_id = seen[0]["response"]["id"]
        hold.set()
        path = f"/v1/responses/{response_id}?stream=true&starting_after=0"
        async with server.client.get(path) as answer:
            seen += [data async for _, _, data in read_events(answer)]
        assert [data["sequence_number"] for data in seen] == list(range(len(seen)))
        assert seen[-1]["type"] == "response.completed"


@pytest.mark.parametrize("fields", [{"store": False}, {"on_disconnect": "cancel"}])
@pytest.mark.parametrize("stream", [True, False])
async def test_turn_ends_with_its_client_where_that_is_the_rule(
    fields: dict[str, Any], stream: bool
) -> None:
    engine = ScriptedEngine(say("hello", hold=asyncio.Event()))
    async with serving(engine) as server:
        post = asyncio.ensure_future(
            server.client.post("/v1/responses", json={**BODY, **fields, "stream": stream})
        )
        while not engine.requests:
            await asyncio.sleep(0)
        if stream:
            (await post).close()
        else:
            post.cancel()
            await asyncio.gather(post, return_exceptions=True)
        await server.idle()
        assert engine.aborted == [engine.requests[0].request_id]


async def test_cancel_is_idempotent() -> None:
    hold = asyncio.Event()
    async with serving(ScriptedEngine(say("hello", hold=hold))) as server:
        status, body = await server.post("/v1/responses", {**BODY, "background": True})
        assert (status, body["status"], body["background"]) == (200, "in_progress", True)
        path = f"/v1/responses/{body['id']}/cancel"
        for _ in range(2):
            status, body = await server.post(path, None)
            assert (status, body["status"]) == (200, "cancelled")
        hold.set()
        done = await answer_id(server)
        status, body = await server.post(f"/v1/responses/{done}/cancel", None)
        assert (status, body["status"]) == (200, "completed")
        assert (await server.post("/v1/responses/resp_0/cancel", None))[0] == 404
        await server.idle()


async def test_deleting_a_running_response_ends_it() -> None:
    engine = ScriptedEngine(say("hello", hold=asyncio.Event()))
    async with serving(engine) as server:
        _, body = await server.post("/v1/responses", {**BODY, "background": True})
        assert (await server.delete(f"/v1/responses/{body['id']}"))[0] == 200
        await server.idle()
        assert (await server.get(f"/v1/responses/{body['id']}"))[0] == 404


def prompt_of(engine: ScriptedEngine, number: int = -1) -> str:
    """The rendered prompt, message openings as ``|``."""
    return bytes(
        token if token < 256 else 124 for token in engine.requests[number].prompt_ids
    ).decode()


async def test_chain_of_responses_carries_history_but_not_instructions() -> None:
    engine = ScriptedEngine(say("yes"))
    async with serving(engine) as server:
        first = await answer_id(server, instructions="be kind")
        assert prompt_of(engine) == "|system: be kind\n|user: hi\n|"
        second = await answer_id(server, previous_response_id=first, input="more")
        third = await answer_id(server, previous_response_id=second, input="again")
        assert prompt_of(engine) == (
            "|user: hi\n|assistant: yes\n|user: more\n|assistant: yes\n|user: again\n|"
        )
        fork = await answer_id(server, previous_response_id=first, input="fork")
        assert prompt_of(engine) == "|user: hi\n|assistant: yes\n|user: fork\n|"
        await server.delete(f"/v1/responses/{first}")
        for broken in (third, fork, first):
            status, body = await server.post(
                "/v1/responses", {**BODY, "previous_response_id": broken}
            )
            assert (status, body["error"]["param"]) == (400, "previous_response_id")


async def test_running_response_cannot_be_followed_on() -> None:
    hold = asyncio.Event()
    async with serving(ScriptedEngine(say("yes", hold=hold))) as server:
        _, body = await server.post("/v1/responses", {**BODY, "background": True})
        status, body = await server.post(
            "/v1/responses", {**BODY, "previous_response_id": body["id"]}
        )
        assert (status, body["error"]["code"]) == (400, "previous_response_in_progress")
        hold.set()


async def test_items_of_all_shapes() -> None:
    engine = ScriptedEngine(say("ok"))
    async with serving(engine) as server:
        await answer_id(
            server,
            input=[
                {"role": "developer", "content": "rule"},
                {"type": "message", "role": "user", "content": "one"},
                {
                    "role": "assistant",
                    "id": "msg_x",
                    "status": "completed",
                    "content": [{"type": "output_text", "text": "two", "annotations": []}],
                },
                {
                    "role": "user",
                    "content": [
                        {"type": "input_text", "text": "three"},
                        {"type": "input_text", "text": "four"},
                    ],
                },
            ],
        )
        assert prompt_of(engine) == (
            "|system: rule\n|user: one\n|assistant: two\n|user: three\nfour\n|"
        )


async def test_sampling_reaches_the_engine() -> None:
    engine = ScriptedEngine(say("ok"))
    async with serving(engine) as server:
        await answer_id(
            server,
            max_output_tokens=9,
            temperature=0,
            top_p=0.5,
            top_k=3,
            min_p=0.1,
            seed=11,
            repetition_penalty=1.1,
            ignore_eos=True,
            min_tokens=2,
            stop_token_ids=[5],
        )
        sampling = engine.requests[0].sampling
        assert (sampling.max_tokens, sampling.temperature, sampling.top_p) == (9, 0.0, 0.5)
        assert (sampling.top_k, sampling.min_p, sampling.seed) == (3, 0.1, 11)
        assert sampling.repetition_penalty == 1.1
        assert (sampling.ignore_eos, sampling.min_tokens) == (True, 2)
        assert sampling.stop_token_ids == (5,)
        assert sampling.logprobs is None


async def test_logprobs_where_they_are_asked_for() -> None:
    async with serving(ScriptedEngine(say("ok"))) as server:
        _, body = await server.post(
            "/v1/responses",
            {**BODY, "include": ["message.output_text.logprobs"], "top_logprobs": 2},
        )
        entries = body["output"][0]["content"][0]["logprobs"]
        assert [entry["token"] for entry in entries] == ["o", "k", ""]
        assert all(len(entry["top_logprobs"]) == 2 for entry in entries)


async def test_limit_makes_an_incomplete_response() -> None:
    async with serving(ScriptedEngine(say("hello"))) as server:
        _, body = await server.post("/v1/responses", {**BODY, "max_output_tokens": 2})
        assert body["status"] == "incomplete"
        assert body["incomplete_details"] == {"reason": "max_output_tokens"}


async def test_engine_death_is_a_failed_response() -> None:
    script = Script(steps=[[97], [98]], dies_after=1)
    async with serving(ScriptedEngine(script)) as server:
        _, body = await server.post("/v1/responses", BODY)
        assert (body["status"], body["error"]["code"]) == ("failed", "engine_died")
        events = await server.stream("/v1/responses", BODY)
        assert events[-1]["type"] == "response.failed"


BAD: list[tuple[dict[str, Any], int, str | None]] = [
    ({"model": None}, 400, "model"),
    ({"model": 7}, 400, "model"),
    ({"model": "gpt"}, 404, "model"),
    ({"input": None}, 400, "input"),
    ({"input": ""}, 400, "input"),
    ({"input": []}, 400, "input"),
    ({"input": 3}, 400, "input"),
    ({"input": {"role": "user"}}, 400, "input"),
    ({"input": ["x"]}, 400, "input[0]"),
    ({"input": [{"content": "x"}]}, 400, "input[0].role"),
    ({"input": [{"role": "robot", "content": "x"}]}, 400, "input[0].role"),
    ({"input": [{"role": "user"}]}, 400, "input[0].content"),
    ({"input": [{"role": "user", "content": 5}]}, 400, "input[0].content"),
    ({"input": [{"role": "user", "content": []}]}, 400, "input[0].content"),
    ({"input": [{"type": "web_search_call"}]}, 400, "input[0].type"),
    (
        {"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "x"}]}]},
        400,
        "input[0].content[0].type",
    ),
    (
        {"input": [{"role": "user", "content": [{"type": "input_text", "text": 1}]}]},
        400,
        "input[0].content[0].text",
    ),
    ({"input": "x" * 5000}, 400, "input"),
    ({"instructions": 4}, 400, "instructions"),
    ({"tools": [{"type": "web_search"}]}, 400, "tools[0].type"),
    ({"tool_choice": "required"}, 400, "tool_choice"),
    ({"text": {"format": {"type": "json_object"}}}, 400, "text.format.type"),
    ({"text": 1}, 400, "text"),
    ({"prompt": {"id": "x"}}, 400, "prompt"),
    ({"max_output_tokens": 0}, 400, "max_output_tokens"),
    ({"max_output_tokens": True}, 400, "max_output_tokens"),
    ({"max_output_tokens": 1.5}, 400, "max_output_tokens"),
    ({"temperature": 3}, 400, "temperature"),
    ({"temperature": "hot"}, 400, "temperature"),
    ({"top_p": 0}, 400, "top_p"),
    ({"top_k": "x"}, 400, "top_k"),
    ({"top_logprobs": 21}, 400, "top_logprobs"),
    ({"include": ["everything"]}, 400, "include[0]"),
    ({"include": "logprobs"}, 400, "include"),
    ({"metadata": {"a": 1}}, 400, "metadata"),
    ({"metadata": {"a" * 65: "1"}}, 400, "metadata"),
    ({"metadata": {str(number): "1" for number in range(17)}}, 400, "metadata"),
    ({"truncation": "always"}, 400, "truncation"),
    ({"store": "yes"}, 400, "store"),
    ({"stream": 1}, 400, "stream"),
    ({"background": True, "store": False}, 400, "background"),
    ({"background": True, "on_disconnect": "cancel"}, 400, "on_disconnect"),
    ({"on_disconnect": "explode"}, 400, "on_disconnect"),
    ({"previous_response_id": "resp_0"}, 400, "previous_response_id"),
    ({"previous_response_id": "a", "conversation": "b"}, 400, "previous_response_id"),
    ({"conversation": "conv_0"}, 404, None),
    ({"conversation": {}}, 400, "conversation.id"),
    ({"stop_token_ids": [9999]}, 400, "stop_token_ids[0]"),
    ({"stop": ""}, 400, "stop"),
    ({"seed": 0.5}, 400, "seed"),
    ({"max_output_token": 5}, 400, "max_output_token"),
]


@pytest.mark.parametrize(
    ("fields", "status", "param"), BAD, ids=[f"{n}-{next(iter(b[0]))}" for n, b in enumerate(BAD)]
)
async def test_bad_bodies(fields: dict[str, Any], status: int, param: str | None) -> None:
    async with serving() as server:
        got, body = await server.post("/v1/responses", {**BODY, **fields})
        assert got == status, body
        error = body["error"]
        assert error["param"] == param
        assert error["message"]
        assert error["type"] in ("invalid_request_error", "not_found_error")
        assert not server.engine.requests
        await server.idle()


@pytest.mark.parametrize("query", ["starting_after=-1", "starting_after=x", "stream=maybe"])
async def test_bad_queries(query: str) -> None:
    async with serving(ScriptedEngine(say("a"))) as server:
        response_id = await answer_id(server)
        path = f"/v1/responses/{response_id}?stream=true&{query}"
        if query.startswith("stream"):
            path = f"/v1/responses/{response_id}?{query}"
        assert (await server.get(path))[0] == 400


async def test_plain_get_is_told_about_the_socket() -> None:
    async with serving() as server:
        status, body = await server.get("/v1/responses")
        assert (status, body["error"]["code"]) == (405, "method_not_allowed")


async def test_silence_is_filled_with_comments() -> None:
    hold = asyncio.Event()
    async with serving(ScriptedEngine(say("hello", hold=hold)), keepalive_s=0.02) as server:
        async with server.client.post("/v1/responses", json={**BODY, "stream": True}) as answer:
            async for line in answer.content:
                if line.startswith(b": "):
                    hold.set()
            assert hold.is_set()
        assert server.app[TURNS].live == 0
