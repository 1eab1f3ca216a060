"""Conversations: trees of items in the store, changed by one transaction at a time.

A change reads the conversation, makes the new one of it (see ``tree``) and writes the difference;
where another was faster it begins again. While a turn runs on a conversation (see ``claims``) items
are neither added nor deleted but by the turn itself; choosing a branch and renaming go on.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import NamedTuple, cast

import msgspec
from redis.exceptions import WatchError

from server.conversations.batches import batches
from server.conversations.claims import Claims, busy
from server.conversations.listing import Listing
from server.conversations.records import ConversationRecord, Kept, Records
from server.conversations.titles import title_of
from server.conversations.tree import Tree
from server.errors import ApiError, invalid, not_found
from server.journals import Journals
from server.paging import Item
from server.response_object import derived_id, new_id
from server.store import Store, StoreError, StoreUnavailable, reaching

__all__ = ["MAX_ITEMS", "Branch", "Conversations"]

MAX_ITEMS = 4096
"""Most items of a conversation, all branches together."""
MAX_TRIES = 32
"""How often a change begins again because of others."""

_Alter = Callable[[Kept], Kept]


class Branch(NamedTuple):
    """What a turn sees of a conversation, and where its own items go."""

    after: str | None
    items: list[Item]


class Conversations:
    """Conversations in the store. Every method may raise StoreError.

    What does not exist, or belongs to another owner, is an ApiError 404 either way.
    """

    def __init__(self, store: Store, journals: Journals, *, retention_s: int) -> None:
        self._redis = store.redis
        self._records = Records(store, retention_s=retention_s)
        self.claims = Claims(store, journals)
        self.listing = Listing(store, self._records)

    # Conversations

    async def create(
        self,
        owner: str,
        metadata: dict[str, str],
        items: Sequence[Item],
        conversation_id: str | None = None,
        *,
        title: str | None = None,
    ) -> ConversationRecord:
        """Create a conversation, with items to begin with; without an id it gets a fresh one."""
        now_s = time.time()
        tree = Tree()
        async for part in batches(items):
            tree = tree.append(tree.head, part)
        record = ConversationRecord(
            conversation_id=conversation_id or new_id("conv"),
            owner=owner,
            created_at=int(now_s),
            metadata=metadata,
            title=title or title_of(items),
            updated_s=now_s,
            head=tree.head,
        )
        kept = await self._records.write_ahead(Kept(record, tree))
        with reaching():
            pipe = self._redis.pipeline(transaction=True)
            self._records.write(pipe, kept)
            self._records.prune(pipe, owner)
            await pipe.execute()
        return record

    async def exists(self, conversation_id: str) -> bool:
        """Return whether there is a conversation, whoever it belongs to."""
        with reaching():
            return bool(await self._redis.exists(self._records.key(conversation_id)))

    async def get(self, conversation_id: str, owner: str) -> ConversationRecord:
        """Return a conversation."""
        record = await self._records.record(conversation_id, owner)
        if record is None:
            raise _no_conversation(conversation_id)
        if record.head is msgspec.UNSET:
            return (await self._kept(conversation_id, owner)).record
        return record

    async def update(
        self,
        conversation_id: str,
        owner: str,
        *,
        metadata: dict[str, str] | None = None,
        title: str | None = None,
        head: str | None = None,
        descend: bool = False,
    ) -> ConversationRecord:
        """Replace metadata or title, and choose the branch that is shown; None stays as it is.

        ``head`` is an item; with ``descend`` the branch goes on to the newest leaf after it. Raises
        ApiError 400 where the conversation has no such item.
        """

        def alter(kept: Kept) -> Kept:
            record, tree = kept.record, kept.tree
            if head is not None:
                if head not in tree:
                    raise _no_such(head, "head")
                tree = tree.at(head, descend=descend)
            if metadata is not None:
                record = msgspec.structs.replace(record, metadata=metadata)
            if title is not None:
                record = msgspec.structs.replace(record, title=title)
            return msgspec.structs.replace(kept, record=record, tree=tree)

        return await self._owned_change(conversation_id, owner, alter)

    async def delete(self, conversation_id: str, owner: str) -> None:
        """Delete a conversation with its items. Responses made in it stay."""
        record = await self.get(conversation_id, owner)
        with reaching():
            pipe = self._redis.pipeline(transaction=True)
            self._records.delete(pipe, record)
            pipe.delete(self.claims.key(conversation_id))
            await pipe.execute()

    async def fork(
        self,
        conversation_id: str,
        owner: str,
        *,
        after: str | None = None,
        title: str | None = None,
        fork_id: str | None = None,
    ) -> ConversationRecord:
        """Create a conversation with copies of the path to ``after``, by default to the head.

        The copies have ids of their own; calls and their outputs still name each other. Metadata,
        and the title where none is given, are copied. Raises ApiError 400 for an unknown ``after``.
        """
        kept = await self._kept(conversation_id, owner)
        record, tree = kept.record, kept.tree
        if after is not None and after not in tree:
            raise _no_such(after, "after")
        fork_id = fork_id or new_id("conv")
        path = tree.path(tree.head if after is None else after)
        copies: list[Item] = []
        async for part in batches(path):
            copies += [
                {**item, "id": derived_id(item["id"].partition("_")[0], fork_id, number)}
                for number, item in enumerate(tree.bodies(part), len(copies))
            ]
        return await self.create(
            owner, record.metadata, copies, fork_id, title=title or record.title
        )

    # Items

    async def add_items(self, conversation_id: str, owner: str, items: Sequence[Item]) -> None:
        """Add items after the head. Raises ApiError: 400 when full, 409 while a turn runs."""
        await self._owned_change(
            conversation_id, owner, lambda kept: _appended(kept, kept.tree.head, items), idle=True
        )

    async def items(self, conversation_id: str, owner: str) -> list[Item]:
        """Return the items from the root to the head."""
        tree = (await self._kept(conversation_id, owner)).tree
        return await _bodies(tree, tree.head)

    async def tree(self, conversation_id: str, owner: str) -> list[Item]:
        """Return all items in the order in which they were added, each with ``parent_id``."""
        tree = (await self._kept(conversation_id, owner)).tree
        shown: list[Item] = []
        async for part in batches(list(tree.items.values())):
            shown += [{**stored.body(), "parent_id": stored.parent} for stored in part]
        return shown

    async def item(self, conversation_id: str, item_id: str, owner: str) -> Item:
        """Return one item, on whatever branch."""
        await self.get(conversation_id, owner)
        item = await self._records.item(conversation_id, item_id)
        if item is None:
            raise _no_item(item_id)
        return item

    async def delete_item(
        self, conversation_id: str, item_id: str, owner: str, *, subtree: bool = False
    ) -> ConversationRecord:
        """Delete one item, or with ``subtree`` all that comes after it too (see ``Tree``).

        Raises ApiError 409 while a turn runs: its items are to go after one that is there.
        """

        def alter(kept: Kept) -> Kept:
            if item_id not in kept.tree:
                raise _no_item(item_id)
            delete = kept.tree.without_subtree if subtree else kept.tree.without
            return msgspec.structs.replace(kept, tree=delete(item_id))

        return await self._owned_change(conversation_id, owner, alter, idle=True)

    # Turns

    async def claim(
        self,
        conversation_id: str,
        owner: str,
        turn_id: str,
        *,
        num_new: int,
        after: str | msgspec.UnsetType | None = msgspec.UNSET,
    ) -> Branch:
        """Take a conversation for one turn that adds ``num_new`` items; return what it sees.

        That is the path to ``after``: an item, None for nothing, by default the head. Raises
        ApiError: 400 when there is no such item, or no room, 409 while another turn has the
        conversation; a turn whose server died has it no longer. Nothing is claimed then.
        """
        await self.get(conversation_id, owner)
        await self.claims.take(conversation_id, turn_id)
        try:
            tree = (await self._kept(conversation_id, owner)).tree
            if len(tree) + num_new > MAX_ITEMS:
                raise _full(len(tree) + num_new)
            where = tree.head if after is msgspec.UNSET else after
            if where is not None and where not in tree:
                raise _no_such(where, "conversation.after")
            return Branch(where, await _bodies(tree, where))
        except BaseException:
            with contextlib.suppress(StoreError):
                await self.claims.release(conversation_id, turn_id)
            raise

    async def append(
        self,
        conversation_id: str,
        items: Sequence[Item],
        after: str | msgspec.UnsetType | None = msgspec.UNSET,
    ) -> None:
        """Add a turn's items after ``after`` and move the head; repeating it changes nothing.

        Nothing happens where the conversation was deleted meanwhile. Raises ApiError 400 when full.
        """

        def alter(kept: Kept) -> Kept:
            head = kept.tree.head
            # An item may only be gone where the claim was lost: the answer is kept all the same.
            gone = after is msgspec.UNSET or (after is not None and after not in kept.tree)
            return _appended(kept, head if gone else cast(str | None, after), items)

        await self._change(conversation_id, None, alter)

    # Changing

    async def _kept(self, conversation_id: str, owner: str) -> Kept:
        kept = await self._records.kept(conversation_id, owner)
        if kept is None:
            raise _no_conversation(conversation_id)
        return kept

    async def _owned_change(
        self, conversation_id: str, owner: str, alter: _Alter, *, idle: bool = False
    ) -> ConversationRecord:
        record = await self._change(conversation_id, owner, alter, idle=idle)
        if record is None:
            raise _no_conversation(conversation_id)
        return record

    async def _change(
        self, conversation_id: str, owner: str | None, alter: _Alter, *, idle: bool = False
    ) -> ConversationRecord | None:
        """Alter a conversation in one transaction; None: there is none.

        With ``idle`` an ApiError 409 is raised where a turn has it.
        """
        watched = [self._records.key(conversation_id)]
        claim = self.claims.key(conversation_id)
        if idle:
            watched.append(claim)
        with reaching():
            for _ in range(MAX_TRIES):
                async with self._redis.pipeline(transaction=True) as pipe:
                    try:
                        await pipe.watch(*watched)
                        kept = await self._records.watched(pipe, conversation_id, owner)
                        if kept is None:
                            return None
                        if idle and await self.claims.holds(
                            await cast(Awaitable[bytes | None], pipe.get(claim))
                        ):
                            raise busy(conversation_id)
                        altered = alter(kept)
                        if altered is kept:
                            return kept.record
                        record = msgspec.structs.replace(
                            altered.record.touched(), head=altered.tree.head
                        )
                        pipe.multi()  # type: ignore[no-untyped-call]
                        self._records.write(pipe, msgspec.structs.replace(altered, record=record))
                        await pipe.execute()
                        return record
                    except WatchError:
                        continue
        raise StoreUnavailable(f"'{conversation_id}' is changed by too many at once")


async def _bodies(tree: Tree, to: str | None) -> list[Item]:
    bodies: list[Item] = []
    async for part in batches(tree.path(to)):
        bodies += tree.bodies(part)
    return bodies


def _appended(kept: Kept, after: str | None, items: Sequence[Item]) -> Kept:
    tree = kept.tree.append(after, items)
    if tree is kept.tree:
        return kept
    if len(tree) > MAX_ITEMS:
        raise _full(len(tree))
    title = kept.record.title or title_of(items)
    record = msgspec.structs.replace(kept.record, title=title)
    return msgspec.structs.replace(kept, record=record, tree=tree)


def _full(num_items: int) -> ApiError:
    return invalid(
        f"The conversation would have {num_items} items; at most {MAX_ITEMS} are allowed.",
        code="conversation_full",
    )


def _no_conversation(conversation_id: str) -> ApiError:
    return not_found(
        f"There is no conversation '{conversation_id}'.", code="conversation_not_found"
    )


def _no_item(item_id: str) -> ApiError:
    return not_found(f"There is no item '{item_id}' in the conversation.", code="item_not_found")


def _no_such(item_id: str, param: str) -> ApiError:
    """Return the 400 of a field that names an item which is not there."""
    return invalid(
        f"There is no item '{item_id}' in the conversation.", param=param, code="item_not_found"
    )
