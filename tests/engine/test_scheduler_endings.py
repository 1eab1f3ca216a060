"""How requests end and are refused, and what the scheduler says of them."""

from __future__ import annotations

from typing import Any

import pytest

from engine.errors import PromptTooLong, RequestError
from engine.scheduler import InvariantError, Phase, StepOutput
from engine.types import Delta, EngineStats, FinishReason, Usage
from tests.engine.scheduler_steps import ENTRY, add, finish_step, run_to_end, scheduler, shape, step
from tests.engine.scheduler_world import EOS, request_of


@pytest.mark.parametrize(
    ("options", "reason", "num_tokens"),
    [
        ({}, FinishReason.STOP, 1),
        ({"min_tokens": 3}, FinishReason.STOP, 4),
        ({"ignore_eos": True, "max_tokens": 6}, FinishReason.LENGTH, 6),
        ({"ignore_eos": True, "stop_token_ids": (EOS,)}, FinishReason.STOP, 1),
        ({"max_tokens": 1}, FinishReason.STOP, 1),
        ({"min_tokens": 2, "max_tokens": 2}, FinishReason.LENGTH, 2),
    ],
)
def test_end_of_sequence(options: dict[str, Any], reason: FinishReason, num_tokens: int) -> None:
    sched = scheduler()
    add(sched, "a", **options)
    deltas: list[Delta] = []
    while sched.has_work:
        deltas += finish_step(sched, sched.plan(), EOS)
    assert [d.finish_reason for d in deltas] == [None] * (num_tokens - 1) + [reason]
    assert [t for d in deltas for t in d.token_ids] == [EOS] * num_tokens
    assert [d.usage for d in deltas[:-1]] == [None] * (num_tokens - 1)
    assert deltas[-1].usage == Usage(4, 0, num_tokens, 0)


def test_stop_token_ids_end_the_answer_and_are_part_of_it() -> None:
    sched = scheduler()
    add(sched, "a", stop_token_ids=(7, 8))
    step(sched, token=6)
    (delta,) = finish_step(sched, sched.plan(), 8)
    assert (delta.token_ids, delta.finish_reason) == ([8], FinishReason.STOP)


def test_the_models_context_ends_an_answer() -> None:
    sched = scheduler(max_model_len=9)
    add(sched, "a", 6)
    deltas = [d for _ in range(3) for d in finish_step(sched, sched.plan())]
    assert deltas[-1].finish_reason is FinishReason.LENGTH
    assert deltas[-1].usage == Usage(6, 0, 3, 0)
    assert not sched.has_work


def test_a_follow_up_finds_prompt_and_answer_in_the_cache() -> None:
    sched = scheduler()
    sched.add(request_of("a", [1, 2, 3, 4, 5, 6], max_tokens=7))
    run_to_end(sched)
    # 13 tokens, the last one never computed: 3 full blocks.
    sched.add(request_of("b", [1, 2, 3, 4, 5, 6, *[5] * 7, 9, 9], max_tokens=1))
    plan = sched.plan()
    assert shape(plan) == [("b", 12, 3, True)]
    (delta,) = finish_step(sched, plan)
    assert delta.usage == Usage(15, 12, 1, 0)
    stats = sched.stats()
    assert stats["queried_tokens"] == 21
    assert stats["cached_tokens"] == 12
    assert stats["prompt_tokens"] == 9


def test_logprobs_are_passed_on() -> None:
    sched = scheduler()
    add(sched, "a", logprobs=1)
    plan = sched.plan()
    (delta,) = sched.commit(plan, StepOutput([5], [ENTRY], {}))
    assert delta.logprobs == [ENTRY]
    assert delta.prompt_logprobs is None


def test_prompt_logprobs_come_once_whole_with_the_first_token_and_never_from_the_cache() -> None:
    sched = scheduler(max_num_tokens=4)
    tokens = [1, 2, 3, 4, 5, 6, 7, 8, 9]
    sched.add(request_of("warm", tokens, max_tokens=1))
    run_to_end(sched)
    sched.add(request_of("a", tokens, max_tokens=3, prompt_logprobs=0))
    due: list[int] = []
    deltas: list[Delta] = []
    while sched.has_work:
        plan = sched.plan()
        due += [row.num_prompt_logprobs for row in plan.rows]
        deltas += finish_step(sched, plan)
    assert due == [4, 4, 0, 0, 0]
    assert [len(d.prompt_logprobs or []) for d in deltas] == [8, 0, 0]
    assert deltas[-1].usage == Usage(9, 0, 3, 0)


def test_prompt_logprobs_of_a_single_token_are_an_empty_list() -> None:
    sched = scheduler()
    sched.add(request_of("a", [1], prompt_logprobs=2))
    plan = sched.plan()
    assert not plan.rows[0].prompt_logprobs
    (delta,) = finish_step(sched, plan)
    assert delta.prompt_logprobs == []


