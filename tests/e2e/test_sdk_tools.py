"""The official SDK's ordinary ways to call tools, over a real socket to a scripted model.

The model is scripted, for what is tested is the wire: a small model may or may not call.
"""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from typing import Any

import openai
import pytest
from openai.types.responses import Response, ResponseStreamEvent
from pydantic import TypeAdapter

from engine import Request
from tests.server.scripted import Script, ScriptedEngine, call_text, prompt_text, say
from tests.server.serving import serving

PARAMETERS = {
    "type": "object",
    "properties": {"location": {"type": "string", "description": "City and country"}},
    "required": ["location"],
    "additionalProperties": False,
}
FUNCTION: dict[str, Any] = {
    "name": "get_weather",
    "description": "Get current temperature for a given location.",
    "parameters": PARAMETERS,
    "strict": True,
}
CHAT_TOOLS: Any = [{"type": "function", "function": FUNCTION}]
TOOLS: Any = [{"type": "function", **FUNCTION}]
QUESTION = "What is the weather like in Paris today?"
ARGUMENTS = '{"location": "Paris, France"}'


def script(request: Request) -> Script:
    prompt = prompt_text(request)
    if "tool: " in prompt:
        result = prompt.rpartition("tool: ")[2].strip()
        return say(f"It is {result} degrees in Paris.", per_step=4)
    return say(f"<think>\nHm.\n</think>\n\n{call_text('get_weather', ARGUMENTS)}", per_step=4)


@pytest.fixture
async def client() -> AsyncIterator[openai.AsyncOpenAI]:
    async with (
        serving(ScriptedEngine(script)) as server,
        openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as running,
    ):
        yield running
        await server.idle()


def get_weather(location: str) -> str:
    assert location == "Paris, France"
    return "14"


async def test_chat(client: openai.AsyncOpenAI) -> None:
    messages: Any = [{"role": "user", "content": QUESTION}]
    first = await client.chat.completions.create(
        model="scripted", messages=messages, tools=CHAT_TOOLS
    )
    message = first.choices[0].message
    assert first.choices[0].finish_reason == "tool_calls"
    assert message.content is None
    assert message.tool_calls
    messages.append(message)
    for call in message.tool_calls:
        assert call.type == "function"
        result = get_weather(**json.loads(call.function.arguments))
        messages.append({"role": "tool", "tool_call_id": call.id, "content": result})
    second = await client.chat.completions.create(
        model="scripted", messages=messages, tools=CHAT_TOOLS
    )
    assert second.choices[0].message.content == "It is 14 degrees in Paris."
    assert second.choices[0].finish_reason == "stop"


async def test_chat_stream(client: openai.AsyncOpenAI) -> None:
    messages: Any = [{"role": "user", "content": QUESTION}]
    stream = await client.chat.completions.create(
        model="scripted", messages=messages, tools=CHAT_TOOLS, stream=True
    )
    calls: dict[int, Any] = {}
    async for chunk in stream:
        for call in chunk.choices[0].delta.tool_calls or []:
            if call.index not in calls:
                calls[call.index] = call
            elif call.function is not None:
                calls[call.index].function.arguments += call.function.arguments or ""
    [call] = calls.values()
    assert json.loads(call.function.arguments) == {"location": "Paris, France"}
    async with client.chat.completions.stream(
        model="scripted", messages=messages, tools=CHAT_TOOLS
    ) as helped:
        kinds = {event.type async for event in helped}
        whole = await helped.get_final_completion()
    assert "tool_calls.function.arguments.done" in kinds
    [helped_call] = whole.choices[0].message.tool_calls or []
    assert helped_call.function.arguments == ARGUMENTS


async def test_responses(client: openai.AsyncOpenAI) -> None:
    given: Any = [{"role": "user", "content": QUESTION}]
    first = await client.responses.create(model="scripted", tools=TOOLS, input=given)
    Response.model_validate(first.to_dict())
    given += first.output
    for item in first.output:
        if item.type == "function_call":
            assert item.name == "get_weather"
            result = get_weather(**json.loads(item.arguments))
            given.append(
                {"type": "function_call_output", "call_id": item.call_id, "output": result}
            )
    second = await client.responses.create(model="scripted", tools=TOOLS, input=given)
    assert second.output_text == "It is 14 degrees in Paris."


async def test_responses_stream(client: openai.AsyncOpenAI) -> None:
    adapter: TypeAdapter[Any] = TypeAdapter(ResponseStreamEvent)
    stream = await client.responses.create(
        model="scripted", input=QUESTION, tools=TOOLS, stream=True
    )
    calls: dict[int, Any] = {}
    reasoning = ""
    async for event in stream:
        adapter.validate_python(event.to_dict())
        if event.type == "response.output_item.added" and event.item.type == "function_call":
            calls[event.output_index] = event.item
        elif event.type == "response.function_call_arguments.delta":
            calls[event.output_index].arguments += event.delta
        elif event.type == "response.reasoning_text.delta":
            reasoning += event.delta
    [call] = calls.values()
    assert (call.name, call.arguments, reasoning) == ("get_weather", ARGUMENTS, "Hm.")


async def test_the_servers_own_tools(client: openai.AsyncOpenAI) -> None:
    tools: Any = [{"type": "millrace:current_time"}]
    answer = await client.responses.create(model="scripted", input=QUESTION, tools=tools)
    assert [item.type for item in answer.output[:3]] == [
        "reasoning",
        "function_call",
        "function_call_output",
    ]
    # The script calls a function that is not there; the model is told so and goes on.
    assert "there is no tool" in answer.output_text
