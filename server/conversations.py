"""Conversations: their items in the store, and which turn has them.

Keys (all with a time to live, renewed when they change)::

    conversation:<id>             a ConversationRecord
    conversation:<id>:items       hash: item id -> StoredItem
    conversation:<id>:order       sorted set: item id by its number
    conversation:<id>:numbers     counter the numbers come from
    conversation:<id>:turn        who runs a turn on it now: <replica>:<turn>

An item knows its parent, the item it was added after, so that a conversation can become a tree.

One turn at a time runs on a conversation: a second is refused with 409 ``conversation_busy``, since
which of two answers the other should have seen is for the client to decide.
"""

from __future__ import annotations

import time
from collections.abc import Awaitable, Sequence
from typing import Any, cast

import msgspec
from redis.exceptions import WatchError

from server.errors import ApiError, invalid, not_found
from server.journals import OPEN_KEEP_S, Journals
from server.paging import Item
from server.response_object import new_id
from server.store import Store, reaching

__all__ = ["MAX_ITEMS", "ConversationRecord", "Conversations"]

MAX_ITEMS = 4096
"""Most items of a conversation."""


class ConversationRecord(msgspec.Struct, frozen=True, kw_only=True):
    """A conversation without its items."""

    conversation_id: str
    owner: str
    created_at: int
    metadata: dict[str, str]

    def body(self) -> dict[str, Any]:
        """Return the API's conversation object."""
        return {
            "id": self.conversation_id,
            "object": "conversation",
            "created_at": self.created_at,
            "metadata": self.metadata,
        }


class StoredItem(msgspec.Struct, frozen=True, kw_only=True):
    """An item of a conversation."""

    item: Item
    parent: str | None


_encode = msgspec.json.Encoder().encode
_decode_conversation = msgspec.json.Decoder(ConversationRecord).decode
_decode_item = msgspec.json.Decoder(StoredItem).decode


