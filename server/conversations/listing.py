"""A caller's conversations, latest activity first, and the search in them.

A conversation enters the list when it is created or changed. It leaves the list when it is deleted,
or when it is seen to have expired.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

from server.conversations.records import ConversationRecord, Records
from server.conversations.search import Found, search, words_of
from server.errors import ApiError, invalid
from server.paging import Page
from server.store import Store, reaching

__all__ = ["MAX_QUERY_CHARS", "MAX_SEARCHED", "MAX_SEARCHED_ITEMS", "Listing"]

MAX_QUERY_CHARS = 256
MAX_SEARCHED = 200
"""A search looks at this many of a caller's newest conversations, no further."""
MAX_SEARCHED_ITEMS = 10_000
"""And no further than these many items in them; the newest conversation is always looked at."""


class Listing:
    """Lists conversations. Every method may raise StoreError.

    Pages are cut as ``paging`` says; an ``after`` that is not in the list is an ApiError 400.
    """

    def __init__(self, store: Store, records: Records) -> None:
        self._redis = store.redis
        self._records = records

    async def page(self, owner: str, *, after: str | None, limit: int, newest_first: bool) -> Page:
        """Return part of an owner's conversations by their last change."""
        index = self._records.index(owner)
        with reaching():
            pipe = self._redis.pipeline(transaction=True)
            self._records.prune(pipe, owner)
            if after is not None:
                (pipe.zrevrank if newest_first else pipe.zrank)(index, after)
            rank = (await pipe.execute())[-1]
        if after is not None and rank is None:
            raise _not_listed(after)
        start = 0 if after is None else rank + 1
        found: list[ConversationRecord] = []
        gone: list[str] = []
        while len(found) <= limit:
            with reaching():
                ranged = self._redis.zrevrange if newest_first else self._redis.zrange
                members: Any = await ranged(index, start, start + limit)
                ids = [one.decode() for one in members]
            if not ids:
                break
            start += len(ids)
            for one, record in zip(ids, await self._records.records(ids, owner), strict=True):
                if record is None:
                    gone.append(one)
                else:
                    found.append(record)
        if gone:
            with reaching():
                await self._redis.zrem(index, *gone)
        bodies = [record.body() for record in found[:limit]]
        return Page(items=bodies, has_more=len(found) > limit)

    async def search(
        self, owner: str, query: str, *, after: str | None, limit: int, newest_first: bool
    ) -> dict[str, Any]:
        """Return the list object of conversations that have all words of ``query``.

        Each has a ``match``: the item and the text around where the words were found, null where
        the title alone has them. Where older conversations were not looked at, ``searched`` says
        how many were.
        """
        words = words_of(query)
        if not words:
            raise invalid("'query' has no word to look for.", param="query", code="empty_string")
        newest, is_cut = await self._newest(owner)
        ids = newest if newest_first else newest[::-1]
        if after is not None:
            if after not in ids:
                raise _not_listed(after)
            ids = ids[ids.index(after) + 1 :]
        hits: list[dict[str, Any]] = []
        for one in ids:
            if len(hits) > limit:
                break
            if (hit := await self._look(one, owner, words)) is not None:
                hits.append(hit)
        body = Page(items=hits[:limit], has_more=len(hits) > limit).body()
        return {**body, "searched": len(newest)} if is_cut else body

    async def _newest(self, owner: str) -> tuple[list[str], bool]:
        """Return the conversations that a search looks at, and whether there are more."""
        index = self._records.index(owner)
        with reaching():
            pipe = self._redis.pipeline(transaction=True)
            self._records.prune(pipe, owner)
            pipe.zrevrange(index, 0, MAX_SEARCHED)
            ids = [one.decode() for one in (await pipe.execute())[-1]]
            pipe = self._redis.pipeline(transaction=False)
            for one in ids[:MAX_SEARCHED]:
                pipe.zcard(self._records.key(one, "order"))
            counts = await pipe.execute()
        num_searched = num_items = 0
        for count in counts:
            num_items += count
            if num_searched and num_items > MAX_SEARCHED_ITEMS:
                break
            num_searched += 1
        return ids[:num_searched], num_searched < len(ids)

    async def _look(
        self, conversation_id: str, owner: str, words: Sequence[str]
    ) -> dict[str, Any] | None:
        kept = await self._records.kept(conversation_id, owner)
        if kept is None:
            return None
        raws = [stored.item for stored in kept.tree.items.values()]
        # A long conversation has megabytes of text: not on the event loop.
        found: Found | None = await asyncio.to_thread(search, words, kept.record.title, raws)
        if found is None:
            return None
        match = None if found.match is None else found.match._asdict()
        return {**kept.record.body(), "match": match}


def _not_listed(conversation_id: str) -> ApiError:
    return invalid(
        f"There is no conversation '{conversation_id}' in this list.",
        param="after",
        code="conversation_not_found",
    )
