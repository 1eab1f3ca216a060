"""The official ``openai`` package, unchanged, against a real server."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from typing import Any

import openai
import pytest
from openai import AsyncOpenAI, OpenAI
from openai.types.chat import ChatCompletionMessageParam

from tests.e2e.live import LiveServer

MODEL = "pebble"
MESSAGES: list[ChatCompletionMessageParam] = [
    {"role": "system", "content": "You are helpful."},
    {"role": "user", "content": "Hello, how are you?"},
]
GREEDY: dict[str, Any] = {"temperature": 0, "max_tokens": 24}


@pytest.fixture
def client(server: LiveServer) -> Iterator[OpenAI]:
    with OpenAI(base_url=f"{server.url}/v1", api_key="unused", max_retries=0) as client:
        yield client


@pytest.fixture
async def async_client(server: LiveServer) -> AsyncIterator[AsyncOpenAI]:
    async with AsyncOpenAI(base_url=f"{server.url}/v1", api_key="unused", max_retries=0) as client:
        yield client


@pytest.fixture(autouse=True)
def nothing_left(server: LiveServer) -> Iterator[None]:
    printed = len(server.log)
    yield
    server.assert_clean(printed)


class TestChat:
    def test_whole(self, client: OpenAI) -> None:
        answer = client.chat.completions.create(model=MODEL, messages=MESSAGES, **GREEDY)
        assert answer.object == "chat.completion"
        assert answer.model == MODEL
        choice = answer.choices[0]
        assert choice.message.role == "assistant"
        assert choice.message.content
        assert choice.finish_reason in ("stop", "length")
        assert answer.usage is not None
        assert 0 < answer.usage.completion_tokens <= 24
        assert answer.usage.prompt_tokens > 10

    def test_streamed_equals_whole(self, client: OpenAI) -> None:
        whole = client.chat.completions.create(model=MODEL, messages=MESSAGES, **GREEDY)
        stream = client.chat.completions.create(
            model=MODEL,
            messages=MESSAGES,
            stream=True,
            stream_options={"include_usage": True},
            **GREEDY,
        )
        chunks = list(stream)
        text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
        assert text == whole.choices[0].message.content
        assert chunks[0].choices[0].delta.role == "assistant"
        assert chunks[-2].choices[0].finish_reason == whole.choices[0].finish_reason
        assert chunks[-1].choices == []
        assert chunks[-1].usage is not None
        assert whole.usage is not None
        assert chunks[-1].usage.total_tokens == whole.usage.total_tokens

    def test_stream_helper(self, client: OpenAI) -> None:
        with client.chat.completions.stream(model=MODEL, messages=MESSAGES, **GREEDY) as stream:
            text = "".join(event.delta for event in stream if event.type == "content.delta")
            final = stream.get_final_completion()
        assert final.choices[0].message.content == text

    def test_several_answers(self, client: OpenAI) -> None:
        answer = client.chat.completions.create(
            model=MODEL, messages=MESSAGES, n=3, temperature=2, seed=5, max_tokens=24
        )
        again = client.chat.completions.create(
            model=MODEL, messages=MESSAGES, n=3, temperature=2, seed=5, max_tokens=24
        )
        texts = [choice.message.content for choice in answer.choices]
        assert [choice.index for choice in answer.choices] == [0, 1, 2]
        assert texts == [choice.message.content for choice in again.choices]
        assert len(set(texts)) > 1

    def test_stop_string(self, client: OpenAI) -> None:
        whole = client.chat.completions.create(model=MODEL, messages=MESSAGES, **GREEDY)
        text = whole.choices[0].message.content
        assert text is not None
        stop = text[len(text) // 2 :][:3]
        cut = client.chat.completions.create(model=MODEL, messages=MESSAGES, stop=stop, **GREEDY)
        assert cut.choices[0].message.content == text[: text.index(stop)]
        assert cut.choices[0].finish_reason == "stop"

    def test_logprobs(self, client: OpenAI) -> None:
        answer = client.chat.completions.create(
            model=MODEL, messages=MESSAGES, logprobs=True, top_logprobs=3, **GREEDY
        )
        choice = answer.choices[0]
        assert choice.logprobs is not None
        content = choice.logprobs.content
        assert content is not None
        assert answer.usage is not None
        assert len(content) == answer.usage.completion_tokens
        for entry in content:
            assert entry.logprob <= 0
            assert len(entry.top_logprobs) == 3
            # Greedy: what was taken is the likeliest.
            assert entry.logprob == pytest.approx(entry.top_logprobs[0].logprob)
        data = b"".join(bytes(entry.bytes or ()) for entry in content)
        assert (choice.message.content or "").strip() in data.decode()

    def test_length_limit(self, client: OpenAI) -> None:
        answer = client.chat.completions.create(
            model=MODEL,
            messages=MESSAGES,
            max_completion_tokens=3,
            extra_body={"ignore_eos": True, "return_token_ids": True},
        )
        assert answer.choices[0].finish_reason == "length"
        extra = answer.choices[0].model_extra
        assert extra is not None
        assert len(extra["token_ids"]) == 3
        assert answer.model_extra is not None
        assert answer.usage is not None
        assert len(answer.model_extra["prompt_token_ids"]) == answer.usage.prompt_tokens

    async def test_async(self, async_client: AsyncOpenAI) -> None:
        whole = await async_client.chat.completions.create(model=MODEL, messages=MESSAGES, **GREEDY)
        stream = await async_client.chat.completions.create(
            model=MODEL, messages=MESSAGES, stream=True, **GREEDY
        )
        text = "".join([chunk.choices[0].delta.content or "" async for chunk in stream])
        assert text == whole.choices[0].message.content

    async def test_leaving_a_stream_ends_the_turn(
        self, async_client: AsyncOpenAI, server: LiveServer
    ) -> None:
        name = "millrace_turns_total{dialect=chat,status=cancelled}"
        before = server.metrics().get(name, 0)
        stream = await async_client.chat.completions.create(
            model=MODEL,
            messages=MESSAGES,
            stream=True,
            max_tokens=3000,
            extra_body={"ignore_eos": True},
        )
        async for chunk in stream:
            if chunk.choices[0].delta.content:
                break
        await stream.close()
        assert server.idle_metrics()[name] == before + 1


class TestCompletions:
    def test_text_and_ids_agree(self, client: OpenAI) -> None:
        by_text = client.completions.create(
            model=MODEL,
            prompt="Once upon a time",
            logprobs=2,
            extra_body={"return_token_ids": True},
            **GREEDY,
        )
        choice = by_text.choices[0]
        assert choice.logprobs is not None
        assert choice.model_extra is not None
        ids = choice.model_extra["prompt_token_ids"]
        by_ids = client.completions.create(model=MODEL, prompt=ids, **GREEDY)
        assert by_ids.choices[0].text == choice.text
        assert by_text.usage is not None
        assert len(choice.logprobs.tokens or ()) == by_text.usage.completion_tokens

    def test_several_prompts_streamed(self, client: OpenAI) -> None:
        prompts = ["Once upon a time", "The sea"]
        whole = client.completions.create(model=MODEL, prompt=prompts, n=2, seed=1, max_tokens=8)
        texts = [""] * 4
        for chunk in client.completions.create(
            model=MODEL, prompt=prompts, n=2, seed=1, max_tokens=8, stream=True
        ):
            texts[chunk.choices[0].index] += chunk.choices[0].text
        assert texts == [choice.text for choice in whole.choices]

    def test_echo(self, client: OpenAI) -> None:
        answer = client.completions.create(
            model=MODEL, prompt="Once upon a time", echo=True, logprobs=0, max_tokens=4
        )
        choice = answer.choices[0]
        assert choice.text.startswith("Once upon a time")
        assert choice.logprobs is not None
        offsets, tokens = choice.logprobs.text_offset, choice.logprobs.tokens
        assert offsets is not None
        assert tokens is not None
        assert answer.usage is not None
        assert len(tokens) == answer.usage.total_tokens
        assert offsets == sorted(offsets)

    async def test_async(self, async_client: AsyncOpenAI) -> None:
        answer = await async_client.completions.create(model=MODEL, prompt="Once", **GREEDY)
        assert answer.choices[0].text


class TestResponses:
    def test_create_retrieve_delete(self, client: OpenAI) -> None:
        response = client.responses.create(
            model=MODEL, input="Hello!", temperature=0, max_output_tokens=16
        )
        assert response.status in ("completed", "incomplete")
        assert response.output_text
        assert response.usage is not None
        assert response.usage.output_tokens <= 16
        again = client.responses.retrieve(response.id)
        assert again.output_text == response.output_text
        items = client.responses.input_items.list(response.id)
        assert len(items.data) == 1
        client.responses.delete(response.id)
        with pytest.raises(openai.NotFoundError):
            client.responses.retrieve(response.id)

    def test_stream(self, client: OpenAI) -> None:
        events = list(
            client.responses.create(
                model=MODEL, input="Hello!", temperature=0, max_output_tokens=16, stream=True
            )
        )
        assert [event.sequence_number for event in events] == list(range(len(events)))
        assert events[0].type == "response.created"
        text = "".join(e.delta for e in events if e.type == "response.output_text.delta")
        last = events[-1]
        assert last.type in ("response.completed", "response.incomplete")
        assert isinstance(
            last,
            openai.types.responses.ResponseCompletedEvent
            | openai.types.responses.ResponseIncompleteEvent,
        )
        assert last.response.output_text == text

    def test_stream_resumes(self, client: OpenAI) -> None:
        events = list(
            client.responses.create(model=MODEL, input="Hello!", max_output_tokens=8, stream=True)
        )
        created = events[0]
        assert created.type == "response.created"
        rest = list(client.responses.retrieve(created.response.id, stream=True, starting_after=3))
        assert [event.to_dict() for event in rest] == [event.to_dict() for event in events[4:]]

    def test_stream_helper(self, client: OpenAI) -> None:
        # The helper knows only answers that end by themselves.
        with client.responses.stream(
            model=MODEL, input="Hi", temperature=0, extra_body={"stop": [".", "!", "?"]}
        ) as stream:
            text = "".join(e.delta for e in stream if e.type == "response.output_text.delta")
            assert stream.get_final_response().output_text == text

    def test_previous_response(self, client: OpenAI) -> None:
        first = client.responses.create(model=MODEL, input="My name is Ann.", max_output_tokens=8)
        second = client.responses.create(
            model=MODEL, input="Hi!", previous_response_id=first.id, max_output_tokens=8
        )
        assert second.previous_response_id == first.id
        assert first.usage is not None
        assert second.usage is not None
        assert second.usage.input_tokens > first.usage.input_tokens + first.usage.output_tokens

    def test_conversation(self, client: OpenAI) -> None:
        conversation = client.conversations.create(metadata={"topic": "test"})
        response = client.responses.create(
            model=MODEL, input="Hello!", conversation=conversation.id, max_output_tokens=8
        )
        items = client.conversations.items.list(conversation.id, order="asc").data
        assert [getattr(item, "role", None) for item in items] == ["user", "assistant"]
        assert response.conversation is not None
        assert response.conversation.id == conversation.id
        assert client.conversations.retrieve(conversation.id).metadata == {"topic": "test"}
        assert client.conversations.delete(conversation.id).deleted

    def test_background(self, client: OpenAI) -> None:
        response = client.responses.create(
            model=MODEL, input="Hello!", max_output_tokens=8, background=True
        )
        events = list(client.responses.retrieve(response.id, stream=True))
        assert events[-1].type in ("response.completed", "response.incomplete")
        assert client.responses.retrieve(response.id).output_text

    async def test_async(self, async_client: AsyncOpenAI) -> None:
        stream = await async_client.responses.create(
            model=MODEL, input="Hello!", max_output_tokens=8, stream=True
        )
        kinds = [event.type async for event in stream]
        assert kinds[0] == "response.created"
        assert kinds[-1] in ("response.completed", "response.incomplete")


class TestWebSocket:
    def test_sync(self, client: OpenAI) -> None:
        with client.responses.connect() as connection:
            previous: dict[str, Any] = {}
            for text in ("Hello!", "And you?"):
                connection.response.create(model=MODEL, input=text, max_output_tokens=8, **previous)
                said = ""
                for event in connection:
                    if event.type == "response.output_text.delta":
                        said += event.delta
                    elif event.type in ("response.completed", "response.incomplete"):
                        assert event.response.output_text == said
                        previous = {"previous_response_id": event.response.id}
                        break
                assert said

    async def test_async(self, async_client: AsyncOpenAI) -> None:
        async with async_client.responses.connect() as connection:
            await connection.response.create(
                model=MODEL, input="Hello!", max_output_tokens=8, store=False
            )
            kinds = []
            async for event in connection:
                kinds.append(event.type)
                if event.type in ("response.completed", "response.incomplete"):
                    break
        assert kinds[0] == "response.created"
        assert "response.output_text.delta" in kinds

    async def test_an_error_leaves_the_connection_open(self, async_client: AsyncOpenAI) -> None:
        async with async_client.responses.connect() as connection:
            await connection.response.create(model="none", input="Hello!")
            event = await connection.recv()
            assert event.type == "error"
            await connection.response.create(model=MODEL, input="Hi", max_output_tokens=4)
            event = await connection.recv()
            assert event.type == "response.created"


class TestModelsAndErrors:
    def test_models(self, client: OpenAI) -> None:
        assert [model.id for model in client.models.list()] == [MODEL]
        model = client.models.retrieve(MODEL)
        assert model.owned_by == "millrace"

    def test_errors_are_the_sdks_own(self, client: OpenAI) -> None:
        with pytest.raises(openai.BadRequestError) as bad:
            client.chat.completions.create(model=MODEL, messages=MESSAGES, temperature=9)
        assert bad.value.param == "temperature"
        assert bad.value.code == "invalid_value"
        with pytest.raises(openai.NotFoundError) as missing:
            client.chat.completions.create(model="gpt-9", messages=MESSAGES)
        assert missing.value.code == "model_not_found"
        with pytest.raises(openai.BadRequestError) as long:
            client.completions.create(model=MODEL, prompt=[5] * 5000)
        assert long.value.code == "context_length_exceeded"

    async def test_async_errors(self, async_client: AsyncOpenAI) -> None:
        with pytest.raises(openai.BadRequestError):
            await async_client.responses.create(model=MODEL, input=[])
