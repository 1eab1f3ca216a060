"""Newcomers: a tenant's only request, without a token yet, beside a crowd of another tenant's rows.

A step takes as long as the rows in it make it. In an ordinary step a newcomer's first token would
wait for a crowd that its tenant has no part in, and before that for the crowd's running step. So
its prompt is read in steps of its own, and a running step may be dropped for it.

What that costs the others is bounded: they lose at most one step and the time of ``most_alone``
tokens before a step of theirs is computed; what the newcomer was served counts like anything else,
and one whose tenant is ahead of another by more than ``most_alone`` waits as usual. A crowd that
would make the step no longer by more than an eighth is none: its rows come along.
"""

from __future__ import annotations

from engine.fairness import Accounts
from engine.seats import Seats
from engine.steps import RequestState

__all__ = ["Newcomers"]

_CROWD = 8
"""Others' tokens are a crowd from one for so many of the newcomer's own."""


class Newcomers:
    """Decides whose first token comes before other tenants' next ones.

    Args:
        accounts: of the tenants.
        seats: of those that run.
        most_alone: tokens for which others wait at most, and by which a newcomer may be ahead.
    """

    def __init__(self, accounts: Accounts, seats: Seats, most_alone: int) -> None:
        self._accounts = accounts
        self._seats = seats
        self._most_alone = most_alone
        self._alone = 0
        self._gave_way = False

    @property
    def room(self) -> int:
        """Tokens that newcomers may still have to themselves."""
        return self._most_alone - self._alone

    def next(self) -> RequestState | None:
        """The newcomer on a seat to which the next step belongs; None: it is everyone's."""
        running = self._seats.running
        if not running or self._accounts.num_tenants == 1 or self.room <= 0:
            return None
        head = self._accounts.head()
        for state in running:
            if head is not None and head.account.priority < state.account.priority:
                continue
            if self._comes_first(state, len(running)):
                return state
        if head is not None and self._comes_first(head, len(running)) and self._seats.admit(head):
            return head
        return None

    def interrupt(self, num_tokens: int) -> bool:
        """Whether the running step, of so many tokens, is dropped for one that waits.

        If so, not again before an ordinary step was computed. It is for the caller not to ask while
        the step is a newcomer's.
        """
        if self._gave_way or self.room <= 0 or self._accounts.num_tenants == 1:
            return False
        if self._seats.has_room and (head := self._accounts.head()) is not None:
            self._gave_way = self._comes_first(head, num_tokens)
        return self._gave_way

    def computed(self, num_tokens: int, *, alone: bool) -> None:
        """A step of so many tokens was computed, a newcomer's or an ordinary one."""
        if alone:
            self._alone += num_tokens
        else:
            self._alone, self._gave_way = 0, False

    def _comes_first(self, state: RequestState, num_tokens: int) -> bool:
        """Whether a tenant's only request goes before so many tokens, others' among them."""
        if state.num_output or state.num_unknown:
            return False
        if num_tokens * _CROWD <= min(state.num_left, self.room):
            return False
        account = state.account
        others = [one.account for one in self._seats.running if one is not state]
        if not others or any(other.tenant == account.tenant for other in others):
            return False
        # What is planned does not count: a step that is dropped was not served.
        priority, least = min((other.priority, other.served) for other in others)
        ahead = account.served - least
        return account.priority < priority or (
            account.priority == priority and ahead <= self._most_alone
        )
