"""The core loop with the real scheduler, a scripted link and a model that counts upward."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import NamedTuple

import msgspec
import pytest
import torch

from engine.cache import CacheManager, FullAttentionGroup
from engine.config import EngineConfig
from engine.core import Core, Launched, StepFailed, is_lack_of_memory
from engine.link import (
    HEARTBEAT_S,
    Abort,
    Configure,
    FromEngine,
    LinkClosed,
    Step,
    Submit,
    ToEngine,
)
from engine.scheduler import Plan, Scheduler, StepOutput
from engine.types import Delta, FinishReason, Request, SamplingParams, Usage


class ScriptedLink:
    """Hands out one list of messages a round, then closes; keeps what is sent."""

    def __init__(self, *rounds: list[ToEngine]) -> None:
        self.rounds = list(rounds)
        self.sent: list[Step] = []
        self.timeouts_s: list[float] = []

    def receive(self, timeout_s: float) -> list[ToEngine]:
        self.timeouts_s.append(timeout_s)
        if not self.rounds:
            raise LinkClosed
        return self.rounds.pop(0)

    def send(self, message: FromEngine) -> None:
        assert isinstance(message, Step)
        self.sent.append(message)

    def deltas(self, request_id: str) -> list[Delta]:
        return [
            delta for step in self.sent for delta in step.deltas if delta.request_id == request_id
        ]


class Computed(NamedTuple):
    """A step that was computed when it was launched."""

    output: StepOutput

    def collect(self) -> StepOutput:
        return self.output


class CountingRunner:
    """After token t comes t + 1."""

    def __init__(self) -> None:
        self.plans = 0

    def launch(self, plan: Plan, between: Callable[[], None] = lambda: None) -> Launched:
        self.plans += 1
        rows = [row for row in plan.rows if row.samples]
        ids = [row.state.token_ids[-1] + 1 + row.state.num_unknown for row in rows]
        return Computed(StepOutput(ids, [None] * len(ids), {}))


def submit(name: str, prompt: list[int], max_tokens: int) -> Submit:
    return Submit(
        Request(request_id=name, prompt_ids=prompt, sampling=SamplingParams(max_tokens=max_tokens))
    )


def run(
    link: ScriptedLink, runner: CountingRunner | None = None, *, steps_ahead: int = 0
) -> CountingRunner:
    cache = CacheManager([FullAttentionGroup()], num_blocks=33, block_size=4)
    scheduler = Scheduler(
        cache, max_num_tokens=16, max_num_seqs=8, max_model_len=64, eos_token_ids=[0]
    )
    runner = runner or CountingRunner()
    core = Core(
        link, scheduler, runner, vocab_size=100, steps_ahead=steps_ahead, check_integrity=True
    )
    with pytest.raises(LinkClosed):
        core.run()
    return runner


def test_answers_leave_a_step_at_a_time_for_the_whole_batch() -> None:
    link = ScriptedLink([submit("a", [10], 3), submit("b", [20], 2)], [], [], [])
    runner = run(link)
    assert [delta.token_ids for delta in link.deltas("a")] == [[11], [12], [13]]
    assert [delta.token_ids for delta in link.deltas("b")] == [[21], [22]]
    assert [len(step.deltas) for step in link.sent] == [2, 2, 1, 0]
    assert runner.plans == 3


def test_a_step_is_launched_before_the_one_ahead_of_it_is_collected() -> None:
    events: list[str] = []

    class Watched(CountingRunner):
        def launch(self, plan: Plan, between: Callable[[], None] = lambda: None) -> Launched:
            number = self.plans
            step = super().launch(plan)
            events.append(f"launch {number}")

            class Step:
                def collect(self) -> StepOutput:
                    events.append(f"collect {number}")
                    return step.collect()

            return Step()

    link = ScriptedLink([submit("a", [10], 3)], [], [], [])
    run(link, Watched(), steps_ahead=1)
    assert [delta.token_ids for delta in link.deltas("a")] == [[11], [12], [13]]
    # That the third token is the last is known before it is drawn: nothing follows it.
    assert events == [
        "launch 0", "launch 1", "collect 0", "launch 2", "collect 1", "collect 2",
    ]  # fmt: skip


def test_what_was_launched_after_the_last_token_is_collected_and_passed_over() -> None:
    link = ScriptedLink([submit("a", [98], 9)], [], [], [], [])

    class Ending(CountingRunner):
        def launch(self, plan: Plan, between: Callable[[], None] = lambda: None) -> Launched:
            self.plans += 1
            return Computed(StepOutput([0 if self.plans == 2 else 50], [None], {}))

    assert run(link, Ending(), steps_ahead=1).plans == 3
    assert [delta.token_ids for delta in link.deltas("a")] == [[50], [0]]
    assert link.deltas("a")[-1].finish_reason is FinishReason.STOP
    assert link.timeouts_s[1:4] == [0.0, 0.0, HEARTBEAT_S]
    assert link.sent[-1].stats.free_blocks == 32


def test_an_abort_one_step_ahead_frees_its_blocks_at_once() -> None:
    link = ScriptedLink([submit("a", [10], 50)], [], [Abort("a", time.monotonic())], [], [])
    assert run(link, steps_ahead=1).plans == 3
    assert [delta.token_ids for delta in link.deltas("a")] == [[11], [12], []]
    assert link.sent[2].stats.free_blocks == 32
    assert link.sent[2].stats.late_aborts == 0


def test_it_waits_for_messages_only_when_idle() -> None:
    link = ScriptedLink([], [submit("a", [10], 2)], [], [])
    run(link)
    assert link.timeouts_s == [HEARTBEAT_S, HEARTBEAT_S, 0.0, HEARTBEAT_S, HEARTBEAT_S]


def test_an_idle_round_still_sends_a_heartbeat_with_the_figures() -> None:
    link = ScriptedLink([submit("a", [10, 11, 12], 2)], [], [])
    run(link)
    last = link.sent[-1]
    assert last.deltas == []
    assert (last.stats.steps, last.stats.running, last.stats.generation_tokens) == (2, 0, 2)
    assert last.stats.prompt_tokens == 3
    assert last.stats.free_blocks == last.stats.num_blocks == 32


def test_a_refused_request_ends_with_the_reason_and_disturbs_nobody() -> None:
    link = ScriptedLink([submit("long", [1] * 64, 1), submit("a", [10], 1)], [])
    run(link)
    (refused,) = link.deltas("long")
    assert refused.finish_reason is FinishReason.ERROR
    assert refused.error is not None
    assert "64 tokens" in refused.error
    assert link.deltas("a")[-1].finish_reason is FinishReason.LENGTH


def test_a_token_the_model_does_not_have_is_refused_before_it_reaches_a_kernel() -> None:
    link = ScriptedLink([submit("odd", [5, 100], 1)], [])
    assert run(link).plans == 0
    (refused,) = link.deltas("odd")
    assert refused.error is not None
    assert "token id 100 is not one of the model's 100" in refused.error


def test_known_output_is_continued_or_found_complete() -> None:
    request = submit("a", [10], 4).request
    known = [msgspec.structs.replace(request, output_ids=[11] * 2)]
    known.append(msgspec.structs.replace(request, request_id="b", output_ids=[11, 12, 13, 14]))
    known.append(msgspec.structs.replace(request, request_id="c", output_ids=[100]))
    link = ScriptedLink([Submit(one) for one in known], [], [], [])
    run(link)
    assert [delta.token_ids for delta in link.deltas("a")] == [[12], [13]]
    (complete,) = link.deltas("b")
    assert (complete.token_ids, complete.finish_reason) == ([], FinishReason.LENGTH)
    assert complete.usage == Usage(1, 0, 4, 0)
    (refused,) = link.deltas("c")
    assert refused.error is not None
    assert "token id 100" in refused.error


@pytest.mark.parametrize(
    ("cause", "is_memory"),
    [
        (MemoryError(), True),
        (torch.OutOfMemoryError("CUDA out of memory"), True),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: 1 bytes"), True),
        (RuntimeError("shapes do not match"), False),
    ],
)
def test_a_step_that_fails_ends_the_loop_and_says_why(cause: Exception, is_memory: bool) -> None:
    class Failing(CountingRunner):
        def launch(self, plan: Plan, between: Callable[[], None] = lambda: None) -> Launched:
            raise cause

    link = ScriptedLink([submit("a", [10, 11], 3), submit("b", [20], 2)], [])
    with pytest.raises(StepFailed, match="2 requests with 3 new tokens") as caught:
        run(link, Failing())
    assert caught.value.__cause__ is cause
    assert is_lack_of_memory(caught.value.__cause__) == is_memory


def test_an_abort_is_answered_in_the_same_round() -> None:
    link = ScriptedLink([submit("a", [10], 50)], [Abort("a", 0.0), Abort("unknown", 0.0)], [])
    run(link)
    assert link.deltas("a")[-1].finish_reason is FinishReason.ABORT
    assert link.sent[1].deltas[-1].finish_reason is FinishReason.ABORT
    assert link.sent[-1].stats.free_blocks == 32


def test_a_step_is_dropped_for_a_newcomer_and_computed_later() -> None:
    class LooksUp(CountingRunner):
        def launch(self, plan: Plan, between: Callable[[], None] = lambda: None) -> Launched:
            between()
            return super().launch(plan, between)

    crowd: list[ToEngine] = [submit(f"a{n}", [10] * (2 + 2 * (n == 0)), 2) for n in range(7)]
    newcomer = msgspec.structs.replace(submit("b", [50], 1).request, tenant="other")
    link = ScriptedLink(crowd, [Submit(newcomer)], [], [], [], [])
    run(link, LooksUp())
    named = [[delta.request_id for delta in step.deltas] for step in link.sent]
    everyone = [f"a{n}" for n in range(7)]
    assert named == [[], ["b"], everyone, everyone]
    assert link.sent[-1].stats.dropped_steps == 1
    assert [delta.token_ids for delta in link.deltas("a0")] == [[11], [12]]


@pytest.mark.parametrize("at_plan", [1, 2, 3, 7])
def test_an_abort_frees_its_blocks_within_two_steps(at_plan: int) -> None:
    """It comes while a step is computed in which its request has a row: as late as may be."""
    held: dict[int, int] = {}

    class Interrupted(CountingRunner):
        def launch(self, plan: Plan, between: Callable[[], None] = lambda: None) -> Launched:
            if self.plans + 1 == at_plan:
                link.rounds[0].append(Abort("a", time.monotonic()))
            step = super().launch(plan, between)
            held[self.plans] = len({block for row in plan.rows for block in row.state.block_ids[0]})
            return step

    # 40 tokens are read in three steps, so that some aborts fall between a prompt's chunks.
    link = ScriptedLink([submit("b", [1], 50), submit("a", [2] * 40, 20)], *([] for _ in range(12)))
    run(link, Interrupted())
    (last,) = [delta for delta in link.deltas("a") if delta.finish_reason]
    assert last.finish_reason is FinishReason.ABORT
    stats = link.sent[-1].stats
    assert (stats.aborts, stats.abort_steps, stats.late_aborts) == (1, 1, 0)
    for step in link.sent:
        if step.stats.steps > at_plan:  # the step in flight, and no other
            used = step.stats.num_blocks - step.stats.free_blocks
            assert used == held[step.stats.steps] <= -(-step.stats.steps // 4)


def test_aborts_that_come_late_are_counted() -> None:
    aborts: list[ToEngine] = [Abort("a", math.inf), Abort("b", 0.0), Abort("unknown", 0.0)]
    link = ScriptedLink([submit(name, [10], 50) for name in "abc"], [], [], aborts, [])
    run(link)
    stats = link.sent[-1].stats
    assert (stats.aborts, stats.abort_steps, stats.late_aborts) == (2, 3, 1)


def test_a_second_configuration_is_a_bug_of_the_caller() -> None:
    with pytest.raises(AssertionError, match="Configure after the start"):
        run(ScriptedLink([Configure(EngineConfig())]))
