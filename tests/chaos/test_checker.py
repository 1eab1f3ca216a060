"""The checker finds every planted fault, and nothing where there is none."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest

from tests.chaos.checker import check, check_journal
from tests.chaos.history import History, Received
from tests.chaos.questions import Answer, Question
from tests.chaos.tally import Expectation, Tally, problems

Event = dict[str, Any]

NUM_DELTAS = 12
TEXT = "".join(f"w{number} " for number in range(NUM_DELTAS))
ANSWER = Answer(TEXT, tuple(range(NUM_DELTAS)))
QUESTION = Question("Hello", NUM_DELTAS, None)


def make_journal() -> list[Event]:
    response: Event = {"id": "resp_1", "status": "in_progress", "output": []}
    whole = {**response, "status": "completed", "output": [{"content": [{"text": TEXT}]}]}
    deltas = [
        {"type": "response.output_text.delta", "delta": f"w{number} ", "token_ids": [number]}
        for number in range(NUM_DELTAS)
    ]
    events: list[Event] = [
        {"type": "response.created", "response": response},
        {"type": "response.in_progress", "response": response},
        *deltas,
        {"type": "response.output_text.done", "text": TEXT},
        {"type": "response.completed", "response": whole},
    ]
    return [{**event, "sequence_number": number} for number, event in enumerate(events)]


def make_history(events: list[Event], *, step_s: float = 0.1) -> History:
    history = History(QUESTION, "sse", 0.0, response_id="resp_1")
    history.received = [
        Received(number * step_s, 1 + number // 5, copy.deepcopy(event))
        for number, event in enumerate(events)
    ]
    history.ended_s = len(events) * step_s
    return history


def merge(events: list[Event], first: int, last: int) -> list[Event]:
    """What a reader that lagged gets instead of the deltas ``first`` to ``last``."""
    run = events[first : last + 1]
    text = "".join(event["delta"] for event in run)
    token_ids = [token for event in run for token in event["token_ids"]]
    merged = {**run[-1], "delta": text, "token_ids": token_ids}
    return [*events[:first], merged, *events[last + 1 :]]


def test_an_undisturbed_history_is_whole() -> None:
    verdict = check(make_history(make_journal()), make_journal(), ANSWER)
    assert verdict.ending == "whole"
    assert not verdict.faults
    assert verdict.num_tokens == NUM_DELTAS
    assert verdict.resumed


def test_merged_deltas_are_whole() -> None:
    verdict = check(make_history(merge(make_journal(), 4, 9)), make_journal(), ANSWER)
    assert verdict.ending == "whole"
    assert not verdict.faults


class Planted(NamedTuple):
    """A fault, and one of the words by which it must be found."""

    name: str
    change: Callable[[list[Event]], list[Event]]
    found_as: str


def without(*numbers: int) -> Callable[[list[Event]], list[Event]]:
    return lambda events: [event for at, event in enumerate(events) if at not in numbers]


def swapped(events: list[Event]) -> list[Event]:
    return [*events[:4], events[5], events[4], *events[6:]]


def renumbered(events: list[Event]) -> list[Event]:
    """A delta is gone, and the numbers hide it."""
    kept = [*events[:6], *events[7:]]
    return [{**event, "sequence_number": at} for at, event in enumerate(kept)]


def changed(events: list[Event]) -> list[Event]:
    return [*events[:6], {**events[6], "delta": "x"}, *events[7:]]


def truncated(events: list[Event]) -> list[Event]:
    """The answer stops half way, and what follows says that this was all of it."""
    text = "".join(event["delta"] for event in events[2:8])
    end = copy.deepcopy(events[-1])
    end["response"]["output"] = [{"content": [{"text": text}]}]
    kept = [*events[:8], {**events[-2], "text": text}, end]
    return [{**event, "sequence_number": at} for at, event in enumerate(kept)]


def bad_merge(events: list[Event]) -> list[Event]:
    merged = merge(events, 4, 9)
    merged[4] = {**merged[4], "delta": merged[4]["delta"][3:]}
    return merged


PLANTED = [
    Planted("a delta dropped", without(6), "lost"),
    Planted("deltas dropped", without(6, 7, 8), "lost"),
    Planted("the first event dropped", without(0), "lost"),
    Planted("the done event dropped", without(NUM_DELTAS + 2), "lost"),
    Planted("doubled", lambda events: [*events[:7], events[6], *events[7:]], "doubled"),
    Planted("begun again", lambda events: [*events[:7], *events[3:]], "doubled"),
    Planted("reordered", swapped, "doubled"),
    Planted("numbers hide a loss", renumbered, "other text"),
    Planted("changed", changed, "altered"),
    Planted("merged wrongly", bad_merge, "lost"),
    Planted("no end", lambda events: events[:-1], "silent"),
    Planted("two ends", lambda events: [*events, events[-1]], "second end"),
    Planted(
        "goes on after the end",
        lambda events: [*events, {**events[5], "sequence_number": len(events)}],
        "event after the end",
    ),
]


@pytest.mark.parametrize("planted", PLANTED, ids=lambda planted: planted.name)
def test_a_planted_fault_of_a_client_is_found(planted: Planted) -> None:
    history = make_history(planted.change(make_journal()))
    verdict = check(history, make_journal(), ANSWER)
    assert verdict.faults[planted.found_as] > 0, verdict
    assert fails(history, make_journal())


@pytest.mark.parametrize("planted", PLANTED[:3], ids=lambda planted: planted.name)
def test_a_journal_with_a_gap_is_found(planted: Planted) -> None:
    assert check_journal(planted.change(make_journal()))["journal not dense"]


def test_a_journal_with_two_ends_is_found() -> None:
    journal = make_journal()
    second = {**journal[-1], "sequence_number": len(journal)}
    assert check_journal([*journal, second])["journal's end"]
    assert check_journal(journal[:-1])["journal's end"]
    assert not check_journal(journal)


def test_a_truncated_answer_shown_as_complete_is_found_though_the_journal_agrees() -> None:
    events = truncated(make_journal())
    verdict = check(make_history(events), events, ANSWER)
    assert verdict.ending == "truncated, shown as complete"
    assert fails(make_history(events), events)


def test_another_continuation_is_found_though_the_journal_agrees() -> None:
    events = changed(make_journal())
    assert check(make_history(events), events, ANSWER).faults["other text"]


def test_a_failure_is_no_fault_but_no_whole_answer_either() -> None:
    events = make_journal()[:8]
    failed = {"id": "resp_1", "error": {"code": "engine_died"}}
    events.append({"type": "response.failed", "response": failed, "sequence_number": 8})
    verdict = check(make_history(events), events, ANSWER)
    assert verdict.ending == "failed engine_died"
    assert not verdict.faults
    assert fails(make_history(events), events)


def test_a_failure_after_another_text_is_found() -> None:
    events = changed(make_journal())[:8]
    failed = {"id": "resp_1", "error": {"code": "engine_died"}}
    events.append({"type": "response.failed", "response": failed, "sequence_number": 8})
    assert check(make_history(events), events, ANSWER).faults["other text"]


def test_silence_is_found() -> None:
    history = make_history(make_journal())
    history.received[9:] = [one._replace(at_s=one.at_s + 6.0) for one in history.received[9:]]
    assert check(history, make_journal(), ANSWER).faults["hung"]
    quick = make_history(make_journal())
    assert not check(quick, make_journal(), ANSWER).faults["hung"]


def test_a_said_loss_is_no_silent_one() -> None:
    events = make_journal()
    gap = {"type": "response.millrace.discontinuity", "first_lost": 5, "last_lost": 7}
    events[5:8] = [{**gap, "sequence_number": 7}]
    verdict = check(make_history(events), make_journal(), ANSWER)
    assert verdict.num_gaps == 1
    assert not verdict.faults
    tally = Tally()
    tally.struck["cut"] = 1
    tally.add(verdict)
    assert problems(tally, Expectation(), least_struck=1) == ["1 discontinuities"]
    assert not problems(tally, Expectation(gaps=True), least_struck=1)


def fails(history: History, journal: list[Event]) -> bool:
    """Whether a run with this one history is refused."""
    tally = Tally()
    tally.struck["cut"] = 1
    tally.add(check(history, journal, ANSWER))
    return bool(problems(tally, Expectation(), least_struck=1))


def good_tally() -> Tally:
    tally = Tally()
    tally.struck["cut"] = 3
    tally.add(check(make_history(make_journal()), make_journal(), ANSWER))
    tally.back(0.3)
    return tally


def test_a_good_run_passes() -> None:
    assert not problems(good_tally(), Expectation(), least_struck=3)


def no_fault(tally: Tally) -> None:
    tally.struck.clear()


def no_token(tally: Tally) -> None:
    tally.num_tokens = 0


def nothing_whole(tally: Tally) -> None:
    tally.endings = type(tally.endings)({"failed engine_died": 1})


def never_back(tally: Tally) -> None:
    tally.back(None)


def late(tally: Tally) -> None:
    tally.back(5.5)


@pytest.mark.parametrize("spoil", [no_fault, no_token, nothing_whole, never_back, late])
def test_a_vacuous_or_failed_run_does_not_pass(spoil: Callable[[Tally], None]) -> None:
    tally = good_tally()
    spoil(tally)
    assert problems(tally, Expectation(), least_struck=3)


def test_nothing_at_all_does_not_pass() -> None:
    assert problems(Tally(), Expectation(least_whole=0.0), least_struck=0)
