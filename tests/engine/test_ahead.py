"""Answers with one step ahead, and of recorded steps, are to the last bit the answers without."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from engine.graphs import Recorded, Repeater, bucket_sizes
from engine.models import Workspace
from engine.types import FinishReason
from tests.engine.checkpoints import Shape, make
from tests.engine.harness import Answer, Engine

VOCABULARY = 131
SAMPLINGS: list[dict[str, Any]] = [
    {},
    {"temperature": 1.0, "seed": 3},
    {"temperature": 0.7, "seed": 4, "top_k": 20, "top_p": 0.9, "min_p": 0.02},
    {"logprobs": 3},
    {"temperature": 1.2, "seed": 5, "logprobs": 0, "prompt_logprobs": 2},
    {"logit_bias": {5: 2.0, 7: 9.0}, "min_tokens": 6},
    {"stop_token_ids": tuple(range(0, VOCABULARY, 5))},
    {"temperature": 1.0, "seed": 6, "stop_token_ids": tuple(range(1, VOCABULARY, 7))},
]
PENALTIES: list[dict[str, Any]] = [
    {"repetition_penalty": 1.3},
    {"temperature": 1.0, "seed": 7, "frequency_penalty": 0.5, "presence_penalty": 0.3},
]


LIMITS: dict[str, Any] = {
    "kv_memory_bytes": 4 << 20, "block_size": 4, "max_num_tokens": 64, "max_num_seqs": 11,
    "steps_ahead": 1,
}  # fmt: skip


class Poisoning(Repeater):
    """Repeats steps, and leaves NaNs before in all that a step must write before it reads it."""

    def __init__(self) -> None:
        self.work: Workspace | None = None
        self.replays = 0

    def record(self, call: Callable[[], None]) -> Recorded:
        def poisoned() -> None:
            if self.work is not None:
                self.replays += 1
                for buffer in (*self.work.step(64), *self.work.outputs(64), self.work.logits):
                    buffer.fill_(math.nan)
            call()

        return super().record(poisoned)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make(tmp_path_factory.mktemp("model"), Shape(num_layers=2))[0]


@pytest.fixture(scope="module")
def engine(model: Path) -> Engine:
    return Engine(model, **LIMITS)


class Recording(NamedTuple):
    engine: Engine
    recorder: Poisoning


@pytest.fixture(scope="module")
def recording(model: Path) -> Recording:
    recorder = Poisoning()
    engine = Engine(model, recorder=recorder, **LIMITS)
    recorder.work = engine.runner._work
    return Recording(engine, recorder)


def play(engine: Engine, seed: int, samplings: list[dict[str, Any]]) -> tuple[list[Answer], int]:
    """Random requests that come while others run, some of which leave; and their preemptions."""
    rng = random.Random(seed)
    head = [rng.randrange(VOCABULARY) for _ in range(30)]
    leaving: dict[str, int] = {}
    for index in range(24):
        prompt = head[: rng.choice([0, 9, 30])]
        prompt = [*prompt, *(rng.randrange(VOCABULARY) for _ in range(rng.randint(1, 20)))]
        sampling = {**samplings[index % len(samplings)], "max_tokens": rng.randint(1, 24)}
        request_id = engine.add(prompt, **sampling)
        if index % 6 == 5:
            leaving[request_id] = rng.randint(0, 6)
        for _ in range(rng.randint(0, 4)):
            engine.step()
            for name, count in leaving.items():
                if len(engine.answers[name].token_ids) >= count:
                    engine.abort(name)
    engine.run()
    return list(engine.answers.values()), engine.scheduler.stats()["preemptions"]


def agree(ours: Answer, expected: Answer) -> bool:
    """Equal; or both as far as they came, where somebody left."""
    if FinishReason.ABORT not in (ours.finish_reason, expected.finish_reason):
        # How much came from the cache, and who gave way, depends on when.
        return (ours.token_ids, ours.logprobs, ours.prompt_logprobs, ours.finish_reason) == (
            expected.token_ids,
            expected.logprobs,
            expected.prompt_logprobs,
            expected.finish_reason,
        )
    shorter = min(len(ours.token_ids), len(expected.token_ids))
    return ours.token_ids[:shorter] == expected.token_ids[:shorter]


@pytest.mark.parametrize("samplings", [SAMPLINGS, SAMPLINGS[:2] + PENALTIES], ids=["all", "some"])
@pytest.mark.parametrize("num_blocks", [22, 200], ids=["tight", "roomy"])
@pytest.mark.parametrize("limits", [{}, {"chunk_tokens": 5}, {"max_num_tokens": 9}], ids=str)
def test_a_step_ahead_changes_no_answer(
    engine: Engine, limits: dict[str, int], num_blocks: int, samplings: list[dict[str, Any]]
) -> None:
    assert engine.runner.batch_invariant
    engine.reset(num_blocks=num_blocks, steps_ahead=0, **limits)
    expected, _ = play(engine, num_blocks, samplings)
    engine.reset(num_blocks=num_blocks, steps_ahead=1, **limits)
    answers, preemptions = play(engine, num_blocks, samplings)
    assert all(map(agree, answers, expected))
    reasons = {answer.finish_reason for answer in answers}
    assert reasons >= {FinishReason.LENGTH, FinishReason.STOP} or samplings is not SAMPLINGS
    assert (preemptions > 0) == (num_blocks == 22)


@pytest.mark.parametrize("steps_ahead", [0, 1])
@pytest.mark.parametrize("num_blocks", [22, 200], ids=["tight", "roomy"])
@pytest.mark.parametrize("limits", [{}, {"chunk_tokens": 5}, {"max_num_tokens": 9}], ids=str)
@pytest.mark.parametrize("samplings", [SAMPLINGS[:3] + PENALTIES[:1], SAMPLINGS[:3]])
def test_recorded_steps_change_no_answer(
    engine: Engine,
    recording: Recording,
    limits: dict[str, int],
    num_blocks: int,
    steps_ahead: int,
    samplings: list[dict[str, Any]],
) -> None:
    engine.reset(num_blocks=num_blocks, steps_ahead=0, **limits)
    expected, _ = play(engine, num_blocks, samplings)
    recorded, recorder = recording
    recorded.reset(num_blocks=num_blocks, steps_ahead=steps_ahead, **limits)
    before = recorder.replays
    answers, _ = play(recorded, num_blocks, samplings)
    assert all(map(agree, answers, expected))
    # Beside prompts, and beside requests that want more than plain draws, nothing is replayed.
    assert recorder.replays - before > 12 or len(samplings) > 3


def test_penalties_wait_for_the_token_before(engine: Engine) -> None:
    engine.reset(steps_ahead=1)
    engine.add([1, 2, 3], max_tokens=9, ignore_eos=True, repetition_penalty=1.5)
    launched = []
    for _ in range(9):
        engine.step()
        launched.append(len(engine._flights))
    assert launched == [0] * 9
    engine.reset(steps_ahead=1)
    engine.add([1, 2, 3], max_tokens=9, ignore_eos=True, min_tokens=4, logprobs=1)
    launched = []
    for _ in range(9):
        engine.step()
        launched.append(len(engine._flights))
    assert launched == [1] * 8 + [0]


@pytest.mark.parametrize("max_rows", [1, 2, 7, 8, 9, 11, 64, 100, 256, 1000])
def test_buckets_are_few_and_near(max_rows: int) -> None:
    sizes = bucket_sizes(max_rows)
    assert sizes == sorted(set(sizes))
    assert sizes[-1] == max_rows
    assert len(sizes) <= 50
    for num_rows in range(9, max_rows + 1):
        size = next(size for size in sizes if size >= num_rows)
        assert size - num_rows < max(8, num_rows / 8)
