"""What a scenario's run comes to, and whether that is good enough."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Mapping, Sequence

from tests.chaos.checker import Verdict

__all__ = ["Expectation", "Tally", "percentile", "problems"]


@dataclasses.dataclass(frozen=True)
class Expectation:
    """What a scenario may end with."""

    endings: tuple[str, ...] = ("whole",)
    """Endings that are allowed; see ``Verdict``."""
    least_whole: float = 1.0
    """Share of the histories that must be whole, 0 to 1."""
    gaps: bool = False
    """Whether the server may say that it lost events."""
    within_s: float = 5.0
    """After a fault everyone has text again, or is told of the end, within this time."""
    hung_s: float = 5.0
    """The longest silence of an answer that has begun."""


@dataclasses.dataclass
class Tally:
    """Sums over the histories of one scenario."""

    struck: Counter[str] = dataclasses.field(default_factory=Counter)
    endings: Counter[str] = dataclasses.field(default_factory=Counter)
    faults: Counter[str] = dataclasses.field(default_factory=Counter)
    num_histories: int = 0
    num_tokens: int = 0
    num_gaps: int = 0
    num_resumed: int = 0
    num_moves: int = 0
    """Resumptions at another server than the one before."""
    num_affected: int = 0
    """Histories that were under way when a fault struck."""
    back_s: list[float] = dataclasses.field(default_factory=list)
    """Of each affected history: from the fault to text, or the end, again."""
    never_back: int = 0
    notes: list[str] = dataclasses.field(default_factory=list)
    """What else went wrong: a crash in a log, something left behind."""
    measured: str = ""
    """A figure that only this scenario has, in words."""

    def add(self, verdict: Verdict) -> None:
        """Count one history."""
        self.num_histories += 1
        self.num_tokens += verdict.num_tokens
        self.num_gaps += verdict.num_gaps
        self.num_resumed += verdict.resumed
        self.num_moves += verdict.moves
        self.endings[verdict.ending] += 1
        self.faults.update(verdict.faults)

    def back(self, seconds: float | None) -> None:
        """Record how long an affected history took to have text again; None: never."""
        self.num_affected += 1
        if seconds is None:
            self.never_back += 1
        else:
            self.back_s.append(seconds)

    @property
    def num_struck(self) -> int:
        """Faults injected."""
        return sum(self.struck.values())

    @property
    def whole_share(self) -> float:
        """Share of the histories that are the undisturbed run's answer."""
        return self.endings["whole"] / self.num_histories if self.num_histories else 0.0


def problems(tally: Tally, expected: Expectation, *, least_struck: int) -> list[str]:
    """Say what is not as expected; a run in which nothing happened is not."""
    found = [f"{fault}: {count}" for fault, count in sorted(tally.faults.items()) if count]
    found += tally.notes
    if tally.num_struck < least_struck:
        found.append(f"only {tally.num_struck} faults struck, {least_struck} were to")
    if not tally.num_tokens:
        found.append("no token flowed")
    if not tally.num_histories:
        found.append("no client asked anything")
    bad = {end: n for end, n in tally.endings.items() if end not in expected.endings}
    if bad:
        found.append(f"endings that may not be: {bad}")
    if tally.whole_share < expected.least_whole:
        found.append(f"{tally.whole_share:.3f} whole, {expected.least_whole} were to be")
    if tally.num_gaps and not expected.gaps:
        found.append(f"{tally.num_gaps} discontinuities")
    if tally.never_back:
        found.append(f"{tally.never_back} clients never heard again")
    late = [seconds for seconds in tally.back_s if seconds > expected.within_s]
    if late:
        found.append(f"{len(late)} waited longer than {expected.within_s} s, up to {max(late):.1f}")
    return found


def percentile(values: Sequence[float], share: float) -> float | None:
    """The value below which ``share`` of them lie; None of none."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))] if ordered else None


def row(name: str, tally: Tally, found: Sequence[str]) -> Mapping[str, object]:
    """The scenario's line of the reliability table."""
    faults = tally.faults
    moved = faults["lost"] + faults["altered"] + faults["not in the journal"]

    def seconds(share: float) -> str:
        value = percentile(tally.back_s, share)
        return "" if value is None else f"{value:.2f}"

    return {
        "scenario": name,
        "events": tally.num_struck,
        "clients": tally.num_histories,
        "tokens": tally.num_tokens,
        "hung": faults["hung"] + tally.never_back,
        "silent": faults["silent"],
        "lost": moved,
        "doubled": faults["doubled"],
        "reordered": faults["reordered"],
        "other text": faults["other text"],
        "said lost": tally.num_gaps,
        "whole %": f"{100 * tally.whole_share:.1f}",
        "resumed %": f"{100 * tally.num_resumed / max(1, tally.num_histories):.1f}",
        "moved": tally.num_moves,
        "back p50 s": seconds(0.5),
        "back p99 s": seconds(0.99),
        "back max s": seconds(1.0),
        "measured": tally.measured,
        "verdict": "failed" if found else "ok",
    }
