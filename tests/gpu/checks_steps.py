"""A profile of decoding steps: what waits for the device, and how long the device waits."""

from __future__ import annotations

import contextlib
import random
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

from tests.gpu.engines import Ours, open_ours, random_prompts
from tests.gpu.journal import Figures
from tests.gpu.parts import Group, Row
from tests.gpu.setting import Setting

__all__ = ["Steps", "groups", "judge"]

STREAMS = 64
STEPS = 32
FORBIDDEN = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaMemcpy")
"""What waits for all work of a stream, of the device, or of a copy. One wait a step for the event
behind the drawn ids is right: they must leave."""
WAIT = "cudaEventSynchronize"
PAGEABLE = "Pageable"
"""In a copy's name: from or to memory that the device cannot reach by itself, so it waits."""
MOST_IDLE = 0.1
"""Of the time; a share that no step ahead leaves."""


class Steps(NamedTuple):
    """What a profile of some steps holds."""

    number: int
    calls: Counter[str]
    """By name, those of the runtime and of the copies."""
    busy_s: float
    """Of the device, in any kernel or copy."""
    span_s: float
    """From the first kernel's start to the last one's end."""

    @property
    def idle(self) -> float:
        """Share of the span in which the device had nothing to do."""
        return 1 - self.busy_s / self.span_s if self.span_s else 0.0


def groups(setting: Setting) -> list[Group]:
    """On 0.6B, whose steps are short, so that whatever waits shows."""
    rows = (Row("no-waiting", _no_waiting, needs_s=10),)
    return [Group("steps", rows, _opened, needs_s=25)]


@contextlib.contextmanager
def _opened(setting: Setting) -> Iterator[Ours]:
    with open_ours(setting, "0.6b", "bf16") as ours:
        yield ours


def judge(steps: Steps) -> str:
    """What a profile shows, in words.

    Raises AssertionError where something waits that should not.
    """
    shown = (
        f"{steps.number} steps: {steps.calls[WAIT]} waits for an event, device idle "
        f"{100 * steps.idle:.1f} %"
    )
    waits = {name: steps.calls[name] for name in FORBIDDEN if steps.calls[name]}
    assert not waits, f"{shown}; {waits}"
    pageable = {name: n for name, n in steps.calls.items() if PAGEABLE in name}
    assert not pageable, f"{shown}; {pageable}"
    assert steps.calls[WAIT] <= steps.number + 1, shown
    assert steps.idle <= MOST_IDLE, shown
    return shown


def _no_waiting(ours: Ours) -> Figures:
    """Greedy and sampled requests together, in the middle of their answers."""
    from torch.profiler import ProfilerActivity, profile

    setting, engine = ours.setting, ours.engine
    steps = 4 if setting.dry else STEPS
    engine.reset()
    random.seed(1)
    for number, prompt in enumerate(random_prompts(ours.vocab_size, setting.size(STREAMS, 4), 32)):
        engine.add(
            prompt, max_tokens=200, ignore_eos=True, temperature=float(number % 2), top_p=0.9
        )
    for _ in range(12):
        engine.step()
    setting.sync()
    activities = [ProfilerActivity.CPU]
    if setting.device.type == "cuda":
        activities.append(ProfilerActivity.CUDA)
    with profile(activities=activities) as profiled:
        for _ in range(steps):
            engine.step()
    ours.end_all()
    found = _steps(profiled.events(), steps)
    if setting.device.type == "cuda":
        assert found.busy_s > 0, "the profile holds no kernels"
    return {"shown": judge(found)}


def _steps(events: Iterable[Any], count: int) -> Steps:
    calls: Counter[str] = Counter()
    spans = []
    for event in events:
        on_device = event.device_type.name == "CUDA"
        if event.name.startswith("cuda") or on_device:
            calls[event.name] += 1
        if on_device:
            spans.append((event.time_range.start, event.time_range.end))
    return Steps(count, calls, _covered(spans) / 1e6, _reach(spans) / 1e6)


def _reach(spans: list[tuple[float, float]]) -> float:
    return max(end for _, end in spans) - min(start for start, _ in spans) if spans else 0.0


def _covered(spans: list[tuple[float, float]]) -> float:
    """Length of the union."""
    covered, reached = 0.0, float("-inf")
    for start, end in sorted(spans):
        covered += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return covered
