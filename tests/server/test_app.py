"""What surrounds every request: errors, keys, origins, headers, the page, drain, fairness."""

from __future__ import annotations

import asyncio
import logging
from pathlib import Path
from typing import Any

import pytest
from yarl import URL

from server.guard.keys import KeyFileError
from server.state import METRICS, TURNS
from server.store import StoreError
from tests.server.scripted import ScriptedEngine, say
from tests.server.serving import read_events, serving

BODY = {"model": "scripted", "input": "hi"}
ERROR_FIELDS = {"message", "type", "param", "code"}


@pytest.mark.parametrize(
    ("method", "path", "status", "code"),
    [
        ("GET", "/v1/nothing", 404, "unknown_url"),
        ("POST", "/v1/", 404, "unknown_url"),
        ("PUT", "/v1/responses", 405, "method_not_allowed"),
        ("DELETE", "/v1/chat/completions", 405, "method_not_allowed"),
        ("POST", "/nothing", 405, "method_not_allowed"),
        ("GET", "/nothing.js", 404, "unknown_url"),
    ],
)
async def test_unknown_addresses(method: str, path: str, status: int, code: str) -> None:
    async with serving() as server, server.client.request(method, path) as answer:
        assert answer.status == status
        error = (await answer.json())["error"]
        assert set(error) == ERROR_FIELDS
        assert error["code"] == code
        if status == 405:
            assert answer.headers["Allow"]


@pytest.mark.parametrize(
    ("data", "headers", "status", "code"),
    [
        (b"{", {}, 400, "invalid_json"),
        (b"", {}, 400, "invalid_json"),
        (b'{"model": "scripted", "input": "\xff"}', {}, 400, "invalid_json"),
        (b'{"model": "scripted", "input": "\\ud800"}', {}, 400, "invalid_json"),
        (b'{"temperature": NaN}', {}, 400, "invalid_json"),
        (b"[1]", {}, 400, None),
        (b"{}", {"Content-Type": "text/plain"}, 415, "unsupported_media_type"),
        (b"x" * 3000, {}, 413, "request_too_large"),
        (b"[" * 2000, {}, 400, "invalid_json"),
    ],
)
async def test_bodies_that_are_no_json(
    data: bytes, headers: dict[str, str], status: int, code: str | None
) -> None:
    async with serving(max_body_bytes=2500) as server:
        async with server.client.post(
            "/v1/responses", data=data, headers={"Content-Type": "application/json", **headers}
        ) as answer:
            assert answer.status == status
            assert (await answer.json())["error"]["code"] == code
        await server.idle()


async def test_fault_of_ours_is_a_500_without_a_word_of_the_request(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*arguments: Any) -> None:
        raise ValueError(str(arguments))

    monkeypatch.setattr("server.dialects.responses.parse", fail)
    async with serving() as server:
        with caplog.at_level(logging.DEBUG):
            status, body = await server.post("/v1/responses", {**BODY, "input": "my secret"})
        assert (status, body["error"]["type"]) == (500, "server_error")
        assert "ValueError" not in body["error"]["message"]
        assert "ValueError" in caplog.text
        assert "secret" not in caplog.text


async def test_no_prompt_and_no_answer_is_ever_logged(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG):
        async with serving(ScriptedEngine(say("classified"))) as server:
            await server.post("/v1/responses", {**BODY, "input": "my secret"})
            await server.stream("/v1/responses", {**BODY, "input": "my secret"})
            await server.post("/v1/responses", {**BODY, "input": "my secret", "model": "x"})
            await server.get("/v1/responses/resp_0?note=secret")
    assert "POST /v1/responses 200" in caplog.text
    assert "secret" not in caplog.text
    assert "classified" not in caplog.text


async def test_store_errors_are_a_503(monkeypatch: pytest.MonkeyPatch) -> None:
    async def fail(*_: Any) -> None:
        raise StoreError("gone")

    monkeypatch.setattr("server.sessions.Sessions.response", fail)
    async with serving() as server, server.client.get("/v1/responses/resp_0") as answer:
        assert answer.status == 503
        assert answer.headers["Retry-After"] == "5"
        assert (await answer.json())["error"]["code"] == "store_unavailable"


async def test_every_answer_has_an_id_of_its_own() -> None:
    async with serving() as server:
        ids = set()
        for path in ("/health", "/v1/models", "/v1/nothing", "/"):
            async with server.client.get(path) as answer:
                ids.add(answer.headers["x-request-id"])
                assert answer.headers["X-Content-Type-Options"] == "nosniff"
        assert len(ids) == 4


def key_file(folder: Path) -> Path:
    path = folder / "keys"
    path.write_text("sesame\n")
    path.chmod(0o600)
    return path


