"""The official openai SDK against the Responses API: its types, its streams, its WebSocket."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import openai
import pytest
from openai.types.conversations import Conversation, ConversationItemList
from openai.types.responses import Response, ResponseStreamEvent
from pydantic import TypeAdapter

from tests.server.scripted import ScriptedEngine, say
from tests.server.serving import Served, serving


@pytest.fixture
async def server() -> AsyncIterator[Served]:
    async with serving(ScriptedEngine(say("héllo"))) as running:
        yield running


@pytest.fixture
async def client(server: Served) -> AsyncIterator[openai.AsyncOpenAI]:
    async with openai.AsyncOpenAI(
        base_url=f"{server.url}/v1", api_key="none", max_retries=0
    ) as running:
        yield running


async def test_whole_answer_is_valid_by_the_sdks_types(client: openai.AsyncOpenAI) -> None:
    answer = await client.responses.create(model="scripted", input="hi", metadata={"a": "b"})
    assert answer.output_text == "héllo"
    Response.model_validate(answer.to_dict())
    assert answer.usage is not None
    assert answer.usage.total_tokens == answer.usage.input_tokens + answer.usage.output_tokens
    stored = await client.responses.retrieve(answer.id)
    assert stored.output_text == "héllo"
    items = await client.responses.input_items.list(answer.id)
    assert len(items.data) == 1
    await client.responses.delete(answer.id)
    with pytest.raises(openai.NotFoundError):
        await client.responses.retrieve(answer.id)


async def test_every_event_is_valid_by_the_sdks_types(client: openai.AsyncOpenAI) -> None:
    adapter: TypeAdapter[Any] = TypeAdapter(ResponseStreamEvent)
    stream = await client.responses.create(
        model="scripted", input="hi", stream=True, include=["message.output_text.logprobs"]
    )
    types = []
    async for event in stream:
        adapter.validate_python(event.to_dict())
        types.append(event.type)
    assert types[0] == "response.created"
    assert types[-1] == "response.completed"


async def test_stream_helper(client: openai.AsyncOpenAI) -> None:
    async with client.responses.stream(model="scripted", input="hi") as stream:
        text = ""
        async for event in stream:
            if event.type == "response.output_text.delta":
                text += event.delta
        final = await stream.get_final_response()
    assert text == final.output_text == "héllo"


async def test_stream_is_picked_up_again(client: openai.AsyncOpenAI) -> None:
    stream = await client.responses.create(model="scripted", input="hi", stream=True)
    seen = []
    async for event in stream:
        seen.append(event)
        if len(seen) == 4:
            break
    await stream.close()
    first: Any = seen[0]
    rest = await client.responses.retrieve(
        first.response.id, stream=True, starting_after=seen[-1].sequence_number
    )
    seen += [event async for event in rest]
    assert [event.sequence_number for event in seen] == list(range(len(seen)))
    assert seen[-1].type == "response.completed"


async def test_websocket(client: openai.AsyncOpenAI) -> None:
    async with client.responses.connect() as connection:
        for _ in range(2):
            await connection.response.create(model="scripted", input="hi")
            text = ""
            async for event in connection:
                if event.type == "response.output_text.delta":
                    text += event.delta
                if event.type == "response.completed":
                    assert event.response.output_text == text == "héllo"
                    break
        await connection.response.create(model="scripted", input=[])
        async for event in connection:
            assert event.type == "error"
            assert event.status == 400
            assert event.error.param == "input"
            break


async def test_conversations(client: openai.AsyncOpenAI) -> None:
    conversation = await client.conversations.create(
        metadata={"title": "x"}, items=[{"role": "user", "content": "hi", "type": "message"}]
    )
    Conversation.model_validate(conversation.to_dict())
    await client.responses.create(model="scripted", input="more", conversation=conversation.id)
    items = await client.conversations.items.list(conversation.id, order="asc")
    ConversationItemList.model_validate(
        {"data": [item.to_dict() for item in items.data]}
        | {"object": "list", "has_more": False, "first_id": "a", "last_id": "b"}
    )
    assert len(items.data) == 3
    updated = await client.conversations.update(conversation.id, metadata={"title": "y"})
    assert updated.metadata == {"title": "y"}
    deleted = await client.conversations.delete(conversation.id)
    assert deleted.deleted


async def test_errors_are_the_sdks_own(client: openai.AsyncOpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as unknown:
        await client.responses.create(model="gpt", input="hi")
    assert unknown.value.param == "model"
    assert unknown.value.request_id
    with pytest.raises(openai.BadRequestError) as wrong:
        await client.responses.create(model="scripted", input="hi", temperature=7)
    assert wrong.value.param == "temperature"


async def test_synchronous_client(server: Served) -> None:
    def talk() -> tuple[str, str]:
        with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none") as client:
            whole = client.responses.create(model="scripted", input="hi").output_text
            with client.responses.stream(model="scripted", input="hi") as stream:
                streamed = stream.get_final_response().output_text
        return whole, streamed

    assert await asyncio.to_thread(talk) == ("héllo", "héllo")
