"""The scheduler's rules of order: budget, chunks, seats, priorities, preemption."""

from __future__ import annotations

import pytest

from engine.errors import RequestError
from engine.scheduler import Phase, Plan, RequestState
from engine.types import Usage
from tests.engine.scheduler_steps import add, finish_step, run_to_end, scheduler, step


def test_nothing_to_do_is_an_empty_plan() -> None:
    sched = scheduler()
    assert not sched.has_work
    assert sched.plan() == Plan([], 0)


def test_requests_catch_up_and_then_gain_a_token_a_step() -> None:
    sched = scheduler()
    add(sched, "a", 7)
    assert step(sched) == [("a", 0, 7, True)]
    assert step(sched) == [("a", 7, 1, True)]
    assert step(sched) == [("a", 8, 1, True)]


def test_single_tokens_go_before_prompts_and_prompts_are_cut_to_the_budget() -> None:
    sched = scheduler(max_num_tokens=10)
    add(sched, "a", 3)
    step(sched)
    add(sched, "b", 14)
    add(sched, "c", 14)
    assert step(sched) == [("a", 3, 1, True), ("b", 0, 9, False)]
    assert step(sched) == [("a", 4, 1, True), ("b", 9, 5, True), ("c", 0, 4, False)]
    assert step(sched) == [("a", 5, 1, True), ("b", 14, 1, True), ("c", 4, 8, False)]


def test_chunks_leave_room_for_others_in_the_same_step() -> None:
    sched = scheduler(max_num_tokens=10, chunk_tokens=4)
    add(sched, "a", 9)
    add(sched, "b", 9)
    add(sched, "c", 9)
    assert step(sched) == [("a", 0, 4, False), ("b", 0, 4, False), ("c", 0, 2, False)]


def test_seats_are_limited() -> None:
    sched = scheduler(max_num_seqs=2)
    for name in "abc":
        add(sched, name)
    assert [row[0] for row in step(sched)] == ["a", "b"]
    assert sched.stats()["waiting"] == 1
    sched.abort("a")
    assert [row[0] for row in step(sched)] == ["b", "c"]


def test_lower_priority_numbers_go_first_and_equals_in_order_of_arrival() -> None:
    sched = scheduler(max_num_seqs=1)
    for name, priority in (("a", 5), ("b", 0), ("c", 5), ("d", -3), ("e", 0)):
        add(sched, name, priority=priority, max_tokens=2)
    assert run_to_end(sched) == ["d", "b", "e", "a", "c"]


def test_what_is_due_first_goes_first_within_a_priority() -> None:
    sched = scheduler(max_num_seqs=1)
    for name, priority, due_s in (("a", 0, 9), ("b", 1, 1), ("c", 0, 5), ("d", 0, 7), ("e", 0, 5)):
        add(sched, name, priority=priority, due_s=due_s, max_tokens=2)
    assert run_to_end(sched) == ["c", "e", "d", "a", "b"]


def test_what_is_due_first_takes_no_seat_from_one_that_has_it() -> None:
    sched = scheduler(max_num_seqs=1)
    add(sched, "a", due_s=9, max_tokens=3)
    step(sched)
    add(sched, "b", due_s=9, max_tokens=1)
    add(sched, "c", due_s=1, max_tokens=1)
    assert run_to_end(sched) == ["a", "c", "b"]
    assert sched.stats()["preemptions"] == 0


def test_what_is_due_last_gives_way_to_growth() -> None:
    sched = scheduler(num_blocks=8, block_size=2, max_model_len=14)  # 7 usable
    add(sched, "a", 4, due_s=2, max_tokens=8)
    add(sched, "b", 4, due_s=1, max_tokens=8)
    assert run_to_end(sched) == ["b", "a"]
    assert sched.stats()["preemptions"] >= 1


def test_deadlines_of_one_tenant_are_no_matter_to_another() -> None:
    sched = scheduler(max_num_seqs=1)
    add(sched, "hurried", tenant="one", due_s=0, max_tokens=8)
    step(sched)
    add(sched, "more hurried", tenant="one", due_s=-5, max_tokens=8)
    add(sched, "patient", tenant="two", due_s=99, max_tokens=1)
    assert run_to_end(sched) == ["hurried", "patient", "more hurried"]


def test_nobody_starves_behind_those_in_a_hurry() -> None:
    """One that may wait long goes first once its time has come, however many are always due."""
    sched = scheduler(max_num_seqs=1, max_model_len=64)
    add(sched, "patient", due_s=60, max_tokens=1)
    ended: list[str] = []
    for now in range(200):
        add(sched, f"urgent{now}", due_s=now + 5, max_tokens=1)
        ended += [delta.request_id for delta in finish_step(sched, sched.plan())]
        if "patient" in ended:
            break
    assert ended == [*(f"urgent{now}" for now in range(55)), "patient"]


