"""The items of a conversation as a tree: values in, values out, no store.

Every item knows its parent, the item it was added after; None at a root, of which there may be
several. A parent was always added before its children, which is what keeps each walk here one pass:
the last item of a subtree, by when it was added, is a leaf.

The *head* is the item that the branch shown ends at. The conversation's items are the path to it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Self

import msgspec

from server.paging import Item

__all__ = ["StoredItem", "Tree"]


class StoredItem(msgspec.Struct, frozen=True, kw_only=True):
    """An item of a conversation."""

    item: msgspec.Raw
    """JSON; most of what is done to a tree need not know what its items say."""
    parent: str | None

    def body(self) -> Item:
        """Return the item as the API shows it."""
        return _decode(self.item)


_encode = msgspec.json.Encoder().encode
_decode = msgspec.json.Decoder(Item).decode


class Tree(msgspec.Struct, frozen=True):
    """A conversation's items by id, in the order in which they were added, and its head.

    A tree never changes: what alters one returns another. An id that is asked for must be in it.
    """

    items: Mapping[str, StoredItem] = {}
    head: str | None = None

    @classmethod
    def chain(cls, items: Mapping[str, StoredItem]) -> Self:
        """Return the tree in which every item follows on the one that was added before it."""
        parent: str | None = None
        chained: dict[str, StoredItem] = {}
        for item_id, stored in items.items():
            if stored.parent != parent:
                stored = msgspec.structs.replace(stored, parent=parent)
            chained[item_id] = stored
            parent = item_id
        return cls(chained, parent)

    def __len__(self) -> int:
        return len(self.items)

    def __contains__(self, item_id: str) -> bool:
        return item_id in self.items

    def path(self, to: str | None) -> list[str]:
        """Return the ids from the root to ``to``; none where it is None."""
        ids: list[str] = []
        while to is not None:
            ids.append(to)
            to = self.items[to].parent
        return ids[::-1]

    def subtree(self, item_id: str | None) -> list[str]:
        """Return an item and all that comes after it, in the order of adding; None: all items."""
        if item_id is None:
            return list(self.items)
        inside = {item_id: None}
        for one, stored in self.items.items():
            if stored.parent in inside:
                inside[one] = None
        return list(inside)

    def newest_leaf(self, below: str | None) -> str | None:
        """Return the leaf that was added last among ``below`` and what comes after it."""
        inside = self.subtree(below)
        return inside[-1] if inside else None

    def bodies(self, ids: Iterable[str]) -> list[Item]:
        """Return items as the API shows them."""
        return [self.items[item_id].body() for item_id in ids]

    def append(self, after: str | None, items: Sequence[Item]) -> Self:
        """Add a branch: ``items``, one after the other, after ``after`` (None: at the root).

        The head moves to its end. Items that are there already stay as they are, and where all are,
        so does the head: an append that is repeated changes nothing.
        """
        parent = after
        added: dict[str, StoredItem] = {}
        for item in items:
            if item["id"] not in self.items:
                added[item["id"]] = StoredItem(item=msgspec.Raw(_encode(item)), parent=parent)
            parent = item["id"]
        return type(self)({**self.items, **added}, parent) if added else self

    def at(self, item_id: str, *, descend: bool = False) -> Self:
        """Move the head to an item, or with ``descend`` to the newest leaf that comes after it."""
        return type(self)(self.items, self.newest_leaf(item_id) if descend else item_id)

    def without(self, item_id: str) -> Self:
        """Delete one item: its children go to its parent, and so does the head if it was there."""
        parent = self.items[item_id].parent
        left = {
            one: msgspec.structs.replace(stored, parent=parent)
            if stored.parent == item_id
            else stored
            for one, stored in self.items.items()
            if one != item_id
        }
        return type(self)(left, parent if self.head == item_id else self.head)

    def without_subtree(self, item_id: str) -> Self:
        """Delete an item and all that comes after it.

        A head among them moves to the newest leaf that is left below the item's parent, or to the
        parent itself.
        """
        parent = self.items[item_id].parent
        gone = set(self.subtree(item_id))
        left = type(self)({one: kept for one, kept in self.items.items() if one not in gone})
        head = left.newest_leaf(parent) if self.head in gone else self.head
        return type(self)(left.items, head)
