"""Fair share between tenants: who gets seats, blocks and the tokens of a step, and how exactly."""

from __future__ import annotations

import random
from functools import cache
from itertools import count
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.errors import RequestError
from engine.fairness import TokenCosts
from tests.engine.mutants import Mutation, load_modules
from tests.engine.scheduler_steps import add, finish_step, run_to_end, scheduler, shape, step
from tests.engine.scheduler_world import VOCABULARY, World, WorldSettings, request_of

COSTS = TokenCosts()


@cache
def real_modules() -> Any:
    return load_modules()


class Backlog(World):
    """A world whose tenants always have more waiting than there are seats.

    Keeps its own books of what each was served: prompt tokens when they are computed for the first
    time or found in the cache, and every generated token.
    """

    def __init__(
        self, settings: WorldSettings, modules: Any, weights: dict[str, float], seed: int
    ) -> None:
        super().__init__(settings, modules)
        self.weights = weights
        self.served = dict.fromkeys(weights, 0.0)
        self.rng = random.Random(seed)
        self.names = count()
        self._seen: dict[str, int] = {}
        self._cached: dict[str, int] = {}

    def refill(self) -> None:
        for tenant, weight in self.weights.items():
            mine = sum(record.request.tenant == tenant for record in self.live.values())
            for _ in range(2 * self.settings.max_num_seqs + 1 - mine):
                self.add(self._request(tenant, weight))

    def _request(self, tenant: str, weight: float) -> Any:
        rng, room = self.rng, self.max_request_tokens
        num_prompt = rng.randrange(1, max(2, room // 2))
        shared = [1, 2, 3] * num_prompt
        fresh = [rng.randrange(1, VOCABULARY) for _ in range(num_prompt)]
        return request_of(
            f"{tenant}{next(self.names)}",
            rng.choice([shared, fresh])[:num_prompt],
            max_tokens=rng.randrange(1, room - num_prompt + 1),
            ignore_eos=rng.random() < 0.7,
            tenant=tenant,
            weight=weight,
        )

    def _check_plan(self, plan: Any) -> None:
        super()._check_plan(plan)
        for state, start, num_new, samples, _ in plan.rows:
            name, num_prompt = state.request.request_id, state.num_prompt
            cached = state.num_cached - self._cached.get(name, 0)
            self._cached[name] = state.num_cached
            seen = max(self._seen.get(name, 0), min(start, num_prompt))
            end = min(start + num_new, num_prompt)
            self._seen[name] = max(seen, end)
            cost = max(0, end - seen) * COSTS.prompt + cached * COSTS.cached
            self.served[state.request.tenant] += cost + samples * COSTS.decode

    @property
    def gap(self) -> float:
        """Between the most and the least served, per weight."""
        shares = [self.served[tenant] / weight for tenant, weight in self.weights.items()]
        return max(shares) - min(shares)

    @property
    def bound(self) -> float:
        limits = self.settings
        seats = min(limits.max_num_seqs, limits.max_num_tokens)
        slack = limits.max_num_tokens * COSTS.prompt + seats * COSTS.decode
        # A step may also let each seat's prompt come from the cache.
        dearest = slack + seats * limits.max_model_len * COSTS.cached
        return 2 * slack + dearest / min(self.weights.values())


def run_backlog(modules: Any, seed: int, num_steps: int) -> Backlog:
    rng = random.Random(seed)
    if seed % 2:  # many short requests that fight for blocks
        limits = WorldSettings(
            num_blocks=rng.randrange(6, 30),
            block_size=rng.randrange(1, 5),
            max_num_tokens=rng.randrange(4, 16),
            max_num_seqs=rng.randrange(1, 8),
            max_model_len=rng.randrange(6, 40),
            chunk_tokens=rng.choice([None, 3]),
            prefix_cache=rng.random() < 0.7,
            steps_ahead=seed // 2 % 2,
        )
    else:  # few seats, held for longer than the slack
        limits = WorldSettings(
            num_blocks=100,
            block_size=4,
            max_num_tokens=rng.randrange(4, 8),
            max_num_seqs=rng.randrange(1, 4),
            max_model_len=120,
            steps_ahead=seed // 2 % 2,
        )
    weights = {"one": 1.0, "two": rng.choice([1.0, 1.0, 2.0, 5.0])}
    if rng.random() < 0.3:
        weights["three"] = 1.0
    world = Backlog(limits, modules, weights, seed)
    for _ in range(num_steps):
        world.refill()
        world.step()
        assert world.gap <= world.bound, (limits, weights, world.served)
    return world


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10**6))
def test_tenants_that_always_have_work_stay_within_steps_of_their_shares(seed: int) -> None:
    run_backlog(real_modules(), seed, 100)


