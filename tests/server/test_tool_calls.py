"""Calls that the client answers: requests with tools and calls, over every way in."""

from __future__ import annotations

import json
from typing import Any

import pytest

from engine import Request
from server.state import TOKENIZER
from tests.server.edge import Edge, datas, serving
from tests.server.scripted import Script, ScriptedEngine, call_text, prompt_text, say

WEATHER = {
    "name": "get_weather",
    "description": "Get the weather",
    "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
}
CHAT_TOOL = {"type": "function", "function": WEATHER}
TOOL = {"type": "function", **WEATHER}
ASK = [{"role": "user", "content": "Weather in Rome and Oslo?"}]
ROME, OSLO = '{"city": "Rome"}', '{"city": "Oslo"}'
TWO_CALLS = f"{call_text('get_weather', ROME)}\n{call_text('get_weather', OSLO)}"


def engine(text: str = f"<think>\nHm.\n</think>\n\nLet me see.\n{TWO_CALLS}") -> ScriptedEngine:
    return ScriptedEngine(say(text, per_step=3))


async def chat(edge: Edge, **fields: Any) -> Any:
    body = {"model": "scripted", "messages": ASK, "tools": [CHAT_TOOL], **fields}
    answer = await edge.post("/v1/chat/completions", body)
    assert answer.status == 200, answer.body
    return answer.body


async def respond(edge: Edge, **fields: Any) -> Any:
    body = {"model": "scripted", "input": ASK, "tools": [TOOL], **fields}
    answer = await edge.post("/v1/responses", body)
    assert answer.status == 200, answer.body
    return answer.body


def names_and_arguments(message: Any) -> list[tuple[str, str]]:
    return [(c["function"]["name"], c["function"]["arguments"]) for c in message["tool_calls"]]


async def test_chat_whole() -> None:
    async with serving(engine()) as edge:
        [choice] = (await chat(edge))["choices"]
    assert choice["finish_reason"] == "tool_calls"
    message = choice["message"]
    assert message["content"] == "Let me see."
    assert message["reasoning_content"] == "Hm."
    assert names_and_arguments(message) == [("get_weather", ROME), ("get_weather", OSLO)]
    assert len({call["id"] for call in message["tool_calls"]}) == 2


async def test_chat_stream_adds_up_to_the_whole() -> None:
    async with serving(engine()) as edge:
        body = {"model": "scripted", "messages": ASK, "tools": [CHAT_TOOL], "stream": True, "n": 2}
        frames = datas(await edge.stream("/v1/chat/completions", body))
    assert frames.pop() == "[DONE]"
    for wanted in (0, 1):
        content = reasoning = ""
        calls: list[dict[str, Any]] = []
        finish, roles = [], []
        for frame in map(json.loads, frames):
            [choice] = frame["choices"]
            if choice["index"] != wanted:
                continue
            delta = choice["delta"]
            roles += [delta["role"]] if "role" in delta else []
            content += delta.get("content") or ""
            reasoning += delta.get("reasoning_content") or ""
            for call in delta.get("tool_calls", ()):
                if call["index"] == len(calls):
                    calls.append(call)
                else:
                    assert set(call) == {"index", "function"}
                    calls[call["index"]]["function"]["arguments"] += call["function"]["arguments"]
            finish += [choice["finish_reason"]] if choice["finish_reason"] else []
        assert (roles, finish) == (["assistant"], ["tool_calls"])
        assert (content, reasoning) == ("Let me see.", "Hm.")
        assert [call["function"]["arguments"] for call in calls] == [ROME, OSLO]
        assert all(call["id"].startswith("call_") for call in calls)


async def test_token_ids_are_all_there() -> None:
    text = f"<think>\nHm.\n</think>\n\nLet me see.\n{TWO_CALLS}"
    async with serving(engine(text)) as edge:
        [choice] = (await chat(edge, return_token_ids=True))["choices"]
        assert choice["token_ids"] == [*text.encode(), 256]


async def test_responses_whole() -> None:
    async with serving(engine()) as edge:
        body = await respond(edge)
    assert [item["type"] for item in body["output"]] == [
        "reasoning",
        "message",
        "function_call",
        "function_call",
    ]
    assert body["status"] == "completed"
    assert body["output"][0]["content"] == [{"type": "reasoning_text", "text": "Hm."}]
    assert body["output"][1]["content"][0]["text"] == "Let me see."
    assert [item["arguments"] for item in body["output"][2:]] == [ROME, OSLO]
    # From the token that completes the opening tag to the one before it is closed.
    assert body["usage"]["output_tokens_details"]["reasoning_tokens"] == len(">\nHm.\n</think")
    assert body["tools"] == [{**TOOL, "strict": False}]


