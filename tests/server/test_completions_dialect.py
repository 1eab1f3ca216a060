"""Completions: bodies in, chunks and answers out, without a socket."""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from openai.types import Completion

from server.dialects.completions import (
    CompletionCollector,
    CompletionRequest,
    CompletionStream,
    parse,
)
from server.dialects.legacy_logprobs import LegacyLogprobs
from server.errors import ApiError
from server.events import Event, ResponsePrompt
from server.request import SamplingOptions, Shape, TurnRequest
from tests.server.turn_events import (
    CREATED,
    HEX,
    MODEL,
    Answer,
    Step,
    failed_turn,
    logprob,
    turn_events,
)


def decode(ids: Sequence[int]) -> str:
    return "".join(chr(ord("a") + token) for token in ids)


def complete(**fields: Any) -> CompletionRequest:
    return parse({"model": "pebble", "prompt": "Once", **fields}, MODEL)


def refusal(**fields: Any) -> ApiError:
    with pytest.raises(ApiError) as caught:
        complete(**fields)
    return caught.value


def frames(request: CompletionRequest, events: Sequence[Event]) -> list[dict[str, Any]]:
    stream = CompletionStream(request, "fp_test", decode)
    datas = [frame.data for event in events for frame in stream.feed(event)]
    assert datas[-1] == b"[DONE]"
    assert datas.count(b"[DONE]") == 1
    chunks = [json.loads(data) for data in datas[:-1]]
    for chunk in chunks:
        # The SDK's type knows no null, which OpenAI sends for an echoed prompt's first token.
        if "error" not in chunk and not request.turn.echo:
            # The SDK's type knows only final choices; running ones have no reason yet.
            choices = [{**one, "finish_reason": "stop"} for one in chunk["choices"]]
            Completion.model_validate({**chunk, "choices": choices})
    return chunks


def answer(request: CompletionRequest, events: Sequence[Event]) -> dict[str, Any]:
    collector = CompletionCollector(request, "fp_test", decode)
    for event in events:
        collector.feed(event)
    return collector.result()


@pytest.mark.parametrize(
    ("prompt", "prompts"),
    [
        ("Once", ["Once"]),
        (["Once", "Twice"], ["Once", "Twice"]),
        ([1, 2, 3], [[1, 2, 3]]),
        ([[1, 2], [3]], [[1, 2], [3]]),
        (["Once", [3]], ["Once", [3]]),
    ],
)
def test_prompts_in_every_form(prompt: object, prompts: list[Any]) -> None:
    assert complete(prompt=prompt).turn == TurnRequest(
        dialect="completions",
        model="pebble",
        prompts=prompts,
        sampling=SamplingOptions(max_tokens=16),
    )


def test_everything_arrives() -> None:
    turn = complete(
        n=2,
        best_of=2,
        max_tokens=7,
        echo=True,
        logprobs=3,
        stream=True,
        stream_options={"include_usage": True},
        temperature=0,
        suffix=None,
        use_beam_search=False,
        return_token_ids=True,
        ignore_eos=True,
        user="u",
    ).turn
    assert turn == TurnRequest(
        dialect="completions",
        model="pebble",
        prompts=["Once"],
        n=2,
        sampling=SamplingOptions(
            max_tokens=7, temperature=0.0, logprobs=3, prompt_logprobs=3, ignore_eos=True
        ),
        stream=True,
        echo=True,
        shape=Shape(include_usage=True, token_ids=True),
        return_token_ids=True,
    )


