"""BlockPool: fixed-size blocks with reference counts, and the index of those worth reusing.

A block is in exactly one of three places: held (its reference count is above 0), empty (nobody
holds it and its content is worthless), or cached (nobody holds it, but its content is indexed and
may be shared again). Empty blocks are given out first; only then is the least recently used cached
block evicted. Every operation costs O(1) a block.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Iterable, Sequence

from engine.errors import EngineError

__all__ = ["SCRATCH_BLOCK", "BlockKey", "BlockPool", "InvariantError"]

SCRATCH_BLOCK = 0
"""Padding rows write here. It is never given out and nobody reads it."""

BlockKey = tuple[int, bytes]
"""(cache group, digest of all tokens up to the block's end): names a block's content."""


class InvariantError(EngineError):
    """The engine's books contradict themselves, or a caller broke a contract."""


class BlockPool:
    """Blocks ``1 .. num_blocks - 1``, each empty, cached or held.

    Args:
        num_blocks: size of the pool with the scratch block, >= 2.
    """

    def __init__(self, num_blocks: int) -> None:
        if num_blocks < 2:
            raise InvariantError(
                f"a pool of {num_blocks} blocks is too small; 2 are the least (one is scratch)"
            )
        self.num_blocks = num_blocks
        self._ref_counts = [0] * num_blocks
        self._keys: list[BlockKey | None] = [None] * num_blocks
        self._index: dict[BlockKey, int] = {}
        self._empty = list(range(num_blocks - 1, SCRATCH_BLOCK, -1))
        self._cached: OrderedDict[int, None] = OrderedDict()  # least recently used first

    @property
    def num_usable(self) -> int:
        """Blocks that requests may hold: all but the scratch block."""
        return self.num_blocks - 1

    @property
    def num_free(self) -> int:
        """Blocks nobody holds, empty and cached ones."""
        return len(self._empty) + len(self._cached)

    @property
    def num_cached(self) -> int:
        """Of the free ones, those with content that can be shared again."""
        return len(self._cached)

    def is_free(self, block: int) -> bool:
        """Whether nobody holds this block."""
        return self._ref_counts[block] == 0

    def find(self, key: BlockKey) -> int | None:
        """The block with this content, held or cached."""
        return self._index.get(key)

    def take(self, count: int) -> list[int]:
        """Give out ``count`` blocks with a reference count of 1, evicting cached ones if need be.

        Raises InvariantError, with nothing changed, when fewer are free.
        """
        if count > self.num_free:
            raise InvariantError(f"{count} blocks were asked for and {self.num_free} are free")
        blocks = []
        for _ in range(count):
            block = self._empty.pop() if self._empty else self._evict()
            self._ref_counts[block] = 1
            blocks.append(block)
        return blocks

    def share(self, blocks: Iterable[int]) -> None:
        """Add a holder to blocks that ``find`` returned."""
        for block in blocks:
            if self._ref_counts[block] == 0:
                del self._cached[block]
            self._ref_counts[block] += 1

    def publish(self, block: int, key: BlockKey) -> bool:
        """Enter a held block, now full and computed, in the index.

        Returns False when a block with equal content is there already: this one then stays private
        to its holder and is empty again once freed.
        """
        if self._keys[block] is not None or self._ref_counts[block] == 0:
            raise InvariantError(
                f"block {block} cannot be published: {self._ref_counts[block]} holders, "
                f"key {self._keys[block]}"
            )
        if self._index.setdefault(key, block) != block:
            return False
        self._keys[block] = key
        return True

    def free(self, blocks: Sequence[int]) -> None:
        """Take one holder off each block, the last block first.

        The order makes the tail of a sequence older than its head in the cached queue, so that a
        shared head outlives the tails that need it.
        """
        for block in reversed(blocks):
            if self._ref_counts[block] <= 0:
                raise InvariantError(f"block {block} was freed more often than it was held")
            self._ref_counts[block] -= 1
            if self._ref_counts[block] == 0:
                if self._keys[block] is None:
                    self._empty.append(block)
                else:
                    self._cached[block] = None

    def _evict(self) -> int:
        block, _ = self._cached.popitem(last=False)
        key = self._keys[block]
        assert key is not None
        del self._index[key]
        self._keys[block] = None
        return block

    def check_integrity(self, held: Iterable[Sequence[int]]) -> None:
        """Compare the books with each other and with the lists of blocks that are really held.

        Raises InvariantError that names the first contradiction.
        """
        holders = Counter(block for blocks in held for block in blocks)
        empty = set(self._empty)
        if len(empty) != len(self._empty):
            raise InvariantError(f"the empty list names a block twice: {self._empty}")
        if both := empty & self._cached.keys():
            raise InvariantError(f"blocks {sorted(both)} are both empty and cached")
        if SCRATCH_BLOCK in holders or SCRATCH_BLOCK in empty or SCRATCH_BLOCK in self._cached:
            raise InvariantError("the scratch block is in circulation")
        for block in range(1, self.num_blocks):
            self._check_block(block, holders[block], block in empty or block in self._cached)
        if holders and not 0 < min(holders) <= max(holders) < self.num_blocks:
            raise InvariantError(f"blocks outside the pool are held: {sorted(holders)}")
        if len(holders) + self.num_free != self.num_usable:
            raise InvariantError(
                f"{len(holders)} held + {self.num_free} free blocks, but {self.num_usable} in all"
            )
        for key, block in self._index.items():
            if self._keys[block] != key:
                raise InvariantError(f"the index says {key} is block {block}, which denies it")

    def _check_block(self, block: int, holders: int, free: bool) -> None:
        count, key = self._ref_counts[block], self._keys[block]
        if count != holders:
            raise InvariantError(
                f"block {block} counts {count} references and has {holders} holders"
            )
        if free != (count == 0):
            raise InvariantError(f"block {block} has {count} holders and free is {free}")
        if key is not None and self._index.get(key) != block:
            raise InvariantError(f"block {block} has key {key}, which the index does not know")
        if free and (key is not None) != (block in self._cached):
            raise InvariantError(f"free block {block} with key {key} is in the wrong queue")
