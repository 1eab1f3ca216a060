"""The list of a caller's conversations, titles that are made, and the search."""

from __future__ import annotations

import itertools
import time
import unicodedata
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.conversations.search import Found, Match, fold, search, words_of
from server.conversations.titles import MAX_MADE_CHARS, title_of
from server.journals import Journals
from server.sessions import Sessions
from server.state import SESSIONS
from tests.server.scripted import ScriptedEngine, say
from tests.server.serving import Served, memory_store, serving

LIST = "/v1/conversations"


def said(role: str, text: str, item_id: str = "msg_1") -> dict[str, Any]:
    part = {"type": "input_text", "text": text}
    return {"id": item_id, "type": "message", "role": role, "content": [part]}


def raws(*items: dict[str, Any]) -> list[msgspec.Raw]:
    return [msgspec.Raw(msgspec.json.encode(item)) for item in items]


def look(query: str, title: str | None, *texts: str) -> Found | None:
    items = [said("user", text, f"msg_{number}") for number, text in enumerate(texts)]
    return search(words_of(query), title, raws(*items))


# Titles


@pytest.mark.parametrize(
    ("texts", "title"),
    [
        (["Hello"], "Hello"),
        (["  What\t is   this? \nMore"], "What is this?"),
        (["\n \n second line"], "second line"),
        (["", "next"], "next"),
        (["", " \n"], None),
        ([], None),
        (["word " * 12], " ".join(["word"] * 12)),
        (["word " * 13], " ".join(["word"] * 12) + "…"),
        (["x" * 60], "x" * 60),
        (["x" * 61], "x" * 59 + "…"),
        (["世" * 70], "世" * 59 + "…"),
    ],
)
def test_made_titles(texts: list[str], title: str | None) -> None:
    assert title_of(said("user", text) for text in texts) == title


def test_a_title_is_of_the_user() -> None:
    items = [
        said("system", "rules"),
        {"id": "r", "type": "reasoning", "content": [{"text": "hm"}]},
        said("assistant", "hello"),
        said("user", "question"),
    ]
    assert title_of(items) == "question"
    assert title_of(items[:3]) is None


@given(st.text())
def test_a_made_title_is_short_and_begins_as_the_text(text: str) -> None:
    title = title_of([said("user", text)])
    if title is None:
        assert not text.split()
        return
    assert 0 < len(title) <= MAX_MADE_CHARS + 1
    assert " ".join(text.split()).startswith(title.removesuffix("…"))


# Words


@pytest.mark.parametrize(
    ("query", "text"),
    [
        ("GRÜSSE", "viele Grüße"),
        ("cafe", "im Café"),
        ("café", "im cafe\u0301"),
        ("istanbul", "İstanbul"),
        ("ΌΔΟΣ", "όδος"),
        ("ﬁne", "fine"),
        ("ABC", "ａｂｃ"),
        ("世界", "你好世界"),
        ("b a", "a b"),
    ],
)
def test_words_are_found_however_they_are_written(query: str, text: str) -> None:
    assert look(query, None, text) is not None
    assert look(query, text) == Found(None)
    assert look(f"{query} nowhere", text, text) is None


@given(st.text(), st.text(), st.text(min_size=1).filter(lambda text: bool(fold(text).split())))
def test_a_text_is_found_by_its_own_words(before: str, after: str, text: str) -> None:
    words = fold(text).split()
    found = look(text, None, f"{before} {text} {after}")
    assert found is not None
    assert found.match is not None
    assert found.match.item_id == "msg_0"
    assert len(found.match.text) <= 162
    whole = " ".join(f"{before} {text} {after}".split())
    assert found.match.text.strip("…") in whole
    assert any(word in fold(found.match.text) for word in words) or len(text) > 40


@given(st.text(max_size=20))
def test_folding_is_stable(text: str) -> None:
    assert fold(fold(text)) == fold(text)
    assert fold(unicodedata.normalize("NFD", text)) == fold(unicodedata.normalize("NFC", text))


def test_the_message_with_most_words_is_shown() -> None:
    assert look("red blue", None, "red", "a blue and red one", "blue") == Found(
        Match("msg_1", "a blue and red one")
    )
    assert look("red blue", "red thing", "nothing", "blue") == Found(Match("msg_1", "blue"))
    assert look("red", "red thing", "nothing") == Found(None)
    assert look("red", None, "nothing") is None
    items = raws({"id": "r", "type": "reasoning", "content": [{"text": "red"}]})
    assert search(["red"], None, items) is None