@pytest.mark.parametrize(
    ("fields", "param", "code"),
    [
        ({"prompt": None}, "prompt", "missing_required_parameter"),
        ({"prompt": ""}, "prompt", "empty_prompt"),
        ({"prompt": []}, "prompt", "empty_array"),
        ({"prompt": 5}, "prompt", "invalid_type"),
        ({"prompt": {"text": "x"}}, "prompt", "invalid_type"),
        ({"prompt": ["x", ""]}, "prompt[1]", "empty_prompt"),
        ({"prompt": ["x", 3]}, "prompt[1]", "invalid_type"),
        ({"prompt": ["x"] * 129}, "prompt", "array_above_max_length"),
        ({"prompt": [1, 100]}, "prompt[1]", "invalid_token_id"),
        ({"prompt": [-1]}, "prompt[0]", "invalid_token_id"),
        ({"prompt": [1, 2.5]}, "prompt[1]", "invalid_type"),
        ({"prompt": [1, True]}, "prompt[1]", "invalid_type"),
        ({"prompt": [None]}, "prompt[0]", "invalid_type"),
        ({"prompt": [[1], []]}, "prompt[1]", "empty_prompt"),
        ({"prompt": [[1], ["x"]]}, "prompt[1][0]", "invalid_type"),
        ({"prompt": [[1], [2, 2**70]]}, "prompt[1][1]", "invalid_token_id"),
        ({"prompt": [1] * 64}, "prompt", "context_length_exceeded"),
        ({"max_tokens": 0}, "max_tokens", "invalid_value"),
        ({"max_tokens": "7"}, "max_tokens", "invalid_type"),
        ({"min_tokens": 17}, "min_tokens", "invalid_value"),
        ({"logprobs": True}, "logprobs", "invalid_type"),
        ({"logprobs": 21}, "logprobs", "invalid_value"),
        ({"echo": "yes"}, "echo", "invalid_type"),
        ({"n": 129}, "n", "invalid_value"),
        ({"n": 65, "prompt": ["a", "b"]}, "n", "invalid_value"),
        ({"best_of": 3}, "best_of", "unsupported_parameter"),
        ({"n": 3, "best_of": 1}, "best_of", "unsupported_parameter"),
        ({"suffix": "end"}, "suffix", "unsupported_parameter"),
        ({"use_beam_search": True}, "use_beam_search", "unsupported_parameter"),
        ({"messages": []}, "messages", "unknown_parameter"),
        ({"stream_options": {}}, "stream_options", "invalid_value"),
        ({"model": ["pebble"]}, "model", "invalid_type"),
    ],
)
def test_wrong_bodies_name_the_field(fields: dict[str, Any], param: str, code: str) -> None:
    error = refusal(**fields)
    assert (error.status, error.param, error.code) == (400, param, code)
    assert param.split("[")[0] in error.message


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
        lambda inner: st.lists(inner, max_size=4),
        max_leaves=12,
    )
)
def test_no_prompt_crashes_the_parser(prompt: object) -> None:
    try:
        turn = parse({"model": "pebble", "prompt": prompt}, MODEL).turn
    except ApiError as error:
        refused = error
    else:
        assert turn.prompts
        assert all(turn.prompts)
        return
    assert refused.status == 400
    assert refused.param is not None
    assert refused.param.startswith("prompt")


def test_a_stream_in_openais_shape() -> None:
    request = complete(stream=True, stream_options={"include_usage": True})
    head = {
        "id": f"cmpl-{HEX}",
        "object": "text_completion",
        "created": CREATED,
        "model": "pebble",
        "system_fingerprint": "fp_test",
    }

    def chunk(text: str, finish: str | None = None) -> dict[str, Any]:
        choice = {"index": 0, "text": text, "logprobs": None, "finish_reason": finish}
        return {**head, "choices": [choice], "usage": None}

    chunks = frames(request, turn_events([Answer([Step(" up"), Step("on")], "length")]))
    assert chunks[:-1] == [chunk(" up"), chunk("on"), chunk("", "length")]
    assert chunks[-1]["choices"] == []
    assert chunks[-1]["usage"]["total_tokens"] == 8


def test_a_whole_answer_in_openais_shape() -> None:
    whole = answer(complete(), turn_events([Answer([Step(" upon")], "stop", "\n")]))
    assert whole["choices"] == [
        {
            "index": 0,
            "text": " upon",
            "logprobs": None,
            "finish_reason": "stop",
            "stop_reason": "\n",
        }
    ]
    assert (whole["id"], whole["object"]) == (f"cmpl-{HEX}", "text_completion")
    Completion.model_validate(whole)


ECHO = [
    ResponsePrompt(
        output_index=0, token_ids=[0, 1], logprobs=[None, logprob("b", -1.0, ("b", -1.0))]
    ),
    ResponsePrompt(output_index=2, token_ids=[2], logprobs=[None]),
]


