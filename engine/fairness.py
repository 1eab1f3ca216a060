"""Fair share between tenants: virtual token counters, and the queues they order.

The scheme is VTC (Sheng et al., "Fairness in Serving Large Language Models", 2024,
arXiv:2401.00588): a tenant's counter grows by the weighted tokens it was served, divided by its own
weight, and whoever has the least goes next. A tenant that was idle is lifted to the least counter
of those that are active, so that idleness earns no credit; one that left with a debt keeps it.

Priorities are strict, so tenants are compared within one priority only: each (priority, tenant) has
an account of its own. Nothing here knows of time, blocks or torch.
"""

from __future__ import annotations

import math
from bisect import bisect_left, insort
from collections import Counter, deque
from collections.abc import Iterable
from heapq import heapify, heappop, heappush
from operator import attrgetter
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from engine.steps import RequestState

__all__ = ["Account", "Accounts", "Bids", "Order", "TokenCosts", "Turn", "turn_of"]

_MAX_IDLE = 64
"""Idle accounts of one priority that are kept before those without a debt are dropped."""

_by_order = attrgetter("order")

Order = tuple[int, float, int]
"""(priority, due, arrival): the lesser goes first among requests of one tenant."""
Turn = tuple[int, float, Order]
"""(priority, virtual tokens of the account, order): the lesser goes first."""


class TokenCosts(NamedTuple):
    """What a token of each kind counts.

    A generated token reads all weights and the whole context for one row, a prompt token shares
    that with its neighbours, and a cached one is only looked up. Tokens that are computed again
    after a preemption count nothing: it was not the tenant's wish.
    """

    prompt: float = 1.0
    cached: float = 0.1
    decode: float = 2.0


class Account:
    """One tenant within one priority.

    Attributes:
        weight: of its latest request; a tenant of weight 2 is due twice the tokens of weight 1.
        served: weighted tokens served, divided by the weight.
        planned: the same for the step that is planned and not committed.
        waiting: its requests that hold no blocks, in order.
        num_running: its requests that do.
        in_flight: both together; 0: the tenant is idle.
    """

    __slots__ = (
        "in_flight",
        "num_running",
        "planned",
        "priority",
        "served",
        "tenant",
        "waiting",
        "weight",
    )

    def __init__(self, priority: int, tenant: str) -> None:
        self.priority = priority
        self.tenant = tenant
        self.weight = 1.0
        self.served = 0.0
        self.planned = 0.0
        self.waiting: list[RequestState] = []
        self.num_running = 0
        self.in_flight = 0

    @property
    def virtual(self) -> float:
        """The counter, the planned step included."""
        return self.served + self.planned


def turn_of(state: RequestState) -> Turn:
    """Whose turn it is among running requests; the last in turn gives way first."""
    account = state.account
    return account.priority, account.served + account.planned, state.order