def test_a_snippet_is_cut_between_words() -> None:
    words = [f"word{number}" for number in range(100)]
    found = look("WORD50", None, "\n".join(words))
    assert found is not None
    assert found.match is not None
    text = found.match.text
    assert text.startswith("…")
    assert text.endswith("…")
    assert "word50" in text
    assert set(text.strip("…").split()) <= set(words)
    # What grows when it is folded does not shift it.
    found = look("needle", None, "ﷺ" * 200 + " needle in the hay")
    assert found is not None
    assert found.match is not None
    assert "needle in the hay" in found.match.text


# The list


async def conversations(server: Served, texts: Sequence[str], **options: Any) -> list[str]:
    made = []
    for text in texts:
        items = [{"role": "user", "content": text}] if text else []
        status, body = await server.post(LIST, {"items": items}, **options)
        assert status == 200
        made.append(body["id"])
    return made


async def pages(server: Served, query: str) -> list[str]:
    """The titles of all pages."""
    titles: list[str] = []
    after = ""
    while True:
        status, page = await server.get(f"{LIST}?{query}{after}")
        assert status == 200, page
        titles += [one["title"] for one in page["data"]]
        if not page["has_more"]:
            return titles
        assert page["first_id"] == page["data"][0]["id"]
        after = f"&after={page['last_id']}"


async def test_the_latest_activity_comes_first() -> None:
    async with serving(ScriptedEngine(say("yes"))) as server:
        a, b, c, d = await conversations(server, "abcd")
        for limit in (1, 2, 3, 4, 100):
            assert await pages(server, f"limit={limit}") == list("dcba")
            assert await pages(server, f"limit={limit}&order=asc") == list("abcd")
        await server.post(f"{LIST}/{a}", {"metadata": {}})
        assert await pages(server, "") == list("adcb")
        await server.post("/v1/responses", {"model": "scripted", "input": "x", "conversation": b})
        assert await pages(server, "") == list("badc")
        _, page = await server.get(f"{LIST}/{c}/items")
        await server.delete(f"{LIST}/{c}/items/{page['last_id']}")
        assert await pages(server, "") == list("cbad")
        await server.post(f"{LIST}/{d}/items", {"items": [{"role": "user", "content": "x"}]})
        assert await pages(server, "") == list("dcba")
        await server.delete(f"{LIST}/{d}")
        assert await pages(server, "") == list("cba")
        # Reading is no activity.
        await server.get(f"{LIST}/{a}/items")
        _, page = await server.get(f"{LIST}?limit=1")
        assert page["data"] == [(await server.get(f"{LIST}/{c}"))[1]]


async def test_an_empty_list() -> None:
    async with serving() as server:
        empty = {
            "object": "list", "data": list[Any](), "first_id": None, "last_id": None,
            "has_more": False,
        }  # fmt: skip
        assert await server.get(LIST) == (200, empty)
        assert await server.get(f"{LIST}?query=x") == (200, empty)


@pytest.mark.parametrize(
    ("query", "param"),
    [
        ("limit=0", "limit"),
        ("order=up", "order"),
        ("after=conv_none", "after"),
        ("query=x&after=conv_none", "after"),
        ("query=", "query"),
        ("query=%20", "query"),
        ("query=%CC%81", "query"),
        ("query=" + "x" * 257, "query"),
    ],
)
async def test_wrong_questions(query: str, param: str) -> None:
    async with serving() as server:
        await conversations(server, "a")
        status, body = await server.get(f"{LIST}?{query}")
        assert (status, body["error"]["param"]) == (400, param)


async def test_what_expired_or_is_gone_is_not_listed(monkeypatch: pytest.MonkeyPatch) -> None:
    store = await memory_store()
    kept = Sessions(store, Journals(store), retention_s=100).conversations
    made = [await kept.create("", {}, [said("user", text)]) for text in "abcdef"]
    # As if these had run out a moment ago, and the list's own clock were behind.
    for one in made[1:4]:
        await store.redis.delete(f"millrace:conversation:{one.conversation_id}")
    page = await kept.listing.page("", after=None, limit=2, newest_first=True)
    assert [one["title"] for one in page.items] == ["f", "e"]
    assert page.has_more
    page = await kept.listing.page("", after=page.items[-1]["id"], limit=2, newest_first=True)
    assert [one["title"] for one in page.items] == ["a"]
    assert await store.redis.zcard("millrace:conversations:") == 3
    found = await kept.listing.search("", "a", after=None, limit=9, newest_first=True)
    assert [one["title"] for one in found["data"]] == ["a"]
    later_s = time.time() + 101
    monkeypatch.setattr(time, "time", lambda: later_s)
    await kept.create("", {}, [])
    assert await store.redis.zcard("millrace:conversations:") == 1
    await store.close()


