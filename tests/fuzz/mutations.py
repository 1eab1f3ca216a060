"""Requests that are almost right: valid ones of every route, mutated from a seed."""

from __future__ import annotations

import copy
import gzip
import json
import random
import zlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

__all__ = ["ROUTES", "Route", "mutated", "mutated_request", "request_bytes"]

Json = Any


class Route(NamedTuple):
    """A valid request."""

    method: str
    path: str
    body: Json = None


MESSAGES = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello"}]
SAMPLING = {
    "temperature": 0.5, "top_p": 0.9, "top_k": 20, "min_p": 0.1, "seed": 3, "presence_penalty": 0.1,
    "frequency_penalty": 0.1, "repetition_penalty": 1.1, "logit_bias": {"5": 1}, "stop": ["x"],
}  # fmt: skip
CHAT = {"model": "pebble", "messages": MESSAGES, "max_tokens": 3}
TEXT = {"model": "pebble", "prompt": "Hello", "max_tokens": 3}
RESPONSES = {"model": "pebble", "input": "Hello", "max_output_tokens": 16}
ITEM = {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "Hi"}]}

ROUTES = (
    Route("POST", "/v1/chat/completions", {**CHAT, **SAMPLING}),
    Route("POST", "/v1/chat/completions", {**CHAT, "n": 2, "logprobs": True, "top_logprobs": 2}),
    Route(
        "POST",
        "/v1/chat/completions",
        {**CHAT, "stream": True, "stream_options": {"include_usage": True}},
    ),
    Route("POST", "/v1/completions", {**TEXT, **SAMPLING, "echo": True, "logprobs": 1}),
    Route("POST", "/v1/completions", {**TEXT, "prompt": [[5, 6, 7], [8]], "n": 2}),
    Route("POST", "/v1/completions", {**TEXT, "stream": True, "suffix": None}),
    Route("POST", "/v1/responses", {**RESPONSES, "temperature": 0.5, "metadata": {"a": "b"}}),
    Route("POST", "/v1/responses", {**RESPONSES, "input": [ITEM], "stream": True, "store": False}),
    Route("POST", "/v1/responses", {**RESPONSES, "instructions": "Be kind.", "background": True}),
    Route("POST", "/v1/responses", {**RESPONSES, "previous_response_id": "resp_none"}),
    Route("POST", "/v1/responses", {**RESPONSES, "conversation": {"id": "c", "after": None}}),
    Route("POST", "/v1/conversations", {"items": [ITEM], "metadata": {"a": "b"}}),
    Route("POST", "/v1/conversations", {"title": "T"}),
    Route("POST", "/v1/conversations/conv_none", {"title": "T", "head": "msg_none"}),
    Route("POST", "/v1/conversations/conv_none/fork", {"after": "msg_none", "title": "T"}),
    Route("POST", "/v1/conversations/conv_none/items", {"items": [ITEM]}),
    Route("POST", "/v1/responses/resp_none/cancel"),
    Route("POST", "/tokenize", {"model": "pebble", "messages": MESSAGES}),
    Route("POST", "/tokenize", {"model": "pebble", "prompt": "Hello"}),
    Route("POST", "/detokenize", {"model": "pebble", "tokens": [5, 6, 7]}),
    Route("GET", "/v1/models"),
    Route("GET", "/v1/models/pebble"),
    Route("GET", "/v1/responses/resp_none?stream=true&starting_after=3"),
    Route("GET", "/v1/responses/resp_none/input_items?limit=5&order=asc&after=x"),
    Route("GET", "/v1/conversations?limit=5&query=hello"),
    Route("GET", "/v1/conversations/conv_none/items?limit=5&tree=true"),
    Route("DELETE", "/v1/responses/resp_none"),
    Route("DELETE", "/v1/conversations/conv_none"),
    Route("DELETE", "/v1/conversations/conv_none/items/msg_none?subtree=true"),
    Route("GET", "/health"),
    Route("GET", "/metrics"),
    Route("GET", "/openapi.json"),
    Route("GET", "/"),
    Route("GET", "/v1/responses"),
)
"""Every route, several shapes of those that take a body."""

VALUES: tuple[Json, ...] = (
    None, True, False, 0, -1, 1, 2, 3.7, -0.0, 1e308, -1e308, 2**31, 2**53, 2**63, 2**64, 10**40,
    -(2**63), "", " ", "x", "0", "null", "true", "\x00", "\ufeff", "\u202e", "\U0001f600", "é" * 50,
    "a" * 5000, "{{7*7}}", "{% raw %}", "<|im_end|>", "../../etc/passwd", "'; DROP TABLE x; --",
    "%s%n%x", [], {}, [[]], [None], [{}], {"": ""}, {"a": {"b": {"c": []}}}, ["x"] * 300,
    [5] * 300, list(range(40)), {str(n): n for n in range(200)}, "resp_none", "conv_none",
)  # fmt: skip
NAMES = ("", "model ", "Model", "__proto__", "constructor", "a.b", "\x00", "é", "x" * 300, "0")


