"""Whatever is sent, the answer is a clear error, and afterwards nothing is left behind."""

from __future__ import annotations

import contextlib
import http.client
import json
import socket
from collections.abc import Iterator
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import pytest
import websockets.exceptions
from websockets.sync.client import ClientConnection, connect

from tests.e2e.live import LiveServer

CHAT = "/v1/chat/completions"
TEXT = "/v1/completions"
RESPONSES = "/v1/responses"
JSON = {"Content-Type": "application/json"}

MESSAGES: list[Any] = [{"role": "user", "content": "Hello"}]
BODIES: dict[str, dict[str, Any]] = {
    CHAT: {"model": "pebble", "messages": MESSAGES, "max_tokens": 4},
    TEXT: {"model": "pebble", "prompt": "Hello", "max_tokens": 4},
    RESPONSES: {"model": "pebble", "input": "Hello", "max_output_tokens": 4},
    "/tokenize": {"prompt": "Hello"},
    "/detokenize": {"tokens": [5]},
    "/v1/conversations": {},
}


class Refused(NamedTuple):
    """What is sent, and how it must be refused."""

    path: str
    change: dict[str, Any]
    param: str | None
    status: int = 400
    code: str | None = None


def image() -> list[Any]:
    return [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:,"}}]}]


FIELDS = [
    # Models
    Refused(CHAT, {"model": None}, "model", 400, "missing_required_parameter"),
    Refused(CHAT, {"model": 7}, "model", 400, "invalid_type"),
    Refused(CHAT, {"model": "gpt-9"}, "model", 404, "model_not_found"),
    Refused(TEXT, {"model": "gpt-9"}, "model", 404, "model_not_found"),
    Refused(RESPONSES, {"model": "gpt-9"}, "model", 404, "model_not_found"),
    Refused(CHAT, {"model": "../../etc/passwd"}, "model", 404, "model_not_found"),
    # Messages
    Refused(CHAT, {"messages": None}, "messages"),
    Refused(CHAT, {"messages": []}, "messages", 400, "empty_array"),
    Refused(CHAT, {"messages": "Hello"}, "messages", 400, "invalid_type"),
    Refused(CHAT, {"messages": [3]}, "messages[0]", 400, "invalid_type"),
    Refused(CHAT, {"messages": [{"role": "king", "content": "x"}]}, "messages[0].role"),
    Refused(CHAT, {"messages": [*MESSAGES, {"role": "user"}]}, "messages[1].content"),
    Refused(CHAT, {"messages": [{"role": "user", "content": {}}]}, "messages[0].content"),
    Refused(CHAT, {"messages": image()}, "messages[0].content[0].type"),
    Refused(CHAT, {"messages": [{"role": "user", "content": "a " * 9000}]}, "messages"),
    Refused(CHAT, {"chat_template": "{% for x in y %}"}, "chat_template"),
    Refused(CHAT, {"chat_template_kwargs": {"messages": []}}, None, 400, None),
    # Prompts and token ids
    Refused(TEXT, {"prompt": None}, "prompt"),
    Refused(TEXT, {"prompt": ""}, "prompt", 400, "empty_prompt"),
    Refused(TEXT, {"prompt": []}, "prompt", 400, "empty_array"),
    Refused(TEXT, {"prompt": {"a": 1}}, "prompt", 400, "invalid_type"),
    Refused(TEXT, {"prompt": [[]]}, "prompt[0]", 400, "empty_prompt"),
    Refused(TEXT, {"prompt": [5, -1]}, "prompt[1]", 400, "invalid_token_id"),
    Refused(TEXT, {"prompt": [5, 10**9]}, "prompt[1]", 400, "invalid_token_id"),
    Refused(TEXT, {"prompt": [5, 10**30]}, "prompt[1]", 400, "invalid_type"),
    Refused(TEXT, {"prompt": [5, 1.5]}, "prompt[1]", 400, "invalid_type"),
    Refused(TEXT, {"prompt": [5, True]}, "prompt[1]", 400, "invalid_type"),
    Refused(TEXT, {"prompt": [5] * 4096}, "prompt", 400, "context_length_exceeded"),
    Refused(TEXT, {"prompt": "word " * 9000}, "prompt", 400, "context_length_exceeded"),
    Refused(TEXT, {"prompt": ["a"] * 200}, "prompt"),
    # Sampling
    Refused(CHAT, {"temperature": -1}, "temperature"),
    Refused(CHAT, {"temperature": 2.5}, "temperature"),
    Refused(CHAT, {"temperature": "warm"}, "temperature", 400, "invalid_type"),
    Refused(CHAT, {"temperature": True}, "temperature", 400, "invalid_type"),
    Refused(CHAT, {"top_p": 0}, "top_p"),
    Refused(CHAT, {"top_p": 1.5}, "top_p"),
    Refused(CHAT, {"top_k": -5}, "top_k"),
    Refused(CHAT, {"min_p": 2}, "min_p"),
    Refused(CHAT, {"presence_penalty": 3}, "presence_penalty"),
    Refused(CHAT, {"frequency_penalty": -3}, "frequency_penalty"),
    Refused(CHAT, {"repetition_penalty": 0}, "repetition_penalty"),
    Refused(CHAT, {"n": 0}, "n"),
    Refused(CHAT, {"n": 10**6}, "n"),
    Refused(CHAT, {"max_tokens": 0}, "max_tokens"),
    Refused(CHAT, {"max_tokens": -5}, "max_tokens"),
    Refused(CHAT, {"max_tokens": 4.5}, "max_tokens", 400, "invalid_type"),
    Refused(CHAT, {"min_tokens": 9}, "min_tokens"),
    Refused(CHAT, {"seed": 2**64}, "seed"),
    Refused(CHAT, {"stop": [""]}, "stop[0]"),
    Refused(CHAT, {"stop": ["x"] * 99}, "stop"),
    Refused(CHAT, {"stop_token_ids": [-1]}, "stop_token_ids[0]", 400, "invalid_token_id"),
    Refused(CHAT, {"logit_bias": {"x": 1}}, "logit_bias.x"),
    Refused(CHAT, {"logit_bias": {"99999999": 1}}, "logit_bias.99999999"),
    Refused(CHAT, {"logit_bias": {"5": 1000}}, "logit_bias.5"),
    Refused(CHAT, {"logprobs": True, "top_logprobs": 500}, "top_logprobs"),
    Refused(TEXT, {"logprobs": -1}, "logprobs"),
    Refused(TEXT, {"best_of": 5}, "best_of"),
    # What there is not
    Refused(CHAT, {"tools": [{"type": "web_search"}]}, "tools[0].type"),
    Refused(CHAT, {"response_format": {"type": "json_object"}}, "response_format"),
    Refused(CHAT, {"temprature": 1}, "temprature", 400, "unknown_parameter"),
    Refused(CHAT, {"stream_options": {"include_usage": True}}, "stream_options"),
    # Responses and conversations
    Refused(RESPONSES, {"input": None}, "input"),
    Refused(RESPONSES, {"input": []}, "input"),
    Refused(RESPONSES, {"input": ""}, "input"),
    Refused(RESPONSES, {"input": [{"type": "poem"}]}, "input[0].type"),
    Refused(RESPONSES, {"input": "word " * 9000}, "input", 400, "context_length_exceeded"),
    Refused(RESPONSES, {"max_output_tokens": 0}, "max_output_tokens"),
    Refused(RESPONSES, {"metadata": {"a": 1}}, "metadata"),
    Refused(RESPONSES, {"include": ["everything"]}, "include[0]"),
    Refused(RESPONSES, {"previous_response_id": "resp_none"}, "previous_response_id", 400),
    Refused(RESPONSES, {"conversation": "conv_none"}, None, 404, "conversation_not_found"),
    Refused("/v1/conversations", {"metadata": "x"}, "metadata"),
    Refused("/v1/conversations", {"items": [{}] * 21}, "items"),
    # Tokens
    Refused("/tokenize", {"prompt": 3}, "prompt"),
    Refused("/detokenize", {"tokens": [-1]}, "tokens[0]", 400, "invalid_token_id"),
    Refused("/detokenize", {"tokens": "5"}, "tokens", 400, "invalid_type"),
]


class Raw(NamedTuple):
    """A request that is wrong before its fields are."""

    name: str
    method: str
    path: str
    headers: dict[str, str]
    body: bytes
    status: int
    code: str | None


RAW = [
    Raw("empty", "POST", CHAT, JSON, b"", 400, "invalid_json"),
    Raw("cut", "POST", CHAT, JSON, b'{"model": "peb', 400, "invalid_json"),
    Raw("not UTF-8", "POST", CHAT, JSON, b'{"model": "\xff\xfe"}', 400, "invalid_json"),
    Raw("UTF-16", "POST", CHAT, JSON, '{"model": "x"}'.encode("utf-16"), 400, "invalid_json"),
    Raw("lone surrogate", "POST", CHAT, JSON, b'{"model": "\\ud800"}', 400, "invalid_json"),
    Raw("NaN", "POST", CHAT, JSON, b'{"temperature": NaN}', 400, "invalid_json"),
    Raw("an array", "POST", CHAT, JSON, b"[]", 400, None),
    Raw("a text", "POST", CHAT, JSON, b'"hello"', 400, None),
    Raw("nested deeply", "POST", CHAT, JSON, b"[" * 200_000, 400, "invalid_json"),
    Raw("huge", "POST", CHAT, JSON, b" " * (9 << 20), 413, "request_too_large"),
    Raw("huge prompt", "POST", TEXT, JSON, b'"' + b"x" * (9 << 20), 413, "request_too_large"),
    Raw(
        "a form",
        "POST",
        CHAT,
        {"Content-Type": "application/x-www-form-urlencoded"},
        b"a=b",
        415,
        "unsupported_media_type",
    ),
    Raw("no type", "POST", CHAT, {}, b"{}", 415, "unsupported_media_type"),
    Raw("wrong method", "GET", CHAT, {}, b"", 405, "method_not_allowed"),
    Raw("wrong method 2", "DELETE", "/v1/models", {}, b"", 405, "method_not_allowed"),
    Raw("GET without upgrade", "GET", RESPONSES, {}, b"", 405, "method_not_allowed"),
    Raw("unknown route", "POST", "/v1/chat", JSON, b"{}", 404, "unknown_url"),
    Raw("unknown model", "GET", "/v1/models/none", {}, b"", 404, "model_not_found"),
    Raw("unknown response", "GET", "/v1/responses/none", {}, b"", 404, "response_not_found"),
    Raw("bad query", "GET", "/v1/responses/none/input_items?limit=x", {}, b"", 404, None),
    Raw("escape", "GET", "/v1/models/..%2f..%2fetc%2fpasswd", {}, b"", 404, "model_not_found"),
    Raw(
        "another origin",
        "POST",
        CHAT,
        {**JSON, "Origin": "https://evil.example"},
        b"{}",
        403,
        "origin_not_allowed",
    ),
]


@pytest.fixture(autouse=True)
def nothing_left(server: LiveServer) -> Iterator[None]:
    before = server.idle_metrics()
    printed = len(server.log)
    yield
    server.assert_clean(printed)
    after = server.idle_metrics()
    assert started(after) == started(before), "a refused request began a turn"


def started(samples: dict[str, float]) -> float:
    return sum(value for name, value in samples.items() if "turns_started_total" in name)


def send(
    server: LiveServer, method: str, path: str, headers: dict[str, str], body: bytes
) -> tuple[int, Any]:
    address = urlsplit(server.url)
    connection = http.client.HTTPConnection(address.hostname or "", address.port, timeout=60)
    with contextlib.closing(connection):
        # A server may refuse a body before it has been sent.
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            connection.request(method, path, body, headers)
        response = connection.getresponse()
        data = response.read()
        if response.headers.get_content_type() == "application/json":
            return response.status, json.loads(data)
        return response.status, data


def check_shape(body: Any) -> dict[str, Any]:
    assert isinstance(body, dict), body
    assert set(body) == {"error"}
    error: dict[str, Any] = body["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert len(error["message"]) > 10
    assert "Traceback" not in error["message"]
    return error


@pytest.mark.parametrize("case", FIELDS, ids=lambda case: f"{case.path}-{case.param}")
def test_wrong_fields(server: LiveServer, case: Refused) -> None:
    body = {**BODIES[case.path], **case.change}
    status, answer = send(server, "POST", case.path, JSON, json.dumps(body).encode())
    error = check_shape(answer)
    assert status == case.status, answer
    assert error["param"] == case.param or case.param is None
    assert case.code in (None, error["code"])


@pytest.mark.parametrize(
    "case", [case for case in FIELDS if case.path in (CHAT, TEXT, RESPONSES)][::7]
)
def test_a_refused_stream_is_no_stream(server: LiveServer, case: Refused) -> None:
    body = {**BODIES[case.path], "stream": True, **case.change}
    if "stream_options" in case.change:
        return
    status, answer = send(server, "POST", case.path, JSON, json.dumps(body).encode())
    check_shape(answer)
    assert status == case.status


@pytest.mark.parametrize("case", RAW, ids=lambda case: case.name)
def test_wrong_requests(server: LiveServer, case: Raw) -> None:
    status, answer = send(server, case.method, case.path, case.headers, case.body)
    assert status == case.status, answer
    error = check_shape(answer)
    assert case.code in (None, error["code"])


@pytest.mark.parametrize(
    "data",
    [
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
        b"GET\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: -5\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
        b"Transfer-Encoding: chunked\r\n\r\nZZ\r\n",
        b"GET / HTTP/1.1\r\nHost: x\r\nX: " + b"a" * 100_000 + b"\r\n\r\n",
    ],
    ids=["TLS", "no path", "negative length", "broken chunks", "long header"],
)
def test_what_is_no_http(server: LiveServer, data: bytes) -> None:
    address = urlsplit(server.url)
    with socket.create_connection((address.hostname, address.port), timeout=60) as raw:
        raw.sendall(data)
        answer = b""
        with contextlib.suppress(ConnectionResetError):
            while part := raw.recv(65536):
                answer += part
    assert answer == b"" or (answer.startswith(b"HTTP/1.") and b" 400 " in answer.split(b"\r\n")[0])


def test_a_body_that_never_ends_comes_to_nothing(server: LiveServer) -> None:
    address = urlsplit(server.url)
    head = (
        b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
        b"Content-Length: 1000\r\n\r\n"
    )
    with socket.create_connection((address.hostname, address.port), timeout=60) as raw:
        raw.sendall(head + b'{"model": "pebble", "prompt": "Hello"}')
    assert server.alive


class Message(NamedTuple):
    """A WebSocket message that is wrong."""

    name: str
    message: Any
    param: str | None
    status: int = 400


CREATE = {"type": "response.create", **BODIES[RESPONSES]}

MESSAGES_WRONG = [
    Message("no JSON", "hello", None),
    Message("empty", "", None),
    Message("binary", b"{}", None),
    Message("an array", [], None),
    Message("no type", {"model": "pebble"}, "type"),
    Message("unknown type", {"type": "response.paint"}, "type"),
    Message("wrong type of type", {"type": 5}, "type"),
    Message("no model", {"type": "response.create", "input": "x"}, "model"),
    Message("unknown model", {**CREATE, "model": "gpt-9"}, "model", 404),
    Message("empty input", {**CREATE, "input": []}, "input"),
    Message("impossible temperature", {**CREATE, "temperature": 9}, "temperature"),
    Message("unknown field", {**CREATE, "temprature": 1}, "temprature"),
    Message("long prompt", {**CREATE, "input": "word " * 9000}, "input"),
    Message("stream id", {**CREATE, "stream_id": 5}, "stream_id"),
    Message("background", {**CREATE, "background": True}, "background"),
    Message("unknown previous", {**CREATE, "previous_response_id": "x"}, "previous_response_id"),
    Message("unknown conversation", {**CREATE, "conversation": "x"}, None, 404),
    Message("nothing to cancel", {"type": "response.cancel"}, "response_id", 404),
    Message("cancel of nothing", {"type": "response.cancel", "response_id": "x"}, None, 404),
]


def dial(server: LiveServer) -> ClientConnection:
    url = server.url.replace("http", "ws", 1) + RESPONSES
    return connect(url, compression=None, max_size=None)


@pytest.mark.parametrize("case", MESSAGES_WRONG, ids=lambda case: case.name)
def test_wrong_messages(server: LiveServer, case: Message) -> None:
    with dial(server) as connection:
        plain = isinstance(case.message, str | bytes)
        connection.send(case.message if plain else json.dumps(case.message))
        event = json.loads(connection.recv(timeout=60))
        assert event["type"] == "error"
        assert event["status"] == case.status, event
        error = check_shape({"error": event["error"]})
        assert error["param"] == case.param or case.param is None
        # The connection is as good as before.
        connection.send('{"type": "response.cancel"}')
        assert json.loads(connection.recv(timeout=60))["status"] == 404


def test_a_message_that_is_too_large_closes_the_connection(server: LiveServer) -> None:
    with dial(server) as connection:
        with contextlib.suppress(websockets.exceptions.ConnectionClosed, ConnectionError):
            connection.send("x" * (9 << 20))
        with pytest.raises(websockets.exceptions.ConnectionClosed) as caught:
            connection.recv(timeout=60)
    assert caught.value.rcvd is None or caught.value.rcvd.code == 1009


def test_there_are_enough_cases() -> None:
    assert len(FIELDS) + len(RAW) + len(MESSAGES_WRONG) >= 100