def test_echo_shows_each_choice_its_own_prompt() -> None:
    """Two prompts with two answers each, and log-probabilities."""
    answers = [Answer([Step(text, [4], [logprob(text, -0.5, (text, -0.5))])]) for text in "wxyz"]
    events = turn_events(answers, ECHO)
    request = complete(prompt=[[0, 1], [2]], n=2, echo=True, logprobs=1)
    whole = answer(request, events)
    assert [one["text"] for one in whole["choices"]] == ["abw", "abx", "cy", "cz"]
    assert whole["choices"][1]["logprobs"] == {
        "tokens": ["a", "b", "x"],
        "token_logprobs": [None, -1.0, -0.5],
        "top_logprobs": [None, {"b": -1.0}, {"x": -0.5}],
        "text_offset": [0, 1, 2],
    }
    assert whole["choices"][2]["logprobs"]["tokens"] == ["c", "y"]
    streamed = frames(
        complete(prompt=[[0, 1], [2]], n=2, echo=True, logprobs=1, stream=True), events
    )
    for index, choice in enumerate(whole["choices"]):
        own = [c["choices"][0] for c in streamed if c["choices"][0]["index"] == index]
        assert "".join(one["text"] for one in own) == choice["text"]
        for name, values in choice["logprobs"].items():
            parts = [one["logprobs"][name] for one in own if one["logprobs"]]
            assert list(itertools.chain(*parts)) == values


def test_echo_of_a_text_is_the_text_as_sent() -> None:
    events = turn_events([Answer([Step(" upon")])], [ResponsePrompt(output_index=0, token_ids=[7])])
    assert answer(complete(prompt="Once ", echo=True), events)["choices"][0]["text"] == "Once  upon"
    chunks = frames(complete(prompt="Once ", echo=True, stream=True), events)
    assert [chunk["choices"][0]["text"] for chunk in chunks] == ["Once ", " upon", ""]


def test_token_ids_as_vllm_gives_them() -> None:
    events = turn_events(
        [Answer([Step("", [1]), Step("x", [2])])],
        [ResponsePrompt(output_index=0, token_ids=[7, 8])],
    )
    whole = answer(complete(return_token_ids=True), events)
    assert whole["choices"][0]["prompt_token_ids"] == [7, 8]
    assert whole["choices"][0]["token_ids"] == [1, 2]
    chunks = frames(complete(return_token_ids=True, stream=True), events)
    choices = [chunk["choices"][0] for chunk in chunks]
    assert choices[0]["prompt_token_ids"] == [7, 8]
    assert [one for choice in choices for one in choice.get("token_ids", [])] == [1, 2]


def test_running_usage_counts_all_prompts() -> None:
    request = complete(
        prompt=[[0, 1], [2]],
        stream=True,
        stream_options={"include_usage": True, "continuous_usage_stats": True},
    )
    prompts = [
        ResponsePrompt(output_index=0, token_ids=[0, 1]),
        ResponsePrompt(output_index=1, token_ids=[2]),
    ]
    events = turn_events([Answer([Step("a", [1, 1])]), Answer([Step("b", [1])])], prompts)
    usages = [chunk["usage"] for chunk in frames(request, events)]
    assert [usage["completion_tokens"] for usage in usages] == [2, 3, 3, 3, 3]
    assert {usage["prompt_tokens"] for usage in usages[:-1]} == {3}


def test_a_failed_turn_is_an_error() -> None:
    chunks = frames(complete(stream=True), failed_turn("engine_died", "Gone."))
    assert chunks[-1]["error"]["code"] == "engine_died"
    assert all(c["choices"][0]["finish_reason"] is None for c in chunks[:-1])
    with pytest.raises(ApiError) as caught:
        answer(complete(), failed_turn("engine_died", "Gone."))
    assert caught.value.status == 503


@given(st.text(max_size=12), st.lists(st.integers(0, 40), max_size=6))
def test_offsets_count_characters_however_bytes_are_cut(text: str, cuts: list[int]) -> None:
    data = text.encode()
    edges = sorted({0, len(data), *(min(cut, len(data)) for cut in cuts)})
    tokens = [data[a:b] for a, b in itertools.pairwise(edges)]
    entries = []
    for token in tokens:
        entry = logprob("", -1.0)
        entry.bytes[:] = token
        entries.append(entry)
    logprobs = LegacyLogprobs()
    offsets = [logprobs.add([entry])["text_offset"][0] for entry in entries]
    begins = [len(data[:edge].decode(errors="ignore")) for edge in edges[:-1]]
    whole = [edge == 0 or data[edge] & 0xC0 != 0x80 for edge in edges[:-1]]
    for offset, begin, is_whole in zip(offsets, begins, whole, strict=True):
        # A token that continues a character stands after it.
        assert offset == (begin if is_whole else begin + 1)
