"""Conversations as trees over HTTP and the WebSocket: edit, regenerate, fork, delete, titles."""

from __future__ import annotations

import asyncio
import shutil
import time
from typing import Any

import msgspec
import openai
import pytest

from server.errors import ApiError
from server.journals import Journals
from server.sessions import Sessions
from server.store import Store
from tests.server.scripted import ScriptedEngine, say
from tests.server.serving import Served, memory_store, serving

BODY = {"model": "scripted", "input": "hi"}
EMPTY: list[Any] = []
USER = {"role": "user", "content": "hi"}


def message(role: str, text: str) -> dict[str, str]:
    return {"role": role, "content": text}


class Chat:
    """A conversation as its page sees it."""

    def __init__(self, server: Served, body: dict[str, Any]) -> None:
        self.server = server
        self.id = body["id"]
        self.url = f"/v1/conversations/{self.id}"

    @classmethod
    async def new(cls, server: Served, *texts: str, **fields: Any) -> Chat:
        """Begin one with messages of the user and of the assistant, in turns."""
        roles = ("user", "assistant") * len(texts)
        items = [message(role, text) for role, text in zip(roles, texts, strict=False)]
        status, body = await server.post("/v1/conversations", {"items": items, **fields})
        assert status == 200, body
        return cls(server, body)

    async def body(self) -> dict[str, Any]:
        status, body = await self.server.get(self.url)
        assert status == 200
        return dict(body)

    async def shown(self) -> str:
        """The texts from the root to the head."""
        _, body = await self.server.get(f"{self.url}/items?order=asc&limit=100")
        assert (await self.body())["head"] == body["last_id"]
        return " ".join(item["content"][0]["text"] for item in body["data"])

    async def tree(self) -> dict[str, str]:
        """Each item's text, and that of its parent."""
        _, body = await self.server.get(f"{self.url}/items?order=asc&limit=100&tree=true")
        texts = {item["id"]: item["content"][0]["text"] for item in body["data"]}
        texts[None] = ""
        return {texts[item["id"]]: texts[item["parent_id"]] for item in body["data"]}

    async def at(self, text: str) -> str:
        """The id of the newest item that says this."""
        _, body = await self.server.get(f"{self.url}/items?limit=100&tree=true")
        return str(next(item["id"] for item in body["data"] if item["content"][0]["text"] == text))

    async def ask(self, given: Any, after: str | None) -> Any:
        conversation = {"id": self.id, "after": after}
        body = {**BODY, "input": given, "conversation": conversation}
        return await self.server.post("/v1/responses", body)


def prompt_of(engine: ScriptedEngine) -> str:
    ids = engine.requests[-1].prompt_ids
    return bytes(token if token < 256 else ord("|") for token in ids).decode()


def counting() -> ScriptedEngine:
    """Answers yes1, yes2 and so on."""
    engine: ScriptedEngine
    engine = ScriptedEngine(lambda _: say(f"yes{len(engine.requests)}"))
    return engine


async def test_an_edited_question_begins_a_branch() -> None:
    engine = counting()
    async with serving(engine) as server:
        chat = await Chat.new(server, "a", "b", "c", "d")
        status, body = await chat.ask("edited", await chat.at("b"))
        assert (status, body["status"]) == (200, "completed")
        assert body["conversation"] == {"id": chat.id}
        assert prompt_of(engine) == "|user: a\n|assistant: b\n|user: edited\n|"
        assert await chat.shown() == "a b edited yes1"
        assert await chat.tree() == {
            "a": "", "b": "a", "c": "b", "d": "c", "edited": "b", "yes1": "edited"
        }  # fmt: skip
        # What comes without a place goes after the head.
        await server.post("/v1/responses", {**BODY, "input": "more", "conversation": chat.id})
        assert await chat.shown() == "a b edited yes1 more yes2"
        # The first question can be edited too.
        await chat.ask("other", None)
        assert prompt_of(engine) == "|user: other\n|"
        assert await chat.shown() == "other yes3"


