"""Tools that the server runs itself: the loop in one turn's log."""

from __future__ import annotations

import asyncio
import json
import re
from typing import Any

import msgspec
import pytest

from engine import FinishReason, Request
from server.agent.rounds import MAX_ROUNDS
from tests.server.edge import Edge, datas, serving
from tests.server.scripted import Script, ScriptedEngine, call_text, prompt_text, say

CALCULATOR = {"type": "millrace:calculator"}
CLOCK = {"type": "millrace:current_time"}
QUESTION = "What is 17 % of 2,340?"
BODY = {"model": "scripted", "input": QUESTION, "tools": [CALCULATOR]}
CALL = call_text("calculator", '{"expression": "2340 * 17 / 100"}')
ANSWER = "17 % of 2,340 is 397.8."


def play(*rounds: str) -> ScriptedEngine:
    """Say one text a round: the number of tool messages in the prompt picks it."""

    def script(request: Request) -> Script:
        num_results = len(re.findall(r"^tool: ", prompt_text(request), re.MULTILINE))
        return say(rounds[min(num_results, len(rounds) - 1)], per_step=5)

    return ScriptedEngine(script)


async def respond(edge: Edge, **fields: Any) -> Any:
    answer = await edge.post("/v1/responses", {**BODY, **fields})
    assert answer.status == 200, answer.body
    return answer.body


def kinds(body: Any) -> list[str]:
    return [item["type"] for item in body["output"]]


def outputs(body: Any) -> list[Any]:
    return [
        json.loads(item["output"])
        for item in body["output"]
        if item["type"] == "function_call_output"
    ]


async def test_the_model_gets_the_result_and_answers() -> None:
    async with serving(play(CALL, ANSWER)) as edge:
        body = await respond(edge)
        first, second = edge.engine.requests
    assert kinds(body) == ["function_call", "function_call_output", "message"]
    assert outputs(body) == [{"result": 397.8}]
    assert body["output"][0]["call_id"] == body["output"][1]["call_id"]
    assert body["output"][2]["content"][0]["text"] == ANSWER
    assert body["status"] == "completed"
    assert body["tools"] == [CALCULATOR]
    assert prompt_text(second) == (
        f'{prompt_text(first)}assistant:  [calculator {{"expression": "2340 * 17 / 100"}}]\n'
        'tool: {"result": 397.8}\n'
    )
    # The prompts are added up, and so are the answers with their end tokens.
    usage = body["usage"]
    assert usage["input_tokens"] == len(first.prompt_ids) + len(second.prompt_ids)
    assert usage["output_tokens"] == len(CALL) + len(ANSWER) + 2


async def test_the_log_has_one_end_and_dense_numbers() -> None:
    async with serving(play(f"One moment.\n{CALL}", ANSWER)) as edge:
        body = {**BODY, "stream": True, "store": True}
        events = [json.loads(data) for data in datas(await edge.stream("/v1/responses", body))]
        assert [event["sequence_number"] for event in events] == list(range(len(events)))
        ends = [event["type"] for event in events if event["type"].endswith("ed")]
        assert ends.count("response.completed") == 1
        assert events[-1]["type"] == "response.completed"
        done = [event for event in events if event["type"] == "response.output_item.done"]
        assert [event["output_index"] for event in done] == [0, 1, 2, 3]
        assert [event["item"] for event in done] == events[-1]["response"]["output"]
        # A follower that comes later sees the same.
        response_id = events[0]["response"]["id"]
        async with edge.client.get(f"/v1/responses/{response_id}?stream=true") as again:
            assert [json.loads(data) for data in datas(await again.text())] == events


async def test_a_conversation_keeps_calls_and_results() -> None:
    async with serving(play(CALL, ANSWER)) as edge:
        conversation = (await edge.post("/v1/conversations", {})).body["id"]
        await respond(edge, conversation=conversation)
        items = (await edge.get(f"/v1/conversations/{conversation}/items?order=asc")).body["data"]
    assert [item["type"] for item in items] == [
        "message",
        "function_call",
        "function_call_output",
        "message",
    ]


async def test_several_calls_of_one_round_and_several_rounds() -> None:
    clock = call_text("get_current_time", '{"city": "Rome"}')
    engine = play(f"{CALL}\n{clock}", "unused", CALL, ANSWER)
    async with serving(engine) as edge:
        body = await respond(edge, tools=[CALCULATOR, CLOCK])
    assert kinds(body) == [
        *(["function_call"] * 2),
        *(["function_call_output"] * 2),
        *(["function_call", "function_call_output", "message"]),
    ]
    calculated, told, again = outputs(body)
    assert calculated == again == {"result": 397.8}
    assert re.fullmatch(r"\d\d:\d\d", told["time"])


@pytest.mark.parametrize(
    ("call", "error"),
    [
        (call_text("calculator", '{"expression": "1/0"}'), "division by zero"),
        (call_text("calculator", '{"expr": "1"}'), "'expression'"),
        (call_text("calculator", '{"expression": nonsense}'), "'expression'"),
        (call_text("abacus", "{}"), "there are: calculator"),
    ],
)
async def test_errors_are_results_too(call: str, error: str) -> None:
    async with serving(play(call, ANSWER)) as edge:
        body = await respond(edge)
    assert error in outputs(body)[0]["error"]
    assert body["status"] == "completed"
    assert body["output"][-1]["type"] == "message"


