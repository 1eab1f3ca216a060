"""Two real servers on one real Redis; one is killed in the middle of its answers."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.live import LiveServer

pytestmark = pytest.mark.skipif(shutil.which("redis-server") is None, reason="no redis-server")

MESSAGES = [{"role": "user", "content": "Tell me a long story about a mill and a river."}]
CHAT = {
    "model": "pebble",
    "messages": MESSAGES,
    "seed": 11,
    "max_tokens": 100,
    "ignore_eos": True,
    "stream": True,
    "on_disconnect": "linger=60",
}
RESPONSE = {
    "model": "pebble",
    "input": "Tell me a long story about a mill and a river.",
    "seed": 12,
    "max_output_tokens": 100,
    "ignore_eos": True,
    "background": True,
}
TOOLS = {
    "model": "pebble",
    "input": "What is 17 % of 2,340?",
    "seed": 13,
    "max_output_tokens": 200,
    "tools": [{"type": "millrace:calculator"}],
    "tool_choice": {"type": "millrace:calculator"},
    "stream": True,
    "store": True,
}
FRAMES_SEEN = 20


@pytest.fixture
def redis_url(tmp_path: Path) -> Iterator[str]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    process = subprocess.Popen(
        ["redis-server", "--port", str(port), "--bind", "127.0.0.1", "--save", ""],
        cwd=tmp_path,
        stdout=subprocess.DEVNULL,
    )
    try:
        give_up_s = time.monotonic() + 30
        while True:
            try:
                socket.create_connection(("127.0.0.1", port), 1).close()
                break
            except OSError:
                assert time.monotonic() < give_up_s
        yield f"redis://127.0.0.1:{port}/0"
    finally:
        process.kill()
        process.wait()


def post(server: LiveServer, path: str, body: Any) -> Any:
    request = urllib.request.Request(
        server.url + path,
        json.dumps(body).encode(),
        {"Content-Type": "application/json"},
    )
    return urllib.request.urlopen(request, timeout=120)


def get(server: LiveServer, path: str, last_id: str | None = None) -> Any:
    headers = {} if last_id is None else {"Last-Event-ID": last_id}
    return urllib.request.urlopen(
        urllib.request.Request(server.url + path, headers=headers), timeout=120
    )


def frames(answer: Any) -> Iterator[tuple[str, Any]]:
    """Yield (id, data) of an event stream."""
    place = ""
    for line in answer:
        name, _, value = line.decode().rstrip("\n").partition(": ")
        if name == "id":
            place = value
        elif name == "data":
            yield place, value if value == "[DONE]" else json.loads(value)


def words(chunks: list[Any]) -> str:
    return "".join(
        choice["delta"].get("content") or ""
        for chunk in chunks
        if chunk != "[DONE]"
        for choice in chunk["choices"]
    )


def test_a_killed_server_loses_nothing(redis_url: str) -> None:
    options = ["--kv-memory", "128MiB", "--redis-url", redis_url]
    doomed, heir = LiveServer(options), LiveServer(options)
    try:
        with post(doomed, "/v1/responses", RESPONSE) as answer:
            response_id = json.load(answer)["id"]
        got: list[Any] = []
        with post(doomed, "/v1/chat/completions", CHAT) as answer:
            stream = frames(answer)
            for _ in range(FRAMES_SEEN):
                place, chunk = next(stream)
                got.append(chunk)
            os.kill(doomed.pid, signal.SIGKILL)
        path = f"/v1/chat/completions/{got[0]['id']}?stream=true"
        with get(heir, path, place) as answer:
            got += [chunk for _, chunk in frames(answer)]
        assert got[-1] == "[DONE]"
        assert got[-2]["choices"][0]["finish_reason"] == "length"
        with post(heir, "/v1/chat/completions", CHAT) as answer:
            undisturbed = [chunk for _, chunk in frames(answer)]
        assert words(got) == words(undisturbed)

        with get(heir, f"/v1/responses/{response_id}?stream=true") as answer:
            events = [event for _, event in frames(answer)]
        assert [event["sequence_number"] for event in events] == list(range(len(events)))
        assert events[-1]["type"] == "response.incomplete"
        wanted = {**RESPONSE, "background": False}
        with post(heir, "/v1/responses", wanted) as answer:
            alone = json.load(answer)
        assert _text(events[-1]["response"]) == _text(alone)
        taken = heir.metrics()["millrace_takeovers_total{outcome=resumed}"]
        assert taken == 2
        heir.assert_clean()
    finally:
        doomed.stop()
        heir.stop()


def test_a_server_that_is_killed_after_its_tools_answered(redis_url: str) -> None:
    options = ["--kv-memory", "128MiB", "--redis-url", redis_url]
    doomed, heir = LiveServer(options), LiveServer(options)
    try:
        with post(heir, "/v1/responses", {**TOOLS, "stream": False}) as answer:
            alone = json.load(answer)
        assert [item["type"] for item in alone["output"]][:2] == [
            "function_call",
            "function_call_output",
        ]
        events: list[Any] = []
        with post(doomed, "/v1/responses", TOOLS) as answer:
            stream = frames(answer)
            while not events or events[-1]["type"] != "response.output_text.delta":
                events.append(next(stream)[1])
            os.kill(doomed.pid, signal.SIGKILL)
        path = f"/v1/responses/{events[0]['response']['id']}?stream=true"
        with get(heir, path, str(events[-1]["sequence_number"])) as answer:
            events += [event for _, event in frames(answer)]
        assert [event["sequence_number"] for event in events] == list(range(len(events)))
        last = events[-1]["response"]
        assert last["status"] == alone["status"]
        assert _text(last) == _text(alone)
        deltas = [one["delta"] for one in events if one["type"] == "response.output_text.delta"]
        assert "".join(deltas) == _text(alone)
        assert [item.get("output") for item in last["output"]] == [
            item.get("output") for item in alone["output"]
        ]
        assert heir.metrics()["millrace_takeovers_total{outcome=resumed}"] == 1
        heir.assert_clean()
    finally:
        doomed.stop()
        heir.stop()


def _text(response: Any) -> str:
    return "".join(
        part["text"]
        for item in response["output"]
        if item["type"] == "message"
        for part in item["content"]
    )