async def test_an_answer_is_made_again_beside_the_first() -> None:
    engine = counting()
    async with serving(engine) as server:
        chat = await Chat.new(server, "a")
        for number in (1, 2):
            status, body = await chat.ask([], await chat.at("a"))
            assert (status, body["status"]) == (200, "completed")
            assert prompt_of(engine) == "|user: a\n|"
            assert await chat.shown() == f"a yes{number}"
        assert await chat.tree() == {"a": "", "yes1": "a", "yes2": "a"}
        _, given = await server.get(f"/v1/responses/{body['id']}/input_items")
        assert given["data"] == []


async def test_regenerating_over_the_websocket() -> None:
    engine = counting()
    async with serving(engine) as server:
        chat = await Chat.new(server, "a", "b")
        create = {"type": "response.create", **BODY, "input": [], "conversation": {"id": chat.id}}
        async with server.client.ws_connect("/v1/responses") as socket:
            for after, ends in ((await chat.at("b"), "error"), (await chat.at("a"), "completed")):
                await socket.send_json({**create, "conversation": {"id": chat.id, "after": after}})
                async for frame in socket:
                    kind = frame.json()["type"]
                    if kind == "error" or kind.startswith("response.comp"):
                        break
                assert kind.endswith(ends)
        assert await chat.shown() == "a yes1"


async def test_an_output_of_a_call_is_answered_again() -> None:
    engine = counting()
    async with serving(engine) as server:
        call = {"type": "function_call", "call_id": "c", "name": "f", "arguments": "{}"}
        output = {"type": "function_call_output", "call_id": "c", "output": "4"}
        items = [message("user", "a"), call, output]
        _, body = await server.post("/v1/conversations", {"items": items})
        chat = Chat(server, body)
        status, body = await chat.ask([], body["head"])
        assert (status, body["status"]) == (200, "completed")


@pytest.mark.parametrize(
    ("given", "after", "param", "code"),
    [
        ("hi", "msg_none", "conversation.after", "item_not_found"),
        ("hi", "", "conversation.after", "empty_string"),
        ("hi", 3, "conversation.after", "invalid_type"),
        (EMPTY, "msg_none", "conversation.after", "item_not_found"),
        (EMPTY, "b", "input", "empty_array"),
        (EMPTY, None, "input", "empty_array"),
    ],
)
async def test_wrong_places_are_refused(given: Any, after: Any, param: str, code: str) -> None:
    engine = counting()
    async with serving(engine) as server:
        chat = await Chat.new(server, "a", "b")
        after = await chat.at("b") if after == "b" else after
        status, body = await chat.ask(given, after)
        assert (status, body["error"]["param"], body["error"]["code"]) == (400, param, code)
        status, body = await server.post(
            "/v1/responses", {**BODY, "input": [], "conversation": chat.id}
        )
        assert (status, body["error"]["param"]) == (400, "input")
        assert not engine.requests
        # It is not held by what was refused.
        assert (await chat.ask("hi", None))[0] == 200


async def test_the_branch_shown_is_chosen() -> None:
    async with serving(counting()) as server:
        chat = await Chat.new(server, "a", "b", "c", "d")
        await chat.ask("other", await chat.at("a"))
        assert await chat.shown() == "a other yes1"
        b = await chat.at("b")
        status, body = await server.post(chat.url, {"head": b})
        assert (status, body["head"]) == (200, b)
        assert await chat.shown() == "a b"
        status, body = await server.post(chat.url, {"head": b, "descend": True})
        assert (status, body["head"]) == (200, await chat.at("d"))
        assert await chat.shown() == "a b c d"
        await server.post(chat.url, {"head": await chat.at("a"), "descend": True})
        assert await chat.shown() == "a other yes1"


async def test_an_item_is_deleted_alone_or_with_all_after_it() -> None:
    async with serving(counting()) as server:
        chat = await Chat.new(server, "a", "b", "c", "d")
        await chat.ask("other", await chat.at("a"))
        await server.post(chat.url, {"head": await chat.at("d")})
        status, body = await server.delete(f"{chat.url}/items/{await chat.at('b')}")
        assert (status, body["id"], body["head"]) == (200, chat.id, await chat.at("d"))
        assert await chat.shown() == "a c d"
        status, body = await server.delete(f"{chat.url}/items/{await chat.at('c')}?subtree=true")
        assert (status, body["head"]) == (200, await chat.at("yes1"))
        assert await chat.tree() == {"a": "", "other": "a", "yes1": "other"}
        await server.delete(f"{chat.url}/items/{await chat.at('other')}?subtree=true")
        assert await chat.shown() == "a"
        _, body = await server.delete(f"{chat.url}/items/{await chat.at('a')}?subtree=true")
        assert body["head"] is None
        assert await chat.tree() == {}


