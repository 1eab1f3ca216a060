"""How conversations lie in the store: reading them, and what one transaction writes.

Keys (all with a time to live, renewed when they change)::

    conversation:<id>             a ConversationRecord
    conversation:<id>:items       hash: item id -> StoredItem
    conversation:<id>:order       sorted set: item id by its number
    conversations:<owner>         sorted set: an owner's conversations by when they last changed

Whatever changes a conversation writes its record in the same transaction, so that who watches the
record sees every change. Only a new one's many items are written ahead of the record.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import msgspec
from redis.asyncio.client import Pipeline

from server.conversations.batches import BATCH, batches
from server.conversations.titles import title_of
from server.conversations.tree import StoredItem, Tree
from server.paging import Item
from server.store import Store, reaching

__all__ = ["ConversationRecord", "Kept", "Records"]

_AHEAD_S = 60
"""How long items are kept that were written ahead of their conversation's record."""


class ConversationRecord(msgspec.Struct, frozen=True, kw_only=True):
    """A conversation without its items."""

    conversation_id: str
    owner: str
    created_at: int
    metadata: dict[str, str]
    title: str | None = None
    updated_s: float = 0.0
    """When it last changed, Unix seconds; 0: not since it was created."""
    head: str | msgspec.UnsetType | None = msgspec.UNSET
    """The item that the branch shown ends at. Unset where it was stored as one sequence of items,
    before there were trees."""

    def body(self) -> dict[str, Any]:
        """Return the API's conversation object."""
        return {
            "id": self.conversation_id,
            "object": "conversation",
            "created_at": self.created_at,
            "metadata": self.metadata,
            "title": self.title,
            "updated_at": int(self.updated_s or self.created_at),
            "head": None if self.head is msgspec.UNSET else self.head,
        }

    def touched(self) -> ConversationRecord:
        """Return the record as changed now, later than ever before."""
        # Servers' clocks differ; of one conversation, what comes later is newer.
        now_s = max(time.time(), self.updated_s + 0.001)
        return msgspec.structs.replace(self, updated_s=now_s)


class Kept(msgspec.Struct, frozen=True):
    """A conversation as it is in the store: its record's ``head`` is that of its tree."""

    record: ConversationRecord
    tree: Tree
    stored: dict[str, StoredItem] = {}
    """The items as they are stored now; what differs from them in the tree is to be written."""
    next_number: int = 0
    """Of the item that is added next."""


_encode = msgspec.json.Encoder().encode
_decode_record = msgspec.json.Decoder(ConversationRecord).decode
_decode_item = msgspec.json.Decoder(StoredItem).decode


