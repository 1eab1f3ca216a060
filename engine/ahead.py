"""Plans whose steps are not committed: one, or two where the second was made one step ahead.

A step is planned ahead while the one before it is computed, on the assumption that each of its rows
goes on: what it computes counts as computed, and the token it draws as a token that nobody knows
yet. Where a request turns out to have ended, its row in the second step is wasted and passed over;
what that row writes lies in blocks that were its own when the step was launched, behind all that is
published, and whoever is given those blocks next writes them in a later step.

Nobody gives way while a step is computed: a request that is behind again and has a token under way
at the same time would be two things at once. Nor is anything planned after a row whose next draw
looks at its last token. The next plan then waits until the step is committed, which costs a moment
of the device's time and is all that such requests need.
"""

from __future__ import annotations

from engine.blocks import InvariantError
from engine.fairness import Accounts
from engine.newcomers import Newcomers
from engine.steps import Plan

__all__ = ["Outstanding"]


class Outstanding:
    """The plans that were made and not committed, and what is assumed of the first.

    What is followed was launched and will be computed, so it is charged by then, not at its commit.
    """

    def __init__(self, accounts: Accounts, newcomers: Newcomers) -> None:
        self._accounts = accounts
        self._newcomers = newcomers
        self._plans: list[Plan] = []
        self._assumed: Plan | None = None

    @property
    def only(self) -> Plan | None:
        """The one that is there, if nothing was planned after it."""
        return self._plans[0] if len(self._plans) == 1 and self._assumed is None else None

    def replace(self) -> None:
        """Forget all of them: the next plan starts from what is committed."""
        self._accounts.forget_plan()
        self._settle()
        self._plans.clear()

    def follow(self, plan: Plan) -> bool:
        """Let the next plan come after this one; False if it has to wait.

        Raises InvariantError unless ``plan`` is the one whose commit is due.
        """
        if not self._plans or plan is not self._plans[0]:
            raise InvariantError("only the plan whose commit is due next can be followed")
        if not plan.can_be_followed:
            return False
        if self._assumed is plan:  # there was a second one: it is replaced
            self._accounts.forget_plan()
        else:
            self._charge(plan)
            plan.assume()
            self._assumed = plan
        del self._plans[1:]
        return True

    def add(self, plan: Plan) -> None:
        """Enter the plan that was made."""
        self._plans.append(plan)

    def take(self, plan: Plan) -> None:
        """Let a plan be committed. Raises InvariantError unless it is the one that is due."""
        if not self._plans or plan is not self._plans[0]:
            raise InvariantError("commit() takes the plans in their order, each once")
        del self._plans[0]
        if self._assumed is None:
            self._charge(plan)
        self._settle()

    def _charge(self, plan: Plan) -> None:
        self._accounts.settle()
        self._newcomers.computed(plan.num_tokens, alone=plan.alone)

    def _settle(self) -> None:
        if self._assumed is not None:
            self._assumed.settle()
            self._assumed = None
