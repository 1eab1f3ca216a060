"""Inputs that mean harm: each is refused, or is taken for the plain text that it is."""

from __future__ import annotations

import asyncio
import functools
import gzip
import io
import json
import zlib
from collections.abc import Iterator
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import aiohttp
import psutil
import pytest
from websockets.asyncio.client import connect

from tests.e2e.live import LiveServer
from tests.fuzz.frames import CREATE, HANDSHAKE, TEXT, frame
from tests.fuzz.fuzzing import KEYS, exchange

pytestmark = pytest.mark.timeout(300)

FIRST, SECOND = ({"Authorization": f"Bearer {key}"} for key in KEYS)


@pytest.fixture(autouse=True)
def nothing_left(server: LiveServer) -> Iterator[None]:
    printed = len(server.log)
    yield
    server.assert_clean(printed)


def http_get(path: bytes) -> bytes:
    return b"GET " + path + b" HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"


# Templates

ESCAPES = [
    "{{ 7*7 }}",
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{% for x in range(10**9) %}{{ x }}{% endfor %}",
    "{% include '/etc/passwd' %}",
    "{{ messages.__init__.__globals__ }}",
    "{% endfor %}{% set x = cycler.__init__ %}{{ x }}",
    "{{ raise_exception('x') }}",
    "{#",
]


@pytest.mark.parametrize("text", ESCAPES)
async def test_a_template_in_a_message_is_text(server: LiveServer, text: str) -> None:
    async with aiohttp.ClientSession(server.url, headers=FIRST) as client:
        for role in ("system", "user", "assistant"):
            messages = [{"role": role, "content": text}, {"role": "user", "content": "Hello"}]
            async with client.post("/tokenize", json={"messages": messages}) as answer:
                assert answer.status == 200, await answer.text()
                tokens = (await answer.json())["tokens"]
            async with client.post("/detokenize", json={"tokens": tokens}) as answer:
                shown = (await answer.json())["prompt"]
            # The template may trim a message; what is inside stays.
            assert text.strip() in shown


@pytest.mark.parametrize(
    "field",
    [
        {"chat_template": "{{ 7*7 }}"},
        {"chat_template_kwargs": {"messages": []}},
        {"chat_template_kwargs": {"messages": [{"role": "system", "content": "x"}]}},
    ],
)
async def test_no_template_of_a_client(server: LiveServer, field: dict[str, Any]) -> None:
    body = {"model": "pebble", "max_tokens": 1, "messages": [{"role": "user", "content": "x"}]}
    async with (
        aiohttp.ClientSession(server.url, headers=FIRST) as client,
        client.post("/v1/chat/completions", json={**body, **field}) as answer,
    ):
        assert answer.status == 400, await answer.text()


# Paths

PATHS = [
    b"/../../../../etc/passwd",
    b"/%2e%2e/%2e%2e/%2e%2e/etc/passwd",
    b"/assets/..%2f..%2f..%2f..%2fetc%2fpasswd",
    b"/assets/%252e%252e/%252e%252e/etc/passwd",
    b"//etc/passwd",
    b"/etc/passwd",
    b"/assets/",
    b"/assets\\..\\..\\etc\\passwd",
    b"/index.html%00.js",
    b"/index.html/../../pyproject.toml",
    b"/..%c0%afetc/passwd",
    b"/.git/config",
    b"/theme.js/",
    b"file:///etc/passwd",
    b"http://127.0.0.1:6379/",
    b"/v1/../etc/passwd",
    b"/v1/models/..%2f..%2fetc%2fpasswd",
    b"/v1/responses/..%2fconversations",
    b"/v1/responses/*",
    b"/v1/conversations/%0d%0aDEL%20x",
]


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.decode())
async def test_no_path_leads_out(server: LiveServer, path: bytes) -> None:
    answered = await exchange(server, http_get(path))
    assert not answered.hung
    # An absolute address may name the page, or nothing; a file it never is.
    assert all(status in (301, 302, 400, 401, 404, 405) for status in answered.statuses) or (
        path.startswith((b"http:", b"file:")) and answered.statuses == [200]
    ), answered
    assert b"root:" not in answered.data
    assert b"[tool." not in answered.data
    assert b"repositoryformatversion" not in answered.data


# Upgrades

UPGRADE = HANDSHAKE.format(key=KEYS[0])