async def test_items_stay_as_they_are_while_a_turn_runs() -> None:
    hold = asyncio.Event()
    async with serving(ScriptedEngine(say("yes", hold=hold))) as server:
        chat = await Chat.new(server, "a", "b")
        a = await chat.at("a")
        body = {**BODY, "background": True, "conversation": {"id": chat.id, "after": a}}
        assert (await server.post("/v1/responses", body))[0] == 200
        for status, answer in (
            await server.delete(f"{chat.url}/items/{a}"),
            await server.delete(f"{chat.url}/items/{a}?subtree=true"),
            await server.post(f"{chat.url}/items", {"items": [USER]}),
            await chat.ask("x", a),
        ):
            assert (status, answer["error"]["code"]) == (409, "conversation_busy")
        # Looking at another branch and naming it disturb nobody.
        assert (await server.post(chat.url, {"title": "x", "head": a}))[0] == 200
        hold.set()
        await server.idle()
        assert await chat.shown() == "a hi yes"
        assert (await server.delete(f"{chat.url}/items/{a}"))[0] == 200


async def test_a_fork_is_a_conversation_of_its_own() -> None:
    async with serving(counting()) as server:
        chat = await Chat.new(server, "a", "b", "c", metadata={"k": "v"})
        await chat.ask("other", await chat.at("b"))
        key = {"headers": {"Idempotency-Key": "once"}}
        made = [await server.post(f"{chat.url}/fork", {}, **key) for _ in range(2)]
        assert made[0] == made[1]
        fork = Chat(server, made[0][1])
        assert fork.id != chat.id
        assert made[0][1]["metadata"] == {"k": "v"}
        assert made[0][1]["title"] == "a"
        assert await fork.shown() == "a b other yes1"
        assert await fork.at("a") != await chat.at("a")
        body = {"after": await chat.at("c"), "title": "Mine"}
        status, body = await server.post(f"{chat.url}/fork", body)
        assert (status, body["title"]) == (200, "Mine")
        assert await Chat(server, body).tree() == {"a": "", "b": "a", "c": "b"}
        await fork.ask("more", await fork.at("a"))
        assert "more" not in await chat.tree()
        for body, param in (({"after": "x"}, "after"), ({"titel": "x"}, "titel")):
            status, answer = await server.post(f"{chat.url}/fork", body)
            assert (status, answer["error"]["param"]) == (400, param)
        assert (await server.post("/v1/conversations/conv_none/fork", {}))[0] == 404


async def test_a_fork_keeps_calls_and_outputs_together() -> None:
    async with serving() as server:
        call = {"type": "function_call", "call_id": "c", "name": "f", "arguments": "{}"}
        output = {"type": "function_call_output", "call_id": "c", "output": "4"}
        _, body = await server.post("/v1/conversations", {"items": [USER, call, output]})
        _, fork = await server.post(f"/v1/conversations/{body['id']}/fork", None)
        _, page = await server.get(f"/v1/conversations/{fork['id']}/items?order=asc")
        assert [item["id"].partition("_")[0] for item in page["data"]] == ["msg", "fc", "fco"]
        assert [item.get("call_id") for item in page["data"]] == [None, "c", "c"]