async def test_search(tmp_path: Path) -> None:
    async with serving(ScriptedEngine(say("The answer is Forty-Two"))) as server:
        a, b, _, _ = await conversations(server, ["Red Balloon", "blue BALLOON", "green", ""])
        await server.post("/v1/responses", {"model": "scripted", "input": "?", "conversation": b})
        await server.post(f"{LIST}/{a}", {"title": "Umbrella"})
        _, page = await server.get(f"{LIST}?query=balloon")
        assert [one["id"] for one in page["data"]] == [a, b]
        assert "searched" not in page
        item = page["data"][0]["match"]["item_id"]
        assert page["data"][0]["match"]["text"] == "Red Balloon"
        _, shown = await server.get(f"{LIST}/{a}/items/{item}")
        assert shown["content"][0]["text"] == "Red Balloon"
        _, page = await server.get(f"{LIST}?query=forty%20blue")
        assert [one["id"] for one in page["data"]] == [b]
        _, page = await server.get(f"{LIST}?query=umbrella")
        assert [(one["id"], one["match"]) for one in page["data"]] == [(a, None)]
        assert (await server.get(f"{LIST}?query=yellow"))[1]["data"] == []
        assert await pages(server, "query=balloon&limit=1") == ["Umbrella", "blue BALLOON"]
        titles = await pages(server, "query=balloon&limit=1&order=asc")
        assert titles == ["blue BALLOON", "Umbrella"]


async def test_other_branches_are_searched_too() -> None:
    async with serving(ScriptedEngine(say("yes"))) as server:
        (a,) = await conversations(server, ["first wording"])
        conversation = {"id": a, "after": None}
        body = {"model": "scripted", "input": "second", "conversation": conversation}
        await server.post("/v1/responses", body)
        _, page = await server.get(f"{LIST}?query=wording")
        assert [one["id"] for one in page["data"]] == [a]


async def test_a_search_has_an_end(monkeypatch: pytest.MonkeyPatch) -> None:
    async with serving() as server:
        made = await conversations(server, ["x one", "x two", "x three", "x four"])
        monkeypatch.setattr("server.conversations.listing.MAX_SEARCHED", 3)
        for order, wanted in (("desc", made[:0:-1]), ("asc", made[1:])):
            _, page = await server.get(f"{LIST}?query=x&order={order}")
            assert [one["id"] for one in page["data"]] == wanted
            assert page["searched"] == 3
        assert len(await pages(server, "query=x&limit=1")) == 3
        monkeypatch.setattr("server.conversations.listing.MAX_SEARCHED", 4)
        assert "searched" not in (await server.get(f"{LIST}?query=x"))[1]
        for most, searched in ((2, 2), (1, 1), (0, 1)):
            monkeypatch.setattr("server.conversations.listing.MAX_SEARCHED_ITEMS", most)
            _, page = await server.get(f"{LIST}?query=x")
            assert (page["searched"], len(page["data"])) == (searched, searched)


async def test_keys_see_their_own(tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    keys.write_text("alpha\nbeta\n")
    keys.chmod(0o600)
    mine = {"Authorization": "Bearer alpha"}
    theirs = {"headers": {"Authorization": "Bearer beta"}}
    async with serving(headers=mine, api_key_file=keys) as server:
        (chat,) = await conversations(server, ["secret"])
        (other,) = await conversations(server, ["secret too"], **theirs)
        for query, options, seen in itertools.chain.from_iterable(
            (
                (query, {}, [chat]),
                (query, theirs, [other]),
            )
            for query in ("", "?query=secret")
        ):
            _, page = await server.get(LIST + query, **options)
            assert [one["id"] for one in page["data"]] == seen
        one = f"{LIST}/{chat}"
        _, page = await server.get(f"{one}/items")
        item = page["first_id"]
        body = {"model": "scripted", "input": "hi"}
        for status, answer in (
            await server.post(f"{one}/fork", {}, **theirs),
            await server.post(one, {"head": item}, **theirs),
            await server.post(one, {"title": "x"}, **theirs),
            await server.get(f"{one}/items?tree=true", **theirs),
            await server.delete(f"{one}/items/{item}?subtree=true", **theirs),
            await server.post(
                "/v1/responses", {**body, "conversation": {"id": chat, "after": item}}, **theirs
            ),
        ):
            assert (status, answer["error"]["code"]) == (404, "conversation_not_found")
        status, answer = await server.get(f"{LIST}?after={chat}", **theirs)
        assert (status, answer["error"]["param"]) == (400, "after")
        # Their names in the store do not show the keys.
        names = [name async for name in server.app[SESSIONS]._redis.scan_iter("*conversations:*")]
        assert len(names) == 2
        assert not [name for name in names if b"alpha" in name or b"beta" in name]
