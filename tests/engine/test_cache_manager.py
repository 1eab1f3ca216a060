"""CacheManager: what is shared, what is not, and what goes first."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

import pytest

from engine.cache import CacheManager, FullAttentionGroup, Holding, InvariantError


def manager(num_blocks: int = 9, block_size: int = 4, *, enabled: bool = True) -> CacheManager:
    return CacheManager([FullAttentionGroup()], num_blocks, block_size, enabled)


def compute(cache: CacheManager, tokens: list[int], salt: str = "") -> tuple[Holding, int]:
    """Admit a request and compute all its tokens; returns what it holds and what it found."""
    holding = cache.hold(salt)
    num_cached = cache.admit(holding, tokens)
    assert num_cached is not None
    cache.publish(holding, tokens, len(tokens))
    cache.check_integrity()
    return holding, num_cached


def find(cache: CacheManager, tokens: list[int], salt: str = "") -> int:
    """How many tokens a newcomer would find."""
    holding = cache.hold(salt)
    num_cached = cache.admit(holding, tokens)
    assert num_cached is not None
    cache.release(holding)
    cache.check_integrity()
    return num_cached


def test_full_blocks_are_shared_while_held_and_after() -> None:
    cache = manager()
    first, found = compute(cache, list(range(10)))
    assert found == 0
    second, found = compute(cache, list(range(10)))
    assert found == 8
    assert second.block_ids[0][:2] == first.block_ids[0][:2]
    assert second.block_ids[0][2] != first.block_ids[0][2]
    assert cache.num_free == 8 - 4
    cache.release(first)
    cache.release(second)
    assert cache.num_free == 8
    assert cache.num_cached == 2
    assert find(cache, list(range(10))) == 8


@pytest.mark.parametrize("length", range(1, 14))
def test_at_least_one_token_is_left_to_compute(length: int) -> None:
    cache = manager()
    holding, _ = compute(cache, list(range(12)))
    cache.release(holding)
    found = find(cache, list(range(length)))
    assert found == max(block * 4 for block in range(4) if block * 4 < length)


def test_a_difference_anywhere_before_a_block_keeps_it_apart() -> None:
    tokens = list(range(12))
    for place in range(12):
        cache = manager()
        cache.release(compute(cache, tokens)[0])
        other = tokens.copy()
        other[place] = 99
        assert find(cache, [*other, 1]) == place // 4 * 4


def test_salts_are_kept_apart() -> None:
    cache = manager(num_blocks=20)
    compute(cache, list(range(9)), salt="a")
    assert find(cache, list(range(9)), salt="b") == 0
    assert find(cache, list(range(9))) == 0
    assert find(cache, list(range(9)), salt="a") == 8
    assert find(cache, list(range(9)), salt="\ud800") == 0  # any str is a salt


def test_token_ids_are_not_confused_by_their_bytes() -> None:
    cache = manager(block_size=2)
    compute(cache, [1, 256, 7])
    assert find(cache, [256, 1, 7]) == 0
    assert find(cache, [1, 65536, 7]) == 0
    assert find(cache, [1, 256, 7]) == 2


def test_nothing_is_shared_before_it_is_computed() -> None:
    cache = manager()
    tokens = list(range(9))
    holding = cache.hold("")
    assert cache.admit(holding, tokens) == 0
    for computed in range(9):
        cache.publish(holding, tokens, computed)
        assert find(cache, tokens) == computed // 4 * 4


def test_equal_blocks_computed_twice_are_held_by_both_and_cached_once() -> None:
    cache = manager()
    tokens = list(range(8))
    one, two = cache.hold(""), cache.hold("")
    assert cache.admit(one, tokens) == cache.admit(two, tokens) == 0
    for holding in (one, two):
        cache.publish(holding, tokens, 8)
    cache.check_integrity()
    assert not set(one.block_ids[0]) & set(two.block_ids[0])
    cache.release(two)
    assert cache.num_cached == 0  # its blocks were the doubles
    assert find(cache, [*tokens, 1]) == 8
    cache.release(one)
    assert cache.num_cached == 2
    cache.check_integrity()


def test_tails_are_evicted_before_the_head_they_share() -> None:
    cache = manager(num_blocks=7)  # 6 usable
    head = list(range(8))
    left, _ = compute(cache, [*head, 20, 21, 22, 23])
    right, _ = compute(cache, [*head, 30, 31, 32, 33])
    cache.release(left)
    cache.release(right)
    assert cache.num_cached == 4
    hog = cache.hold("")
    assert cache.admit(hog, list(range(100, 112))) == 0  # 3 blocks: 2 empty ones, 1 evicted
    assert cache.num_cached == 3
    cache.release(hog)
    assert find(cache, [*head, 20, 21, 22, 23, 1]) == 8  # left was freed first
    assert find(cache, [*head, 30, 31, 32, 33, 1]) == 12


def test_use_makes_a_prefix_young_again() -> None:
    cache = manager(num_blocks=3, block_size=2)  # 2 usable
    for tokens in ([1, 2], [3, 4]):
        cache.release(compute(cache, tokens)[0])
    assert find(cache, [1, 2, 9]) == 2  # takes the other block: [3, 4] is evicted
    assert find(cache, [3, 4, 9]) == 0


def test_admission_counts_shared_free_blocks_as_used() -> None:
    cache = manager(num_blocks=4, block_size=2)  # 3 usable
    cache.release(compute(cache, [1, 2, 3, 4])[0])
    other = cache.hold("")
    assert cache.admit(other, [9]) == 0
    # Both remaining blocks are the prefix itself, so none is left for the third.
    assert cache.admit(cache.hold(""), [1, 2, 3, 4, 5]) is None
    cache.check_integrity()
    assert cache.num_free == 2
    cache.release(other)
    assert find(cache, [1, 2, 3, 4, 5]) == 4


def test_headroom_is_left_free() -> None:
    cache = manager(num_blocks=5, block_size=2)  # 4 usable
    assert cache.admit(cache.hold(""), [1, 2, 3], headroom=3) is None
    assert cache.admit(cache.hold(""), [1, 2, 3], headroom=2) == 0


def test_growth_takes_blocks_at_boundaries_only_and_all_or_nothing() -> None:
    cache = manager(num_blocks=4, block_size=4)  # 3 usable
    holding = cache.hold("")
    assert cache.admit(holding, [1, 2, 3]) == 0
    for length, blocks in ((4, 1), (5, 2), (8, 2), (9, 3), (12, 3)):
        assert cache.grow(holding, length)
        assert len(holding.block_ids[0]) == blocks
        assert holding.capacity == blocks * 4
    assert not cache.grow(holding, 13)
    assert len(holding.block_ids[0]) == 3
    cache.check_integrity()


def test_without_prefix_cache_nothing_is_shared() -> None:
    cache = manager(enabled=False)
    cache.release(compute(cache, list(range(8)))[0])
    assert cache.num_cached == 0
    assert find(cache, list(range(9))) == 0


def test_lookup_can_be_declined() -> None:
    cache = manager()
    cache.release(compute(cache, list(range(8)))[0])
    holding = cache.hold("")
    assert cache.admit(holding, list(range(9)), use_cache=False) == 0
    # What is computed again is a double of what is cached: publishing it must not disturb that.
    cache.publish(holding, list(range(9)), 9)
    cache.check_integrity()
    cache.release(holding)
    assert find(cache, list(range(9))) == 8


def test_holding_is_admitted_once() -> None:
    cache = manager()
    holding, _ = compute(cache, [1, 2])
    with pytest.raises(InvariantError, match="admitted again"):
        cache.admit(holding, [1, 2])


def test_no_groups_and_no_block_size_are_refused() -> None:
    with pytest.raises(InvariantError, match="0 cache groups"):
        CacheManager([], 4, 4)
    with pytest.raises(InvariantError, match="blocks of 0 tokens"):
        CacheManager([FullAttentionGroup()], 4, 0)


class ConstantGroup:
    """State of one size whatever the length, reusable nowhere: the simplest recurrent layer."""

    def num_blocks(self, num_token_blocks: int) -> int:
        return 2 if num_token_blocks else 0

    def longest_hit(self, limit: int, is_cached: Callable[[int], bool]) -> int:
        return 0

    def hit_blocks(self, num_token_blocks: int) -> Sequence[int]:
        return ()

    def published_block(self, token_block: int) -> int | None:
        return None


class WindowGroup(FullAttentionGroup):
    """Keys and values of which the cache happens to keep only even prefixes."""

    def longest_hit(self, limit: int, is_cached: Callable[[int], bool]) -> int:
        return super().longest_hit(limit, is_cached) // 2 * 2


def test_a_group_of_constant_size_lives_beside_attention() -> None:
    cache = CacheManager([FullAttentionGroup(), ConstantGroup()], 9, 4)
    holding, found = compute(cache, list(range(10)))
    assert found == 0
    assert [len(blocks) for blocks in holding.block_ids] == [3, 2]
    assert cache.grow(holding, 13)
    assert [len(blocks) for blocks in holding.block_ids] == [4, 2]
    assert len({block for blocks in holding.block_ids for block in blocks}) == 6
    cache.release(holding)
    assert cache.num_free == 8
    # Attention could resume after two blocks, the other state cannot: nobody does.
    assert find(cache, list(range(10))) == 0
    assert cache.max_tokens == 6 * 4


@pytest.mark.parametrize("reverse", [False, True])
def test_a_hit_is_as_long_as_all_groups_agree_on(reverse: bool) -> None:
    groups: list[FullAttentionGroup] = [FullAttentionGroup(), WindowGroup()]
    cache = CacheManager(groups[::-1] if reverse else groups, 40, 2)
    holding, _ = compute(cache, list(range(10)))
    cache.release(holding)
    assert find(cache, list(range(8))) == 4
    assert find(cache, list(range(9))) == 8
    again, found = compute(cache, list(range(9)))
    assert found == 8
    assert [blocks[:4] for blocks in again.block_ids] == [
        blocks[:4] for blocks in holding_blocks(cache, list(range(9)))
    ]


def holding_blocks(cache: CacheManager, tokens: list[int]) -> list[list[int]]:
    holding = cache.hold("")
    assert cache.admit(holding, tokens) is not None
    return holding.block_ids


@pytest.mark.parametrize(("num_blocks", "block_size"), [(2, 1), (2, 16), (9, 4), (1000, 16)])
def test_max_tokens_is_what_the_empty_pool_holds(num_blocks: int, block_size: int) -> None:
    cache = manager(num_blocks, block_size)
    assert cache.max_tokens == (num_blocks - 1) * block_size
    assert cache.blocks_for(cache.max_tokens) == cache.num_usable
    assert cache.blocks_for(cache.max_tokens + 1) > cache.num_usable


def test_hits_agree_with_a_naive_search() -> None:
    """Without eviction, hits are as long as a set of every computed prefix says they can be."""
    rng = random.Random(5)
    cache = manager(num_blocks=4000, block_size=3)
    computed: set[tuple[int, ...]] = set()
    for _ in range(300):
        tokens = [rng.randrange(2) for _ in range(rng.randrange(1, 25))]
        wanted = 0
        while wanted + 3 < len(tokens) and tuple(tokens[: wanted + 3]) in computed:
            wanted += 3
        holding, found = compute_without_check(cache, tokens)
        assert found == wanted
        computed.update(tuple(tokens[:end]) for end in range(3, len(tokens) + 1, 3))
        if rng.random() < 0.7:
            cache.release(holding)
    cache.check_integrity()


def compute_without_check(cache: CacheManager, tokens: list[int]) -> tuple[Holding, int]:
    holding = cache.hold("")
    num_cached = cache.admit(holding, tokens)
    assert num_cached is not None
    cache.publish(holding, tokens, len(tokens))
    return holding, num_cached
