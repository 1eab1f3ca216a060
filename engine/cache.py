"""CacheManager: which blocks hold the state of which request, and which prefixes can be shared.

A full block is named by a chained digest: of its own tokens and of the digest of the block before
it, back to a root made of the request's cache salt. Equal names therefore mean equal salts and
equal tokens from position 0 on, which is what makes a block's content reusable (attention state
depends on all tokens before it). Digests are BLAKE2b (RFC 7693), not ``hash()``: a collision would
show one request the state of another.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Sequence
from hashlib import blake2b
from typing import NamedTuple, Protocol

from engine.blocks import SCRATCH_BLOCK, BlockPool, InvariantError

__all__ = [
    "SCRATCH_BLOCK",
    "CacheGroup",
    "CacheManager",
    "FullAttentionGroup",
    "Holding",
    "InvariantError",
]

_DIGEST_BYTES = 16


class CacheGroup(Protocol):
    """How one kind of per-request state uses blocks of the pool.

    All groups count in steps of one token block, so what they hold changes only at block
    boundaries. A recurrent state, for instance, holds the same few blocks at any length, and can be
    reused only at a boundary where a snapshot of it was published.
    """

    def num_blocks(self, num_token_blocks: int) -> int:
        """Blocks held by a request whose tokens fill this many token blocks; never decreases."""
        ...

    def longest_hit(self, limit: int, is_cached: Callable[[int], bool]) -> int:
        """Most token blocks, at most ``limit``, whose state this group can take from the cache.

        ``is_cached(i)`` says whether this group has a block with the digest of token block ``i``.
        """
        ...

    def hit_blocks(self, num_token_blocks: int) -> Sequence[int]:
        """Which token blocks' digests name the blocks to share for a hit of that length."""
        ...

    def published_block(self, token_block: int) -> int | None:
        """Which of the held blocks is complete once ``token_block`` is computed; None: none."""
        ...


class FullAttentionGroup:
    """Keys and values of every token: block ``i`` of a request holds its token block ``i``."""

    def num_blocks(self, num_token_blocks: int) -> int:
        """One block a token block."""
        return num_token_blocks

    def longest_hit(self, limit: int, is_cached: Callable[[int], bool]) -> int:
        """Attention reads every token before it, so the hit ends at the first missing block."""
        for block in range(limit):
            if not is_cached(block):
                return block
        return limit

    def hit_blocks(self, num_token_blocks: int) -> Sequence[int]:
        """All of them."""
        return range(num_token_blocks)

    def published_block(self, token_block: int) -> int | None:
        """The one that holds it."""
        return token_block


class Holding:
    """The blocks of one request, and the digests of its tokens as far as they were needed.

    Attributes:
        block_ids: one list for each cache group, in order of position.
        capacity: tokens for which blocks are held, a multiple of the block size.
        publish_at: number of computed tokens at which the next block can be published.
    """

    __slots__ = ("block_ids", "capacity", "digests", "publish_at", "root")

    def __init__(self, salt: str, num_groups: int, block_size: int) -> None:
        # `person` keeps a salt that spells a parent digest and tokens from naming that block.
        self.root = blake2b(
            salt.encode("utf-8", "surrogatepass"), digest_size=_DIGEST_BYTES, person=b"cache salt"
        ).digest()
        self.digests: list[bytes] = []
        self.block_ids: list[list[int]] = [[] for _ in range(num_groups)]
        self.capacity = 0
        self.publish_at = block_size


class _Hit(NamedTuple):
    """A prefix found in the cache: its length, and the blocks to share in each group."""

    num_token_blocks: int
    blocks: list[list[int]]