class Accounts:
    """All accounts of requests in flight, and those idle ones that still owe.

    When the last request of a priority ends, its accounts are forgotten: nobody was held back by
    what was served, so nobody is owed.

    ``slack`` are the virtual tokens by which one may be ahead before it must give up places.
    """

    def __init__(self, slack: float) -> None:
        self._slack = slack
        self._tenants: Counter[str] = Counter()
        self.num_active = 0
        """Accounts with requests in flight."""
        self.num_waiting = 0
        self._by_priority: dict[int, dict[str, Account]] = {}
        self._active: Counter[int] = Counter()
        # A dict, not a set: its order does not depend on addresses, so runs repeat.
        self._queued: dict[Account, None] = {}
        self._planned: list[Account] = []

    def enter(self, state: RequestState) -> Account:
        """Return the account of a new request, lifted if its tenant was idle."""
        request = state.request
        members = self._by_priority.setdefault(request.priority, {})
        account = members.get(request.tenant)
        if account is None:
            account = members[request.tenant] = Account(request.priority, request.tenant)
        account.weight = request.weight
        if not account.in_flight:
            # What is planned does not count: a step that is dropped was not served.
            active = [other.served for other in members.values() if other.in_flight]
            floor = min(active, default=0.0)
            account.served = max(account.served, floor)
            if len(members) > 2 * len(active) + _MAX_IDLE:
                self._drop_paid(members, floor, account)
            self.num_active += 1
            self._active[request.priority] += 1
            self._tenants[request.tenant] += 1
        account.in_flight += 1
        return account

    @property
    def num_tenants(self) -> int:
        """Tenants with requests in flight."""
        return len(self._tenants)

    def leave(self, account: Account) -> None:
        """Enter that one of its requests ended."""
        account.in_flight -= 1
        if account.in_flight:
            return
        self.num_active -= 1
        self._tenants[account.tenant] -= 1
        if not self._tenants[account.tenant]:
            del self._tenants[account.tenant]
        self._active[account.priority] -= 1
        if not self._active[account.priority]:
            del self._active[account.priority]
            del self._by_priority[account.priority]

    def push(self, state: RequestState) -> None:
        """Let a request wait."""
        account = state.account
        insort(account.waiting, state, key=_by_order)
        self._queued[account] = None
        self.num_waiting += 1

    def remove(self, state: RequestState) -> None:
        """Take a request out of its queue."""
        account = state.account
        del account.waiting[bisect_left(account.waiting, state.order, key=_by_order)]
        if not account.waiting:
            del self._queued[account]
        self.num_waiting -= 1

    def head(self) -> RequestState | None:
        """The waiting request whose turn is next.

        Of two tenants that were served the same, the one with fewer requests running goes first.
        """
        if not self._queued:
            return None
        first = min(
            self._queued,
            key=lambda a: (a.priority, a.virtual, a.num_running, a.waiting[0].order),
        )
        return first.waiting[0]

    def queued(self) -> list[Account]:
        """Accounts with waiting requests."""
        return list(self._queued)

    def waiting(self) -> list[RequestState]:
        """All waiting requests, account by account."""
        return [state for account in self._queued for state in account.waiting]

    def charge(self, account: Account, cost: float) -> None:
        """Count what is served already."""
        account.served += cost / account.weight

    def plan(self, account: Account, cost: float) -> None:
        """Count what a row of the planned step will cost."""
        if not account.planned:
            self._planned.append(account)
        account.planned += cost / account.weight

    def forget_plan(self) -> None:
        """The planned step will not be computed."""
        for account in self._planned:
            account.planned = 0.0
        self._planned.clear()

    def settle(self) -> None:
        """The planned step was computed."""
        for account in self._planned:
            account.served += account.planned
            account.planned = 0.0
        self._planned.clear()

    def must_yield(self, state: RequestState, head: RequestState) -> bool:
        """Whether a running request gives its place to a waiting one that does not find any.

        A lower priority does. So does another tenant that is ahead by the slack, until both have
        the seats their weights are due; and by twice the slack, to the last one.
        """
        account, other = state.account, head.account
        if account.priority != other.priority:
            return account.priority > other.priority
        ahead = account.virtual - other.virtual
        if ahead <= self._slack:
            return False
        left = (account.num_running - 1) / account.weight
        return ahead > 2 * self._slack or left >= (other.num_running + 1) / other.weight

    def check(self, running: list[RequestState]) -> list[str]:
        """Contradictions between these books and the list of running requests."""
        wrong = []
        runs: Counter[int] = Counter(id(state.account) for state in running)
        for members in self._by_priority.values():
            for account in members.values():
                queued = account in self._queued
                if account.num_running != runs[id(account)]:
                    wrong.append(f"{account.tenant!r} has {account.num_running} running requests")
                if account.in_flight != account.num_running + len(account.waiting):
                    wrong.append(f"{account.tenant!r} has {account.in_flight} in flight")
                if queued != bool(account.waiting):
                    wrong.append(f"{account.tenant!r} is queued: {queued}")
                if not (0 <= account.virtual < math.inf and account.weight > 0):
                    wrong.append(f"{account.tenant!r} was served {account.virtual}")
        if self.num_waiting != len(self.waiting()):
            wrong.append(f"{self.num_waiting} requests wait")
        active = sum(a.in_flight > 0 for m in self._by_priority.values() for a in m.values())
        if self.num_active != active or sum(self._active.values()) != active:
            wrong.append(f"{self.num_active} accounts are active")
        return wrong

    def _drop_paid(self, members: dict[str, Account], floor: float, keep: Account) -> None:
        # Whoever is at the floor or below would be lifted to it anyway.
        paid = [a for a in members.values() if not a.in_flight and a.virtual <= floor]
        for account in paid:
            if account is not keep:
                del members[account.tenant]


_Bid = tuple[int, float, int, Order, Account]


class Bids:
    """Requests that want part of a step's budget, in turn; each account asks for one at a time.

    What ``next`` hands out must be charged before the next call. Of two tenants that were served
    the same, the one with fewer requests running goes first.

    Args:
        queued: accounts with waiting requests.
        behind: running requests with more than one token to compute, in order; used up.
    """

    def __init__(
        self,
        queued: Iterable[Account],
        behind: dict[Account, deque[RequestState]],
    ) -> None:
        self.admitting = True
        """Set to False when one could not be let in: then nobody is let in past it."""
        self._behind = behind
        bids = map(self._bid, dict.fromkeys((*behind, *queued)))
        self._heap = [bid for bid in bids if bid is not None]
        heapify(self._heap)
        self._latest: Account | None = None

    def next(self) -> RequestState | None:
        """Return the next request, running or waiting; None: nobody wants more."""
        if self._latest is not None and (bid := self._bid(self._latest)) is not None:
            heappush(self._heap, bid)
        self._latest = None
        while self._heap:
            bid = heappop(self._heap)
            account = bid[-1]
            state = self._candidate(account)
            if state is None:
                continue
            if state.order != bid[3]:  # the one it was made for may not be let in any more
                heappush(self._heap, (*bid[:3], state.order, account))
                continue
            queue = self._behind.get(account)
            if queue and queue[0] is state:
                queue.popleft()
            self._latest = account
            return state
        return None

    def _candidate(self, account: Account) -> RequestState | None:
        queue = self._behind.get(account)
        first = queue[0] if queue else None
        if self.admitting and account.waiting:
            head = account.waiting[0]
            if first is None or head.order < first.order:
                return head
        return first

    def _bid(self, account: Account) -> _Bid | None:
        state = self._candidate(account)
        if state is None:
            return None
        return account.priority, account.virtual, account.num_running, state.order, account
