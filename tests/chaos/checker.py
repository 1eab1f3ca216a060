"""The history checker: a client's log against the journal and against an undisturbed run.

A client may get adjacent text deltas merged into one that has the last one's sequence number; what
it must never get is a gap, a double, another order, another content, an end that is not the
journal's, or an answer shown as complete that is not the one of the undisturbed run.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections import Counter
from collections.abc import Sequence
from typing import Any

from tests.chaos.history import DELTA, TERMINAL, History, Received
from tests.chaos.questions import Answer

__all__ = ["HUNG_S", "Verdict", "check", "check_journal"]

HUNG_S = 5.0
GAP = "response.millrace.discontinuity"

Event = dict[str, Any]


@dataclasses.dataclass
class Verdict:
    """What is to be said of one history.

    ``ending`` is "whole" (the undisturbed run's answer to the last token), "failed CODE",
    "cancelled", "refused CODE" or "none". ``faults`` counts what must never be.
    """

    ending: str
    faults: Counter[str]
    num_tokens: int
    num_gaps: int = 0
    """Discontinuities that the server said."""
    resumed: bool = False
    moves: int = 0
    """Times that it was resumed at another server."""

    def add(self, fault: str, count: int = 1) -> None:
        """Count a fault."""
        self.faults[fault] += count


def check(
    history: History, journal: Sequence[Event] | None, answer: Answer, *, hung_s: float = HUNG_S
) -> Verdict:
    """Judge one history; ``journal`` is None where the store has no log of that turn any more."""
    verdict = Verdict(
        ending=_ending(history),
        faults=Counter(),
        num_tokens=history.num_tokens,
        resumed=len({one.connection for one in history.received}) > 1,
        moves=history.moves,
    )
    _check_order(history.received, journal, verdict)
    _check_end(history, journal, verdict)
    _check_answer(history, answer, verdict)
    _check_pace(history, hung_s, verdict)
    if journal is not None:
        verdict.faults.update(check_journal(journal))
    return verdict


def check_journal(journal: Sequence[Event]) -> Counter[str]:
    """Judge a stored log by itself: dense from 0, one terminal event, and that one last."""
    faults: Counter[str] = Counter()
    numbers = [event["sequence_number"] for event in journal]
    if numbers != list(range(len(numbers))):
        faults["journal not dense"] += 1
    ends = [at for at, event in enumerate(journal) if event["type"] in TERMINAL]
    if ends != [len(journal) - 1]:
        faults["journal's end"] += 1
    return faults


def _ending(history: History) -> str:
    if history.refused is not None:
        return f"refused {history.refused}"
    terminal = history.terminal
    if terminal is None:
        return "none"
    if terminal.kind == "response.failed":
        error = terminal.event["response"].get("error") or {}
        return f"failed {error.get('code')}"
    if terminal.kind == "response.cancelled":
        return "cancelled"
    return "whole"


def _check_order(
    received: Sequence[Received], journal: Sequence[Event] | None, verdict: Verdict
) -> None:
    stored = {event["sequence_number"]: event for event in journal or ()}
    seen: set[int] = set()
    last = -1
    said_lost = False
    for one in received:
        number = one.number
        if number <= last:
            verdict.add("doubled" if number in seen else "reordered")
            continue
        if one.kind == GAP:
            verdict.num_gaps += 1
            said_lost = True
        elif number > last + 1 and one.kind != DELTA:
            verdict.add("lost", number - last - 1)
        elif journal is not None and not said_lost:
            _compare(one, [stored.get(at) for at in range(last + 1, number + 1)], verdict)
        elif number > last + 1:
            # Nothing is left to compare with; a run of merged deltas cannot be told from a gap.
            verdict.add("lost", number - last - 1)
        seen.update(range(last + 1, number + 1) if one.kind == DELTA else (number,))
        last = number


def _compare(one: Received, span: Sequence[Event | None], verdict: Verdict) -> None:
    """Compare an event with what the journal has for it, or for the run it was merged from."""
    if any(event is None for event in span):
        verdict.add("not in the journal")
        return
    events = [event for event in span if event is not None]
    if len(events) == 1:
        if events[0] != one.event:
            verdict.add("altered")
        return
    others = sum(event["type"] != DELTA for event in events)
    merged = "".join(event["delta"] for event in events if event["type"] == DELTA)
    if others or merged != one.event["delta"]:
        verdict.add("lost", len(events) - 1)


def _check_end(history: History, journal: Sequence[Event] | None, verdict: Verdict) -> None:
    ends = [one for one in history.received if one.kind in TERMINAL]
    if len(ends) > 1:
        verdict.add("second end", len(ends) - 1)
    if ends and history.received[-1].kind not in TERMINAL:
        verdict.add("event after the end")
    if not ends and history.refused is None:
        verdict.add("silent")
    if ends and journal and verdict.num_gaps == 0 and journal[-1] != ends[0].event:
        verdict.add("another end")


def _check_answer(history: History, answer: Answer, verdict: Verdict) -> None:
    deltas = [one.event for one in history.received if one.is_text]
    text = "".join(event["delta"] for event in deltas)
    token_ids = tuple(token for event in deltas for token in event.get("token_ids") or ())
    if verdict.ending != "whole":
        # What was shown of an answer that did not come to its end is a beginning of it.
        is_beginning = answer.token_ids[: len(token_ids)] == token_ids and answer.text.startswith(
            text
        )
        if verdict.num_gaps == 0 and not is_beginning:
            verdict.add("other text")
        return
    terminal = history.terminal
    assert terminal is not None
    if verdict.num_gaps:
        # The object that the terminal event carries has the whole text, whatever was lost.
        text = _object_text(terminal.event["response"])
        token_ids = answer.token_ids
    shown = _object_text(terminal.event["response"])
    if text != answer.text or shown != answer.text or token_ids != answer.token_ids:
        verdict.ending = "truncated, shown as complete"
        verdict.add("other text")


def _object_text(response: dict[str, Any]) -> str:
    parts = [part for item in response.get("output", ()) for part in item.get("content", ())]
    return "".join(part.get("text", "") for part in parts)


def _check_pace(history: History, hung_s: float, verdict: Verdict) -> None:
    """No silence of ``hung_s`` between the first text and the end."""
    first = next((at for at, one in enumerate(history.received) if one.is_text), None)
    if first is None:
        return
    moments = [one.at_s for one in history.received[first:]]
    if history.terminal is None:
        moments.append(history.ended_s)
    if any(after - before > hung_s for before, after in itertools.pairwise(moments)):
        verdict.add("hung")
