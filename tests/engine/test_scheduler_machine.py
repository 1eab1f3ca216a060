"""The scheduler on tiny pools: whatever happens, every answer is the undisturbed one.

``scheduler_world.World`` checks each step: no row reads state that is not its own prefix's, the
first request in order gains a token, all books agree. Then bugs are planted, which it must notice.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule

from tests.engine.mutants import MACHINE_TIMEOUT_S, Mutation, hypothesis_settings, load_modules
from tests.engine.scheduler_world import (
    VOCABULARY,
    World,
    WorldSettings,
    drive,
    random_settings,
    request_of,
)

SETTINGS = st.builds(
    WorldSettings,
    num_blocks=st.integers(2, 12).map(lambda missing: 14 - missing),
    block_size=st.integers(2, 4),
    max_num_tokens=st.integers(1, 12).map(lambda missing: 13 - missing),
    max_num_seqs=st.integers(1, 6).map(lambda missing: 7 - missing),
    max_model_len=st.integers(3, 24).map(lambda missing: 27 - missing),
    chunk_tokens=st.none() | st.integers(1, 4),
    prefix_cache=st.sampled_from([True, True, True, False]),
    steps_ahead=st.integers(0, 1),
)
"""Hypothesis prefers small numbers, which would refuse most requests; so it counts from the top."""
SHARED = [1, 2, 1, 3, 3, 2, 1, 2, 3, 1, 1, 2, 3, 3]
PROMPTS = st.builds(
    lambda shared, tail: SHARED[:shared] + tail,
    st.integers(0, len(SHARED)),
    st.lists(st.integers(1, VOCABULARY - 1), min_size=1, max_size=3),
)


@cache
def real_modules() -> Any:
    return load_modules()


class SchedulerMachine(RuleBasedStateMachine):
    """Requests come and go, steps pass; at the end everyone must have been served."""

    @initialize(settings=SETTINGS)
    def start(self, settings: WorldSettings) -> None:
        self.world = World(settings, real_modules())
        self.count = 0

    def submit(self, prompt: list[int], options: dict[str, Any]) -> None:
        self.count += 1
        if self.count % 8:  # the eighth may be one that must be refused
            room = self.world.max_request_tokens
            prompt = prompt[: room - 1]
            options = {**options, "max_tokens": min(options["max_tokens"], room - len(prompt))}
        self.world.add(request_of(f"r{self.count}", prompt, **options))

    options = st.fixed_dictionaries(
        {
            "max_tokens": st.integers(1, 12).map(lambda missing: 13 - missing),
            "ignore_eos": st.booleans(),
            "priority": st.sampled_from([0, 0, 0, -1, 3]),
        },
        optional={
            "min_tokens": st.integers(0, 3),
            "stop_token_ids": st.sampled_from([(), (2,), (0, 3)]),
            "logprobs": st.integers(0, 1),
            "presence_penalty": st.sampled_from([0.0, 0.0, 0.5]),
            "prompt_logprobs": st.integers(0, 1),
            "cache_salt": st.sampled_from(["", "other"]),
            "tenant": st.sampled_from(["", "one", "two"]),
            "weight": st.sampled_from([1.0, 0.5, 4.0]),
            "due_s": st.sampled_from([-1.0, 2.5, 7.0]),
        },
    )

    @rule(prompts=st.lists(PROMPTS, min_size=1, max_size=3), options=options)
    def add(self, prompts: list[list[int]], options: dict[str, Any]) -> None:
        for prompt in prompts:
            self.submit(prompt, options)

    @precondition(lambda self: self.world.done)
    @rule(data=st.data(), tail=PROMPTS, options=options)
    def continue_a_conversation(
        self, data: st.DataObject, tail: list[int], options: dict[str, Any]
    ) -> None:
        record = data.draw(st.sampled_from(self.world.done))
        self.submit(record.request.prompt_ids + record.tokens + tail[:3], options)

    @rule(prompt=PROMPTS, options=options)
    def add_during_a_step(self, prompt: list[int], options: dict[str, Any]) -> None:
        self.world.step(lambda: self.submit(prompt, options))

    @rule(steps=st.integers(1, 6))
    def step(self, steps: int) -> None:
        for _ in range(steps):
            self.world.step()

    @precondition(lambda self: self.world.live)
    @rule(data=st.data(), during_step=st.booleans(), again=st.booleans())
    def abort(self, data: st.DataObject, during_step: bool, again: bool) -> None:
        victim = data.draw(st.sampled_from(sorted(self.world.live)))
        request = self.world.live[victim].request

        def leave() -> None:
            self.world.abort(victim)
            if again:  # the same id returns while the old one's row is still computed
                self.world.add(request)

        if during_step:
            self.world.step(leave)
        else:
            leave()

    @rule()
    def die(self) -> None:
        self.world.die()

    @rule()
    def forget_a_plan(self) -> None:
        self.world.forget_a_plan()

    def teardown(self) -> None:
        if hasattr(self, "world"):
            self.world.drain()


SchedulerMachine.TestCase.settings = hypothesis_settings(max_examples=150, stateful_step_count=40)
TestScheduler = pytest.mark.timeout(MACHINE_TIMEOUT_S)(SchedulerMachine.TestCase)


def test_random_worlds_exercise_what_they_are_for() -> None:
    preemptions = cached = dropped = ahead = 0
    for seed in range(120):
        world = drive(random_settings(seed), real_modules(), seed)
        preemptions += world.total("preemptions")
        dropped += world.dropped
        cached += world.total("cached_tokens")
        ahead += world.steps_ahead
    assert ahead > 200
    assert preemptions > 20
    assert cached > 200
    assert dropped > 10


CACHE, SCHEDULER, BLOCKS = "engine.cache", "engine.scheduler", "engine.blocks"
STEPS, SEATS, AHEAD = "engine.steps", "engine.seats", "engine.ahead"
MUTATIONS = [
    Mutation("reference not dropped", BLOCKS, "ref_counts[block] -= 1", "keys"),
    Mutation("reference not counted", BLOCKS, "ref_counts[block] += 1", "keys"),
    Mutation("shared block stays in queue", BLOCKS, "del self._cached[block]", "pass"),
    Mutation("evicted content found", BLOCKS, "del self._index[key]", "pass"),
    Mutation(
        "whole prompt from cache",
        CACHE,
        "limit = (len(token_ids) - 1) // self.block_size",
        "limit = len(token_ids) // self.block_size",
    ),
    Mutation("digest without parent", CACHE, "blake2b(parent + tokens", "blake2b(b'' + tokens"),
    Mutation(
        "digest misses the last token",
        CACHE,
        "start + self.block_size]",
        "start + self.block_size - 1]",
    ),
    Mutation("salt ignored", CACHE, "salt.encode(", "''.encode("),
    Mutation(
        "published one block early",
        CACHE,
        "stop = num_computed // self.block_size",
        "stop = min(num_computed // self.block_size + 1, holding.capacity // self.block_size)",
    ),
    Mutation(
        "shared free blocks counted as available",
        CACHE,
        "headroom += sum(",
        "headroom += 0 * sum(",
    ),
    Mutation(
        "capacity one block too large",
        CACHE,
        "holding.capacity = num_token_blocks * self.block_size",
        "holding.capacity = (num_token_blocks + 1) * self.block_size",
    ),
    Mutation(
        "shared blocks published again",
        CACHE,
        "holding.publish_at = (num_hit + 1) * self.block_size",
        "holding.publish_at = self.block_size",
    ),
    Mutation(
        "partial block rounded down",
        CACHE,
        "num_token_blocks = -(-num_tokens // self.block_size)\n        for",
        "num_token_blocks = num_tokens // self.block_size\n        for",
    ),
    Mutation("blocks kept on release", CACHE, "self._pool.free(blocks)", "pass"),
    Mutation("preempted tokens not recomputed", SEATS, "state.num_computed = 0\n", "pass\n"),
    Mutation("samples before it caught up", SCHEDULER, "num_new, num_new == left", "num_new, True"),
    Mutation(
        "first in order gives way",
        SEATS,
        "last = running.pop()",
        "last = running.pop(0)",
    ),
    Mutation(
        "more seats than tokens",
        SCHEDULER,
        "min(max_num_seqs, max_num_tokens)",
        "max_num_seqs",
    ),
    Mutation(
        "aborted rows count",
        SCHEDULER,
        "            if state.phase is running:\n",
        "            if 1:\n",
    ),
    Mutation(
        "impossible requests taken",
        SCHEDULER,
        "blocks_for(state.max_len - 1) > self._cache.num_usable",
        "blocks_for(state.max_len - 1) > 10**9",
    ),
    Mutation(
        "one token too many",
        STEPS,
        "len(token_ids) >= self.max_len",
        "len(token_ids) > self.max_len",
    ),
    Mutation("stop tokens ignored", STEPS, "if token_ids[-1] in self.stop_ids and", "if False and"),
    Mutation(
        "prompt logprobs from cache",
        SEATS,
        "use_cache = not head.wants_prompt_logprobs",
        "use_cache = True",
    ),
    Mutation("prompt logprobs twice", SEATS, "state.prompt_logprobs = []", "pass"),
    Mutation(
        "growth forgets the new token",
        SEATS,
        "state.num_pending + 1):",
        "state.num_pending):",
    ),
    Mutation(
        "finished requests keep blocks",
        SCHEDULER,
        "state.move(Phase.FINISHED)\n        self._cache.release(state.holding)",
        "state.move(Phase.FINISHED)",
    ),
    Mutation("priorities wait", SCHEDULER, "        self._seats.admit_urgent()\n", ""),
    Mutation(
        "arrival order forgotten",
        STEPS,
        "request.due_s, arrival)",
        "request.due_s, -arrival)",
    ),
    Mutation("deadlines forgotten", STEPS, "request.due_s, arrival)", "0.0, arrival)"),
    Mutation(
        "the last deadline first", STEPS, "request.due_s, arrival)", "-request.due_s, arrival)"
    ),
    Mutation(
        "aborted request stays listed",
        SCHEDULER,
        "        else:\n            self._accounts.remove(state)\n",
        "",
    ),
    Mutation("budget not counted", SCHEDULER, "budget -= rows[-1].num_new", "budget -= 0"),
    Mutation(
        "chunks not limited",
        SCHEDULER,
        "min(left, budget, self._chunk_tokens)",
        "min(left, budget)",
    ),
    Mutation(
        "prompt tokens counted again",
        SCHEDULER,
        "news = max(0, min(num_computed, state.num_prompt) - state.prompt_seen)",
        "news = min(num_computed, state.num_prompt)",
    ),
    Mutation(
        "known output taken for prompt",
        STEPS,
        "self.num_prompt = len(request.prompt_ids)",
        "self.num_prompt = len(self.token_ids)",
    ),
    Mutation("ended requests go on", SCHEDULER, "if not state.is_ending]", "if state.num_left]"),
    Mutation(
        "gives way while it is computed",
        SCHEDULER,
        "self._seats.preempts = after is None",
        "self._seats.preempts = True",
    ),
    Mutation("penalties guessed", AHEAD, "if not plan.can_be_followed:", "if False:"),
    Mutation("assumed for ever", AHEAD, "self._assumed.settle()", "pass"),
    Mutation("unknown token not counted", STEPS, "state.num_unknown = int(samples)", "pass"),
    Mutation("step in flight computed again", STEPS, "state.num_pending = num_new", "pass"),
    Mutation("prompt logprobs after a death", STEPS, "is None or request.output_ids", "is None"),
]


@pytest.mark.timeout(30)
@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: mutation.name)
def test_planted_bug_is_found(mutation: Mutation) -> None:
    modules = load_modules(mutation)
    with pytest.raises(Exception):  # noqa: B017 - an assertion, or whatever the bug leads to
        for seed in range(400):
            drive(random_settings(seed), modules, seed)


def test_ids_may_come_back() -> None:
    """An aborted row in flight must not be taken for the new request of the same id."""
    world = World(WorldSettings(), real_modules())
    request = request_of("same", [1, 2, 3], ignore_eos=True)
    world.add(request)
    world.step()

    def replace() -> None:
        world.abort("same")
        world.add(request)

    world.step(replace)
    world.add(request_of("other", [1, 2, 3], ignore_eos=True))
    world.drain()
    assert [(r.request.request_id, len(r.tokens)) for r in world.done] == [
        ("same", 1),
        ("same", 4),
        ("other", 4),
    ]
