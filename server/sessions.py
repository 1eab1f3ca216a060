"""What outlives a turn: stored responses and conversations, each visible to its owner only.

Keys in the store (all with a time to live, renewed when they change)::

    response:<id>                 a ResponseRecord
    conversation:<id>             a ConversationRecord
    conversation:<id>:items       hash: item id -> StoredItem
    conversation:<id>:order       sorted set: item id by its number
    conversation:<id>:numbers     counter the numbers come from
    conversation:<id>:turn        who runs a turn on it now: <replica>:<turn>

An item knows its parent, the item it was added after, so that a conversation can become a tree.

One turn at a time runs on a conversation: a second is refused with 409 ``conversation_busy``, since
which of two answers the other should have seen is for the client to decide. A completed or cut turn
adds its input and output items; a cancelled one adds what was produced; a failed one adds nothing,
so that sending it again does not double the question.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Awaitable, Iterator, Sequence
from typing import Any, cast

import msgspec
from redis.exceptions import RedisError, WatchError

from server.errors import ApiError, invalid, not_found
from server.journals import OPEN_KEEP_S, Journals
from server.request import TurnRequest
from server.response_object import new_id
from server.store import Store, StoreError

__all__ = ["ConversationRecord", "Page", "ResponseRecord", "Sessions", "page_of"]

MAX_ITEMS = 4096
"""Most items of a conversation, and of a chain of responses."""

Item = dict[str, Any]


class ResponseRecord(msgspec.Struct, frozen=True, kw_only=True):
    """A stored response with what it was made from."""

    owner: str
    response: dict[str, Any]
    input_items: list[Item]
    previous_ids: list[str]
    """The responses it follows on, first to last."""


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


class Page(msgspec.Struct, frozen=True, kw_only=True):
    """Part of a list of items."""

    items: list[Item]
    has_more: bool

    def body(self) -> dict[str, Any]:
        """Return the API's list object."""
        return {
            "object": "list",
            "data": self.items,
            "first_id": self.items[0]["id"] if self.items else None,
            "last_id": self.items[-1]["id"] if self.items else None,
            "has_more": self.has_more,
        }


_encode = msgspec.json.Encoder().encode
_decode_response = msgspec.json.Decoder(ResponseRecord).decode
_decode_conversation = msgspec.json.Decoder(ConversationRecord).decode
_decode_item = msgspec.json.Decoder(StoredItem).decode


@contextlib.contextmanager
def _reaching_store() -> Iterator[None]:
    try:
        yield
    except (RedisError, OSError) as error:
        raise StoreError(f"the store does not answer: {error}") from error


def page_of(items: Sequence[Item], *, after: str | None, limit: int, newest_first: bool) -> Page:
    """Cut a page out of items that are in order. Raises ApiError 400 when ``after`` is not one."""
    ordered = list(reversed(items)) if newest_first else list(items)
    start = 0
    if after is not None:
        ids = [item["id"] for item in ordered]
        if after not in ids:
            raise invalid(f"There is no item '{after}' in this list.", param="after")
        start = ids.index(after) + 1
    return Page(items=ordered[start : start + limit], has_more=len(ordered) > start + limit)


