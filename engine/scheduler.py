"""The scheduler: pure ``plan()`` and ``commit()``, without torch, clock or I/O.

There is no prefill phase and no decode phase. A request has tokens, some of them computed; each
step brings it closer to its token count, and a step that catches up draws one more token.
Generating is being one token behind, reading a prompt is being many behind, and a preempted request
that returns is simply far behind again.

Requests have a turn: (priority, tokens their tenant was served, due, arrival), see
``engine.fairness``. Within one tenant that is (priority, due, arrival): what is due first is let in
first, but takes no seat from one that has it. Between tenants it shares out seats, blocks and the
prompt tokens of a step; and a tenant that has fallen behind another by ``slack`` takes its seats,
so that two tenants that always have work are never further apart than twice the slack and a step.

Why nothing stalls: running requests give way from the end of their turns, so the first in turn
never gives way to growth; ``add`` refuses what would not fit into the empty pool, so once it is
alone it fits; seats never outnumber the token budget, so it always has a token to compute. A turn
only changes when tokens are charged, and each token is charged once, however often it is computed
again: so between two changes the first in turn catches up and is charged, and what is charged in
all is finite. The same bounds fairness: one tenant can take another's seats back only after the
slack was charged in between, not in circles.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection

from engine.ahead import Outstanding
from engine.blocks import InvariantError
from engine.cache import CacheManager
from engine.errors import RequestError
from engine.fairness import Account, Accounts, Bids, TokenCosts
from engine.newcomers import Newcomers
from engine.seats import Seats, WouldPreempt
from engine.steps import Phase, Plan, RequestState, Row, StepOutput, check_request
from engine.types import Delta, FinishReason, Request, TokenLogprobs

__all__ = ["InvariantError", "Phase", "Plan", "RequestState", "Row", "Scheduler", "StepOutput"]


_NOTHING = Plan([], 0)


class Scheduler:
    """Decides what each step computes, and what its outcome means for each request.

    Args:
        cache: where requests keep their state; this scheduler is its only user.
        max_num_tokens: most tokens computed in one step, >= 1.
        max_num_seqs: most requests that run at once, >= 1; capped by ``max_num_tokens``.
        max_model_len: most tokens of prompt and answer together.
        eos_token_ids: tokens that end an answer unless its request ignores them.
        chunk_tokens: most tokens of one request in one step; None: up to ``max_num_tokens``.
        costs: what tokens count where tenants share.
        shared_prompt_tokens: most prompt tokens of a step in which another tenant's answers wait
            for it; None: an eighth of ``max_num_tokens``.
    """

    def __init__(
        self,
        cache: CacheManager,
        *,
        max_num_tokens: int,
        max_num_seqs: int,
        max_model_len: int,
        eos_token_ids: Collection[int],
        chunk_tokens: int | None = None,
        costs: TokenCosts | None = None,
        shared_prompt_tokens: int | None = None,
    ) -> None:
        self._cache = cache
        self._max_num_tokens = max_num_tokens
        num_seats = min(max_num_seqs, max_num_tokens)
        self._max_model_len = max_model_len
        self._eos_token_ids = frozenset(eos_token_ids)
        self._chunk_tokens = max_num_tokens if chunk_tokens is None else chunk_tokens
        self._shared_prompt_tokens = shared_prompt_tokens or max(1, max_num_tokens // 8)
        costs = costs or TokenCosts()
        self._costs = costs
        # What the dearest step charges: all of it prompts, and a token drawn for every seat.
        slack = max_num_tokens * costs.prompt + num_seats * costs.decode
        self._accounts = Accounts(slack)
        self._seats = Seats(cache, self._accounts, max_num=num_seats, cached_cost=costs.cached)
        self._newcomers = Newcomers(self._accounts, self._seats, max(1, max_num_tokens // 2))
        self._requests: dict[str, RequestState] = {}
        self._arrivals = 0
        self._outstanding = Outstanding(self._accounts, self._newcomers)
        self._prompt_tokens = 0
        self._generation_tokens = 0

    @property
    def has_work(self) -> bool:
        """Whether a request is waiting or running."""
        return bool(self._requests)

    def stats(self) -> dict[str, int]:
        """Those fields of EngineStats that the scheduler knows."""
        return {
            "waiting": self._accounts.num_waiting,
            "running": len(self._seats.running),
            "num_blocks": self._cache.num_usable,
            "free_blocks": self._cache.num_free,
            "cached_blocks": self._cache.num_cached,
            "prompt_tokens": self._prompt_tokens,
            "cached_tokens": self._seats.cached_tokens,
            "queried_tokens": self._seats.queried_tokens,
            "generation_tokens": self._generation_tokens,
            "preemptions": self._seats.preemptions,
        }

    def add(self, request: Request) -> Delta | None:
        """Let a request wait for its turn.

        Returns its last delta if nothing is left to generate: its ``output_ids`` were complete.

        Raises RequestError for an id that is in flight, a prompt that is empty or not made of token
        ids, or a request that could never fit into the KV cache; PromptTooLong for a prompt that
        leaves no room in the model's context.
        """
        if request.request_id in self._requests:
            raise RequestError(
                f"request_id {request.request_id!r} is in flight already; each needs its own",
                param="request_id",
            )
        check_request(request, self._max_model_len)
        holding = self._cache.hold(request.cache_salt)
        state = RequestState(
            request, self._arrivals, holding, self._max_model_len, self._eos_token_ids
        )
        # The last token is only drawn: its state is never computed.
        if self._cache.blocks_for(state.max_len - 1) > self._cache.num_usable:
            raise RequestError(
                f"{state.num_prompt} prompt tokens and {state.max_len - state.num_prompt} more do "
                f"not fit into the KV cache; ask for {self._cache.max_tokens + 1} in all at most",
                param="max_tokens",
            )
        if request.output_ids and (reason := state.finish_reason):
            return state.last_delta(reason)
        self._arrivals += 1
        self._requests[request.request_id] = state
        state.account = self._accounts.enter(state)
        self._accounts.push(state)
        return None

    def abort(self, request_id: str) -> Delta | None:
        """End a request now and free its blocks; its part of a step in flight will be ignored.

        Returns its last delta, or None if no such request is in flight.
        """
        return self._end_early(request_id, FinishReason.ABORT, None)

    def fail(self, request_id: str, message: str) -> Delta | None:
        """End a request that cannot go on; as ``abort``, but its last delta carries an error."""
        return self._end_early(request_id, FinishReason.ERROR, message)

    def plan(self, after: Plan | None = None) -> Plan:
        """Choose the rows of the next step and give them blocks.

        First the requests that need one token, so that nobody's answer waits for another's prompt;
        what is left of the budget goes to prompts in turn. A plan that was not committed is
        replaced by the next one.

        With ``after``, a plan whose step is computed and which is committed next, this is the step
        after that one, see ``engine.ahead``. No rows then mean that it cannot be planned yet.
        """
        if after is None:
            self._outstanding.replace()
        elif not self._outstanding.follow(after):
            return _NOTHING
        self._seats.preempts = after is None
        try:
            plan = self._choose(ahead=after is not None)
        except WouldPreempt:
            self._accounts.forget_plan()
            return _NOTHING
        self._outstanding.add(plan)
        return plan

    def _choose(self, *, ahead: bool) -> Plan:
        """The next step, charged; ``ahead``: the one before it is computed."""
        self._seats.admit_urgent()
        rows: list[Row] = []
        behind: dict[Account, deque[RequestState]] = {}
        newcomer = self._newcomers.next()
        if newcomer is not None:
            budget = min(self._max_num_tokens, self._newcomers.room)
            rows.append(self._chunk(newcomer, budget))
        else:
            running = self._seats.in_turn()
            if ahead:
                running = [state for state in running if not state.is_ending]
            self._plan_single_tokens(running, rows, behind)
            budget = self._max_num_tokens - len(rows)
            if behind or self._accounts.num_waiting:
                if self._accounts.num_tenants > 1 and rows:
                    budget = min(budget, self._shared_prompt_tokens)
                self._plan_prompts(rows, behind, budget)
        return Plan(rows, sum([row.num_new for row in rows]), newcomer is not None)

    def gives_way(self) -> bool:
        """Whether the latest plan is better dropped than computed, for a request that came since.

        Whoever asks may go on all the same; else the next ``plan()`` replaces it.
        """
        plan = self._outstanding.only
        if plan is None or plan.alone:
            return False
        return self._newcomers.interrupt(plan.num_tokens)

    def commit(self, plan: Plan, output: StepOutput) -> list[Delta]:
        """Enter the outcome of a plan, the earlier of two first; returns what it added, in order.

        Rows of requests that have ended meanwhile are passed over. A drawn token that ends the
        answer is part of its delta. End and stop tokens end it only once ``min_tokens`` were
        generated before them. Raises InvariantError when plan or output is not the expected one.
        """
        self._outstanding.take(plan)
        plan.check(output)
        deltas: list[Delta] = []
        drawn = 0
        finished = False
        running = Phase.RUNNING
        for index, (state, start, num_new, samples, wants) in enumerate(plan.rows):
            if state.phase is running:
                end = state.num_computed = start + num_new
                if end >= state.holding.publish_at:
                    self._cache.publish(state.holding, state.token_ids, end)
                if start < state.num_prompt:
                    self._count_prompt(state, end)
                if wants:
                    self._collect(plan.rows[index], output.prompt_logprobs.get(index))
                if samples:
                    delta = self._append(state, output.token_ids[drawn], output.logprobs[drawn])
                    deltas.append(delta)
                    finished = finished or delta.finish_reason is not None
            drawn += samples
        self._generation_tokens += len(deltas)
        if finished:
            self._seats.drop_finished()
        return deltas

    def check_integrity(self) -> None:
        """Compare all books, the cache's included. Raises InvariantError naming a contradiction."""
        self._cache.check_integrity()
        waiting, seated = self._accounts.waiting(), self._seats.running
        for states, phase in ((waiting, Phase.WAITING), (seated, Phase.RUNNING)):
            for state in states:
                known = self._requests.get(state.request.request_id) is state
                if state.phase is not phase or not known:
                    raise InvariantError(f"{state} is listed as {phase.value}")
                state.check_integrity()
        for states in (seated, *(account.waiting for account in self._accounts.queued())):
            orders = [state.order for state in states]
            if orders != sorted(set(orders)):
                raise InvariantError(f"requests are out of order: {states}")
        if len(self._requests) != len(waiting) + len(seated):
            raise InvariantError(f"requests neither wait nor run: {sorted(self._requests)}")
        self._seats.check_integrity()

    def _plan_single_tokens(
        self,
        running: list[RequestState],
        rows: list[Row],
        behind: dict[Account, deque[RequestState]],
    ) -> None:
        """Add rows of requests one token behind, and those further behind, in turn."""
        charge, cost = self._accounts.plan, self._costs.decode
        index = 0
        while index < len(running):  # requests at the end may give way meanwhile
            state = running[index]
            start = state.num_computed + state.num_pending
            if len(state.token_ids) + state.num_unknown - start > 1:
                behind.setdefault(state.account, deque()).append(state)
            elif start < state.holding.capacity or self._seats.grow(state, running):
                wants = state.prompt_logprobs is not None and state.wants_prompt_logprobs
                rows.append(Row(state, start, 1, True, wants and start < state.num_prompt - 1))
                charge(state.account, cost)
            index += 1

    def _plan_prompts(
        self,
        rows: list[Row],
        behind: dict[Account, deque[RequestState]],
        budget: int,
    ) -> None:
        """Give what is left of the budget to those behind and to those waiting, in turn.

        Each row is charged before the next is chosen. When the first in turn cannot be let in,
        nobody is let in past it.
        """
        bids = Bids(self._accounts.queued(), behind)
        while budget > 0 and (state := bids.next()) is not None:
            if state.phase is Phase.WAITING and not self._seats.admit(state):
                bids.admitting = False
                continue
            rows.append(self._chunk(state, budget))
            budget -= rows[-1].num_new

    def _chunk(self, state: RequestState, budget: int) -> Row:
        """The next part of a request that is behind; charged."""
        start, left = state.num_computed + state.num_pending, state.num_left
        num_new = min(left, budget, self._chunk_tokens)
        # What a step that is not committed computes is counted already, but not seen.
        seen = max(start, state.prompt_seen)
        news = max(0, min(start + num_new, state.num_prompt) - seen)
        drawn = self._costs.decode if num_new == left else 0.0
        self._accounts.plan(state.account, news * self._costs.prompt + drawn)
        wants = state.wants_prompt_logprobs and start < state.num_prompt - 1
        return Row(state, start, num_new, num_new == left, wants)

    def _count_prompt(self, state: RequestState, num_computed: int) -> None:
        news = max(0, min(num_computed, state.num_prompt) - state.prompt_seen)
        self._prompt_tokens += news
        state.prompt_seen += news

    def _collect(self, row: Row, prompt_logprobs: list[TokenLogprobs] | None) -> None:
        """Keep what a row brought of its prompt's log-probabilities until they are complete."""
        state = row.state
        if prompt_logprobs is None or len(prompt_logprobs) != row.num_prompt_logprobs:
            raise InvariantError(
                f"{row.num_prompt_logprobs} prompt logprobs are due for {state}, "
                f"the step brought {prompt_logprobs}"
            )
        assert state.prompt_logprobs is not None
        state.prompt_logprobs += prompt_logprobs

    def _append(self, state: RequestState, token_id: int, logprobs: TokenLogprobs | None) -> Delta:
        """Add a drawn token to its request, which may end with it."""
        token_ids = state.token_ids
        token_ids.append(token_id)
        counts = state.output_counts
        counts[token_id] = counts.get(token_id, 0) + 1
        reason = state.finish_reason
        prompt_logprobs, state.prompt_logprobs = state.prompt_logprobs, None
        if reason is not None:
            self._finish(state)
        return Delta(
            request_id=state.request.request_id,
            token_ids=[token_id],
            logprobs=None if logprobs is None else [logprobs],
            prompt_logprobs=prompt_logprobs,
            finish_reason=reason,
            usage=None if reason is None else state.usage,
        )

    def _finish(self, state: RequestState) -> None:
        """Free what a request holds and forget it; the caller takes it off its list."""
        account = state.account
        account.num_running -= state.phase is Phase.RUNNING
        self._accounts.leave(account)
        state.move(Phase.FINISHED)
        self._cache.release(state.holding)
        del self._requests[state.request.request_id]

    def _end_early(self, request_id: str, reason: FinishReason, error: str | None) -> Delta | None:
        state = self._requests.get(request_id)
        if state is None:
            return None
        if state.phase is Phase.RUNNING:
            self._seats.leave(state)
        else:
            self._accounts.remove(state)
        self._finish(state)
        return state.last_delta(reason, error)
