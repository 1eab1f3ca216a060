"""The bounded queue: who is refused, with which Retry-After, and what those who wait are told."""

from __future__ import annotations

import contextlib

import pytest

from engine import EngineStats
from server.errors import ApiError
from server.guard.queue import WaitingTurn, WaitingTurns
from server.metering.pace import Pace

FULL = EngineStats(waiting=1)


def pace(tokens_per_s: float | None = None) -> Pace:
    measured = Pace()
    if tokens_per_s is not None:
        measured.update(EngineStats(steps=1, generation_tokens=int(tokens_per_s), busy_s=1.0))
    return measured


def turn(owner: str = "a", prompt: int = 100, most: int = 100, **fields: float) -> WaitingTurn:
    due_s = fields.get("due_s", 0.0)
    return WaitingTurn(owner, fields.get("weight", 1.0), 0, prompt, most, 1, 0.0, due_s)


def queue(
    tokens_per_s: float | None = None, *, most: int = 1000, wait_s: float = 60.0, free: bool = False
) -> WaitingTurns:
    stats = EngineStats() if free else FULL
    return WaitingTurns(lambda: stats, pace(tokens_per_s), max_waiting=most, max_wait_s=wait_s)


def refusal(turns: WaitingTurns, one: WaitingTurn, deadline_s: float | None = None) -> ApiError:
    with pytest.raises(ApiError) as caught:
        turns.check(one, deadline_s)
    assert caught.value.status == 429
    return caught.value


def test_nobody_is_refused_before_anything_was_measured() -> None:
    turns = queue()
    for index in range(500):
        turns.check(turn(prompt=10**6))
        turns.enter(str(index), turn(prompt=10**6))
    assert turns.place("499") == (500, None)


def test_a_long_wait_is_refused_until_it_is_short_enough() -> None:
    turns = queue(100.0, wait_s=10.0)
    for index in range(4):
        turns.check(turn())
        turns.enter(str(index), turn())  # 200 tokens each, 2 s
    # 4 * 2 s, and the request's own prompt, 1 s.
    assert turns.place("3").place == 4
    assert turns.place("3").wait_s == pytest.approx(3 * 2 + 1)
    turns.enter("4", turn())
    error = refusal(turns, turn())
    assert (error.code, error.retry_after_s) == ("queue_too_slow", 1)
    turns.enter("5", turn())
    assert refusal(turns, turn()).retry_after_s == 3
    turns.leave("0")
    turns.leave("1")
    turns.check(turn())


def test_while_seats_are_free_only_prompts_stand_before_a_token() -> None:
    turns = queue(100.0, wait_s=5.0, free=True)
    for index in range(4):
        turns.check(turn(prompt=50, most=10_000))
        turns.enter(str(index), turn(prompt=50, most=10_000))


def test_lengths_of_answers_are_learnt() -> None:
    turns = queue(100.0)
    turns.enter("0", turn(prompt=0, most=1000))
    turns.enter("1", turn(prompt=0, most=1000))
    assert turns.place("1").wait_s == pytest.approx(10.0)
    turns.answered(200)
    assert turns.place("1").wait_s == pytest.approx(2.0)


def test_ones_queue_is_not_the_others() -> None:
    turns = queue(100.0, most=10, wait_s=30.0)
    for index in range(10):
        turns.enter(str(index), turn("a"))
    assert refusal(turns, turn("a")).code == "queue_full"
    turns.check(turn("b"))
    turns.enter("b", turn("b"))
    # Half of the engine is b's: its own prompt at half the pace.
    assert turns.place("b").place == 1
    assert turns.place("b").wait_s == pytest.approx(2.0)


def test_shares_follow_weights() -> None:
    turns = queue(100.0)
    turns.enter("a", turn("a", weight=3.0))
    turns.enter("b", turn("b"))
    assert turns.place("a").wait_s == pytest.approx(1 / 0.75)
    assert turns.place("b").wait_s == pytest.approx(1 / 0.25)


def test_even_many_keys_find_an_end() -> None:
    turns = queue(most=10)
    let_in = 0
    for index in range(100):
        one = turn(f"key {index}")
        with contextlib.suppress(ApiError):
            turns.check(one)
            turns.enter(str(index), one)
            let_in += 1
    assert let_in == 20
    assert refusal(turns, turn("new")).code == "queue_full"


def test_a_deadline_that_cannot_be_met_is_refused_at_once() -> None:
    turns = queue(100.0)
    turns.enter("0", turn())
    turns.check(turn(), 3.5)
    error = refusal(turns, turn(), 2.0)
    assert (error.code, error.retry_after_s) == ("deadline_unreachable", 1)


def test_the_pace_follows_the_engine_and_its_successor() -> None:
    measured = Pace()
    assert measured.tokens_per_s is None
    measured.update(EngineStats(steps=1, prompt_tokens=50, generation_tokens=50, busy_s=1.0))
    assert measured.tokens_per_s == pytest.approx(100)
    measured.update(EngineStats(steps=1, prompt_tokens=50, generation_tokens=50, busy_s=1.0))
    assert measured.tokens_per_s == pytest.approx(100), "idle time does not count"
    for step in range(2, 100):
        measured.update(EngineStats(steps=step, prompt_tokens=50 + 10 * step, busy_s=float(step)))
    assert measured.tokens_per_s == pytest.approx(10, rel=0.2)
    measured.update(EngineStats(steps=0, busy_s=0.0))
    assert measured.tokens_per_s == pytest.approx(10, rel=0.2)


def test_what_is_due_first_stands_first() -> None:
    turns = queue(100.0, wait_s=5.0)
    for index in range(2):
        turns.enter(str(index), turn(due_s=60.0 + index))  # 200 tokens each, 2 s
    assert refusal(turns, turn(prompt=200, due_s=62.0)).code == "queue_too_slow"
    turns.check(turn(prompt=200, due_s=2.0), 2.0)
    turns.enter("hurried", turn(due_s=2.0))
    assert [turns.place(name).place for name in ("hurried", "0", "1")] == [1, 2, 3]
    assert turns.place("hurried").wait_s == pytest.approx(1)
    assert turns.place("0").wait_s == pytest.approx(2 + 1)
