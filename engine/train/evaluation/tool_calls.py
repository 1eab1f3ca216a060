"""Tool calls on held-out dialogues: does the model call when and what the reference calls.

Each turn is judged on its own, after the true history and with all tools of the dialogue.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, fields

from engine.train.dialogue import Record
from engine.train.evaluation.generation import Generator
from engine.train.evaluation.replies import Call, Reply, canonical, reference_calls

__all__ = ["CallTally", "Turn", "TurnScore", "evaluate_calls", "sample_turns", "score_turn"]


@dataclass(frozen=True, slots=True)
class Turn:
    """An assistant turn to be predicted."""

    history: Sequence[Record]
    tools: Sequence[Record]
    reference: tuple[Call, ...]
    """Empty where the reference answers in words."""


@dataclass(frozen=True, slots=True)
class TurnScore:
    """How one turn went."""

    wanted: bool
    """The reference calls."""
    called: bool
    """The model began a call."""
    valid: bool
    """It did, and each call is closed, JSON, and an object of name and arguments."""
    right_function: bool
    """The same functions as the reference; needs `valid`."""
    exact: bool
    """And the same arguments, as JSON values."""
    relaxed: bool
    """The same up to case and outer spaces of strings."""


def score_turn(reference: Sequence[Call], reply: Reply) -> TurnScore:
    """Compares a reply with the reference's calls, in whatever order they stand."""
    called = reply.attempts_call
    valid = called and not reply.num_broken

    def same(form: Callable[[Call], str]) -> bool:
        return bool(valid and reference) and sorted(map(form, reply.calls)) == sorted(
            map(form, reference)
        )

    return TurnScore(
        wanted=bool(reference),
        called=called,
        valid=valid,
        right_function=same(lambda call: call.name),
        exact=same(lambda call: canonical([call.name, call.arguments])),
        relaxed=same(lambda call: call.name + canonical(call.arguments, relaxed=True)),
    )


@dataclass(slots=True)
class CallTally:
    """Counts over turns; what a table row is made of."""

    num_call_turns: int = 0
    """Turns in which the reference calls."""
    num_other_turns: int = 0
    """Turns in which it does not."""
    num_left_out: int = 0
    """Turns not judged, since prompt and answer exceed the context."""
    num_called_rightly: int = 0
    """Both call."""
    num_called_wrongly: int = 0
    """The model calls, the reference does not."""
    num_valid: int = 0
    """Of all turns with a call by the model."""
    num_right_function: int = 0
    num_exact: int = 0
    num_relaxed: int = 0

    def add(self, score: TurnScore) -> None:
        """Counts one turn."""
        self.num_call_turns += score.wanted
        self.num_other_turns += not score.wanted
        self.num_called_rightly += score.wanted and score.called
        self.num_called_wrongly += score.called and not score.wanted
        self.num_valid += score.valid
        self.num_right_function += score.right_function
        self.num_exact += score.exact
        self.num_relaxed += score.relaxed

    def merge(self, other: CallTally) -> None:
        """Adds another tally's counts."""
        for field in fields(self):
            setattr(self, field.name, getattr(self, field.name) + getattr(other, field.name))

    @property
    def num_called(self) -> int:
        """Turns in which the model calls."""
        return self.num_called_rightly + self.num_called_wrongly

    @property
    def num_decided_rightly(self) -> int:
        """Turns in which the model calls, or does not, as the reference does."""
        return self.num_called_rightly + self.num_other_turns - self.num_called_wrongly


def sample_turns(
    records: Iterable[Record], *, max_call_turns: int, max_other_turns: int, seed: int
) -> dict[str, list[Turn]]:
    """Draws assistant turns of dialogues with tools, by source, those with calls and others apart.

    A draw depends on the seed and the source's own records alone. Turns stay in the order of the
    records, so that those of one dialogue share their prefix in the cache.
    """
    found: dict[str, list[Turn]] = {}
    for record in records:
        if record.get("tools"):
            messages = record["messages"]
            found.setdefault(record["source"], []).extend(
                Turn(messages[:index], record["tools"], reference_calls(message))
                for index, message in enumerate(messages)
                if message["role"] == "assistant"
            )
    drawn = {}
    for source, turns in sorted(found.items()):
        rng = random.Random(f"{seed} {source}")
        calls = [index for index, turn in enumerate(turns) if turn.reference]
        others = [index for index, turn in enumerate(turns) if not turn.reference]
        chosen = rng.sample(calls, min(len(calls), max_call_turns))
        chosen += rng.sample(others, min(len(others), max_other_turns))
        drawn[source] = [turns[index] for index in sorted(chosen)]
    return drawn


def evaluate_calls(
    generator: Generator,
    turns: dict[str, list[Turn]],
    *,
    on_done: Callable[[], None] = lambda: None,
) -> dict[str, CallTally]:
    """Has the model answer each turn and counts by source."""
    tallies = {}
    for source, own in turns.items():
        tally = CallTally()
        replies = generator.reply_all(((t.history, t.tools) for t in own), on_done=on_done)
        for turn, reply in zip(own, replies, strict=True):
            if reply is None:
                tally.num_left_out += 1
            else:
                tally.add(score_turn(turn.reference, reply))
        tallies[source] = tally
    return tallies