class Conversations:
    """Conversations in the store. Every method may raise StoreError.

    What does not exist, or belongs to another owner, is an ApiError 404 either way.
    """

    def __init__(self, store: Store, journals: Journals, *, retention_s: int) -> None:
        self._store = store
        self._redis = store.redis
        self._journals = journals
        self._retention_s = retention_s

    async def create(
        self,
        owner: str,
        metadata: dict[str, str],
        items: Sequence[Item],
        conversation_id: str | None = None,
    ) -> ConversationRecord:
        """Create a conversation, with items to begin with; without an id it gets a fresh one."""
        record = ConversationRecord(
            conversation_id=conversation_id or new_id("conv"),
            owner=owner,
            created_at=int(time.time()),
            metadata=metadata,
        )
        await self._save(record)
        if items:
            await self.append(record.conversation_id, items)
        return record

    async def exists(self, conversation_id: str) -> bool:
        """Return whether there is a conversation, whoever it belongs to."""
        with reaching():
            return bool(await self._redis.exists(self._key(conversation_id)))

    async def get(self, conversation_id: str, owner: str) -> ConversationRecord:
        """Return a conversation."""
        with reaching():
            data = await self._redis.get(self._key(conversation_id))
        record = _decode_conversation(data) if data else None
        if record is None or record.owner != owner:
            raise not_found(
                f"There is no conversation '{conversation_id}'.", code="conversation_not_found"
            )
        return record

    async def update(
        self, conversation_id: str, owner: str, metadata: dict[str, str]
    ) -> ConversationRecord:
        """Replace a conversation's metadata."""
        record = await self.get(conversation_id, owner)
        record = msgspec.structs.replace(record, metadata=metadata)
        await self._save(record)
        return record

    async def delete(self, conversation_id: str, owner: str) -> None:
        """Delete a conversation with its items. Responses made in it stay."""
        await self.get(conversation_id, owner)
        with reaching():
            await self._redis.delete(*self._keys(conversation_id))

    async def add_items(self, conversation_id: str, owner: str, items: Sequence[Item]) -> None:
        """Add items at the end."""
        await self.get(conversation_id, owner)
        await self.append(conversation_id, items)

    async def items(self, conversation_id: str, owner: str) -> list[Item]:
        """Return all items in their order."""
        await self.get(conversation_id, owner)
        return [stored.item for stored in await self._items(conversation_id)]

    async def item(self, conversation_id: str, item_id: str, owner: str) -> Item:
        """Return one item."""
        await self.get(conversation_id, owner)
        key = self._key(conversation_id, "items")
        with reaching():
            data = await cast(Awaitable[bytes | None], self._redis.hget(key, item_id))
        if data is None:
            raise _no_item(item_id)
        return _decode_item(data).item

    async def delete_item(self, conversation_id: str, item_id: str, owner: str) -> None:
        """Delete one item; its children keep it as their parent's id."""
        await self.get(conversation_id, owner)
        with reaching():
            pipe = self._redis.pipeline(transaction=True)
            pipe.hdel(self._key(conversation_id, "items"), item_id)
            pipe.zrem(self._key(conversation_id, "order"), item_id)
            deleted, _ = await pipe.execute()
        if not deleted:
            raise _no_item(item_id)

    async def claim(
        self, conversation_id: str, owner: str, turn_id: str, *, num_new: int
    ) -> list[Item]:
        """Take a conversation for one turn that adds ``num_new`` items, and return its items.

        Raises ApiError: 400 when they have no room, 409 while another turn has the conversation; a
        turn whose server died has it no longer.
        """
        await self.get(conversation_id, owner)
        key = self._key(conversation_id, "turn")
        mine = f"{self._journals.replica_id}:{turn_id}"
        with reaching():
            taken = await self._redis.set(key, mine, nx=True, ex=OPEN_KEEP_S)
            if not taken and not await self._take_over(key, mine):
                raise ApiError(
                    409,
                    f"Another response is being made in the conversation '{conversation_id}'.",
                    code="conversation_busy",
                    param="conversation",
                )
        items = [stored.item for stored in await self._items(conversation_id)]
        if len(items) + num_new > MAX_ITEMS:
            await self.release(conversation_id, turn_id)
            raise _full(len(items) + num_new)
        return items

    async def _take_over(self, key: str, mine: str) -> bool:
        """Take the claim of a dead replica."""
        async with self._redis.pipeline(transaction=True) as pipe:
            try:
                await pipe.watch(key)
                holder = cast(bytes | None, await pipe.get(key))
                replica, _, turn_id = holder.decode().partition(":") if holder else ("", "", "")
                if await self._journals.lives(replica):
                    return False
                if turn_id and not await self._journals.stored.abandoned(turn_id):
                    return False  # Another server is about to go on with it.
                pipe.multi()  # type: ignore[no-untyped-call]
                pipe.set(key, mine, ex=OPEN_KEEP_S)
                await pipe.execute()
            except WatchError:
                return False
        return True

    async def adopt(self, conversation_id: str, turn_id: str) -> None:
        """Hold for this server the claim of a turn that it has taken over."""
        key = self._key(conversation_id, "turn")
        with reaching():
            async with self._redis.pipeline(transaction=True) as pipe:
                try:
                    await pipe.watch(key)
                    holder = cast(bytes | None, await pipe.get(key))
                    if holder is None or holder.decode().partition(":")[2] != turn_id:
                        return
                    pipe.multi()  # type: ignore[no-untyped-call]
                    pipe.set(key, f"{self._journals.replica_id}:{turn_id}", ex=OPEN_KEEP_S)
                    await pipe.execute()
                except WatchError:
                    return

    async def release(self, conversation_id: str, turn_id: str) -> None:
        """Give a conversation back, if ``turn_id`` has it."""
        key = self._key(conversation_id, "turn")
        with reaching():
            if await self._redis.get(key) == f"{self._journals.replica_id}:{turn_id}".encode():
                await self._redis.delete(key)

    async def _save(self, record: ConversationRecord) -> None:
        key = self._key(record.conversation_id)
        with reaching():
            await self._redis.set(key, _encode(record), ex=self._retention_s)
            await self._touch(record.conversation_id)

    async def append(self, conversation_id: str, items: Sequence[Item]) -> None:
        """Add items in one transaction; repeating it changes nothing."""
        order = self._key(conversation_id, "order")
        numbers = self._key(conversation_id, "numbers")
        with reaching():
            if not await self._redis.exists(self._key(conversation_id)):
                return
            # Of an attempt whose answer got lost they may be there already.
            known = await self._redis.zmscore(order, [item["id"] for item in items])
            items = [item for item, at in zip(items, known, strict=True) if at is None]
            if not items:
                return
            count = await self._redis.zcard(order)
            if count + len(items) > MAX_ITEMS:
                raise _full(count + len(items))
            last: Any = await self._redis.zrange(order, -1, -1)
            parent = last[0].decode() if last else None
            end = await self._redis.incrby(numbers, len(items))
            pipe = self._redis.pipeline(transaction=True)
            for number, item in enumerate(items, start=end - len(items)):
                stored = StoredItem(item=item, parent=parent)
                parent = item["id"]
                pipe.hset(self._key(conversation_id, "items"), parent, _encode(stored))
                pipe.zadd(order, {parent: number})
            await pipe.execute()
            await self._touch(conversation_id)

    async def _touch(self, conversation_id: str) -> None:
        pipe = self._redis.pipeline(transaction=False)
        for key in self._keys(conversation_id)[:-1]:
            pipe.expire(key, self._retention_s)
        await pipe.execute()

    async def _items(self, conversation_id: str) -> list[StoredItem]:
        with reaching():
            pipe = self._redis.pipeline(transaction=True)
            pipe.zrange(self._key(conversation_id, "order"), 0, -1)
            pipe.hgetall(self._key(conversation_id, "items"))
            order, stored = await pipe.execute()
        return [_decode_item(stored[item_id]) for item_id in order]

    def _key(self, conversation_id: str, *part: str) -> str:
        return self._store.key("conversation", conversation_id, *part)

    def _keys(self, conversation_id: str) -> list[str]:
        """All keys of a conversation, the claim last."""
        parts: list[tuple[str, ...]] = [(), ("items",), ("order",), ("numbers",), ("turn",)]
        return [self._key(conversation_id, *part) for part in parts]


def _full(num_items: int) -> ApiError:
    return invalid(
        f"The conversation would have {num_items} items; at most {MAX_ITEMS} are allowed.",
        code="conversation_full",
    )


def _no_item(item_id: str) -> ApiError:
    return not_found(f"There is no item '{item_id}' in the conversation.", code="item_not_found")
