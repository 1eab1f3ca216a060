"""Transcripts of every dialect, byte for byte, from the scripted engine.

The files beside this one are compared with what the server sends now. Only what differs from run
to run is replaced: ids, by their order of appearance, and times. After a change that is meant,
write them anew with ``MILLRACE_UPDATE_GOLDEN=1`` and read the difference.
"""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from aiohttp import ClientResponse

from engine import Request
from tests.server.edge import Edge, serving
from tests.server.scripted import Script, ScriptedEngine, call_text, prompt_text, say

HERE = Path(__file__).parent
UPDATE = os.environ.get("MILLRACE_UPDATE_GOLDEN") == "1"

_ID = re.compile(rb"[0-9a-f]{24,32}")
_TIME = re.compile(rb'("(?:created|created_at|completed_at)":)(\d+)')
_SHOWN_HEADERS = ("Content-Type", "Cache-Control", "Retry-After", "Allow", "WWW-Authenticate")


class Case(NamedTuple):
    name: str
    path: str
    body: Any
    said: str = "Grüß Gott"
    method: str = "POST"
    dies_after: int | None = None
    per_step: int = 1
    max_model_len: int = 64


MESSAGES = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": [{"type": "text", "text": "Hi"}]},
]
CHAT = {"model": "scripted", "messages": MESSAGES, "seed": 1}
TEXT = {"model": "scripted", "prompt": "Hi", "seed": 1}
RESPONSE = {"model": "scripted", "input": "Hi", "seed": 1}
STREAM = {"stream": True, "stream_options": {"include_usage": True}}
EVERYTHING = {"n": 2, "return_token_ids": True, "prompt_logprobs": 1}

TOOL = {
    "name": "book",
    "description": "Book a table",
    "parameters": {"type": "object", "properties": {"people": {"type": "integer"}}},
}
WITH_TOOL = {**CHAT, "tools": [{"type": "function", "function": TOOL}]}
CALLS = "<think>\nTwo.\n</think>\n\nOk.\n" + call_text("book", '{"people": 2}')
LONG: dict[str, Any] = {"per_step": 9, "max_model_len": 512}
CALCULATE = call_text("calculator", '{"expression": "6 * 7"}')

CASES = [
    Case("chat", "/v1/chat/completions", CHAT),
    Case("chat_stream", "/v1/chat/completions", {**CHAT, **STREAM}),
    Case(
        "chat_everything",
        "/v1/chat/completions",
        {**CHAT, **EVERYTHING, "logprobs": True, "top_logprobs": 2, "max_tokens": 3},
    ),
    Case(
        "chat_stream_everything",
        "/v1/chat/completions",
        {**CHAT, **EVERYTHING, **STREAM, "logprobs": True, "top_logprobs": 2, "max_tokens": 3},
    ),
    Case("chat_stop", "/v1/chat/completions", {**CHAT, "stop": "G", "stream": True}, "one Gott"),
    Case("chat_stream_dies", "/v1/chat/completions", {**CHAT, **STREAM}, "abc", "POST", 2),
    Case("chat_dies", "/v1/chat/completions", CHAT, "abc", "POST", 2),
    Case("completions", "/v1/completions", TEXT),
    Case("completions_stream", "/v1/completions", {**TEXT, **STREAM}),
    Case(
        "completions_everything",
        "/v1/completions",
        {**TEXT, **EVERYTHING, "echo": True, "logprobs": 2, "prompt": [[72, 105], "Ho"]},
        "ok",
    ),
    Case(
        "completions_stream_everything",
        "/v1/completions",
        {**TEXT, **EVERYTHING, **STREAM, "echo": True, "logprobs": 2},
        "ok",
    ),
    Case("responses", "/v1/responses", RESPONSE),
    Case("responses_stream", "/v1/responses", {**RESPONSE, "stream": True}),
    Case(
        "responses_stream_everything",
        "/v1/responses",
        {
            **RESPONSE,
            "stream": True,
            "instructions": "Be brief.",
            "metadata": {"a": "b"},
            "include": ["message.output_text.logprobs"],
            "top_logprobs": 1,
            "return_token_ids": True,
            "max_output_tokens": 2,
            "store": False,
        },
    ),
    Case("responses_stream_dies", "/v1/responses", {**RESPONSE, "stream": True}, "abc", "POST", 2),
    Case("chat_tools", "/v1/chat/completions", WITH_TOOL, CALLS, **LONG),
    Case("chat_stream_tools", "/v1/chat/completions", {**WITH_TOOL, **STREAM}, CALLS, **LONG),
    Case(
        "responses_stream_tools",
        "/v1/responses",
        {**RESPONSE, "stream": True, "tools": [{"type": "function", **TOOL}]},
        CALLS,
        **LONG,
    ),
    Case(
        "responses_stream_builtin",
        "/v1/responses",
        {**RESPONSE, "stream": True, "tools": [{"type": "millrace:calculator"}]},
        CALCULATE,
        **LONG,
    ),
    Case("models", "/v1/models", None, method="GET"),
    Case("tokenize", "/tokenize", {"messages": MESSAGES, "return_token_strs": True}),
    Case("detokenize", "/detokenize", {"tokens": [71, 114, 195, 188, 256]}),
    Case("error_missing_model", "/v1/chat/completions", {"messages": MESSAGES}),
    Case("error_unknown_model", "/v1/completions", {**TEXT, "model": "gpt-9"}),
    Case("error_range", "/v1/chat/completions", {**CHAT, "temperature": 7}),
    Case("error_type", "/v1/chat/completions", {**CHAT, "messages": [{"role": "user"}]}),
    Case("error_unknown_field", "/v1/responses", {**RESPONSE, "temprature": 1}),
    Case("error_context", "/v1/completions", {**TEXT, "prompt": "x" * 64}),
    Case("error_unknown_url", "/v1/nothing", None, method="GET"),
    Case("error_method", "/v1/chat/completions", None, method="GET"),
    Case("error_no_response", "/v1/responses/resp_none", None, method="GET"),
]


