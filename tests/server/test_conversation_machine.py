"""Conversations against a naive model: dicts. Over fakeredis and over a real redis-server."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import Coroutine
from typing import Any, TypeVar

import pytest
from hypothesis import Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from server.conversations.store import Conversations
from server.errors import ApiError
from server.journals import Journals
from server.store import Store

T = TypeVar("T")
OWNER = "me"


@pytest.fixture(autouse=True)
def small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is done a part at a time is so here, too, with a handful of items."""
    for module in ("batches", "records"):
        monkeypatch.setattr(f"server.conversations.{module}.BATCH", 2)


class _Model:
    """One conversation: each item's parent in the order of adding, and the head."""

    def __init__(self) -> None:
        self.parents: dict[str, str | None] = {}
        self.texts: dict[str, str] = {}
        self.head: str | None = None

    def path(self, to: str | None) -> list[str]:
        return [] if to is None else [*self.path(self.parents[to]), to]

    def below(self, item: str | None) -> list[str]:
        """An item's leaves: those with it on their path and nothing after them."""
        leaves = [one for one in self.parents if one not in self.parents.values()]
        return [one for one in leaves if item is None or item in self.path(one)]


class ConversationMachine(RuleBasedStateMachine):
    """Items are added, branched off, deleted and forked; the head moves; turns come and go."""

    real_redis = False

    def __init__(self) -> None:
        super().__init__()
        self.runner = asyncio.Runner()
        self.count = 0
        self.models: dict[str, _Model] = {}
        self.turn: tuple[str, str, str | None, list[dict[str, Any]]] | None = None
        self.run(self._start())

    async def _start(self) -> None:
        if self.real_redis:
            self.store = await Store.open()
        else:
            self.store = Store.in_memory()
            await self.store.renew_epoch()
        self.journals = [Journals(self.store), Journals(self.store)]
        for journals in self.journals:
            await journals.start()
        self.servers = [
            Conversations(self.store, journals, retention_s=100) for journals in self.journals
        ]
        await self._new(0)

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        return self.runner.run(work)

    def teardown(self) -> None:
        self.run(self._stop())
        self.runner.close()

    async def _stop(self) -> None:
        for journals in self.journals:
            await journals.close()
        await self.store.close()

    @property
    def conversations(self) -> Conversations:
        """Whichever server is asked next."""
        self.count += 1
        return self.servers[self.count % 2]

    def _items(self, model: _Model, num: int, after: str | None) -> list[dict[str, Any]]:
        """Make items, and add them to a model."""
        items: list[dict[str, Any]] = []
        for _ in range(num):
            self.count += 1
            name, text = f"msg_{self.count}", f"text {self.count}"
            part = {"type": "input_text", "text": text}
            items.append({"id": name, "type": "message", "role": "user", "content": [part]})
            model.parents[name], model.texts[name] = after, text
            model.head = after = name
        return items

    async def _new(self, num: int) -> None:
        model = _Model()
        record = await self.conversations.create(OWNER, {}, self._items(model, num, None))
        self.models[record.conversation_id] = model

    def _draw(self, data: st.DataObject) -> tuple[str, _Model]:
        chat = data.draw(st.sampled_from(list(self.models)))
        return chat, self.models[chat]

    def _draw_item(self, data: st.DataObject, model: _Model) -> str | None:
        return data.draw(st.sampled_from([None, *model.parents]))

    def _is_busy(self, chat: str) -> bool:
        return self.turn is not None and self.turn[0] == chat

    @rule(num=st.integers(0, 4))
    @precondition(lambda self: len(self.models) < 4)
    def create(self, num: int) -> None:
        self.run(self._new(num))

    @rule(data=st.data(), num=st.integers(1, 4))
    def add(self, data: st.DataObject, num: int) -> None:
        chat, model = self._draw(data)
        if self._is_busy(chat):
            items = self._items(_Model(), num, None)
            with pytest.raises(ApiError, match="response is being made"):
                self.run(self.conversations.add_items(chat, OWNER, items))
            return
        items = self._items(model, num, model.head)
        self.run(self.conversations.add_items(chat, OWNER, items))

    @rule(data=st.data(), num=st.integers(1, 3))
    @precondition(lambda self: self.turn is None)
    def begin_turn(self, data: st.DataObject, num: int) -> None:
        """A turn sees the path it asked for, and nothing of other branches."""
        chat, model = self._draw(data)
        after = self._draw_item(data, model)
        given: dict[str, Any] = {} if after == model.head else {"after": after}
        branch = self.run(self.conversations.claim(chat, OWNER, "resp_1", num_new=num, **given))
        assert branch.after == after
        assert [item["id"] for item in branch.items] == model.path(after)
        self.claimed_by = self.count % 2
        self.turn = (chat, "resp_1", after, self._items(_Model(), num, after))

    @rule(data=st.data(), times=st.integers(0, 2))
    @precondition(lambda self: self.turn is not None)
    def end_turn(self, data: st.DataObject, times: int) -> None:
        """Its items land after what it saw, wherever the head is now, and once."""
        assert self.turn is not None
        chat, turn_id, after, items = self.turn
        model = self.models[chat]
        self.run(self.conversations.append(chat, items, after))
        parent = after
        for item in items:
            model.parents[item["id"]] = parent
            model.texts[item["id"]] = item["content"][0]["text"]
            model.head = parent = item["id"]
        for _ in range(times):
            # The answer got lost, and meanwhile somebody looks at another branch.
            model.head = data.draw(st.sampled_from(list(model.parents)))
            self.run(self.conversations.update(chat, OWNER, head=model.head))
            self.run(self.conversations.append(chat, items, after))
        self.run(self.servers[self.claimed_by].claims.release(chat, turn_id))
        self.turn = None

    @rule(data=st.data(), descend=st.booleans())
    def choose(self, data: st.DataObject, descend: bool) -> None:
        chat, model = self._draw(data)
        item = self._draw_item(data, model)
        if item is None:
            with pytest.raises(ApiError, match="no item"):
                self.run(self.conversations.update(chat, OWNER, head="msg_none"))
            return
        model.head = model.below(item)[-1] if descend else item
        record = self.run(self.conversations.update(chat, OWNER, head=item, descend=descend))
        assert record.head == model.head

    @rule(data=st.data(), subtree=st.booleans())
    def delete(self, data: st.DataObject, subtree: bool) -> None:
        chat, model = self._draw(data)
        item = self._draw_item(data, model) or "msg_none"
        work = self.conversations.delete_item(chat, item, OWNER, subtree=subtree)
        if item == "msg_none" or self._is_busy(chat):
            with pytest.raises(ApiError) as refused:
                self.run(work)
            assert refused.value.code == (
                "conversation_busy" if self._is_busy(chat) else "item_not_found"
            )
            return
        self.run(work)
        parent = model.parents[item]
        if subtree:
            gone = [one for one in model.parents if item in model.path(one)]
            for one in gone:
                del model.parents[one]
            if model.head in gone:
                model.head = next(reversed(model.below(parent)), parent)
            return
        del model.parents[item]
        for one, its in model.parents.items():
            if its == item:
                model.parents[one] = parent
        if model.head == item:
            model.head = parent

    @rule(data=st.data())
    @precondition(lambda self: len(self.models) < 4)
    def fork(self, data: st.DataObject) -> None:
        chat, model = self._draw(data)
        after = self._draw_item(data, model)
        record = self.run(self.conversations.fork(chat, OWNER, after=after))
        path = model.path(model.head if after is None else after)
        copies = self.run(self.conversations.items(record.conversation_id, OWNER))
        assert [one["content"][0]["text"] for one in copies] == [model.texts[one] for one in path]
        assert not {one["id"] for one in copies} & set(model.texts)
        copied = self.models[record.conversation_id] = _Model()
        for one in copies:
            copied.parents[one["id"]], copied.head = copied.head, one["id"]
            copied.texts[one["id"]] = one["content"][0]["text"]

    @rule(data=st.data())
    @precondition(lambda self: len(self.models) > 1 and self.turn is None)
    def drop(self, data: st.DataObject) -> None:
        chat, _ = self._draw(data)
        self.run(self.conversations.delete(chat, OWNER))
        del self.models[chat]

    @invariant()
    def is_as_the_model(self) -> None:
        self.run(self._compare())

    async def _compare(self) -> None:
        for chat, model in self.models.items():
            tree = await self.conversations.tree(chat, OWNER)
            assert {one["id"]: one["parent_id"] for one in tree} == model.parents
            assert [one["id"] for one in tree] == list(model.parents)
            assert [one["content"][0]["text"] for one in tree] == [
                model.texts[one] for one in model.parents
            ]
            items = await self.conversations.items(chat, OWNER)
            assert [one["id"] for one in items] == model.path(model.head)
            assert (await self.conversations.get(chat, OWNER)).head == model.head
        page = await self.conversations.listing.page(OWNER, after=None, limit=10, newest_first=True)
        assert {one["id"] for one in page.items} == set(self.models)
        await self._check_store()

    async def _check_store(self) -> None:
        """Nothing is left of what was deleted, and everything runs out some time."""
        keys = [key.decode() async for key in self.store.redis.scan_iter("millrace:conversation*")]
        chats = {key.split(":")[2] for key in keys if not key.startswith("millrace:conversations")}
        assert chats == set(self.models)
        for chat, model in self.models.items():
            for part in ("items", "order"):
                key = self.store.key("conversation", chat, part)
                names: Any = await (
                    self.store.redis.hkeys(key)
                    if part == "items"
                    else self.store.redis.zrange(key, 0, -1)
                )
                assert {name.decode() for name in names} == set(model.parents)
        for key in keys:
            assert await self.store.redis.ttl(key) > 0


class RealRedisMachine(ConversationMachine):
    """The same over a real redis-server."""

    real_redis = True


# Shrinking would take longer than a test may: what fails is told as it was found.
FEW = settings(
    max_examples=25,
    stateful_step_count=25,
    deadline=None,
    phases=(Phase.reuse, Phase.generate),
)
TestConversationsInMemory = ConversationMachine.TestCase
TestConversationsInMemory.settings = FEW
TestConversationsInRedis = pytest.mark.skipif(
    shutil.which("redis-server") is None, reason="no redis-server"
)(RealRedisMachine.TestCase)
TestConversationsInRedis.settings = settings(FEW, max_examples=5)
