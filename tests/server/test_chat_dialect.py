"""Chat Completions: bodies in, chunks and answers out, without a socket."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from openai.types.chat import ChatCompletion, ChatCompletionChunk

from server.dialects.chat import ChatRequest, parse
from server.dialects.chat_answers import ChatCollector, ChatStream
from server.errors import ApiError
from server.events import Event, ResponseCancelled, ResponsePrompt
from server.request import SamplingOptions, Shape, ToolOptions, TurnRequest
from tests.server.turn_events import (
    CREATED,
    HEX,
    MODEL,
    Answer,
    Step,
    failed_turn,
    logprob,
    response,
    turn_events,
)

USER = [{"role": "user", "content": "Hello"}]


def body(**fields: Any) -> dict[str, Any]:
    return {"model": "pebble", "messages": USER, **fields}


def chat(**fields: Any) -> ChatRequest:
    return parse(body(**fields), MODEL)


def refusal(**fields: Any) -> ApiError:
    with pytest.raises(ApiError) as caught:
        chat(**fields)
    return caught.value


def frames(request: ChatRequest, events: Sequence[Event]) -> list[dict[str, Any]]:
    """The chunks of a stream, which must end with [DONE]."""
    stream = ChatStream(request, "fp_test")
    datas = [frame.data for event in events for frame in stream.feed(event)]
    assert datas[-1] == b"[DONE]"
    assert datas.count(b"[DONE]") == 1
    return [json.loads(data) for data in datas[:-1]]


def answer(request: ChatRequest, events: Sequence[Event]) -> dict[str, Any]:
    collector = ChatCollector(request, "fp_test")
    for event in events:
        collector.feed(event)
    result: dict[str, Any] = json.loads(json.dumps(collector.result(), default=_struct))
    return result


def _struct(value: Any) -> Any:
    return {name: getattr(value, name) for name in value.__struct_fields__}


TOOL = {
    "type": "function",
    "function": {"name": "f", "parameters": {"type": "object", "properties": {}}},
}


def test_the_smallest_body() -> None:
    assert chat() == ChatRequest(
        TurnRequest(dialect="chat", model="pebble", messages=USER), chat().shape
    )


def test_everything_arrives() -> None:
    request = parse(
        body(
            n=3,
            stream=True,
            stream_options={"include_usage": True},
            max_completion_tokens=9,
            min_tokens=2,
            temperature=0.5,
            top_p=0.9,
            top_k=4,
            min_p=0.1,
            stop=["x"],
            seed=3,
            logprobs=True,
            top_logprobs=2,
            ignore_eos=True,
            stop_token_ids=[7],
            return_token_ids=True,
            include_stop_str_in_output=True,
            skip_special_tokens=False,
            prompt_logprobs=1,
            priority=-5,
            chat_template_kwargs={"enable_thinking": False},
            add_generation_prompt=False,
            # Of no consequence here:
            user="u",
            store=True,
            metadata={"a": "b"},
            service_tier="auto",
            reasoning_effort="low",
            tools=[TOOL],
            tool_choice="none",
            parallel_tool_calls=False,
            response_format={"type": "text"},
        ),
        MODEL,
        "owner",
    )
    assert request.turn == TurnRequest(
        dialect="chat",
        model="pebble",
        messages=USER,
        tools=ToolOptions(functions=[TOOL], choice="none", parallel=False),
        n=3,
        stream=True,
        sampling=SamplingOptions(
            max_tokens=9,
            min_tokens=2,
            temperature=0.5,
            top_p=0.9,
            top_k=4,
            min_p=0.1,
            stop=("x",),
            seed=3,
            logprobs=2,
            ignore_eos=True,
            stop_token_ids=(7,),
            include_stop_str_in_output=True,
            prompt_logprobs=1,
        ),
        shape=Shape(include_usage=True, token_ids=True),
        return_token_ids=True,
        skip_special_tokens=False,
        priority=-5,
        template_kwargs={"enable_thinking": False},
        add_generation_prompt=False,
        owner="owner",
    )
    assert request.shape.include_usage


def test_messages_become_plain() -> None:
    call = {"id": "c", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    given = [
        {"role": "developer", "content": "Be brief."},
        {"role": "user", "name": "Ann", "content": [{"type": "text", "text": "one"}]},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "c", "content": "4"},
        {"role": "assistant", "content": "Four.", "refusal": None, "annotations": []},
        {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
    ]
    assert chat(messages=given).turn.messages == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "one", "name": "Ann"},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": "4", "tool_call_id": "c"},
        {"role": "assistant", "content": "Four."},
        {"role": "user", "content": "a\nb"},
    ]


def text_part(**fields: Any) -> list[dict[str, Any]]:
    return [{"role": "user", "content": [fields]}]


@pytest.mark.parametrize(
    ("fields", "param", "code"),
    [
        ({"messages": None}, "messages", "missing_required_parameter"),
        ({"messages": []}, "messages", "empty_array"),
        ({"messages": "Hello"}, "messages", "invalid_type"),
        ({"messages": ["Hello"]}, "messages[0]", "invalid_type"),
        ({"messages": [{"content": "x"}]}, "messages[0].role", "missing_required_parameter"),
        ({"messages": [{"role": "robot", "content": "x"}]}, "messages[0].role", "invalid_value"),
        ({"messages": [{"role": 1, "content": "x"}]}, "messages[0].role", "invalid_type"),
        ({"messages": [*USER, {"role": "user"}]}, "messages[1].content", None),
        ({"messages": [{"role": "user", "content": 5}]}, "messages[0].content", "invalid_type"),
        ({"messages": [{"role": "user", "content": []}]}, "messages[0].content", "empty_array"),
        ({"messages": text_part(text="x")}, "messages[0].content[0].type", None),
        ({"messages": text_part(type="text")}, "messages[0].content[0].text", None),
        ({"messages": text_part(type="text", text=3)}, "messages[0].content[0].text", None),
        ({"messages": text_part(type="poem")}, "messages[0].content[0].type", "invalid_value"),
        (
            {"messages": text_part(type="image_url", image_url={"url": "data:"})},
            "messages[0].content[0].type",
            "unsupported_content_type",
        ),
        (
            {"messages": text_part(type="input_audio", input_audio={})},
            "messages[0].content[0].type",
            "unsupported_content_type",
        ),
        (
            {"messages": [{"role": "assistant", "tool_calls": [{"function": {}}]}]},
            "messages[0].tool_calls[0].function.name",
            None,
        ),
        ({"model": None}, "model", "missing_required_parameter"),
        ({"model": 3}, "model", "invalid_type"),
        ({"n": 0}, "n", "invalid_value"),
        ({"stream": "yes"}, "stream", "invalid_type"),
        ({"stream_options": {"include_usage": True}}, "stream_options", "invalid_value"),
        (
            {"stream": True, "stream_options": {"include_usage": 1}},
            "stream_options.include_usage",
            "invalid_type",
        ),
        ({"stream": True, "stream_options": []}, "stream_options", "invalid_type"),
        ({"stream": True, "stream_options": {"x": 1}}, "stream_options.x", "unknown_parameter"),
        ({"max_tokens": 0}, "max_tokens", "invalid_value"),
        ({"max_completion_tokens": -1}, "max_completion_tokens", "invalid_value"),
        ({"max_tokens": 3, "max_completion_tokens": 4}, "max_tokens", "invalid_value"),
        ({"top_logprobs": 2}, "top_logprobs", "invalid_value"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs", "invalid_value"),
        ({"logprobs": 1}, "logprobs", "invalid_type"),
        ({"temperature": 9}, "temperature", "invalid_value"),
        ({"functions": [{"name": "f"}]}, "functions", "unsupported_parameter"),
        ({"response_format": {"type": "json_object"}}, "response_format", "unsupported_parameter"),
        ({"modalities": ["text", "audio"]}, "modalities", "unsupported_parameter"),
        ({"chat_template": "{{ messages }}"}, "chat_template", "unsupported_parameter"),
        ({"chat_template_kwargs": []}, "chat_template_kwargs", "invalid_type"),
        ({"temprature": 1}, "temprature", "unknown_parameter"),
        ({"continue_final_message": True}, "continue_final_message", "invalid_value"),
        (
            {
                "messages": [{"role": "assistant", "content": "x"}],
                "continue_final_message": True,
                "add_generation_prompt": True,
            },
            "continue_final_message",
            "invalid_value",
        ),
        ({"priority": 2**40}, "priority", "invalid_value"),
    ],
)
def test_wrong_bodies_name_the_field(fields: dict[str, Any], param: str, code: str | None) -> None:
    error = refusal(**fields)
    assert error.status == 400
    assert error.param == param
    assert code in (None, error.code)
    assert param.split("[")[0].split(".")[0] in error.message


def test_an_unknown_model_is_not_found() -> None:
    error = refusal(model="gpt-9")
    assert (error.status, error.code, error.param) == (404, "model_not_found", "model")
    assert "gpt-9" in error.message
    assert "pebble" in error.message


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
        lambda inner: (
            st.lists(inner, max_size=3)
            | st.dictionaries(
                st.sampled_from(["role", "content", "type", "text", "name", "tool_calls"]), inner
            )
        ),
        max_leaves=12,
    )
)
def test_no_messages_crash_the_parser(messages: object) -> None:
    """Whatever is sent, there is a request or an error of status 400."""
    try:
        request = parse({"model": "pebble", "messages": messages}, MODEL)
    except ApiError as error:
        refused = error
    else:
        assert request.turn.messages
        assert all(isinstance(one["content"], str) for one in request.turn.messages)
        return
    assert refused.status == 400
    assert refused.param is not None
    assert refused.param.startswith("messages")


def test_a_stream_in_openais_shape() -> None:
    request = chat(stream=True, stream_options={"include_usage": True})
    chunks = frames(request, turn_events([Answer([Step("Hel"), Step("lo")])]))
    head = {
        "id": f"chatcmpl-{HEX}",
        "object": "chat.completion.chunk",
        "created": CREATED,
        "model": "pebble",
        "system_fingerprint": "fp_test",
    }

    def chunk(delta: dict[str, Any], finish: str | None = None) -> dict[str, Any]:
        choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish}
        return {**head, "choices": [choice], "usage": None}

    usage = {
        "prompt_tokens": 5,
        "completion_tokens": 3,
        "total_tokens": 8,
        "prompt_tokens_details": {"cached_tokens": 2},
        "completion_tokens_details": {"reasoning_tokens": 0},
    }
    assert chunks == [
        chunk({"role": "assistant", "content": "", "refusal": None}),
        chunk({"content": "Hel"}),
        chunk({"content": "lo"}),
        chunk({}, "stop"),
        {**head, "choices": [], "usage": usage},
    ]
    for one in chunks:
        ChatCompletionChunk.model_validate(one)


def test_usage_is_absent_unless_asked_for() -> None:
    chunks = frames(chat(stream=True), turn_events([Answer([Step("a")])]))
    assert all("usage" not in chunk for chunk in chunks)
    assert all(chunk["choices"] for chunk in chunks)


def test_running_usage_counts_every_token() -> None:
    request = chat(
        stream=True, stream_options={"include_usage": True, "continuous_usage_stats": True}
    )
    assert request.turn.return_token_ids
    events = turn_events(
        [Answer([Step("a", [1]), Step("bc", [2, 3])])],
        [ResponsePrompt(output_index=0, token_ids=[9, 9, 9, 9, 9])],
    )
    chunks = frames(request, events)
    counts = [chunk["usage"]["completion_tokens"] for chunk in chunks]
    assert counts == [0, 1, 3, 3, 3]
    assert {chunk["usage"]["prompt_tokens"] for chunk in chunks} == {5}
    assert "token_ids" not in json.dumps(chunks)


def test_several_choices_interleave() -> None:
    events = turn_events(
        [Answer([Step("a"), Step("b")]), Answer([Step("c")], "length", None)],
    )
    chunks = frames(chat(n=2, stream=True), events)
    for index, (text, finish) in enumerate([("ab", "stop"), ("c", "length")]):
        own = [c["choices"][0] for c in chunks if c["choices"][0]["index"] == index]
        assert own[0]["delta"]["role"] == "assistant"
        assert "".join(choice["delta"].get("content", "") for choice in own) == text
        assert [choice["finish_reason"] for choice in own][-1] == finish
    whole = answer(chat(n=2), events)
    assert [choice["message"]["content"] for choice in whole["choices"]] == ["ab", "c"]
    assert [choice["finish_reason"] for choice in whole["choices"]] == ["stop", "length"]


def test_token_ids_as_vllm_gives_them() -> None:
    events = turn_events(
        [Answer([Step("", [1]), Step("\u00e9", [2])], "stop", 42)],
        [ResponsePrompt(output_index=0, token_ids=[7, 8])],
    )
    chunks = frames(chat(stream=True, return_token_ids=True), events)
    assert [c.get("prompt_token_ids") for c in chunks] == [[7, 8], None, None, None]
    assert [c["choices"][0].get("token_ids") for c in chunks] == [None, [1], [2], None]
    assert chunks[-1]["choices"][0]["stop_reason"] == 42
    whole = answer(chat(return_token_ids=True), events)
    assert whole["prompt_token_ids"] == [7, 8]
    assert whole["choices"][0]["token_ids"] == [1, 2]
    assert whole["choices"][0]["stop_reason"] == 42


def test_logprobs_reach_stream_and_answer() -> None:
    first = logprob("Hel", -0.5, ("Hel", -0.5), ("Bye", -1.5))
    second = logprob("lo", -0.25, ("lo", -0.25))
    events = turn_events([Answer([Step("Hel", None, [first]), Step("lo", None, [second])])])
    request = chat(logprobs=True, top_logprobs=2)
    whole = answer(request, events)
    content = whole["choices"][0]["logprobs"]["content"]
    assert [entry["token"] for entry in content] == ["Hel", "lo"]
    assert content[0]["bytes"] == [72, 101, 108]
    assert [top["logprob"] for top in content[0]["top_logprobs"]] == [-0.5, -1.5]
    chunks = frames(chat(stream=True, logprobs=True, top_logprobs=2), events)
    streamed = [c["choices"][0]["logprobs"] for c in chunks]
    assert [one and one["content"] for one in streamed] == [None, content[:1], content[1:], None]
    ChatCompletion.model_validate(whole)


def test_an_empty_answer_has_empty_logprobs() -> None:
    events = turn_events([Answer([])])
    choice = answer(chat(logprobs=True), events)["choices"][0]
    assert choice["logprobs"] == {"content": [], "refusal": None}
    assert answer(chat(), events)["choices"][0]["logprobs"] is None


def test_a_whole_answer_in_openais_shape() -> None:
    whole = answer(chat(), turn_events([Answer([Step("Hello")])]))
    assert whole == {
        "id": f"chatcmpl-{HEX}",
        "object": "chat.completion",
        "created": CREATED,
        "model": "pebble",
        "system_fingerprint": "fp_test",
        "choices": [
            {
                "index": 0,
                "message": {
                    "role": "assistant",
                    "content": "Hello",
                    "refusal": None,
                    "annotations": [],
                },
                "logprobs": None,
                "finish_reason": "stop",
            }
        ],
        "usage": {
            "prompt_tokens": 5,
            "completion_tokens": 3,
            "total_tokens": 8,
            "prompt_tokens_details": {"cached_tokens": 2},
            "completion_tokens_details": {"reasoning_tokens": 0},
        },
    }
    ChatCompletion.model_validate(whole)


def test_a_failed_turn_is_an_error_frame() -> None:
    *_, last = frames(chat(stream=True), failed_turn("server_error", "It broke."))
    assert last == {
        "error": {
            "message": "It broke.",
            "type": "server_error",
            "param": None,
            "code": "server_error",
        }
    }


@pytest.mark.parametrize(("code", "status"), [("server_error", 500), ("engine_died", 503)])
def test_a_failed_turn_has_a_status(code: str, status: int) -> None:
    with pytest.raises(ApiError) as caught:
        answer(chat(), failed_turn(code))
    assert (caught.value.status, caught.value.code) == (status, code)


def test_a_cancelled_turn_is_no_answer() -> None:
    events = [*failed_turn()[:-1], ResponseCancelled(response=response(status="cancelled"))]
    with pytest.raises(ApiError) as caught:
        answer(chat(), events)
    assert caught.value.code == "cancelled"
    assert frames(chat(stream=True), events)[-1]["error"]["code"] == "cancelled"


def test_the_parts_of_a_stream_make_the_whole() -> None:
    events = turn_events([Answer([Step(c) for c in "Gr\u00fc\u00df Gott \U0001f600"])])
    chunks = frames(chat(stream=True), events)
    joined = "".join(c["choices"][0]["delta"].get("content", "") for c in chunks)
    assert joined == answer(chat(), events)["choices"][0]["message"]["content"]