RESUMED = [
    Case("chat_resumed", "/v1/chat/completions", {**CHAT, **STREAM}),
    Case("completions_resumed", "/v1/completions", {**TEXT, **STREAM}),
]
"""Streams of which a client has two frames when it comes back."""


async def record_resumed(edge: Edge, case: Case) -> bytes:
    async with edge.client.post(case.path, json=case.body) as response:
        frames = (await response.read()).split(b"\n\n")
    place = re.search(rb"^id: (.*)$", frames[1], re.MULTILINE)
    assert place is not None
    last_id = place[1].decode()
    path = f"{case.path}/{last_id.partition(':')[0]}?stream=true"
    headers = {"Last-Event-ID": last_id}
    async with edge.client.get(path, headers=headers) as response:
        shown = Case(case.name, path, None, method="GET")
        text = transcript(shown, response, await response.read())
    return normal(b"> Last-Event-ID: " + last_id.encode() + b"\n" + text)


@pytest.mark.parametrize("case", RESUMED, ids=lambda case: case.name)
async def test_resumed_transcript(case: Case) -> None:
    async with serving(ScriptedEngine(say(case.said), max_model_len=64)) as edge:
        now = await record_resumed(edge, case)
    path = HERE / f"{case.name}.txt"
    if UPDATE:
        path.write_bytes(now)
    assert path.read_bytes() == now, f"{path.name} differs; MILLRACE_UPDATE_GOLDEN=1 writes it"


async def record(edge: Edge, case: Case) -> bytes:
    options = {} if case.body is None else {"json": case.body}
    async with edge.client.request(case.method, case.path, **options) as response:
        return normal(transcript(case, response, await response.read()))


def transcript(case: Case, response: ClientResponse, body: bytes) -> bytes:
    lines = [f"> {case.method} {case.path}"]
    if case.body is not None:
        lines.append(f"> {json.dumps(case.body, ensure_ascii=False)}")
    lines.append(f"< {response.status}")
    lines += [
        f"< {name}: {response.headers[name]}" for name in _SHOWN_HEADERS if name in response.headers
    ]
    return "\n".join(lines).encode() + b"\n\n" + body + b"\n"


def normal(text: bytes) -> bytes:
    """Replace ids by their order and times by a word; nothing else."""
    numbers: dict[bytes, int] = {}

    def number(match: re.Match[bytes]) -> bytes:
        return b"<id %d>" % numbers.setdefault(match.group(), len(numbers) + 1)

    return _TIME.sub(rb"\1<time>", _ID.sub(number, text))


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
async def test_transcript(case: Case) -> None:
    def script(request: Request) -> Script:
        # What the server's own tool said is answered in a second round.
        text = "It is 42." if "tool: " in prompt_text(request) else case.said
        return say(text, per_step=case.per_step, dies_after=case.dies_after)

    engine = ScriptedEngine(script, max_model_len=case.max_model_len)
    async with serving(engine) as edge:
        now = await record(edge, case)
    path = HERE / f"{case.name}.txt"
    if UPDATE:
        path.write_bytes(now)
    assert path.read_bytes() == now, f"{path.name} differs; MILLRACE_UPDATE_GOLDEN=1 writes it"


def test_every_transcript_has_its_case() -> None:
    assert {path.stem for path in HERE.glob("*.txt")} == {case.name for case in [*CASES, *RESUMED]}


def test_only_ids_and_times_are_replaced() -> None:
    hexadecimal = "0123456789abcdef" * 2
    given = f'{{"id":"resp_{hexadecimal}","created":17,"n":17,"other":"{"f" * 32}"}}'
    assert normal(given.encode()) == (
        b'{"id":"resp_<id 1>","created":<time>,"n":17,"other":"<id 2>"}'
    )
