"""The block pool against a naive model of it, and planted bugs that the comparison must find."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, Verbosity, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from engine.blocks import BlockPool, InvariantError
from tests.engine.mutants import MACHINE_TIMEOUT_S, Mutation, hypothesis_settings, load_modules

KEYS = st.tuples(st.integers(0, 1), st.sampled_from([b"a", b"b", b"c", b"d", b"e"]))


class PoolMachine(RuleBasedStateMachine):
    """Holds lists of blocks as requests do; the model is a list in eviction order and a dict."""

    pool_class: Any = BlockPool

    @initialize(num_blocks=st.integers(2, 12))
    def start(self, num_blocks: int) -> None:
        self.pool = self.pool_class(num_blocks)
        self.usable = num_blocks - 1
        self.held: list[list[int]] = []
        self.cached: list[int] = []  # oldest first
        self.content: dict[int, tuple[int, bytes]] = {}

    def holders(self, block: int) -> int:
        return sum(blocks.count(block) for blocks in self.held)

    @rule(count=st.integers(0, 5))
    def take(self, count: int) -> None:
        in_use = {block for blocks in self.held for block in blocks}
        if count > self.usable - len(in_use):
            with pytest.raises(InvariantError if self.pool_class is BlockPool else Exception):
                self.pool.take(count)
            return
        empty = set(range(1, self.usable + 1)) - in_use - set(self.cached)
        blocks = self.pool.take(count)
        assert len(set(blocks)) == len(blocks) == count
        evicted = max(0, count - len(empty))
        assert {b for b in blocks if b in empty} == (empty if evicted else set(blocks))
        assert [b for b in blocks if b not in empty] == self.cached[:evicted], "not the oldest"
        for block in self.cached[:evicted]:
            del self.content[block]
        del self.cached[:evicted]
        self.held.append(blocks)

    @rule(key=KEYS)
    def share(self, key: tuple[int, bytes]) -> None:
        block = self.pool.find(key)
        assert block == next((b for b, k in self.content.items() if k == key), None)
        if block is not None:
            self.pool.share([block])
            self.held.append([block])
            if block in self.cached:
                self.cached.remove(block)

    @precondition(lambda self: self.held)
    @rule(data=st.data(), key=KEYS)
    def publish(self, data: st.DataObject, key: tuple[int, bytes]) -> None:
        private = sorted({b for blocks in self.held for b in blocks} - self.content.keys())
        if not private:
            return
        block = data.draw(st.sampled_from(private))
        known = key in self.content.values()
        assert self.pool.publish(block, key) is not known
        if not known:
            self.content[block] = key

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def free(self, data: st.DataObject) -> None:
        blocks = self.held.pop(data.draw(st.integers(0, len(self.held) - 1)))
        self.pool.free(blocks)
        for block in reversed(blocks):
            if not self.holders(block) and block in self.content:
                self.cached.append(block)

    @invariant()
    def books_agree(self) -> None:
        if hasattr(self, "pool"):
            self.pool.check_integrity(self.held)
            assert self.pool.num_cached == len(self.cached)
            in_use = {block for blocks in self.held for block in blocks}
            assert self.pool.num_free == self.usable - len(in_use)


PoolMachine.TestCase.settings = hypothesis_settings(max_examples=60, stateful_step_count=30)
TestPool = pytest.mark.timeout(MACHINE_TIMEOUT_S)(PoolMachine.TestCase)

MUTATIONS = [
    Mutation("free keeps the reference", "engine.blocks", "ref_counts[block] -= 1", "keys"),
    Mutation("freed head first", "engine.blocks", "in reversed(blocks)", "in blocks"),
    Mutation("newest evicted first", "engine.blocks", "popitem(last=False)", "popitem(last=True)"),
    Mutation(
        "cached evicted before empty",
        "engine.blocks",
        "self._empty.pop() if self._empty else self._evict()",
        "self._evict() if self._cached else self._empty.pop()",
    ),
    Mutation("share counts nothing", "engine.blocks", "ref_counts[block] += 1", "keys"),
    Mutation("shared block stays free", "engine.blocks", "del self._cached[block]", "pass"),
    Mutation("evicted content found", "engine.blocks", "del self._index[key]", "pass"),
    Mutation(
        "evicted block keeps its key",
        "engine.blocks",
        "self._keys[block] = None\n        return block",
        "return block",
    ),
    Mutation(
        "second block of equal content indexed",
        "engine.blocks",
        "self._index.setdefault(key, block) != block",
        "self._index.update({key: block}) is not None",
    ),
]


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: mutation.name)
def test_planted_bug_is_found(mutation: Mutation) -> None:
    class MutantMachine(PoolMachine):
        pool_class = load_modules(mutation).blocks.BlockPool

    with pytest.raises(Exception):  # noqa: B017 - an assertion, or whatever the bug leads to
        run_state_machine_as_test(
            MutantMachine,
            settings=settings(
                max_examples=200,
                stateful_step_count=40,
                phases=[Phase.generate],
                derandomize=True,
                database=None,
                deadline=None,
                verbosity=Verbosity.quiet,
                suppress_health_check=list(HealthCheck),
                report_multiple_bugs=False,
            ),
        )


def test_scratch_block_is_never_given_out() -> None:
    pool = BlockPool(5)
    assert sorted(pool.take(4)) == [1, 2, 3, 4]
    with pytest.raises(InvariantError, match="1 blocks were asked for and 0 are free"):
        pool.take(1)


@pytest.mark.parametrize("num_blocks", [0, 1])
def test_pool_without_usable_blocks_is_refused(num_blocks: int) -> None:
    with pytest.raises(InvariantError, match="too small"):
        BlockPool(num_blocks)


def test_misuse_is_refused() -> None:
    pool = BlockPool(4)
    (block,) = pool.take(1)
    assert pool.publish(block, (0, b"x"))
    with pytest.raises(InvariantError, match="cannot be published"):
        pool.publish(block, (0, b"y"))
    pool.free([block])
    with pytest.raises(InvariantError, match="freed more often"):
        pool.free([block])


def test_integrity_names_what_is_wrong() -> None:
    pool = BlockPool(4)
    blocks = pool.take(2)
    with pytest.raises(InvariantError, match="counts 1 references and has 0 holders"):
        pool.check_integrity([])
    with pytest.raises(InvariantError, match="has 2 holders"):
        pool.check_integrity([blocks, blocks[:1]])
    pool.check_integrity([blocks])