FAIRNESS, SCHEDULER, AHEAD = "engine.fairness", "engine.scheduler", "engine.ahead"
MUTATIONS = [
    Mutation("nobody yields", FAIRNESS, "if ahead <= self._slack:", "if True:"),
    Mutation("steps cost nothing", FAIRNESS, "account.served += account.planned", "pass"),
    Mutation("weights ignored", FAIRNESS, "planned += cost / account.weight", "planned += cost"),
    Mutation(
        "the most served goes first",
        FAIRNESS,
        "(a.priority, a.virtual, a.num_running,",
        "(a.priority, -a.virtual, a.num_running,",
    ),
    Mutation(
        "generated tokens are free", SCHEDULER, "                charge(state.account, cost)\n", ""
    ),
]


@pytest.mark.timeout(60)
@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: mutation.name)
def test_planted_unfairness_is_found(mutation: Mutation) -> None:
    modules = load_modules(mutation)
    with pytest.raises(AssertionError):
        for seed in range(60):
            run_backlog(modules, seed, 150)


def charge_for_prompts(modules: Any, steps_ahead: int) -> None:
    """Serve prompts in chunks beside answers, and compare the charges with the world's books."""
    limits = WorldSettings(
        num_blocks=100, max_num_tokens=12, chunk_tokens=5, max_model_len=100,
        prefix_cache=False, steps_ahead=steps_ahead,
    )  # fmt: skip
    world = Backlog(limits, modules, {"one": 2.0}, seed=5)
    for index in range(60):
        if index % 9 == 0:  # the first of them keeps the account open
            prompt = [index % 3 + 1, 2, 3] * 6  # not a chunk and one: that one counts as drawn only
            room = 80 if index == 0 else 3
            options = {"max_tokens": room, "ignore_eos": True, "tenant": "one", "weight": 2.0}
            world.add(request_of(f"one{index}", prompt, **options))
        world.step()
        account = world.scheduler._requests["one0"].account
        assert account.virtual * 2.0 == pytest.approx(world.served["one"])


@pytest.mark.parametrize("steps_ahead", [0, 1])
def test_charges_are_for_what_is_computed(steps_ahead: int) -> None:
    charge_for_prompts(real_modules(), steps_ahead)


@pytest.mark.parametrize(
    "mutation",
    [
        Mutation(
            "a step ahead is free",
            AHEAD,
            "self._charge(plan)\n            plan.assume()",
            "self._accounts.forget_plan()\n            plan.assume()",
        ),
        Mutation(
            "chunks under way are charged again",
            SCHEDULER,
            "seen = max(start, state.prompt_seen)",
            "seen = state.prompt_seen",
        ),
    ],
    ids=lambda mutation: mutation.name,
)
def test_planted_wrong_charges_are_found(mutation: Mutation) -> None:
    with pytest.raises(AssertionError):
        charge_for_prompts(load_modules(mutation), 1)


def served(sched: Any, num_steps: int) -> dict[str, int]:
    """Rows of each tenant, the first letter of a request's id, over some steps."""
    rows: dict[str, int] = {}
    for _ in range(num_steps):
        for name, *_ in step(sched):
            rows[name[0]] = rows.get(name[0], 0) + 1
    return rows


def test_a_single_request_passes_another_tenants_queue() -> None:
    sched = scheduler(max_num_seqs=4)
    for index in range(50):
        add(sched, f"a{index}", tenant="a", max_tokens=5)
    step(sched)
    add(sched, "b", tenant="b", max_tokens=5)
    ended = run_to_end(sched)
    assert ended.index("b") <= 8, "it waits for the seats of one round, not for the queue"


def test_a_newcomers_first_token_takes_a_step_of_its_own() -> None:
    sched = scheduler(max_num_seqs=8, max_num_tokens=64)
    for index in range(5):
        add(sched, f"a{index}", tenant="a")
    step(sched)
    add(sched, "b", 6, tenant="b")
    assert step(sched) == [("b", 0, 6, True)]
    assert len(step(sched)) == 6, "the others lost one step only"


def test_a_few_rows_of_others_come_along() -> None:
    sched = scheduler(max_num_seqs=8, max_num_tokens=64)
    add(sched, "a", tenant="a")
    step(sched)
    add(sched, "b", 8, tenant="b")
    assert step(sched) == [("a", 4, 1, True), ("b", 0, 8, True)]


def test_others_wait_for_a_bounded_part_of_a_newcomers_prompt() -> None:
    sched = scheduler(max_num_seqs=16, max_num_tokens=64, shared_prompt_tokens=8, num_blocks=200)
    for index in range(10):
        add(sched, f"a{index}", tenant="a")
    step(sched)
    add(sched, "b", 50, tenant="b")
    assert step(sched) == [("b", 0, 32, False)], "half of what a step may have"
    assert served(sched, 1) == {"a": 10, "b": 1}
    assert step(sched)[0][:2] == ("b", 40), "then it is its turn again"


def test_a_tenant_that_was_served_more_than_others_is_no_newcomer() -> None:
    sched = scheduler(max_num_seqs=16, max_num_tokens=64, shared_prompt_tokens=8, num_blocks=200)
    for index in range(10):
        add(sched, f"a{index}", tenant="a", ignore_eos=True)
    step(sched)
    alone = []
    for index in range(6):
        add(sched, f"b{index}", 20, tenant="b", max_tokens=1)
        rows = step(sched)
        alone.append(len(rows) == 1)
        while any(name.startswith("b") for name in sched._requests):
            step(sched)
    assert alone[0]
    assert not all(alone), "it gets ahead, and then waits like anyone"