async def test_keys_are_asked_for_where_something_can_be_had(tmp_path: Path) -> None:
    async with serving(ScriptedEngine(say("ok")), api_key_file=key_file(tmp_path)) as server:
        for path in ("/health", "/ready", "/metrics", "/openapi.json", "/"):
            async with server.client.get(path) as answer:
                assert answer.status == 200, path
        for method, path in (
            ("POST", "/v1/responses"),
            ("GET", "/v1/responses/resp_0"),
            ("POST", "/v1/conversations"),
            ("POST", "/v1/chat/completions"),
            ("POST", "/v1/completions"),
            ("GET", "/v1/models"),
            ("POST", "/tokenize"),
            ("POST", "/detokenize"),
            ("GET", "/v1/nothing"),
        ):
            for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "Basic x"}):
                async with server.client.request(method, path, json={}, headers=headers) as answer:
                    assert answer.status == 401, path
                    assert answer.headers["WWW-Authenticate"] == "Bearer"
                    assert (await answer.json())["error"]["code"] == "invalid_api_key"
        authorized = {"Authorization": "Bearer sesame"}
        assert (await server.post("/v1/responses", BODY, headers=authorized))[0] == 200


async def test_bad_key_file_is_told_at_the_start(tmp_path: Path) -> None:
    with pytest.raises(KeyFileError):
        async with serving(api_key_file=tmp_path / "missing"):
            pass


@pytest.mark.parametrize(
    ("origin", "status"),
    [
        ("http://evil.example", 403),
        ("null", 403),
        ("https://good.example", 200),
        (None, 200),
        ("own", 200),
    ],
)
async def test_foreign_pages_may_not_post(origin: str | None, status: int) -> None:
    async with serving(
        ScriptedEngine(say("ok")), allowed_origins=("https://good.example",)
    ) as server:
        headers = {}
        if origin is not None:
            headers["Origin"] = server.url if origin == "own" else origin
        async with server.client.post("/v1/responses", json=BODY, headers=headers) as answer:
            assert answer.status == status
            allowed = answer.headers.get("Access-Control-Allow-Origin")
            assert allowed == (origin if origin == "https://good.example" else None)


async def test_renamed_loopback_is_a_foreign_page() -> None:
    """DNS rebinding: the browser believes that the page and this server are one site."""
    async with serving(ScriptedEngine(say("ok"))) as server:
        headers = {"Origin": "http://evil.example:80", "Host": "evil.example:80"}
        async with server.client.post("/v1/responses", json=BODY, headers=headers) as answer:
            assert answer.status == 403


async def test_preflight_is_answered_for_allowed_origins_only() -> None:
    async with serving(allowed_origins=("https://good.example",)) as server:
        asks = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "a, b"}
        for origin, status in (("https://good.example", 204), ("http://evil.example", 405)):
            async with server.client.options(
                "/v1/responses", headers={"Origin": origin, **asks}
            ) as answer:
                assert answer.status == status
                if status == 204:
                    assert answer.headers["Access-Control-Allow-Headers"] == "a, b"
                    assert answer.headers["Access-Control-Allow-Origin"] == origin


async def test_page_that_is_not_built_says_what_to_do() -> None:
    async with serving() as server, server.client.get("/") as answer:
        assert answer.status == 200
        text = await answer.text()
        assert "make page" in text
        assert "Node.js 20" in text


async def test_page(tmp_path: Path) -> None:
    page = tmp_path / "dist"
    (page / "assets").mkdir(parents=True)
    (page / "index.html").write_text("<p>index")
    (page / "assets" / "app-1a2b.js").write_text("1")
    secret = tmp_path / "secret.txt"
    secret.write_text("hunter2")
    (page / "link.txt").symlink_to(secret)
    html = {"Accept": "text/html"}
    async with serving(page_dir=page) as server:
        async with server.client.get("/") as answer:
            assert await answer.text() == "<p>index"
            assert answer.headers["Cache-Control"] == "no-cache"
            assert "frame-ancestors 'none'" in answer.headers["Content-Security-Policy"]
            etag = answer.headers["ETag"]
        async with server.client.get("/", headers={"If-None-Match": etag}) as answer:
            assert answer.status == 304
        async with server.client.get("/assets/app-1a2b.js") as answer:
            assert answer.status == 200
            assert "immutable" in answer.headers["Cache-Control"]
            assert "javascript" in answer.headers["Content-Type"]
        async with server.client.get("/c/conv_1", headers=html) as answer:
            assert await answer.text() == "<p>index"
        for path in (
            "/assets/missing.js",
            "/link.txt",
            "/../secret.txt",
            "/assets/../../secret.txt",
            "/%2e%2e/secret.txt",
            "/..%2fsecret.txt",
            "/assets/%2e%2e/%2e%2e/secret.txt",
            "//etc/passwd",
        ):
            url = URL(server.url + path, encoded=True)
            async with server.client.get(url, headers=html) as answer:
                text = await answer.text()
                assert "hunter2" not in text
                assert "root:" not in text
                assert answer.status == 404 or text == "<p>index"
        async with server.client.get("/v1/nothing", headers=html) as answer:
            assert answer.status == 404