async def test_titles() -> None:
    async with serving(counting()) as server:
        named = await Chat.new(server, "a question", title="Mine")
        assert (await named.body())["title"] == "Mine"
        empty = await Chat.new(server)
        assert (await empty.body())["title"] is None
        await server.post(f"{empty.url}/items", {"items": [message("system", "Be brief.")]})
        assert (await empty.body())["title"] is None
        await empty.ask(" \n  What  is\tthis?\nAnd that?", (await empty.body())["head"])
        assert (await empty.body())["title"] == "What is this?"
        await empty.ask("Another", None)
        assert (await empty.body())["title"] == "What is this?"
        _, body = await server.post(empty.url, {"title": "Other"})
        assert body["title"] == "Other"
        await empty.ask("Another", None)
        assert (await empty.body())["title"] == "Other"


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({}, None),
        ({"title": None, "head": None}, None),
        ({"title": ""}, "title"),
        ({"title": "x" * 201}, "title"),
        ({"title": 3}, "title"),
        ({"head": "msg_none"}, "head"),
        ({"head": 3}, "head"),
        ({"title": "x", "descend": True}, "descend"),
        ({"descend": True}, None),
        ({"items": []}, "items"),
    ],
)
async def test_wrong_updates(body: dict[str, Any], param: str | None) -> None:
    async with serving() as server:
        chat = await Chat.new(server, "a")
        before = await chat.body()
        status, answer = await server.post(chat.url, body)
        assert (status, answer["error"]["param"]) == (400, param)
        assert await chat.body() == before


@pytest.mark.parametrize("query", ["tree=x", "tree="])
async def test_wrong_flags(query: str) -> None:
    async with serving() as server:
        chat = await Chat.new(server, "a")
        status, answer = await server.get(f"{chat.url}/items?{query}")
        assert (status, answer["error"]["param"]) == (400, "tree")
        status, answer = await server.delete(f"{chat.url}/items/x?subtree=2")
        assert (status, answer["error"]["param"]) == (400, "subtree")


async def test_the_tree_is_listed_page_by_page() -> None:
    async with serving(counting()) as server:
        chat = await Chat.new(server, "a", "b", "c")
        await chat.ask("other", None)
        seen: list[str] = []
        query = f"{chat.url}/items?tree=true&order=asc&limit=2"
        after = ""
        while True:
            _, page = await server.get(query + after)
            seen += [item["content"][0]["text"] for item in page["data"]]
            if not page["has_more"]:
                break
            after = f"&after={page['last_id']}"
        assert seen == ["a", "b", "c", "other", "yes1"]


async def test_conversations_of_before_there_were_trees() -> None:
    """They were one sequence of items; a deleted one had stayed its child's parent."""
    store = await memory_store()
    key = "millrace:conversation:conv_old"
    record = {"conversation_id": "conv_old", "owner": "", "created_at": 5, "metadata": {"a": "b"}}
    await store.redis.set(key, msgspec.json.encode(record), ex=99)
    for number, (name, parent) in enumerate([("a", None), ("c", "b"), ("d", "c")]):
        part = {"type": "input_text", "text": name}
        item = {"id": name, "type": "message", "role": "user", "content": [part]}
        stored = msgspec.json.encode({"item": item, "parent": parent})
        await store.redis.hset(f"{key}:items", name, stored)
        await store.redis.zadd(f"{key}:order", {name: number})
    async with serving(counting(), store) as server:
        chat = Chat(server, {"id": "conv_old"})
        old = await chat.body()
        assert (old["title"], old["head"], old["updated_at"]) == ("a", "d", 5)
        assert await chat.shown() == "a c d"
        assert await chat.tree() == {"a": "", "c": "a", "d": "c"}
        await chat.ask("x", "c")
        assert await chat.tree() == {"a": "", "c": "a", "d": "c", "x": "c", "yes1": "x"}
        assert await chat.shown() == "a c x yes1"
        _, page = await server.get("/v1/conversations")
        assert [one["id"] for one in page["data"]] == ["conv_old"]
    await store.close()


async def test_items_that_expired_before_their_conversation() -> None:
    store = await memory_store()
    async with serving(store=store) as server:
        chat = await Chat.new(server, "a", "b")
        await store.redis.delete(f"millrace:conversation:{chat.id}:items")
        _, page = await server.get(f"{chat.url}/items")
        assert page["data"] == []
        await server.post(f"{chat.url}/items", {"items": [USER]})
        assert await chat.tree() == {"hi": ""}
    await store.close()


