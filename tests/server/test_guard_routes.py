"""What one key stored is not there for another: every route that names something is walked."""

from __future__ import annotations

import asyncio
import re
from pathlib import Path
from typing import Any

import pytest

from tests.server.scripted import ScriptedEngine, say
from tests.server.serving import Served, serving

MINE, OTHER = {"Authorization": "Bearer mine"}, {"Authorization": "Bearer other"}
NAMES_NOTHING_OF_A_KEY = {"/v1/models/{model}", "/{path}"}


def routes(served: Served) -> list[tuple[str, str]]:
    """Method and path of every route that names something, HEAD left to GET."""
    found = []
    for route in served.app.router.routes():
        path = route.resource.canonical if route.resource is not None else ""
        named = "{" in path and path not in NAMES_NOTHING_OF_A_KEY
        if named and route.method != "HEAD":
            found.append((route.method, path))
    return found


@pytest.fixture
def keys(tmp_path: Path) -> Path:
    path = tmp_path / "keys"
    path.write_text("mine\nother\n")
    path.chmod(0o600)
    return path


async def stored(served: Served) -> dict[str, str]:
    """Store one of everything; return the ids by the first letters of their kind."""
    _, conversation = await served.post("/v1/conversations", {}, headers=MINE)
    body = {"model": "scripted", "input": "a secret", "conversation": conversation["id"]}
    status, response = await served.post("/v1/responses", body, headers=MINE)
    assert status == 200
    await served.idle()
    _, chat = await served.post(
        "/v1/chat/completions",
        {"model": "scripted", "messages": [{"role": "user", "content": "a secret"}], "store": True},
        headers=MINE,
    )
    _, completion = await served.post(
        "/v1/completions", {"model": "scripted", "prompt": "a secret"}, headers=MINE
    )
    ids = [conversation["id"], response["id"], response["output"][0]["id"]]
    ids += [chat["id"], completion["id"]]
    return {one.partition("_")[0].partition("-")[0]: one for one in ids}


def filled(path: str, ids: dict[str, str]) -> str:
    """Put existing ids into a path: the first by the collection's name, a second is an item's."""
    by_collection = {
        "conversations": ids["conv"],
        "responses": ids["resp"],
        "chat": ids["chatcmpl"],
        "completions": ids["cmpl"],
        "items": ids["msg"],
    }

    def fill(match: re.Match[str]) -> str:
        before = path[: match.start()].rstrip("/").rpartition("/")[2]
        if before == "completions" and "/chat/" in path:
            before = "chat"
        return by_collection[before]

    return re.sub(r"\{[^}]*\}", fill, path)


async def ask(served: Served, method: str, url: str, headers: dict[str, str]) -> tuple[int, Any]:
    json: dict[str, Any] | None = {} if method in ("POST", "PATCH", "PUT") else None
    async with served.client.request(method, url, headers=headers, json=json) as answer:
        return answer.status, await answer.text()


async def test_no_route_shows_another_keys_things(keys: Path) -> None:
    async with serving(api_key_file=keys) as served:
        ids = await stored(served)
        walked = routes(served)
        assert len(walked) >= 7
        for method, path in walked:
            for query in ("", "?stream=true&starting_after=0"):
                url = filled(path, ids) + query
                status, text = await ask(served, method, url, OTHER)
                assert status in (400, 404), (method, url, status, text)
                assert "secret" not in text
        # Everything is still there for its owner, and readable.
        for method, path in walked:
            if method == "GET":
                status, text = await ask(served, method, filled(path, ids), MINE)
                assert status < 500, (path, text)
        status, text = await ask(served, "GET", f"/v1/responses/{ids['resp']}", MINE)
        assert status == 200


async def test_no_route_answers_without_a_key(keys: Path) -> None:
    async with serving(api_key_file=keys) as served:
        ids = await stored(served)
        for method, path in routes(served):
            status, text = await ask(served, method, filled(path, ids), {})
            assert status == 401, (method, path, text)


async def test_another_keys_history_cannot_be_followed_on(keys: Path) -> None:
    async with serving(api_key_file=keys) as served:
        ids = await stored(served)
        body = {"model": "scripted", "input": "go on"}
        for field, one in (("previous_response_id", "resp"), ("conversation", "conv")):
            given = {**body, field: ids[one]}
            status, answer = await served.post("/v1/responses", given, headers=OTHER)
            assert status in (400, 404), answer
            assert "secret" not in str(answer)
        assert len(served.engine.requests) == 3


async def test_a_running_turn_cannot_be_cancelled_or_followed_by_another_key(keys: Path) -> None:
    hold = asyncio.Event()
    async with serving(ScriptedEngine(say("abc", hold=hold)), api_key_file=keys) as served:
        body = {"model": "scripted", "input": "hi", "background": True}
        _, response = await served.post("/v1/responses", body, headers=MINE)
        url = f"/v1/responses/{response['id']}"
        for method, path in (("POST", f"{url}/cancel"), ("GET", f"{url}?stream=true")):
            assert (await ask(served, method, path, OTHER))[0] == 404
        async with served.client.ws_connect("/v1/responses", headers=OTHER) as socket:
            await socket.send_json({"type": "response.cancel", "response_id": response["id"]})
            assert (await socket.receive_json())["status"] == 404
        hold.set()
        await served.idle()
        status, answer = await served.get(url, headers=MINE)
        assert (status, answer["status"]) == (200, "completed")