async def test_calls_of_the_clients_functions_are_left_to_it() -> None:
    own = {"type": "function", "name": "book", "parameters": None}
    async with serving(play(f"{CALL}\n{call_text('book', '{}')}")) as edge:
        body = await respond(edge, tools=[CALCULATOR, own])
        assert kinds(body) == ["function_call", "function_call", "function_call_output"]
        assert body["status"] == "completed"
        assert len(edge.engine.requests) == 1
        # Who gives the missing result goes on.
        last = [
            {
                "type": "function_call_output",
                "call_id": body["output"][1]["call_id"],
                "output": "booked",
            }
        ]
        edge.engine._script = say("Done.")
        following = await respond(edge, input=last, previous_response_id=body["id"])
        assert kinds(following) == ["message"]


async def test_a_model_that_never_stops_calling_is_stopped() -> None:
    async with serving(play(CALL)) as edge:
        body = await respond(edge)
        assert kinds(body).count("function_call_output") == MAX_ROUNDS
        # Asked without tools at last, what it says is text.
        assert "tools:" not in prompt_text(edge.engine.requests[-1])
        assert body["output"][-1]["content"][0]["text"] == CALL
        assert len(edge.engine.requests) == MAX_ROUNDS + 1


async def test_max_tool_calls() -> None:
    async with serving(play(f"{CALL}\n{CALL}\n{CALL}", "x", "x", ANSWER)) as edge:
        body = await respond(edge, max_tool_calls=2)
        assert body["max_tool_calls"] == 2
    assert [next(iter(output)) for output in outputs(body)] == ["result", "result", "error"]
    assert body["output"][-1]["content"][0]["text"] == ANSWER


async def test_the_limit_is_of_the_whole_turn() -> None:
    limit = len(CALL) + 1 + 4
    async with serving(play(CALL, ANSWER)) as edge:
        body = await respond(edge, max_output_tokens=limit)
        assert body["status"] == "incomplete"
        assert body["output"][-1]["content"][0]["text"] == ANSWER[:4]
        assert body["usage"]["output_tokens"] == limit
        body = await respond(edge, max_output_tokens=len(CALL) + 1)
        assert body["status"] == "incomplete"
        assert kinds(body) == ["function_call", "function_call_output"]


async def test_no_room_in_the_context_ends_the_turn_incomplete() -> None:
    # What the tool says is longer than the call was.
    engine = play(call_text("calculator", "{}"), ANSWER)
    engine.info = msgspec.structs.replace(engine.info, max_model_len=150)
    async with serving(engine) as edge:
        body = await respond(edge)
    assert body["status"] == "incomplete"
    assert kinds(body) == ["function_call", "function_call_output"]


async def test_a_required_call_is_required_once() -> None:
    async with serving(play(CALL.removeprefix("<tool_call>"), ANSWER)) as edge:
        body = await respond(edge, tool_choice=CALCULATOR)
        assert body["tool_choice"] == CALCULATOR
    async with serving(play(CALL.removeprefix("<tool_call>"), ANSWER)) as edge:
        body = await respond(edge, tools=[CALCULATOR, CLOCK], tool_choice="required")
        first, second = edge.engine.requests
        assert prompt_text(first).endswith("<tool_call>")
        assert not prompt_text(second).endswith("<tool_call>")
        assert kinds(body) == ["function_call", "function_call_output", "message"]


@pytest.mark.parametrize("while_round", [1, 2])
async def test_cancel_at_any_moment(while_round: int) -> None:
    hold = asyncio.Event()

    def script(request: Request) -> Script:
        in_second = "tool: " in prompt_text(request)
        text = ANSWER if in_second else CALL
        return say(text, per_step=5, hold=hold if in_second == (while_round == 2) else None)

    async with (
        serving(ScriptedEngine(script)) as edge,
        edge.client.ws_connect("/v1/responses") as socket,
    ):
        await socket.send_json({"type": "response.create", **BODY})
        seen = "response.in_progress" if while_round == 1 else "response.output_text.delta"
        event: dict[str, Any] = {"type": ""}
        while event["type"] != seen:
            event = await socket.receive_json(timeout=20)
        await socket.send_json({"type": "response.cancel"})
        while event["type"] not in ("response.cancelled", "response.completed"):
            event = await socket.receive_json(timeout=20)
        assert event["type"] == "response.cancelled"
        assert not edge.engine.running
        output = event["response"]["output"]
        if while_round == 2:
            assert [item["type"] for item in output][:2] == [
                "function_call",
                "function_call_output",
            ]


async def test_an_engine_that_dies_in_a_later_round_fails_the_turn() -> None:
    def script(request: Request) -> Script:
        if "tool: " in prompt_text(request):
            return say(ANSWER, dies_after=2)
        return say(CALL)

    async with serving(ScriptedEngine(script)) as edge:
        body = await respond(edge)
    assert (body["status"], body["error"]["code"]) == ("failed", "engine_died")
    assert kinds(body) == ["function_call", "function_call_output", "message"]


async def test_a_cut_call_is_not_run() -> None:
    engine = ScriptedEngine(Script(steps=[list(CALL[:60].encode())], end=FinishReason.LENGTH))
    async with serving(engine) as edge:
        body = await respond(edge)
    assert kinds(body) == ["function_call"]
    assert body["status"] == "incomplete"