async def test_responses_stream_in_order() -> None:
    async with serving(engine()) as edge:
        body = {"model": "scripted", "input": ASK, "tools": [TOOL], "stream": True}
        events = [json.loads(data) for data in datas(await edge.stream("/v1/responses", body))]
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    kinds = [event["type"].removeprefix("response.") for event in events]
    changes = [kind for kind, before in zip(kinds, ["", *kinds], strict=False) if kind != before]
    call = [
        "output_item.added",
        "function_call_arguments.delta",
        "function_call_arguments.done",
        "output_item.done",
    ]

    def text(kind: str) -> list[str]:
        return [
            "output_item.added",
            "content_part.added",
            f"{kind}.delta",
            f"{kind}.done",
            "content_part.done",
            "output_item.done",
        ]

    assert changes == [
        "created",
        "in_progress",
        *text("reasoning_text"),
        *text("output_text"),
        *call,
        *call,
        "completed",
    ]
    for item in events[-1]["response"]["output"]:
        deltas = [event["delta"] for event in events if event.get("item_id") == item["id"]
                  and "delta" in event]  # fmt: skip
        whole = item["arguments"] if "arguments" in item else item["content"][0]["text"]
        assert "".join(deltas) == whole
        assert len(deltas) > 1


async def test_calls_and_results_reach_the_template() -> None:
    said = [
        *ASK,
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [
                {"id": "c1", "type": "function", "function": {"name": "f", "arguments": ROME}}
            ],
        },
        {"role": "tool", "tool_call_id": "c1", "content": "sunny"},
    ]
    items = [
        *ASK,
        {"type": "reasoning", "id": "rs_1", "summary": []},
        {"type": "function_call", "call_id": "c1", "name": "f", "arguments": ROME},
        {"type": "function_call_output", "call_id": "c1", "output": "sunny"},
    ]
    async with serving(engine("Sunny.")) as edge:
        await chat(edge, messages=said)
        await respond(edge, input=items)
        first, second = edge.engine.requests
    assert prompt_text(first) == prompt_text(second)
    assert prompt_text(first) == (
        "tools: get_weather\nuser: Weather in Rome and Oslo?\n"
        f"assistant:  [f {ROME}]\ntool: sunny\n"
    )


async def test_a_conversation_remembers_calls() -> None:
    def script(request: Request) -> Script:
        return say("Sunny." if "tool: sunny" in prompt_text(request) else TWO_CALLS)

    async with serving(ScriptedEngine(script)) as edge:
        first = await respond(edge)
        outputs = [
            {"type": "function_call_output", "call_id": item["call_id"], "output": "sunny"}
            for item in first["output"]
        ]
        second = await respond(edge, input=outputs, previous_response_id=first["id"])
        assert second["output"][0]["content"][0]["text"] == "Sunny."
        assert prompt_text(edge.engine.requests[-1]).splitlines()[1:] == [
            "user: Weather in Rome and Oslo?",
            f"assistant:  [get_weather {ROME}] [get_weather {OSLO}]",
            "tool: sunny",
            "tool: sunny",
        ]


async def test_without_tools_a_call_is_text() -> None:
    async with serving(engine(TWO_CALLS)) as edge:
        cases: list[dict[str, Any]] = [{"tools": []}, {"tool_choice": "none"}]
        for fields in cases:
            [choice] = (await chat(edge, **fields))["choices"]
            assert choice["message"]["content"] == TWO_CALLS
            assert choice["finish_reason"] == "stop"
            assert "tools:" not in prompt_text(edge.engine.requests[-1])


async def test_one_call_at_a_time() -> None:
    async with serving(engine(TWO_CALLS)) as edge:
        [choice] = (await chat(edge, parallel_tool_calls=False))["choices"]
        assert names_and_arguments(choice["message"]) == [("get_weather", ROME)]
        assert choice["finish_reason"] == "tool_calls"
        assert edge.engine.aborted == [edge.engine.requests[0].request_id]


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": WEATHER}])
@pytest.mark.parametrize("num_tools", [1, 2])
async def test_a_call_that_must_be_made_is_begun_for_the_model(choice: Any, num_tools: int) -> None:
    tools = [CHAT_TOOL, {"type": "function", "function": {"name": "get_time"}}][:num_tools]
    opening, rest = '<tool_call>\n{"name": "get_weather", "arguments":', f" {ROME}}}"
    if choice == "required" and num_tools > 1:
        # Which one is the model's choice.
        opening, rest = "<tool_call>", f'\n{{"name": "get_weather", "arguments": {ROME}}}'
    async with serving(engine(f"{rest}\n</tool_call>")) as edge:
        [answer] = (await chat(edge, tools=tools, tool_choice=choice))["choices"]
        assert prompt_text(edge.engine.requests[0]).endswith(f"Oslo?\n{opening}")
        assert names_and_arguments(answer["message"]) == [("get_weather", ROME)]
        assert answer["message"]["content"] is None


async def test_a_call_that_is_cut_is_incomplete() -> None:
    async with serving(engine(call_text("get_weather", ROME))) as edge:
        body = await respond(edge, max_output_tokens=50)
        assert body["status"] == "incomplete"
        [item] = body["output"]
        assert (item["type"], item["status"]) == ("function_call", "incomplete")
        assert ROME.startswith(item["arguments"])
        [choice] = (await chat(edge, max_tokens=50))["choices"]
        assert choice["finish_reason"] == "length"


