"""/v1/conversations: items, turns in them, and who may see what."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from server.journals import Journals
from server.sessions import Sessions
from server.store import Store
from tests.server.scripted import Script, ScriptedEngine, say
from tests.server.serving import Served, memory_store, serving

BODY = {"model": "scripted", "input": "hi"}


async def new_conversation(server: Served, **fields: Any) -> str:
    status, body = await server.post("/v1/conversations", fields)
    assert status == 200, body
    assert body["object"] == "conversation"
    return str(body["id"])


async def texts(server: Served, conversation: str) -> list[str]:
    status, body = await server.get(f"/v1/conversations/{conversation}/items?order=asc&limit=100")
    assert status == 200
    return [f"{item['role']}: {item['content'][0]['text']}" for item in body["data"]]


def prompt_of(engine: ScriptedEngine) -> str:
    ids = engine.requests[-1].prompt_ids
    return bytes(token if token < 256 else ord("|") for token in ids).decode()


async def test_turns_in_a_conversation_see_each_other() -> None:
    engine = ScriptedEngine(say("yes"))
    async with serving(engine) as server:
        conversation = await new_conversation(server, metadata={"title": "First"})
        _, body = await server.post("/v1/responses", {**BODY, "conversation": conversation})
        assert body["conversation"] == {"id": conversation}
        await server.post(
            "/v1/responses", {**BODY, "input": "more", "conversation": {"id": conversation}}
        )
        assert prompt_of(engine) == "|user: hi\n|assistant: yes\n|user: more\n|"
        assert await texts(server, conversation) == [
            "user: hi",
            "assistant: yes",
            "user: more",
            "assistant: yes",
        ]


async def test_metadata_and_deletion() -> None:
    async with serving() as server:
        conversation = await new_conversation(server, metadata={"title": "First"})
        path = f"/v1/conversations/{conversation}"
        assert (await server.get(path))[1]["metadata"] == {"title": "First"}
        status, body = await server.post(path, {"metadata": {"title": "Other"}})
        assert (status, body["metadata"]) == (200, {"title": "Other"})
        assert (await server.get(path))[1]["metadata"] == {"title": "Other"}
        _, body = await server.delete(path)
        assert body == {"id": conversation, "object": "conversation.deleted", "deleted": True}
        for answer in (
            await server.get(path),
            await server.delete(path),
            await server.post(path, {"metadata": {}}),
            await server.get(path + "/items"),
            await server.post(path + "/items", {"items": [{"role": "user", "content": "x"}]}),
            await server.post("/v1/responses", {**BODY, "conversation": conversation}),
        ):
            assert (answer[0], answer[1]["error"]["code"]) == (404, "conversation_not_found")


async def test_items_are_listed_page_by_page() -> None:
    async with serving() as server:
        conversation = await new_conversation(
            server, items=[{"role": "user", "content": str(number)} for number in range(3)]
        )
        path = f"/v1/conversations/{conversation}/items"
        added = [{"role": "user", "content": str(number)} for number in range(3, 7)]
        _, body = await server.post(path, {"items": added})
        assert len(body["data"]) == 4
        for order, wanted in (("asc", "0123456"), ("desc", "6543210")):
            seen, query = "", f"?limit=3&order={order}"
            while True:
                _, page = await server.get(path + query)
                seen += "".join(item["content"][0]["text"] for item in page["data"])
                assert page["first_id"] == page["data"][0]["id"]
                if not page["has_more"]:
                    break
                query = f"?limit=3&order={order}&after={page['last_id']}"
            assert seen == wanted


async def test_one_item() -> None:
    async with serving() as server:
        conversation = await new_conversation(
            server, items=[{"role": "user", "content": "a"}, {"role": "user", "content": "b"}]
        )
        path = f"/v1/conversations/{conversation}/items"
        _, page = await server.get(path + "?order=asc")
        first = page["data"][0]
        assert (await server.get(f"{path}/{first['id']}"))[1] == first
        status, body = await server.delete(f"{path}/{first['id']}")
        assert (status, body["id"]) == (200, conversation)
        assert await texts(server, conversation) == ["user: b"]
        for answer in (
            await server.get(f"{path}/{first['id']}"),
            await server.delete(f"{path}/{first['id']}"),
        ):
            assert (answer[0], answer[1]["error"]["code"]) == (404, "item_not_found")


async def test_items_know_their_parents() -> None:
    store = await memory_store()
    journals = Journals(store)
    conversations = Sessions(store, journals, retention_s=100).conversations
    record = await conversations.create("me", {}, [{"id": "a"}, {"id": "b"}])
    await conversations.add_items(record.conversation_id, "me", [{"id": "c"}])
    stored = await conversations.tree(record.conversation_id, "me")
    assert [(one["id"], one["parent_id"]) for one in stored] == [
        ("a", None),
        ("b", "a"),
        ("c", "b"),
    ]
    for key in await store.redis.keys("millrace:conversation*"):
        assert 0 < await store.redis.ttl(key) <= 100
    await store.close()


async def test_second_turn_at_once_is_refused_and_the_first_goes_on() -> None:
    hold = asyncio.Event()
    async with serving(ScriptedEngine(say("yes", hold=hold))) as server:
        conversation = await new_conversation(server)
        fields = {**BODY, "conversation": conversation}
        await server.post("/v1/responses", {**fields, "background": True})
        status, body = await server.post("/v1/responses", fields)
        assert (status, body["error"]["code"]) == (409, "conversation_busy")
        hold.set()
        await server.idle()
        assert await texts(server, conversation) == ["user: hi", "assistant: yes"]
        assert (await server.post("/v1/responses", fields))[0] == 200


async def test_refused_turn_does_not_keep_the_conversation() -> None:
    async with serving(ScriptedEngine(max_model_len=64)) as server:
        conversation = await new_conversation(server)
        for _ in range(2):
            status, body = await server.post(
                "/v1/responses", {**BODY, "conversation": conversation, "input": "x" * 99}
            )
            assert (status, body["error"]["code"]) == (400, "context_length_exceeded")
        assert await texts(server, conversation) == []


@pytest.mark.parametrize(
    ("script", "kept"),
    [
        (Script(steps=[[97], [98]], dies_after=1), []),
        (say("abc"), ["user: hi", "assistant: abc"]),
    ],
    ids=["failed", "completed"],
)
async def test_failed_turn_adds_nothing(script: Script, kept: list[str]) -> None:
    async with serving(ScriptedEngine(script)) as server:
        conversation = await new_conversation(server)
        await server.post("/v1/responses", {**BODY, "conversation": conversation})
        assert await texts(server, conversation) == kept
        # And lets go of it.
        assert (await server.post("/v1/responses", {**BODY, "conversation": conversation}))[
            0
        ] == 200


async def test_cancelled_turn_keeps_what_was_said() -> None:
    engine = ScriptedEngine(say("abc", hold=asyncio.Event()))
    async with serving(engine) as server:
        conversation = await new_conversation(server)
        body = {**BODY, "conversation": conversation, "stream": True}
        async with server.client.post("/v1/responses", json=body) as answer:
            async for line in answer.content:
                if b'"response.created"' in line:
                    response_id = line.split(b'"id":"')[1].split(b'"')[0].decode()
                if b"output_text.delta" in line:
                    break
            await server.post(f"/v1/responses/{response_id}/cancel", None)
        assert await texts(server, conversation) == ["user: hi", "assistant: a"]


async def test_claim_of_a_dead_replica_is_taken_over() -> None:
    store = await memory_store()
    dead, alive = Journals(store), Journals(store)
    await dead.start()
    await alive.start()
    theirs = Sessions(store, dead, retention_s=100).conversations
    ours = Sessions(store, alive, retention_s=100).conversations
    conversation = (await theirs.create("me", {}, [])).conversation_id
    await theirs.claim(conversation, "me", "resp_1", num_new=1)
    with pytest.raises(Exception, match="response is being made"):
        await ours.claim(conversation, "me", "resp_2", num_new=1)
    await dead.close()
    await ours.claim(conversation, "me", "resp_2", num_new=1)
    # What the dead one might still say does not let go of our claim.
    await theirs.claims.release(conversation, "resp_1")
    with pytest.raises(Exception, match="response is being made"):
        await ours.claim(conversation, "me", "resp_3", num_new=1)
    await alive.close()
    await store.close()


async def test_owners_do_not_see_each_other(tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    keys.write_text("alpha\nbeta\n")
    keys.chmod(0o600)
    mine = {"Authorization": "Bearer alpha"}
    theirs = {"headers": {"Authorization": "Bearer beta"}}
    async with serving(ScriptedEngine(say("yes")), headers=mine, api_key_file=keys) as server:
        conversation = await new_conversation(server, items=[{"role": "user", "content": "x"}])
        _, response = await server.post("/v1/responses", {**BODY, "conversation": conversation})
        _, page = await server.get(f"/v1/conversations/{conversation}/items")
        item = page["data"][0]["id"]
        one = f"/v1/conversations/{conversation}"
        refused = [
            await server.get(one, **theirs),
            await server.delete(one, **theirs),
            await server.post(one, {"metadata": {}}, **theirs),
            await server.get(f"{one}/items", **theirs),
            await server.get(f"{one}/items/{item}", **theirs),
            await server.delete(f"{one}/items/{item}", **theirs),
            await server.post("/v1/responses", {**BODY, "conversation": conversation}, **theirs),
            await server.get(f"/v1/responses/{response['id']}", **theirs),
            await server.get(f"/v1/responses/{response['id']}?stream=true", **theirs),
            await server.delete(f"/v1/responses/{response['id']}", **theirs),
            await server.post(f"/v1/responses/{response['id']}/cancel", None, **theirs),
            await server.get(f"/v1/responses/{response['id']}/input_items", **theirs),
        ]
        assert [status for status, _ in refused] == [404] * len(refused)
        status, body = await server.post(
            "/v1/responses", {**BODY, "previous_response_id": response["id"]}, **theirs
        )
        assert (status, body["error"]["code"]) == (400, "previous_response_not_found")
        # Prefixes of their prompts are not shared in the cache either.
        await server.post("/v1/responses", BODY, **theirs)
        salts = {request.cache_salt for request in server.engine.requests}
        assert len(salts) == 2
        assert "" not in salts


BAD: list[tuple[str, dict[str, Any], str]] = [
    ("", {"metadata": 3}, "metadata"),
    ("", {"items": "x"}, "items"),
    ("", {"items": [{"role": "user", "content": "x"}] * 21}, "items"),
    ("", {"titel": "x"}, "titel"),
    ("/items", {}, "items"),
    ("/items", {"items": []}, "items"),
    ("/items", {"items": [{"role": "user"}]}, "items[0].content"),
]


@pytest.mark.parametrize(("path", "body", "param"), BAD)
async def test_bad_bodies(path: str, body: dict[str, Any], param: str) -> None:
    async with serving() as server:
        conversation = await new_conversation(server)
        where = f"/v1/conversations/{conversation}{path}" if path else "/v1/conversations"
        status, answer = await server.post(where, body)
        assert (status, answer["error"]["param"]) == (400, param)


@pytest.mark.parametrize("query", ["limit=0", "limit=101", "limit=x", "order=up", "after=nobody"])
async def test_bad_pages(query: str) -> None:
    async with serving() as server:
        conversation = await new_conversation(server)
        status, answer = await server.get(f"/v1/conversations/{conversation}/items?{query}")
        assert (status, answer["error"]["param"]) == (400, query.partition("=")[0])


async def test_full_conversation(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("server.conversations.store.MAX_ITEMS", 3)
    async with serving(ScriptedEngine(say("yes"))) as server:
        conversation = await new_conversation(server, items=[{"role": "user", "content": "x"}])
        fields = {**BODY, "conversation": conversation}
        assert (await server.post("/v1/responses", fields))[0] == 200
        for _ in range(2):
            status, body = await server.post("/v1/responses", fields)
            assert (status, body["error"]["code"]) == (400, "conversation_full")


async def test_store_that_went_away_is_a_503(monkeypatch: pytest.MonkeyPatch) -> None:
    store: Store = await memory_store()
    async with serving(ScriptedEngine(say("yes")), store) as server:
        conversation = await new_conversation(server)
        with monkeypatch.context() as patch:
            patch.setattr(store.redis, "get", _refuse)
            status, body = await server.get(f"/v1/conversations/{conversation}")
        assert (status, body["error"]["code"]) == (503, "store_unavailable")
    await store.close()


async def _refuse(*_: Any) -> None:
    raise OSError("gone")


async def test_an_append_whose_answer_got_lost_is_repeated_without_a_trace() -> None:
    store = await memory_store()
    conversations = Sessions(store, Journals(store), retention_s=60).conversations
    items: list[dict[str, Any]] = [{"id": name, "type": "reasoning"} for name in "abcd"]
    record = await conversations.create("", {}, items[:1])
    chat = record.conversation_id
    await conversations.append(chat, items[1:3])
    before = await conversations.tree(chat, "")
    await conversations.append(chat, items[1:3])
    assert await conversations.tree(chat, "") == before
    assert [stored["parent_id"] for stored in before] == [None, "a", "b"]
    # A part of it that is new goes behind.
    await conversations.append(chat, items[1:])
    assert (await conversations.tree(chat, ""))[:3] == before
    assert (await conversations.tree(chat, ""))[3]["parent_id"] == "c"
    await store.close()