def _paths(value: Json, here: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Every place in a value."""
    found = [here]
    if isinstance(value, dict):
        for key, inner in value.items():
            found += _paths(inner, (*here, key))
    elif isinstance(value, list):
        for at, inner in enumerate(value):
            found += _paths(inner, (*here, at))
    return found


def _replace(rng: random.Random, body: Json) -> Json:
    return _at(rng, body, lambda _: copy.deepcopy(rng.choice(VALUES)))


def _wrap(rng: random.Random, body: Json) -> Json:
    return _at(rng, body, lambda old: rng.choice(([old], {"a": old}, [old, old])))


def _as_text(rng: random.Random, body: Json) -> Json:
    return _at(rng, body, lambda old: old if isinstance(old, dict | list) else str(old))


def _nest(rng: random.Random, body: Json) -> Json:
    def deep(old: Json) -> Json:
        for _ in range(rng.choice((5, 60, 150))):
            old = [old] if rng.random() < 0.5 else {"a": old}
        return old

    return _at(rng, body, deep)


def _delete(rng: random.Random, body: Json) -> Json:
    paths = [path for path in _paths(body) if path]
    if not paths:
        return body
    *parents, last = rng.choice(paths)
    inner = body
    for step in parents:
        inner = inner[step]
    del inner[last]
    return body


def _rename(rng: random.Random, body: Json) -> Json:
    if isinstance(body, dict) and body:
        key = rng.choice(list(body))
        name = rng.choice((*NAMES, key.upper(), key + "s", key[::-1]))
        body[name] = body.pop(key)
    return body


def _add(rng: random.Random, body: Json) -> Json:
    if isinstance(body, dict):
        key = rng.choice((*NAMES, *SAMPLING, "stream", "n", "store", "tools", "user", "best_of"))
        body[key] = copy.deepcopy(rng.choice(VALUES))
    return body


def _at(rng: random.Random, body: Json, change: Callable[[Json], Json]) -> Json:
    path = rng.choice(_paths(body))
    if not path:
        return change(body)
    *parents, last = path
    inner = body
    for step in parents:
        inner = inner[step]
    inner[last] = change(inner[last])
    return body


TREE = (_replace, _replace, _replace, _delete, _rename, _add, _wrap, _as_text, _nest)


def _cut(rng: random.Random, data: bytes) -> bytes:
    return data[: rng.randrange(len(data) + 1)]


def _flip(rng: random.Random, data: bytes) -> bytes:
    spoiled = bytearray(data or b"x")
    for _ in range(rng.randint(1, 4)):
        spoiled[rng.randrange(len(spoiled))] = rng.randrange(256)
    return bytes(spoiled)


def _insert(rng: random.Random, data: bytes) -> bytes:
    at = rng.randrange(len(data) + 1)
    what = rng.choice((b"\x00", b"\xff\xfe", b",", b"}", b"NaN", b"\\ud800", b"/**/", b"1e999"))
    return data[:at] + what + data[at:]


def _double_keys(rng: random.Random, data: bytes) -> bytes:
    return data.replace(b"{", b'{"model":"other","model":"pebble",', 1)


def _encoded(rng: random.Random, data: bytes) -> bytes:
    text = data.decode("utf-8", "replace")
    return text.encode(rng.choice(("utf-16", "utf-32", "utf-8-sig", "utf-7", "cp037")))


def _twice(rng: random.Random, data: bytes) -> bytes:
    return data + rng.choice((data, b" ", b"\x00", b"x", b"[]"))


BYTES = (_cut, _flip, _insert, _double_keys, _encoded, _twice)

Headers = list[tuple[str, str]]
TYPES = (
    "text/plain", "application/json; charset=utf-16", "application/json; charset=nonsense",
    "application/JSON", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x",
    "multipart/form-data", "application/json;;;", "application/json, text/plain", "*/*", "",
    "application/json; boundary=\"", "é/é",
)  # fmt: skip
ODD_HEADERS: tuple[tuple[str, str], ...] = (
    ("Content-Encoding", "gzip"), ("Content-Encoding", "deflate"), ("Content-Encoding", "br"),
    ("Content-Encoding", "nonsense"), ("Content-Length", "5"), ("Content-Length", "-1"),
    ("Content-Length", "99999999999999999999"), ("Content-Length", "1e3"), ("Expect", "x"),
    ("Expect", "100-continue"), ("Transfer-Encoding", "chunked"), ("Transfer-Encoding", "gzip"),
    ("Transfer-Encoding", "chunked, chunked"), ("Host", "evil.example"), ("Host", ""),
    ("Origin", "null"), ("Origin", "https://evil.example"), ("Origin", "x" * 500),
    ("Upgrade", "websocket"), ("Upgrade", "h2c"), ("Connection", "upgrade"), ("Range", "bytes=0-0"),
    ("Range", "bytes=5-1"), ("If-Modified-Since", "yesterday"), ("If-None-Match", '"x'),
    ("Authorization", "Basic x"), ("Authorization", "Bearer"), ("Authorization", "Bearer \xff"),
    ("api-key", ""), ("X-Forwarded-For", "127.0.0.1"), ("X-HTTP-Method-Override", "DELETE"),
    ("Cookie", "a=b; " * 200), ("Accept", "\xff"), ("Accept-Encoding", "gzip;q=nonsense"),
    ("Last-Event-ID", "-5"), ("Last-Event-ID", "9" * 400), ("Last-Event-ID", "é"),
    ("Sec-WebSocket-Protocol", "millrace-key."), ("Access-Control-Request-Method", "\x01"),
    ("Idempotency-Key", "x" * 5000), ("Idempotency-Key", ""), ("X", "y" * 7000),
)  # fmt: skip


def _compressed(rng: random.Random, data: bytes) -> tuple[bytes, str]:
    if rng.random() < 0.2:
        data = b" " * (32 << 20)
    if rng.random() < 0.5:
        return gzip.compress(data, 6), "gzip"
    return zlib.compress(data), "deflate"


def _mutated_path(rng: random.Random, path: str) -> str:
    odd = rng.choice(
        ("%00", "%2e%2e/", "..;/", "//", "%ff", "?", "?a=b&a=c", "?limit=-1", "?limit=1e9", "#x",
         "/" * 30, "%", "%zz", "?stream=x", "?stream=true&starting_after=-1", "x" * 3000, "é",
         "?starting_after=99999999999999999999", "?order=up", "?after=%00")
    )  # fmt: skip
    at = rng.randrange(1, len(path) + 1)
    return path[:at] + odd + path[at:] if rng.random() < 0.3 else path + odd


def mutated(rng: random.Random, body: Json) -> tuple[list[str], Json]:
    """Return the names of a few changes, and the body with them; it may be changed in place."""
    names: list[str] = []
    for _ in range(rng.choice((0, 1, 1, 1, 2, 4))):
        change = rng.choice(TREE)
        names.append(change.__name__)
        body = change(rng, body)
    return names, body


def mutated_request(
    rng: random.Random, key: str, routes: Sequence[Route] = ROUTES
) -> tuple[str, bytes]:
    """Return a description and the bytes of one request; most are wrong in one or two ways."""
    route = rng.choice(routes)
    method, path = route.method, route.path
    headers: Headers = [("Host", "127.0.0.1"), ("Authorization", f"Bearer {key}")]
    body = copy.deepcopy(route.body)
    names: list[str] = []
    if body is not None:
        names, body = mutated(rng, body)
        headers.append(("Content-Type", "application/json"))
    data = b"" if body is None else json.dumps(body).encode("utf-8", "replace")
    if rng.random() < 0.25:
        spoil = rng.choice(BYTES)
        names.append(spoil.__name__)
        data = spoil(rng, data)
    kind = rng.random()
    if kind < 0.1 and len(headers) > 2:
        headers[2] = ("Content-Type", rng.choice(TYPES))
    elif kind < 0.25:
        headers.append(rng.choice(ODD_HEADERS))
    elif kind < 0.28:
        data, encoding = _compressed(rng, data)
        headers.append(("Content-Encoding", encoding))
    elif kind < 0.38:
        path = _mutated_path(rng, path)
    elif kind < 0.42:
        method = rng.choice(("PUT", "PATCH", "OPTIONS", "HEAD", "TRACE", "CONNECT", "BREW", "get"))
    message = request_bytes(rng, method, path, headers, data)
    return f"{method} {path[:60]} {','.join(names)} {headers[2:]}"[:300], message


def request_bytes(
    rng: random.Random, method: str, path: str, headers: Headers, data: bytes
) -> bytes:
    """Return a request as it goes over the wire: whole, chunked, or several in one go."""
    names = {name.lower() for name, _ in headers}
    close = [("Connection", "close")] if "connection" not in names else []
    chunked = data and rng.random() < 0.15 and "transfer-encoding" not in names
    if chunked:
        headers = [*headers, ("Transfer-Encoding", "chunked")]
        step = rng.choice((1, 7, 1000))
        parts = [data[at : at + step] for at in range(0, min(len(data), 5000), step)]
        parts += [data[5000:]] if len(data) > 5000 else []
        framed = b"".join(b"%x\r\n%b\r\n" % (len(part), part) for part in parts) + b"0\r\n\r\n"
    elif "content-length" in names or not (data or method == "POST"):
        framed = data
    else:
        headers = [*headers, ("Content-Length", str(len(data)))]
        framed = data
    version = "HTTP/1.0" if rng.random() < 0.03 else "HTTP/1.1"

    def head(more: Headers) -> bytes:
        lines = [f"{method} {path} {version}", *(f"{n}: {v}" for n, v in [*headers, *more])]
        return "\r\n".join(lines).encode("utf-8", "surrogateescape") + b"\r\n\r\n"

    first = (head([]) + framed) * rng.randint(1, 5) if rng.random() < 0.05 else b""
    return first + head(close) + framed