class Records:
    """Reads and writes conversations. What is not there is None; ``owner`` None is whoever."""

    def __init__(self, store: Store, *, retention_s: int) -> None:
        self._store = store
        self._redis = store.redis
        self._retention_s = retention_s

    async def record(self, conversation_id: str, owner: str) -> ConversationRecord | None:
        """Return a conversation's record. Raises StoreError."""
        with reaching():
            data = await self._redis.get(self.key(conversation_id))
        return self._owned(data, owner)

    async def records(self, ids: Sequence[str], owner: str) -> list[ConversationRecord | None]:
        """Return several records. Raises StoreError."""
        if not ids:
            return []
        with reaching():
            found = await self._redis.mget([self.key(one) for one in ids])
        return [self._owned(data, owner) for data in found]

    async def kept(self, conversation_id: str, owner: str) -> Kept | None:
        """Return a conversation with its items as they are at one moment. Raises StoreError."""
        with reaching():
            pipe = self._redis.pipeline(transaction=True)
            pipe.get(self.key(conversation_id))
            pipe.zrange(self.key(conversation_id, "order"), 0, -1)
            pipe.zrange(self.key(conversation_id, "order"), -1, -1, withscores=True)
            pipe.hgetall(self.key(conversation_id, "items"))
            data, order, last, stored = await pipe.execute()
        record = self._owned(data, owner)
        return None if record is None else await _kept(record, order, last, stored)

    async def item(self, conversation_id: str, item_id: str) -> Item | None:
        """Return one item of whoever's conversation. Raises StoreError."""
        client: Any = self._redis
        with reaching():
            data = await client.hget(self.key(conversation_id, "items"), item_id)
        return None if data is None else _decode_item(data).body()

    async def watched(self, pipe: Pipeline, conversation_id: str, owner: str | None) -> Kept | None:
        """Read a conversation within a transaction that watches its record."""
        reads: Any = pipe
        record = self._owned(await reads.get(self.key(conversation_id)), owner)
        if record is None:
            return None
        key = self.key(conversation_id, "order")
        order = await reads.zrange(key, 0, -1)
        last = await reads.zrange(key, -1, -1, withscores=True)
        stored = await reads.hgetall(self.key(conversation_id, "items"))
        return await _kept(record, order, last, stored)

    async def write_ahead(self, kept: Kept) -> Kept:
        """Store all but the last items of a new conversation; return it as it is stored now.

        Nobody sees them before its record is written. Raises StoreError.
        """
        items = self.key(kept.record.conversation_id, "items")
        order = self.key(kept.record.conversation_id, "order")
        left = list(kept.tree.items.items())
        number = kept.next_number
        stored = dict(kept.stored)
        while len(left) > BATCH:
            part, left = left[:BATCH], left[BATCH:]
            with reaching():
                pipe = self._redis.pipeline(transaction=False)
                pipe.hset(items, mapping={one: _encode(item) for one, item in part})
                pipe.zadd(order, {one: number + at for at, (one, _) in enumerate(part)})
                for key in (items, order):
                    pipe.expire(key, _AHEAD_S)
                await pipe.execute()
            stored |= part
            number += len(part)
        return msgspec.structs.replace(kept, stored=stored, next_number=number)

    def write(self, pipe: Pipeline, kept: Kept) -> None:
        """Add to a transaction what makes the store hold a conversation so."""
        record, tree = kept.record, kept.tree
        conversation_id = record.conversation_id
        items, order = self.key(conversation_id, "items"), self.key(conversation_id, "order")
        rows: dict[Any, bytes] = {
            item_id: _encode(stored)
            for item_id, stored in tree.items.items()
            if kept.stored.get(item_id) is not stored
        }
        if rows:
            pipe.hset(items, mapping=rows)
        added = [item_id for item_id in rows if item_id not in kept.stored]
        if added:
            pipe.zadd(order, {one: number for number, one in enumerate(added, kept.next_number)})
        if gone := [item_id for item_id in kept.stored if item_id not in tree]:
            pipe.hdel(items, *gone)
            pipe.zrem(order, *gone)
        record = msgspec.structs.replace(record, head=tree.head)
        pipe.set(self.key(conversation_id), _encode(record), ex=self._retention_s)
        index = self.index(record.owner)
        pipe.zadd(index, {conversation_id: record.updated_s})
        for key in (items, order, index):
            pipe.expire(key, self._retention_s)

    def delete(self, pipe: Pipeline, record: ConversationRecord) -> None:
        """Add to a transaction what leaves nothing of a conversation."""
        conversation_id = record.conversation_id
        pipe.delete(
            self.key(conversation_id),
            self.key(conversation_id, "items"),
            self.key(conversation_id, "order"),
        )
        pipe.zrem(self.index(record.owner), conversation_id)

    def prune(self, pipe: Pipeline, owner: str) -> None:
        """Add to a transaction what takes expired conversations off their owner's list."""
        pipe.zremrangebyscore(self.index(owner), "-inf", time.time() - self._retention_s)

    def key(self, conversation_id: str, *part: str) -> str:
        """Return the name of one of a conversation's keys."""
        return self._store.key("conversation", conversation_id, *part)

    def index(self, owner: str) -> str:
        """Return the name of an owner's list."""
        return self._store.key("conversations", owner)

    def _owned(self, data: Any, owner: str | None) -> ConversationRecord | None:
        record = _decode_record(data) if data else None
        return record if record is not None and owner in (None, record.owner) else None


async def _kept(
    record: ConversationRecord,
    order: Sequence[bytes],
    last: Sequence[tuple[bytes, float]],
    stored: dict[bytes, bytes],
) -> Kept:
    items: dict[str, StoredItem] = {}
    async for part in batches(order):
        items |= {one.decode(): _decode_item(stored[one]) for one in part if one in stored}
    next_number = int(last[0][1]) + 1 if last else 0
    if record.head is not msgspec.UNSET:
        # What belongs together may expire a moment apart.
        head = record.head if record.head in items else None
        return Kept(record, Tree(items, head), items, next_number)
    # Its items lay in one sequence, with the parents they had before others were deleted.
    tree = Tree.chain(items)
    title = record.title or title_of(tree.bodies(items))
    record = msgspec.structs.replace(record, head=tree.head, title=title)
    return Kept(record, tree, items, next_number)