@pytest.mark.parametrize(
    ("name", "request_text"),
    [
        ("a body", UPGRADE + "Content-Length: 5\r\n\r\nhello"),
        ("a chunked body", UPGRADE + "Transfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\n\r\n"),
        ("a huge body", UPGRADE + "Content-Length: 99999999\r\n\r\nhello"),
        ("a POST", UPGRADE.replace("GET", "POST", 1) + "\r\n"),
        ("no key", UPGRADE.replace("Sec-WebSocket-Key", "X") + "\r\n"),
        ("a short key", UPGRADE.replace("dGhlIHNhbXBsZSBub25jZQ==", "eA==") + "\r\n"),
        ("another version", UPGRADE.replace("Version: 13", "Version: 99") + "\r\n"),
        ("another protocol", UPGRADE.replace("Upgrade: websocket", "Upgrade: h2c") + "\r\n"),
        ("no connection", UPGRADE.replace("Connection: Upgrade", "Connection: close") + "\r\n"),
        ("another route", UPGRADE.replace("/v1/responses", "/v1/models") + "\r\n"),
        ("another origin", UPGRADE + "Origin: https://evil.example\r\n\r\n"),
        ("no API key", UPGRADE.replace("Authorization", "X") + "\r\n"),
        ("a wrong API key", UPGRADE.replace(KEYS[0], "nobody's") + "\r\n"),
    ],
    ids=lambda value: value if len(value) < 30 else "",
)
async def test_odd_upgrades_are_refused(server: LiveServer, name: str, request_text: str) -> None:
    answered = await exchange(server, request_text.encode())
    assert not answered.hung, name
    assert answered.statuses, name
    if name == "another route":
        assert answered.statuses[0] == 200
    else:
        assert all(400 <= status < 500 for status in answered.statuses), answered


# Bombs

BOMB_BYTES = 256 << 20
"""Of which a server with a limit of 8 MiB may hold that, and what is decompressed of the rest while
it is thrown away, but never the whole."""


@functools.cache
def bombs() -> list[tuple[str, bytes]]:
    data = b'"' + b" " * BOMB_BYTES
    return [("gzip", gzip.compress(data, 1)), ("deflate", zlib.compress(data, 1))]


@pytest.mark.parametrize("path", ["/v1/responses", "/v1/chat/completions", "/tokenize"])
async def test_a_compressed_bomb_stays_small(server: LiveServer, path: str) -> None:
    process = psutil.Process(server.pid)
    before = process.memory_info().rss
    async with aiohttp.ClientSession(server.url, headers=FIRST) as client:
        for encoding, data in bombs():
            headers = {"Content-Type": "application/json", "Content-Encoding": encoding}
            async with client.post(path, data=io.BytesIO(data), headers=headers) as answer:
                assert answer.status in (400, 413, 415), await answer.text()
    assert process.memory_info().rss - before < BOMB_BYTES // 2


async def test_a_deflated_frame_that_nobody_agreed_on_ends_the_connection(
    server: LiveServer,
) -> None:
    packer = zlib.compressobj(wbits=-15)
    packed = packer.compress(b" " * BOMB_BYTES) + packer.flush(zlib.Z_SYNC_FLUSH)
    process = psutil.Process(server.pid)
    before = process.memory_info().rss
    offered = UPGRADE + "Sec-WebSocket-Extensions: permessage-deflate\r\n\r\n"
    answered = await exchange(
        server, offered.encode(), then=frame(packed[:-4], reserved=4), upgraded=True
    )
    assert b"permessage-deflate" not in answered.data
    assert not answered.hung
    assert process.memory_info().rss - before < BOMB_BYTES // 2


async def test_one_byte_frames_are_one_message(server: LiveServer) -> None:
    data = json.dumps({**CREATE, "model": "nobody"}).encode()
    last = len(data) - 1
    sent = b"".join(
        frame(data[at : at + 1], opcode=TEXT if at == 0 else 0, final=at == last)
        for at in range(len(data))
    )
    url = urlsplit(server.url)
    reader, writer = await asyncio.open_connection(url.hostname, url.port)
    try:
        writer.write((UPGRADE + "\r\n").encode() + sent)
        async with asyncio.timeout(60):
            answer = await reader.readuntil(b"model_not_found")
        assert answer.startswith(b"HTTP/1.1 101 ")
    finally:
        writer.transport.abort()


