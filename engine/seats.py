"""Seats: which requests run. Only those hold blocks; one that is let in takes a seat and blocks for
all its tokens, one that gives way loses both and waits for its turn again.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from operator import attrgetter

from engine.blocks import InvariantError
from engine.cache import CacheManager
from engine.fairness import Accounts, turn_of
from engine.steps import Phase, RequestState

__all__ = ["Seats", "WouldPreempt"]

_HEADROOM_STEPS = 4
"""A request is let in only if those running can also grow for this many steps: one let in to be
preempted at once would compute its prompt for nothing."""

_by_order = attrgetter("order")


class WouldPreempt(Exception):
    """Somebody would have to give way, and may not now."""


class Seats:
    """Lets requests in and has them give way.

    Args:
        cache: where those that run hold blocks.
        accounts: their tenants' accounts, and the queues of those that wait.
        max_num: most requests that run at once.
        cached_cost: what a prompt token from the prefix cache counts.

    Attributes:
        running: those that run, in order.
        preempts: whether they give way; where not, WouldPreempt is raised instead.
        cached_tokens: prompt tokens taken from the prefix cache.
        queried_tokens: prompt tokens looked up in it.
        preemptions: how often one gave way.
    """

    def __init__(
        self, cache: CacheManager, accounts: Accounts, *, max_num: int, cached_cost: float
    ) -> None:
        self._cache = cache
        self._accounts = accounts
        self._max_num = max_num
        self._cached_cost = cached_cost
        self.running: list[RequestState] = []
        self.preempts = True
        self.cached_tokens = 0
        self.queried_tokens = 0
        self.preemptions = 0

    @property
    def has_room(self) -> bool:
        """Whether a seat is free."""
        return len(self.running) < self._max_num

    def in_turn(self) -> list[RequestState]:
        """Running requests, the first in turn first; a new list."""
        if self._accounts.num_active > 1:
            return sorted(self.running, key=turn_of)
        return self.running.copy()

    def _last_in_turn(self) -> RequestState:
        if self._accounts.num_active > 1:
            return max(self.running, key=turn_of)
        return self.running[-1]

    def admit_urgent(self) -> None:
        """Let waiting requests in before those that must give way to them."""
        while self.running and (head := self._accounts.head()) is not None:
            last = self._last_in_turn()
            if not self._accounts.must_yield(last, head):
                return
            if self.admit(head):
                continue
            if not self._could_give_way(head):
                return
            self._preempt(last)

    def _could_give_way(self, head: RequestState) -> bool:
        """Whether ``head`` might fit if all that must yield to it gave way (an upper bound)."""
        available = self._cache.num_free
        needed = self._cache.blocks_for(len(head.token_ids))
        for state in reversed(self.in_turn()):
            if not self._accounts.must_yield(state, head):
                break
            available += sum(map(len, state.block_ids))
            if available >= needed:
                return True
        return False

    def grow(self, state: RequestState, running: list[RequestState]) -> bool:
        """Give a running request room for one more token; False if it gave way itself.

        ``running`` is in turn; its last ones give way.
        """
        while not self._cache.grow(state.holding, state.num_computed + state.num_pending + 1):
            last = running.pop()
            self._preempt(last)
            if last is state:
                return False
        return True

    def admit(self, head: RequestState) -> bool:
        """Move a waiting request to a seat, if there is one and its tokens fit."""
        num_running = len(self.running)
        if not self.has_room:
            return False
        use_cache = not head.wants_prompt_logprobs
        headroom = -(-num_running * _HEADROOM_STEPS // self._cache.block_size)
        num_cached = self._cache.admit(
            head.holding, head.token_ids, use_cache=use_cache, headroom=headroom
        )
        if num_cached is None:
            return False
        # Each prompt token counts once, as cached or as computed, however often it is recomputed.
        news = max(0, min(num_cached, head.num_prompt) - head.prompt_seen)
        head.prompt_seen += news
        head.num_cached += news
        self.cached_tokens += news
        if not head.num_preemptions and use_cache and self._cache.enable_prefix_cache:
            self.queried_tokens += head.num_prompt
        self._accounts.charge(head.account, news * self._cached_cost)
        head.num_computed = num_cached
        head.move(Phase.RUNNING)
        self._accounts.remove(head)
        head.account.num_running += 1
        insort(self.running, head, key=_by_order)
        return True

    def leave(self, state: RequestState) -> None:
        """Take a running request off the list; its blocks are the caller's to release."""
        del self.running[bisect_left(self.running, state.order, key=_by_order)]

    def _preempt(self, state: RequestState) -> None:
        """Take a running request's blocks; it keeps its tokens and waits to return."""
        if not self.preempts:
            raise WouldPreempt
        self.leave(state)
        self._cache.release(state.holding)
        state.num_computed = 0
        state.num_preemptions += 1
        if state.wants_prompt_logprobs:
            state.prompt_logprobs = []
        state.move(Phase.WAITING)
        state.account.num_running -= 1
        self._accounts.push(state)
        self.preemptions += 1

    def drop_finished(self) -> None:
        """Take those that ended off the list."""
        running = Phase.RUNNING
        self.running = [state for state in self.running if state.phase is running]

    def check_integrity(self) -> None:
        """Compare the books. Raises InvariantError that names a contradiction."""
        if wrong := self._accounts.check(self.running):
            raise InvariantError("; ".join(wrong))
        if len(self.running) > self._max_num:
            raise InvariantError(f"{len(self.running)} requests on {self._max_num} seats")
        if not self.running and self._cache.num_free != self._cache.num_usable:
            held = self._cache.num_usable - self._cache.num_free
            raise InvariantError(f"no request runs, but {held} blocks are held")