def test_a_running_step_gives_way_to_a_newcomer_once() -> None:
    sched = scheduler(max_num_seqs=16, max_num_tokens=64)
    for index in range(10):
        add(sched, f"a{index}", tenant="a")
    step(sched)
    plan = sched.plan()
    add(sched, "a-more", 20, tenant="a")
    assert not sched.gives_way(), "its tenant has a part in the crowd"
    add(sched, "b", 20, tenant="b")
    assert sched.gives_way()
    plan = sched.plan()
    assert shape(plan) == [("b", 0, 20, True)]
    add(sched, "c", 20, tenant="c")
    assert not sched.gives_way(), "newcomers do not chase each other away"
    finish_step(sched, plan)
    assert step(sched) == [("c", 0, 12, False)], "but go one after the other, for so long"
    plan = sched.plan()
    assert len(plan.rows) > 10
    add(sched, "d", 20, tenant="d")
    assert not sched.gives_way(), "nor is the crowd's step dropped twice"
    finish_step(sched, plan)
    plan = sched.plan()
    assert {state.request.tenant for state, *_ in plan.rows} < {"c", "d"}


def test_anothers_long_prompt_is_read_in_small_parts_while_answers_wait() -> None:
    sched = scheduler(max_num_tokens=64, shared_prompt_tokens=8, num_blocks=200)
    add(sched, "a", tenant="a")
    step(sched)
    for index in range(3):
        add(sched, f"b{index}", 100, tenant="b")
    for _ in range(12):
        rows = step(sched)
        prompts = sum(num_new for name, _, num_new, _ in rows if name != "a")
        assert prompts <= 8
    assert served(sched, 10)["a"] >= 9


def test_one_tenants_requests_are_not_slowed_for_each_other() -> None:
    sched = scheduler(max_num_tokens=64, shared_prompt_tokens=8, num_blocks=200)
    add(sched, "a")
    step(sched)
    add(sched, "b", 60, priority=3)
    assert step(sched) == [("a", 4, 1, True), ("b", 0, 60, True)]


def test_an_idle_tenant_earns_no_credit_and_a_debt_stays() -> None:
    sched = scheduler(max_num_seqs=2, max_num_tokens=16)
    add(sched, "a0", tenant="a", max_tokens=200, ignore_eos=True)
    served(sched, 100)
    add(sched, "b0", tenant="b", max_tokens=200, ignore_eos=True)
    step(sched)
    accounts = {row.state.account.tenant: row.state.account for row in sched.plan().rows}
    gap = accounts["a"].virtual - accounts["b"].virtual
    assert abs(gap) < 16 * COSTS.prompt, "b starts where a is, not at zero"
    served(sched, 20)
    debt = accounts["b"].served
    sched.abort("b0")
    add(sched, "b1", tenant="b")
    step(sched)
    assert accounts["b"].served >= debt


def test_seats_follow_weights() -> None:
    sched = scheduler(num_blocks=400, max_num_seqs=8, max_num_tokens=16)
    for index in range(40):
        add(sched, f"a{index}", 2, tenant="a", weight=3.0, max_tokens=100, ignore_eos=True)
        add(sched, f"b{index}", 2, tenant="b", weight=1.0, max_tokens=100, ignore_eos=True)
    served(sched, 200)
    rows = served(sched, 400)
    assert rows["a"] / rows["b"] == pytest.approx(3.0, rel=0.1)


def test_a_tenant_that_holds_every_seat_gives_half_of_them_back() -> None:
    sched = scheduler(num_blocks=400, max_num_seqs=4, max_num_tokens=8)
    for index in range(4):
        add(sched, f"a{index}", 2, tenant="a", max_tokens=200, ignore_eos=True)
    step(sched)
    for index in range(4):
        add(sched, f"b{index}", 2, tenant="b", max_tokens=200, ignore_eos=True)
    rows = served(sched, 150)
    assert sched.stats()["preemptions"] >= 2
    assert abs(rows["a"] - rows["b"]) * COSTS.decode <= 3 * (8 + 4 * COSTS.decode)


def test_priorities_stay_strict_between_tenants() -> None:
    sched = scheduler(max_num_seqs=1)
    add(sched, "a", tenant="a", priority=1, max_tokens=30)
    served(sched, 3)
    add(sched, "b", tenant="b", priority=0, max_tokens=30)
    assert run_to_end(sched) == ["b", "a"]


@pytest.mark.parametrize("weight", [0.0, -1.0, float("inf"), float("nan")])
def test_impossible_weights_are_refused(weight: float) -> None:
    with pytest.raises(RequestError, match="weight is") as caught:
        scheduler().add(request_of("a", [1], weight=weight))
    assert caught.value.param == "weight"