async def test_drain_ends_running_turns_and_refuses_new_ones() -> None:
    hold = asyncio.Event()
    engine = ScriptedEngine(say("hello", hold=hold))
    async with serving(engine) as server:
        async with server.client.post("/v1/responses", json={**BODY, "stream": True}) as answer:
            frames = read_events(answer)
            await anext(frames)
            drain = asyncio.create_task(server.app[TURNS].drain(3600))
            await asyncio.sleep(0)
            async with server.client.post("/v1/responses", json=BODY) as refused:
                assert refused.status == 503
                assert int(refused.headers["Retry-After"]) > 0
                assert (await refused.json())["error"]["code"] == "server_draining"
            assert (await server.get("/ready"))[0] == 503
            assert (await server.get("/health"))[0] == 200
            hold.set()
            rest = [data async for _, _, data in frames]
            assert rest[-1]["type"] == "response.completed"
        await drain


async def test_server_that_stops_ends_every_stream_with_a_terminal_event() -> None:
    async with serving(ScriptedEngine(say("hello", hold=asyncio.Event()))) as server:
        async with server.client.post("/v1/responses", json={**BODY, "stream": True}) as answer:
            frames = read_events(answer)
            await anext(frames)
            await server.app[TURNS].drain(0.0)
            rest = [data async for _, _, data in frames]
        assert rest[-1]["type"] == "response.cancelled"


async def test_many_streams_a_third_cut_at_random() -> None:
    """Every stream that is not cut is whole; nothing is left of those that are."""
    words = "one two three four five six seven eight nine ten"
    async with serving(ScriptedEngine(lambda _: say(words, per_step=3))) as server:

        async def one(number: int) -> str:
            body = {**BODY, "stream": True, "store": False}
            async with server.client.post("/v1/responses", json=body) as answer:
                text, count = "", 0
                async for _, event_id, data in read_events(answer):
                    assert int(event_id or -1) == data["sequence_number"] == count
                    count += 1
                    text += data.get("delta", "")
                    if number % 3 == 0 and count > number % 13:
                        return "cut"
                return text

        texts = await asyncio.gather(*(one(number) for number in range(64)))
        assert texts.count("cut") == len(range(0, 64, 3))
        assert set(texts) == {"cut", words}
        await server.idle()
        metrics = server.app[METRICS].render().decode()
        assert "millrace_turns_in_flight 0.0" in metrics
        ended = [
            float(line.rpartition(" ")[2])
            for line in metrics.splitlines()
            if line.startswith("millrace_turns_total{")
        ]
        assert sum(ended) == 64


async def test_reader_that_stops_reading_holds_back_nobody() -> None:
    text = "0123456789" * 3000
    engine = ScriptedEngine(lambda _: say(text, per_step=10), max_model_len=100_000)
    async with serving(engine) as server:
        body = {**BODY, "stream": True, "max_output_tokens": len(text) + 1}
        async with server.client.post("/v1/responses", json=body) as slow:
            # About 500 kB of frames: more than the socket's buffers and the client's own take.
            async with server.client.post("/v1/responses", json=body) as quick:
                events = [data async for _, _, data in read_events(quick)]
            assert "".join(event.get("delta", "") for event in events) == text
            await server.app[TURNS].until_idle()
            late = [data async for _, _, data in read_events(slow)]
        assert "".join(event.get("delta", "") for event in late) == text
        numbers = [event["sequence_number"] for event in late]
        assert numbers == sorted(set(numbers))
        assert late[-1] | {"response": None} == {
            "type": "response.completed",
            "sequence_number": numbers[-1],
            "response": None,
        }


async def test_nothing_blocks_the_loop() -> None:
    blockbuster = pytest.importorskip("blockbuster")
    async with serving(ScriptedEngine(say("hello"))) as server:
        with blockbuster.blockbuster_ctx():
            await server.stream("/v1/responses", BODY)
            _, conversation = await server.post("/v1/conversations", {"metadata": {"a": "b"}})
            body = {**BODY, "conversation": conversation["id"], "input": "x" * 2000}
            assert (await server.post("/v1/responses", body))[0] == 200
            async with server.client.ws_connect("/v1/responses") as socket:
                await socket.send_json({"type": "response.create", **BODY})
                while (await socket.receive_json())["type"] != "response.completed":
                    pass
            async with server.client.get("/") as answer:
                assert answer.status == 200