async def test_reasoning_can_be_turned_off() -> None:
    seen: list[Any] = []
    async with serving(engine("Hi")) as edge:
        tokenizer = edge.app[TOKENIZER]
        rendered = tokenizer.render_chat

        def render(messages: Any, **options: Any) -> Any:
            seen.append(options.get("enable_thinking"))
            return rendered(messages, **options)

        tokenizer.render_chat = render  # type: ignore[assignment,method-assign]
        await chat(edge, reasoning_effort="none")
        await chat(edge, reasoning_effort="high")
        await respond(edge, reasoning={"effort": "minimal"})
        await respond(
            edge, reasoning={"effort": "low"}, chat_template_kwargs={"enable_thinking": False}
        )
        await chat(edge)
    assert seen == [False, True, False, False, None]


DEEP: dict[str, Any] = {}
for _ in range(40):
    DEEP = {"properties": {"x": DEEP}}


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"tools": 1}, "tools"),
        ({"tools": [1]}, "tools[0]"),
        ({"tools": [{}]}, "tools[0].type"),
        ({"tools": [{"type": "retrieval"}]}, "tools[0].type"),
        ({"tools": [{"type": "function"}]}, "tools[0].function"),
        ({"tools": [{"type": "millrace:calculator"}]}, "tools[0].type"),
        ({"tools": [CHAT_TOOL, CHAT_TOOL]}, "tools"),
        ({"tools": [CHAT_TOOL] * 129}, "tools"),
        ({"tools": [{"type": "function", "function": {}}]}, "tools[0].function.name"),
        ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools[0].function.name"),
        ({"tools": [{"type": "function", "function": {"nam": "a"}}]}, "tools[0].function.nam"),
        (
            {"tools": [{"type": "function", "function": {"name": "f", "description": "x" * 9000}}]},
            "tools[0].function.description",
        ),
        (
            {"tools": [{"type": "function", "function": {"name": "f", "parameters": []}}]},
            "tools[0].function.parameters",
        ),
        (
            {
                "tools": [
                    {"type": "function", "function": {"name": "f", "parameters": {"type": "array"}}}
                ]
            },
            "tools[0].function.parameters.type",
        ),
        (
            {"tools": [{"type": "function", "function": {"name": "f", "parameters": DEEP}}]},
            "tools[0].function.parameters",
        ),
        (
            {
                "tools": [
                    {
                        "type": "function",
                        "function": {"name": "f", "parameters": {"title": "x" * 70000}},
                    }
                ]
            },
            "tools[0].function.parameters",
        ),
        ({"tool_choice": "any"}, "tool_choice"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tool_choice": {"type": "allowed_tools"}}, "tool_choice.type"),
        (
            {
                "tools": [CHAT_TOOL],
                "tool_choice": {"type": "function", "function": {"name": "other"}},
            },
            "tool_choice",
        ),
        ({"parallel_tool_calls": 1}, "parallel_tool_calls"),
        ({"reasoning_effort": "much"}, "reasoning_effort"),
    ],
)
async def test_what_cannot_be_done_is_refused(fields: dict[str, Any], param: str) -> None:
    async with serving(engine("x")) as edge:
        body = {"model": "scripted", "messages": ASK, **fields}
        answer = await edge.post("/v1/chat/completions", body)
        assert (answer.status, answer.error["param"]) == (400, param)


@pytest.mark.parametrize(
    ("item", "param"),
    [
        ({"type": "function_call", "name": "f", "arguments": "{}"}, "input[0].call_id"),
        ({"type": "function_call", "call_id": "c", "arguments": "{}"}, "input[0].name"),
        ({"type": "function_call", "call_id": "c", "name": "f"}, "input[0].arguments"),
        ({"type": "function_call_output", "call_id": "c"}, "input[0].output"),
        ({"type": "function_call_output", "call_id": "c", "output": 1}, "input[0].output"),
        (
            {"type": "function_call_output", "call_id": "c", "output": [{"type": "input_image"}]},
            "input[0].output[0].type",
        ),
        ({"type": "reasoning", "content": [{"type": "text"}]}, "input[0].content[0].type"),
    ],
)
async def test_wrong_items_are_refused(item: dict[str, Any], param: str) -> None:
    async with serving(engine("x")) as edge:
        answer = await edge.post("/v1/responses", {"model": "scripted", "input": [item]})
        assert (answer.status, answer.error["param"]) == (400, param)


async def test_a_template_without_tools_is_said() -> None:
    async with serving(engine("x")) as edge:
        edge.app[TOKENIZER].takes_tools = False
        body = {"model": "scripted", "messages": ASK, "tools": [CHAT_TOOL]}
        answer = await edge.post("/v1/chat/completions", body)
        assert (answer.status, answer.error["code"]) == (400, "template_error")
        body["tool_choice"] = "none"
        assert (await edge.post("/v1/chat/completions", body)).status == 200