class CacheManager:
    """Gives blocks to requests and shares full ones between requests with equal prefixes.

    Args:
        groups: one for each kind of state the model keeps, at least one.
        num_blocks: size of the pool with the scratch block, >= 2.
        block_size: tokens in a token block, >= 1.
        enable_prefix_cache: False never shares and never looks up.
    """

    def __init__(
        self,
        groups: Sequence[CacheGroup],
        num_blocks: int,
        block_size: int,
        enable_prefix_cache: bool = True,
    ) -> None:
        if not groups or block_size < 1:
            raise InvariantError(
                f"{len(groups)} cache groups with blocks of {block_size} tokens; "
                "there must be at least one of each"
            )
        self.groups = tuple(groups)
        self.block_size = block_size
        self.enable_prefix_cache = enable_prefix_cache
        self._pool = BlockPool(num_blocks)
        self._holders: set[Holding] = set()

    @property
    def num_usable(self) -> int:
        """Blocks that requests may hold: all but the scratch block."""
        return self._pool.num_usable

    @property
    def num_free(self) -> int:
        """Blocks no request holds, those with a reusable prefix included."""
        return self._pool.num_free

    @property
    def num_cached(self) -> int:
        """Of the free blocks, those that hold a reusable prefix."""
        return self._pool.num_cached

    @property
    def max_tokens(self) -> int:
        """Tokens whose state one request can hold if it has the pool to itself."""
        low, high = 0, self.num_usable + 1  # blocks_for(low) fits, of high is not known to
        while self.blocks_for(high * self.block_size) <= self.num_usable:
            low, high = high, high * 2
            if high > 1 << 40:  # no group grows with the length
                break
        while high - low > 1:
            middle = (low + high) // 2
            fits = self.blocks_for(middle * self.block_size) <= self.num_usable
            low, high = (middle, high) if fits else (low, middle)
        return low * self.block_size

    def blocks_for(self, num_tokens: int) -> int:
        """Blocks, over all groups, that a request with this many tokens holds."""
        num_token_blocks = -(-num_tokens // self.block_size)
        return sum(group.num_blocks(num_token_blocks) for group in self.groups)

    def hold(self, salt: str) -> Holding:
        """An empty holding for a new request; only requests of the same salt share blocks."""
        return Holding(salt, len(self.groups), self.block_size)

    def admit(
        self,
        holding: Holding,
        token_ids: Sequence[int],
        *,
        use_cache: bool = True,
        headroom: int = 0,
    ) -> int | None:
        """Give an empty holding the blocks for all of ``token_ids``, shared ones where they exist.

        Returns the number of leading tokens whose state is there already, always fewer than
        ``len(token_ids)``; None, with nothing changed, if then fewer than ``headroom`` blocks would
        be free.
        """
        if holding in self._holders:
            raise InvariantError("a holding that has blocks was admitted again")
        needed = self.blocks_for(len(token_ids))
        hit = self._find_hit(holding, token_ids) if use_cache and self.enable_prefix_cache else None
        if hit is not None:
            needed -= sum(map(len, hit.blocks))
            headroom += sum(self._pool.is_free(b) for blocks in hit.blocks for b in blocks)
        if needed + headroom > self._pool.num_free:
            return None
        num_hit = 0
        if hit is not None:
            num_hit = hit.num_token_blocks
            for held, blocks in zip(holding.block_ids, hit.blocks, strict=True):
                self._pool.share(blocks)
                held.extend(blocks)
        holding.publish_at = (num_hit + 1) * self.block_size
        self._holders.add(holding)
        self._extend(holding, len(token_ids))
        return num_hit * self.block_size

    def grow(self, holding: Holding, num_tokens: int) -> bool:
        """Give an admitted holding blocks for ``num_tokens`` tokens in all.

        Returns False, with nothing changed, when too few blocks are free.
        """
        if num_tokens <= holding.capacity:
            return True
        if self.blocks_for(num_tokens) - sum(map(len, holding.block_ids)) > self._pool.num_free:
            return False
        self._extend(holding, num_tokens)
        return True

    def publish(self, holding: Holding, token_ids: Sequence[int], num_computed: int) -> None:
        """Let others share the blocks that the first ``num_computed`` tokens fill."""
        first = holding.publish_at // self.block_size - 1
        stop = num_computed // self.block_size
        if self.enable_prefix_cache:
            for token_block in range(first, stop):
                digest = self._digest(holding, token_ids, token_block)
                for index, group in enumerate(self.groups):
                    held = group.published_block(token_block)
                    if held is not None:
                        self._pool.publish(holding.block_ids[index][held], (index, digest))
        holding.publish_at = (stop + 1) * self.block_size

    def release(self, holding: Holding) -> None:
        """Give all blocks back; what was published can still be shared until it is evicted.

        The holding can be admitted again.
        """
        self._holders.discard(holding)
        for index, blocks in enumerate(holding.block_ids):
            self._pool.free(blocks)
            holding.block_ids[index] = []
        holding.capacity = 0
        holding.publish_at = self.block_size

    def check_integrity(self) -> None:
        """Compare all books. Raises InvariantError that names the first contradiction."""
        for holding in self._holders:
            num_token_blocks = holding.capacity // self.block_size
            for group, blocks in zip(self.groups, holding.block_ids, strict=True):
                if len(blocks) != group.num_blocks(num_token_blocks):
                    raise InvariantError(
                        f"a holding for {holding.capacity} tokens has {len(blocks)} blocks; "
                        f"{group.num_blocks(num_token_blocks)} are right"
                    )
                if len(set(blocks)) != len(blocks):
                    raise InvariantError(f"a holding names a block twice: {blocks}")
        self._pool.check_integrity(b for holding in self._holders for b in holding.block_ids)

    def _extend(self, holding: Holding, num_tokens: int) -> None:
        num_token_blocks = -(-num_tokens // self.block_size)
        for group, blocks in zip(self.groups, holding.block_ids, strict=True):
            blocks.extend(self._pool.take(group.num_blocks(num_token_blocks) - len(blocks)))
        holding.capacity = num_token_blocks * self.block_size

    def _find_hit(self, holding: Holding, token_ids: Sequence[int]) -> _Hit:
        """The longest prefix that every group has; at least one token stays to be computed."""
        limit = (len(token_ids) - 1) // self.block_size
        settled = 0
        while limit and settled < len(self.groups):
            # A group may need a shorter hit than another could give, so ask until all agree.
            for index, group in enumerate(self.groups):
                longest = group.longest_hit(limit, self._lookup(holding, token_ids, index))
                settled = settled + 1 if longest == limit else 1
                limit = longest
        hit_blocks = []
        for index, group in enumerate(self.groups):
            keys = [(index, holding.digests[block]) for block in group.hit_blocks(limit)]
            found = [self._pool.find(key) for key in keys]
            hit_blocks.append([block for block in found if block is not None])
        return _Hit(limit, hit_blocks)

    def _lookup(
        self, holding: Holding, token_ids: Sequence[int], group: int
    ) -> Callable[[int], bool]:
        find, digests = self._pool.find, holding.digests

        def is_cached(token_block: int) -> bool:
            # A long prompt that waits for blocks is looked up before every step: keep this short.
            if token_block >= len(digests):
                self._digest(holding, token_ids, token_block)
            return find((group, digests[token_block])) is not None

        return is_cached

    def _digest(self, holding: Holding, token_ids: Sequence[int], token_block: int) -> bytes:
        """The name of a token block, computed once; a request's tokens only ever grow."""
        digests = holding.digests
        while len(digests) <= token_block:
            parent = digests[-1] if digests else holding.root
            start = len(digests) * self.block_size
            tokens = array("I", token_ids[start : start + self.block_size])
            digests.append(blake2b(parent + tokens.tobytes(), digest_size=_DIGEST_BYTES).digest())
        return digests[token_block]