class Sessions:
    """Responses and conversations in the store. Every method may raise StoreError.

    What does not exist, or belongs to another owner, is an ApiError 404 either way.
    """

    def __init__(self, store: Store, journals: Journals, *, retention_s: int) -> None:
        self._store = store
        self._redis = store.redis
        self._journals = journals
        self._retention_s = retention_s

    # Turns (TurnKeeper)

    async def begin(self, request: TurnRequest, response: dict[str, Any]) -> None:
        """Store a response that begins."""
        if request.store:
            await self._save(request, response)

    async def end(self, request: TurnRequest, response: dict[str, Any]) -> None:
        """Store a response's end, add its items to its conversation and let others use that."""
        if request.store:
            await self._save(request, response)
        if request.conversation_id is not None:
            if response["status"] != "failed":
                await self._append(
                    request.conversation_id, [*request.input_items, *response["output"]]
                )
            await self.release(request.conversation_id, response["id"])

    async def _save(self, request: TurnRequest, response: dict[str, Any]) -> None:
        record = ResponseRecord(
            owner=request.owner,
            response=response,
            input_items=request.input_items,
            previous_ids=request.previous_ids,
        )
        with _reaching_store():
            await self._redis.set(
                self._response_key(response["id"]), _encode(record), ex=self._retention_s
            )

    # Responses

    async def response(self, response_id: str, owner: str) -> ResponseRecord:
        """Return a stored response; one whose server died has failed."""
        with _reaching_store():
            data = await self._redis.get(self._response_key(response_id))
        record = _decode_response(data) if data else None
        if record is None or record.owner != owner:
            raise not_found(f"There is no response '{response_id}'.", code="response_not_found")
        if record.response["status"] == "in_progress":
            last = await self._journals.settle(response_id)
            if last is not None:
                response = cast(dict[str, Any], getattr(last.event, "response", record.response))
                record = msgspec.structs.replace(record, response=response)
        return record

    async def delete_response(self, response_id: str, owner: str) -> None:
        """Delete a response and its event log."""
        await self.response(response_id, owner)
        with _reaching_store():
            await self._redis.delete(self._response_key(response_id))
        await self._journals.delete(response_id)

    async def history(self, response_id: str, owner: str) -> tuple[list[str], list[Item]]:
        """Return the ids and the items of a chain of responses that ends with ``response_id``."""
        try:
            last = await self.response(response_id, owner)
        except ApiError:
            raise _no_previous(response_id) from None
        if last.response["status"] == "in_progress":
            raise invalid(
                f"The response '{response_id}' is not complete yet.",
                param="previous_response_id",
                code="previous_response_in_progress",
            )
        ids = last.previous_ids
        records = [*await self._records(ids, owner), last]
        items = [item for record in records for item in record_items(record)]
        if len(items) > MAX_ITEMS:
            raise invalid(
                f"The chain of responses has {len(items)} items; at most {MAX_ITEMS} are allowed.",
                param="previous_response_id",
            )
        return [*ids, response_id], items

    async def _records(self, ids: Sequence[str], owner: str) -> list[ResponseRecord]:
        if not ids:
            return []
        with _reaching_store():
            found = await self._redis.mget([self._response_key(one) for one in ids])
        records = []
        for response_id, data in zip(ids, found, strict=True):
            record = _decode_response(data) if data else None
            if record is None or record.owner != owner:
                raise _no_previous(response_id)
            records.append(record)
        return records

    # Conversations

    async def create(
        self, owner: str, metadata: dict[str, str], items: Sequence[Item]
    ) -> ConversationRecord:
        """Create a conversation, with items to begin with."""
        record = ConversationRecord(
            conversation_id=new_id("conv"),
            owner=owner,
            created_at=int(time.time()),
            metadata=metadata,
        )
        await self._save_conversation(record)
        if items:
            await self._append(record.conversation_id, items)
        return record

    async def conversation(self, conversation_id: str, owner: str) -> ConversationRecord:
        """Return a conversation."""
        with _reaching_store():
            data = await self._redis.get(self._conversation_key(conversation_id))
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
        record = await self.conversation(conversation_id, owner)
        record = msgspec.structs.replace(record, metadata=metadata)
        await self._save_conversation(record)
        return record

    async def delete(self, conversation_id: str, owner: str) -> None:
        """Delete a conversation with its items. Responses made in it stay."""
        await self.conversation(conversation_id, owner)
        with _reaching_store():
            await self._redis.delete(*self._conversation_keys(conversation_id))

    async def add_items(self, conversation_id: str, owner: str, items: Sequence[Item]) -> None:
        """Add items at the end."""
        await self.conversation(conversation_id, owner)
        await self._append(conversation_id, items)

    async def items(self, conversation_id: str, owner: str) -> list[Item]:
        """Return all items in their order."""
        await self.conversation(conversation_id, owner)
        return [stored.item for stored in await self._items(conversation_id)]

    async def item(self, conversation_id: str, item_id: str, owner: str) -> Item:
        """Return one item."""
        await self.conversation(conversation_id, owner)
        key = self._conversation_key(conversation_id, "items")
        with _reaching_store():
            data = await cast(Awaitable[bytes | None], self._redis.hget(key, item_id))
        if data is None:
            raise _no_item(item_id)
        return _decode_item(data).item

    async def delete_item(self, conversation_id: str, item_id: str, owner: str) -> None:
        """Delete one item; its children keep it as their parent's id."""
        await self.conversation(conversation_id, owner)
        with _reaching_store():
            pipe = self._redis.pipeline(transaction=True)
            pipe.hdel(self._conversation_key(conversation_id, "items"), item_id)
            pipe.zrem(self._conversation_key(conversation_id, "order"), item_id)
            deleted, _ = await pipe.execute()
        if not deleted:
            raise _no_item(item_id)

    # Turns on conversations

    async def claim(
        self, conversation_id: str, owner: str, turn_id: str, *, num_new: int
    ) -> list[Item]:
        """Take a conversation for one turn that adds ``num_new`` items, and return its items.

        Raises ApiError: 400 when they have no room, 409 while another turn has the conversation; a
        turn whose server died has it no longer.
        """
        await self.conversation(conversation_id, owner)
        key = self._conversation_key(conversation_id, "turn")
        mine = f"{self._journals.replica_id}:{turn_id}"
        with _reaching_store():
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
                replica = holder.decode().partition(":")[0] if holder else ""
                if await self._journals.lives(replica):
                    return False
                pipe.multi()  # type: ignore[no-untyped-call]
                pipe.set(key, mine, ex=OPEN_KEEP_S)
                await pipe.execute()
            except WatchError:
                return False
        return True

    async def release(self, conversation_id: str, turn_id: str) -> None:
        """Give a conversation back, if ``turn_id`` has it."""
        key = self._conversation_key(conversation_id, "turn")
        with _reaching_store():
            if await self._redis.get(key) == f"{self._journals.replica_id}:{turn_id}".encode():
                await self._redis.delete(key)

    # Storage

    async def _save_conversation(self, record: ConversationRecord) -> None:
        key = self._conversation_key(record.conversation_id)
        with _reaching_store():
            await self._redis.set(key, _encode(record), ex=self._retention_s)
            await self._touch(record.conversation_id)

    async def _append(self, conversation_id: str, items: Sequence[Item]) -> None:
        """Add items in one transaction; repeating it changes nothing."""
        order = self._conversation_key(conversation_id, "order")
        numbers = self._conversation_key(conversation_id, "numbers")
        with _reaching_store():
            if not await self._redis.exists(self._conversation_key(conversation_id)):
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
                pipe.hset(self._conversation_key(conversation_id, "items"), parent, _encode(stored))
                pipe.zadd(order, {parent: number})
            await pipe.execute()
            await self._touch(conversation_id)

    async def _touch(self, conversation_id: str) -> None:
        pipe = self._redis.pipeline(transaction=False)
        for key in self._conversation_keys(conversation_id)[:-1]:
            pipe.expire(key, self._retention_s)
        await pipe.execute()

    async def _items(self, conversation_id: str) -> list[StoredItem]:
        with _reaching_store():
            pipe = self._redis.pipeline(transaction=True)
            pipe.zrange(self._conversation_key(conversation_id, "order"), 0, -1)
            pipe.hgetall(self._conversation_key(conversation_id, "items"))
            order, stored = await pipe.execute()
        return [_decode_item(stored[item_id]) for item_id in order]

    def _response_key(self, response_id: str) -> str:
        return self._store.key("response", response_id)

    def _conversation_key(self, conversation_id: str, *part: str) -> str:
        return self._store.key("conversation", conversation_id, *part)

    def _conversation_keys(self, conversation_id: str) -> list[str]:
        """All keys of a conversation, the claim last."""
        parts: list[tuple[str, ...]] = [(), ("items",), ("order",), ("numbers",), ("turn",)]
        return [self._conversation_key(conversation_id, *part) for part in parts]


def record_items(record: ResponseRecord) -> list[Item]:
    """Return a response's input and output."""
    return [*record.input_items, *record.response["output"]]


def _full(num_items: int) -> ApiError:
    return invalid(
        f"The conversation would have {num_items} items; at most {MAX_ITEMS} are allowed.",
        code="conversation_full",
    )


def _no_previous(response_id: str) -> ApiError:
    return invalid(
        f"There is no response '{response_id}' to follow on.",
        param="previous_response_id",
        code="previous_response_not_found",
    )


def _no_item(item_id: str) -> ApiError:
    return not_found(f"There is no item '{item_id}' in the conversation.", code="item_not_found")
