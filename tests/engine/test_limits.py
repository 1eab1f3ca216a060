"""How large steps become, and what they were measured to take."""

from __future__ import annotations

from pathlib import Path

import pytest

from engine.limits import Limits, choose_num_tokens, first_limits, measure
from engine.types import StepCost
from tests.engine.checkpoints import Shape, make
from tests.engine.harness import Engine

GIB = 1 << 30


@pytest.mark.parametrize(
    ("num_tokens", "num_seqs", "on_gpu", "free_bytes", "expected"),
    [
        (None, None, False, GIB, (2048, 256)),
        (100, 9, False, GIB, (100, 9)),
        (None, None, True, 64 * GIB, (8192, 512)),
        (None, None, True, 20 * GIB, (8192, 160)),  # 1,024 tokens each of 128 KiB
        (None, None, True, GIB // 2, (8192, 8)),
        (700, 1000, True, GIB, (700, 1000)),
    ],
)
def test_what_is_not_set_follows_from_the_device(
    num_tokens: int | None,
    num_seqs: int | None,
    on_gpu: bool,
    free_bytes: int,
    expected: tuple[int, int],
) -> None:
    limits = first_limits(
        num_tokens, num_seqs, on_gpu=on_gpu, token_bytes=128 << 10, free_bytes=free_bytes
    )
    assert limits == expected
    assert limits.max_rows == min(expected)


@pytest.mark.parametrize(
    ("costs_s", "expected"),
    [
        ({512: 0.01, 1024: 0.02, 2048: 0.04, 4096: 0.08, 8192: 0.17}, 2048),
        ({512: 0.001, 8192: 0.02}, 8192),
        ({512: 0.2, 1024: 0.4}, 512),
        ({}, 512),
    ],
)
def test_a_step_has_the_tokens_that_end_in_time(costs_s: dict[int, float], expected: int) -> None:
    costs = [StepCost(1, num_tokens, took_s) for num_tokens, took_s in costs_s.items()]
    assert choose_num_tokens(costs, Limits(8192, 256)) == expected
    assert choose_num_tokens(costs, Limits(100, 64)) == 100
    assert choose_num_tokens([], Limits(8192, 1000)) == 1000, "every seat has its token"


def test_measuring_leaves_nothing_behind(tmp_path: Path) -> None:
    path, _ = make(tmp_path)
    engine = Engine(path, kv_memory_bytes=4 << 20, max_num_tokens=600, max_num_seqs=10)
    expected = engine.generate([1, 2, 3], max_tokens=8).token_ids
    costs = measure(engine.runner.step, engine.runner.info, engine.runner.limits)
    assert [(cost.num_rows, cost.num_tokens) for cost in costs] == [(1, 1), (8, 8), (10, 10)]
    assert all(cost.duration_s > 0 for cost in costs)
    engine.reset()
    assert engine.generate([1, 2, 3], max_tokens=8).token_ids == expected
    assert engine.runner.info.step_costs == ()


def test_prompts_are_measured_as_far_as_they_go(tmp_path: Path) -> None:
    path, _ = make(tmp_path, Shape(max_positions=2000, num_layers=1))
    engine = Engine(path, kv_memory_bytes=64 << 20, max_num_tokens=1500, max_num_seqs=2)
    costs = measure(engine.runner.step, engine.runner.info, engine.runner.limits)
    assert [(cost.num_rows, cost.num_tokens) for cost in costs] == [
        (1, 1), (2, 2), (1, 512), (1, 1024),
    ]  # fmt: skip
