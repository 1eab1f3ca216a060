"""When an engine counts as hung, and what an engine says so that it does not: no clock is real."""

from __future__ import annotations

import itertools
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from engine.cache import CacheManager, FullAttentionGroup
from engine.config import Device, EngineConfig
from engine.pulse import Pulse
from engine.runner import Runner
from engine.scheduler import Scheduler
from engine.starvation import Starvation
from engine.types import Request, SamplingParams
from engine.watchdog import HANG_S, TICK_S, Watchdog
from tests.engine.checkpoints import Shape, make


def ticks_until_hung(watchdog: Watchdog, elapsed_s: float = TICK_S) -> int:
    count = 1
    while not watchdog.tick(elapsed_s):
        count += 1
        assert count < 10**6
    return count


def serving() -> Watchdog:
    watchdog = Watchdog()
    watchdog.begin(prepared=False)
    watchdog.progress()
    return watchdog


def test_a_hang_is_noticed_within_two_seconds() -> None:
    assert (ticks_until_hung(serving()) + 1) * TICK_S <= 2.0


def test_progress_begins_the_count_anew() -> None:
    watchdog = serving()
    for _ in range(1000):
        assert not watchdog.tick(HANG_S / 2)
        watchdog.progress()


def test_a_pause_of_our_own_is_not_the_engines() -> None:
    watchdog = serving()
    assert not watchdog.tick(3600.0)
    assert watchdog.silent_s <= 2 * TICK_S


def test_an_announced_silence_is_granted_once() -> None:
    watchdog = serving()
    watchdog.progress(30.0)
    assert ticks_until_hung(watchdog) * TICK_S == pytest.approx(30.0, abs=0.2)
    watchdog.progress()
    assert ticks_until_hung(watchdog) * TICK_S == pytest.approx(HANG_S, abs=0.2)


def test_a_first_start_may_be_slow_and_later_ones_as_slow_as_it_was() -> None:
    watchdog = Watchdog()
    watchdog.begin(prepared=False)
    for _ in range(600):  # a minute for the kernels
        assert not watchdog.tick(TICK_S)
    watchdog.loading()
    watchdog.progress()
    watchdog.begin(prepared=False)
    assert 60 < ticks_until_hung(watchdog) * TICK_S < 600
    watchdog.begin(prepared=True)  # such a one has only to answer
    assert ticks_until_hung(watchdog) * TICK_S == pytest.approx(HANG_S, abs=0.2)
    watchdog.begin(prepared=True)
    watchdog.loading()
    assert ticks_until_hung(watchdog) * TICK_S > 60


class Clock:
    """A loop whose pieces take as long as the test says."""

    def __init__(self) -> None:
        self.now_s = 100.0
        self.said: list[tuple[float, float]] = []
        self.pulse = Pulse(lambda silence_s: self.said.append((self.now_s, silence_s)), self.time)

    def time(self) -> float:
        return self.now_s

    def step(self, num_tokens: int, *pieces_s: float) -> None:
        self.pulse.begin(num_tokens)
        for piece_s in pieces_s:
            self.now_s += piece_s
            self.pulse.beat()


def test_short_steps_say_nothing() -> None:
    clock = Clock()
    clock.said.clear()
    for _ in range(10):
        clock.step(31, *[0.001] * 20)
        clock.now_s = clock.pulse._said_s
    assert clock.said == []


@pytest.mark.parametrize("token_s", [0.00001, 0.001, 0.05])
@pytest.mark.parametrize("num_tokens", [1, 31, 512, 2048])
def test_no_piece_of_an_honest_step_is_taken_for_a_hang(num_tokens: int, token_s: float) -> None:
    """After a warm-up, whatever the model's size; a piece may also take five times as long."""
    clock = Clock()
    clock.step(31, *[31 * token_s] * 8)
    watchdog = serving()
    for slower in (1.0, 5.0):
        clock.said.clear()
        began_s = clock.now_s
        piece_s = min(max(num_tokens, 31) * token_s * slower, 250.0)
        clock.step(num_tokens, *[piece_s] * 8)
        signs = [(began_s, 0.0), *clock.said, (clock.now_s, 0.0)]
        for (then_s, allow_s), (next_s, _) in itertools.pairwise(signs):
            watchdog.progress(allow_s)
            for _ in range(int((next_s - then_s) / TICK_S)):
                assert not watchdog.tick(TICK_S), (then_s, allow_s, next_s)


def test_one_interruption_is_forgotten() -> None:
    clock = Clock()
    clock.step(100, *[0.01] * 10)
    clock.step(100, 1.7)
    assert clock.pulse._silence_s > HANG_S
    clock.step(100, *[0.01] * 30)
    assert clock.pulse._silence_s < 1.0


def test_a_runner_speaks_after_every_half_of_a_layer_and_before_every_slice_of_logits(
    tmp_path: Path,
) -> None:
    path, _ = make(tmp_path, Shape(num_layers=3))
    beats: list[int] = []

    class Counting(Pulse):
        def begin(self, num_tokens: int) -> None:
            beats.append(num_tokens)

        def beat(self) -> None:
            beats.append(0)

    config = EngineConfig(
        model=str(path), device=Device.CPU, num_threads=1, kv_memory_bytes=8 << 20, max_num_seqs=2
    )
    runner = Runner(config, pulse=Counting())
    assert beats, "the warm-up teaches it how long pieces take"
    beats.clear()
    info = runner.info
    cache = CacheManager(
        [FullAttentionGroup()], num_blocks=info.num_blocks, block_size=info.block_size
    )
    scheduler = Scheduler(
        cache, max_num_tokens=64, max_num_seqs=2, max_model_len=info.max_model_len, eos_token_ids=()
    )
    sampling = SamplingParams(max_tokens=1, prompt_logprobs=0)
    scheduler.add(Request(request_id="a", prompt_ids=[1] * 9, sampling=sampling))
    runner.step(scheduler.plan())
    # Halves of three layers, the sampled row, and eight rows of the prompt by two.
    assert beats == [9] + [0] * (2 * 3 + 1 + 4)


def test_a_starved_engine_is_not_hung() -> None:
    watchdog = serving()
    for _ in range(1000):
        assert not watchdog.tick(TICK_S, starved_s=0.095)
        watchdog.tick(TICK_S, starved_s=0.3)  # a long wait is entered when it is over


@pytest.mark.skipif(not Path("/proc/self/schedstat").exists(), reason="needs Linux's schedstat")
def test_waiting_for_a_core_is_told_from_waiting_for_nothing() -> None:
    core = min(os.sched_getaffinity(0))
    spin = f"import os\nos.sched_setaffinity(0, [{core}])\nwhile True: pass"
    rivals = [subprocess.Popen([sys.executable, "-S", "-c", spin]) for _ in range(4)]
    sleeper = subprocess.Popen(["sleep", "60"])
    try:
        starving, asleep = Starvation(rivals[0].pid), Starvation(sleeper.pid)
        starved_s = 0.0
        while starved_s < 1.0:  # three quarters of the time, once they all spin
            time.sleep(0.05)
            starved_s += starving.since_last_call(0.05)
        asleep.since_last_call(0.0)
        rivals[0].send_signal(signal.SIGSTOP)
        os.waitid(os.P_PID, rivals[0].pid, os.WSTOPPED)
        starving.since_last_call(0.0)
        time.sleep(0.1)
        assert starving.since_last_call(0.1) == 0.0
        assert asleep.since_last_call(0.1) < 0.1
    finally:
        for process in [*rivals, sleeper]:
            process.kill()
            process.wait()
    assert starving.since_last_call(0.1) == 0.0