async def test_frames_without_an_end_stay_within_the_limit(server: LiveServer) -> None:
    piece = frame(b"x" * (1 << 20), opcode=0, final=False)
    sent = frame(b"x", final=False) + piece * 12
    answered = await exchange(server, (UPGRADE + "\r\n").encode(), then=sent, upgraded=True)
    # 1009: the message is too big (RFC 6455, section 7.4.1); or the connection is just gone.
    assert not answered.hung
    assert b"\x03\xf1" in answered.data or answered.data.endswith(b"\r\n\r\n")


# Two keys


class Owned(NamedTuple):
    """What the first key has."""

    response: str
    conversation: str
    running: str


@pytest.fixture
async def owned(server: LiveServer) -> Owned:
    body = {"model": "pebble", "input": "Hello", "max_output_tokens": 16}
    async with aiohttp.ClientSession(server.url, headers=FIRST) as client:
        async with client.post("/v1/responses", json=body) as answer:
            response = (await answer.json())["id"]
        item = {"type": "message", "role": "user", "content": "Hello"}
        async with client.post("/v1/conversations", json={"items": [item]}) as answer:
            conversation = (await answer.json())["id"]
        more = {"max_output_tokens": 200, "ignore_eos": True, "background": True}
        async with client.post("/v1/responses", json={**body, **more}) as answer:
            running = (await answer.json())["id"]
    return Owned(response, conversation, running)


def foreign_requests(owned: Owned) -> list[tuple[str, str, Any]]:
    body = {"model": "pebble", "input": "Hello", "max_output_tokens": 16}
    one, chat, running = owned
    return [
        ("GET", f"/v1/responses/{one}", None),
        ("GET", f"/v1/responses/{one}?stream=true", None),
        ("GET", f"/v1/responses/{running}?stream=true&starting_after=0", None),
        ("GET", f"/v1/responses/{one}/input_items", None),
        ("POST", f"/v1/responses/{running}/cancel", None),
        ("DELETE", f"/v1/responses/{one}", None),
        ("DELETE", f"/v1/responses/{running}", None),
        ("POST", "/v1/responses", {**body, "previous_response_id": one}),
        ("POST", "/v1/responses", {**body, "conversation": chat}),
        ("GET", f"/v1/conversations/{chat}", None),
        ("GET", f"/v1/conversations/{chat}/items", None),
        ("GET", f"/v1/conversations/{chat}/items?tree=true", None),
        ("POST", f"/v1/conversations/{chat}", {"metadata": {"a": "b"}}),
        ("POST", f"/v1/conversations/{chat}", {"title": "x"}),
        ("POST", f"/v1/conversations/{chat}/fork", {}),
        ("POST", "/v1/responses", {**body, "conversation": {"id": chat, "after": None}}),
        ("GET", f"/v1/conversations?after={chat}", None),
        ("POST", f"/v1/conversations/{chat}/items", {"items": [{"role": "user", "content": "x"}]}),
        ("DELETE", f"/v1/conversations/{chat}", None),
    ]


@pytest.mark.parametrize("headers", [SECOND, {}, {"Authorization": "Bearer nobody"}])
async def test_nothing_of_one_key_is_another_keys(
    server: LiveServer, owned: Owned, headers: dict[str, str]
) -> None:
    allowed = (404, 400) if headers == SECOND else (401,)
    async with aiohttp.ClientSession(server.url, headers=headers) as client:
        for method, path, body in foreign_requests(owned):
            options = {} if body is None else {"json": body}
            async with client.request(method, path, **options) as answer:
                text = await answer.text()
                assert answer.status in allowed, (method, path, answer.status, text)
                if answer.status == 400:
                    assert "not_found" in text, text
    # All of it is still there, and was not touched.
    async with aiohttp.ClientSession(server.url, headers=FIRST) as client:
        for path in (f"/v1/responses/{owned.response}", f"/v1/conversations/{owned.conversation}"):
            async with client.get(path) as answer:
                assert answer.status == 200
        url = f"/v1/responses/{owned.running}"
        async with client.get(f"{url}?stream=true") as answer:
            assert b"response.cancelled" not in await answer.read()


async def test_a_socket_cannot_cancel_another_keys_turn(server: LiveServer, owned: Owned) -> None:
    url = server.url.replace("http", "ws", 1) + "/v1/responses"
    async with connect(url, additional_headers=SECOND, compression=None) as socket:
        cancel = {"type": "response.cancel", "response_id": owned.running}
        await socket.send(json.dumps(cancel))
        async with asyncio.timeout(30):
            told = json.loads(await socket.recv())
    assert told["type"] == "error"
    assert told["status"] == 404