async def test_many_at_once_on_two_servers_lose_nothing() -> None:
    """Each adds after the head that it finds: one line, whoever was faster."""
    if shutil.which("redis-server") is None:
        pytest.skip("no redis-server")
    first = await Store.open()
    path = first.redis.connection_pool.connection_kwargs["path"]
    second = await Store.open(f"unix://{path}")
    servers = [
        Sessions(store, Journals(store), retention_s=60).conversations for store in (first, second)
    ]
    chat = (await servers[0].create("", {}, [{"id": "root"}])).conversation_id
    names = [f"item_{number}" for number in range(24)]
    await asyncio.gather(
        *(
            servers[number % 2].add_items(chat, "", [{"id": name}])
            for number, name in enumerate(names)
        ),
        servers[0].update(chat, "", title="x"),
        servers[1].update(chat, "", metadata={"a": "b"}),
    )
    tree = await servers[0].tree(chat, "")
    ids = [item["id"] for item in tree]
    assert sorted(ids) == sorted(["root", *names])
    assert [item["parent_id"] for item in tree] == [None, *ids[:-1]]
    record = await servers[1].get(chat, "")
    assert (record.title, record.metadata, record.head) == ("x", {"a": "b"}, ids[-1])
    # Only one of many deletions of one item is told that it did it.
    ends = await asyncio.gather(
        *(servers[number % 2].delete_item(chat, "root", "") for number in range(6)),
        return_exceptions=True,
    )
    assert sum(not isinstance(end, Exception) for end in ends) == 1
    await second.close()
    await first.close()


async def test_a_turn_that_begins_during_a_deletion_keeps_its_items(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Whoever is first: the turn has what it saw, or the deletion what it deleted."""
    store = await memory_store()
    journals = [Journals(store), Journals(store)]
    for one in journals:
        await one.start()
    ours, theirs = (Sessions(store, one, retention_s=60).conversations for one in journals)
    chat = (await ours.create("", {}, [{"id": "a"}, {"id": "b"}])).conversation_id
    real = ours.claims.holds

    async def slow(holder: bytes | None) -> bool:
        held = await real(holder)
        if not held:
            await theirs.claim(chat, "", "resp_1", num_new=1)
        return held

    for subtree in (False, True):
        with monkeypatch.context() as patch:
            patch.setattr(ours.claims, "holds", slow)
            with pytest.raises(ApiError, match="response is being made"):
                await ours.delete_item(chat, "a", "", subtree=subtree)
    await theirs.append(chat, [{"id": "c"}], "b")
    assert [item["id"] for item in await ours.items(chat, "")] == ["a", "b", "c"]
    # A server that is gone keeps nobody from deleting.
    await journals[1].close()
    await ours.delete_item(chat, "a", "")
    assert [item["id"] for item in await ours.items(chat, "")] == ["b", "c"]
    await journals[0].close()
    await store.close()


async def test_what_changed_last_is_newest_though_a_clock_is_behind(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async with serving() as server:
        chats = [await Chat.new(server, text) for text in "abc"]
        now_s = time.time()
        monkeypatch.setattr(time, "time", lambda: now_s - 50)
        await server.post(chats[1].url, {"title": "x"})
        before = (await chats[1].body())["updated_at"]
        assert before >= int(now_s) - 1


async def test_the_official_sdk() -> None:
    async with (
        serving(counting()) as server,
        openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client,
    ):
        conversation = await client.conversations.create(
            items=[{"type": "message", "role": "user", "content": "a"}]
        )
        chat = Chat(server, {"id": conversation.id})
        first = await client.responses.create(
            model="scripted",
            input=[],
            extra_body={"conversation": {"id": conversation.id, "after": await chat.at("a")}},
        )
        assert first.output_text == "yes1"
        edited = await client.responses.create(
            model="scripted",
            input="b",
            extra_body={"conversation": {"id": conversation.id, "after": None}},
        )
        assert edited.output_text == "yes2"
        assert edited.conversation is not None
        items = client.conversations.items
        assert [one.id async for one in items.list(conversation.id, order="asc")] == [
            await chat.at("b"),
            await chat.at("yes2"),
        ]
        listed = items.list(conversation.id, order="asc", limit=2, extra_query={"tree": "true"})
        assert [one.to_dict()["parent_id"] async for one in listed] == [
            None, await chat.at("a"), None, await chat.at("b"),
        ]  # fmt: skip
        await items.delete(await chat.at("yes2"), conversation_id=conversation.id)
        assert await chat.shown() == "b"