def test_a_deadline_must_be_a_number() -> None:
    with pytest.raises(RequestError, match="due_s is not a number"):
        add(scheduler(), "a", due_s=float("nan"))


def test_an_urgent_request_takes_a_seat_and_its_owner_returns_to_the_same_answer() -> None:
    sched = scheduler(max_num_seqs=2)
    add(sched, "a", priority=1)
    add(sched, "b", priority=1)
    step(sched)
    add(sched, "equal", priority=1)
    step(sched)
    assert sched.stats()["preemptions"] == 0
    add(sched, "urgent", priority=0, max_tokens=1)
    assert step(sched) == [("a", 5, 1, True), ("urgent", 0, 4, True)]
    # b had 6 tokens, of which 4 are still cached, and its seat is before the equal one's.
    assert step(sched) == [("a", 6, 1, True), ("b", 4, 2, True)]
    assert sched.stats()["preemptions"] == 1
    assert sched.stats()["waiting"] == 1


def test_an_urgent_request_takes_blocks() -> None:
    sched = scheduler(num_blocks=9, max_model_len=28)  # 8 usable
    add(sched, "a", 12, priority=1, max_tokens=10)
    add(sched, "b", 8, priority=2, max_tokens=10)
    step(sched)
    add(sched, "urgent", 16, priority=0, max_tokens=2)
    assert [row[0] for row in step(sched)] == ["a", "urgent"]
    assert run_to_end(sched) == ["urgent", "a", "b"]


def test_nobody_gives_way_for_a_request_that_would_not_fit_even_then() -> None:
    sched = scheduler(num_blocks=9)  # 8 usable
    add(sched, "same", 20, priority=0, max_tokens=4)
    add(sched, "low", 4, priority=1, max_tokens=4)
    step(sched)
    add(sched, "large", 24, priority=0, max_tokens=4)
    assert [row[0] for row in step(sched)] == ["same", "low"]
    assert sched.stats()["preemptions"] == 0


def test_two_large_requests_on_a_tiny_pool_end_one_after_the_other() -> None:
    """Both start, both grow into all of the pool: the later gives way once, and neither starves."""
    sched = scheduler(num_blocks=9, block_size=4, max_model_len=33)  # 8 usable: 32 tokens
    add(sched, "a", 4, max_tokens=28)
    add(sched, "b", 4, max_tokens=28)
    assert run_to_end(sched, limit=80) == ["a", "b"]
    assert 1 <= sched.stats()["preemptions"] <= 3
    assert sched.stats()["generation_tokens"] == 56


def test_the_last_arrival_gives_way_and_keeps_its_tokens() -> None:
    sched = scheduler(num_blocks=8, block_size=2, max_model_len=14)  # 7 usable
    add(sched, "a", 4, max_tokens=8)
    add(sched, "b", 4, max_tokens=8)
    states: dict[str, RequestState] = {}
    while not sched.stats()["preemptions"]:
        plan = sched.plan()
        states |= {row.state.request.request_id: row.state for row in plan.rows}
        finish_step(sched, plan)
    assert states["a"].phase is Phase.RUNNING
    assert states["b"].phase is Phase.WAITING
    assert states["b"].num_output > 0
    assert states["b"].block_ids == [[]]
    generated = list(states["b"].token_ids)
    assert run_to_end(sched) == ["a", "b"]
    assert states["b"].token_ids[: len(generated)] == generated
    assert states["b"].usage == Usage(4, 0, 8, states["b"].num_preemptions)


def test_a_newcomer_does_not_overtake_one_that_waits_for_blocks() -> None:
    sched = scheduler(num_blocks=9)  # 8 usable
    add(sched, "a", 16, max_tokens=8)
    step(sched)
    add(sched, "large", 20, max_tokens=4)
    add(sched, "small", 1, max_tokens=1)
    assert [row[0] for row in step(sched)] == ["a"]
    assert run_to_end(sched) == ["a", "small", "large"]


def test_cached_prefixes_shrink_when_blocks_are_needed_and_answers_go_on() -> None:
    sched = scheduler(num_blocks=9)  # 8 usable
    for name in "abcdef":
        add(sched, name, 8, max_tokens=4)
        assert run_to_end(sched) == [name]
    stats = sched.stats()
    assert stats["preemptions"] == 0
    assert stats["free_blocks"] == 8
    assert stats["cached_blocks"] == 8 - 1  # the last request's third block was not filled