def test_abort_of_waiting_running_and_unknown_requests() -> None:
    sched = scheduler(max_num_seqs=1)
    add(sched, "a")
    add(sched, "b")
    step(sched)
    for name, num_tokens in (("b", 0), ("a", 1)):
        delta = sched.abort(name)
        assert delta is not None
        assert delta.finish_reason is FinishReason.ABORT
        assert delta.token_ids == []
        assert delta.usage == Usage(4, 0, num_tokens, 0)
        assert sched.abort(name) is None
    assert not sched.has_work
    assert sched.stats()["free_blocks"] == sched.stats()["num_blocks"]
    assert sched.plan().rows == []


def test_an_abort_during_a_step_frees_at_once_and_drops_its_token() -> None:
    sched = scheduler()
    add(sched, "a")
    add(sched, "b")
    plan = sched.plan()
    sched.abort("a")
    assert sched.stats()["free_blocks"] == sched.stats()["num_blocks"] - 1
    deltas = sched.commit(plan, StepOutput([7, 8], [None, None], {}))
    assert [(d.request_id, d.token_ids) for d in deltas] == [("b", [8])]


def test_fail_says_why() -> None:
    sched = scheduler()
    add(sched, "a")
    delta = sched.fail("a", "the grammar does not compile")
    assert delta is not None
    assert (delta.finish_reason, delta.error) == (
        FinishReason.ERROR,
        "the grammar does not compile",
    )
    assert not sched.has_work


def test_a_duplicate_id_is_refused_while_the_first_is_in_flight() -> None:
    sched = scheduler()
    add(sched, "a")
    with pytest.raises(RequestError, match="'a' is in flight already") as caught:
        add(sched, "a")
    assert caught.value.param == "request_id"
    sched.abort("a")
    add(sched, "a")


@pytest.mark.parametrize(
    ("prompt", "error", "match"),
    [
        ([], RequestError, "the prompt is empty"),
        ([1, -1], RequestError, "not made of token ids"),
        ([2**40], RequestError, "not made of token ids"),
        ([1] * 256, PromptTooLong, "256 tokens; with a context of 256 it may have at most 255"),
    ],
)
def test_impossible_prompts_are_refused(
    prompt: list[int], error: type[RequestError], match: str
) -> None:
    sched = scheduler()
    with pytest.raises(error, match=match) as caught:
        sched.add(request_of("a", prompt))
    assert caught.value.param == "prompt"
    assert not sched.has_work


def test_what_can_never_fit_is_refused_and_what_just_fits_is_served() -> None:
    sched = scheduler(num_blocks=5)  # 16 tokens
    with pytest.raises(RequestError, match="ask for 17 in all at most"):
        add(sched, "large", 10, max_tokens=8)
    add(sched, "fits", 10, max_tokens=7)
    assert run_to_end(sched) == ["fits"]


def test_stats_are_fields_of_engine_stats() -> None:
    sched = scheduler()
    add(sched, "a", 9, max_tokens=3)
    run_to_end(sched)
    stats = EngineStats(**sched.stats())
    assert stats == EngineStats(
        num_blocks=99,
        free_blocks=99,
        cached_blocks=2,
        prompt_tokens=9,
        queried_tokens=9,
        generation_tokens=3,
    )


def test_commit_takes_each_plan_once() -> None:
    sched = scheduler()
    add(sched, "a")
    old, plan = sched.plan(), sched.plan()
    output = StepOutput([5], [None], {})
    with pytest.raises(InvariantError, match="in their order"):
        sched.commit(old, output)
    sched.commit(plan, output)
    with pytest.raises(InvariantError, match="in their order"):
        sched.commit(plan, output)


@pytest.mark.parametrize(
    ("output", "match"),
    [
        (StepOutput([], [], {0: [ENTRY] * 3}), "1 rows sample, but the step brought 0 tokens"),
        (StepOutput([5], [], {0: [ENTRY] * 3}), "and 0 logprobs"),
        (StepOutput([5], [None], {}), "3 prompt logprobs are due"),
        (StepOutput([5], [None], {0: [ENTRY]}), "3 prompt logprobs are due"),
    ],
)
def test_an_output_that_does_not_match_the_plan_is_refused(output: StepOutput, match: str) -> None:
    sched = scheduler()
    add(sched, "a", 4, prompt_logprobs=1)
    plan = sched.plan()
    with pytest.raises(InvariantError, match=match):
        sched.commit(plan, output)


def test_phases_refuse_illegal_transitions() -> None:
    sched = scheduler()
    add(sched, "a")
    state = sched.plan().rows[0].state
    with pytest.raises(InvariantError, match="a is running, from where it cannot become running"):
        state.move(Phase.RUNNING)
    sched.abort("a")
    for phase in Phase:
        with pytest.raises(InvariantError, match="a is finished"):
            state.move(phase)


def test_what_the_sampler_needs_is_kept() -> None:
    sched = scheduler()
    add(sched, "a", 4, stop_token_ids=(7,))
    state = sched.plan().rows[0].state
    for token in (5, 6, 5):
        finish_step(sched, sched.plan(), token)
    assert state.output_counts == {5: 2, 6: 1}
    assert state.stop_ids == {7, EOS}
    assert state.token_ids[-3:] == [5, 6, 5]
