"""Metrics add up, and outlive the engine."""

from __future__ import annotations

import asyncio
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client.parser import text_string_to_metric_families

from engine import EngineStats, Recoveries
from server.metering.loopwatch import LoopWatch
from server.metering.metrics import Metrics


def read(metrics: Metrics) -> dict[str, float]:
    """All samples, named as in PromQL, labels in order of their names."""
    samples: dict[str, float] = {}
    for family in text_string_to_metric_families(metrics.render().decode()):
        for sample in family.samples:
            labels = ",".join(f"{key}={value}" for key, value in sorted(sample.labels.items()))
            samples[f"{sample.name}{{{labels}}}" if labels else sample.name] = sample.value
    return samples


def end(metrics: Metrics, dialect: str, status: str, tokens: int) -> None:
    metrics.turn_ended(
        dialect=dialect,
        status=status,
        prompt_tokens=10,
        cached_tokens=4,
        completion_tokens=tokens,
        duration_s=0.5,
    )
    metrics.turn_left()


def test_turns_by_dialect_and_status_add_up() -> None:
    metrics = Metrics()
    for dialect in ("chat", "chat", "responses"):
        metrics.turn_started(dialect)
    end(metrics, "chat", "completed", 3)
    end(metrics, "responses", "cancelled", 1)
    samples = read(metrics)
    assert samples["millrace_turns_started_total{dialect=chat}"] == 2
    assert samples["millrace_turns_total{dialect=chat,status=completed}"] == 1
    assert samples["millrace_turns_total{dialect=responses,status=cancelled}"] == 1
    assert samples["millrace_turns_in_flight"] == 1
    assert samples["millrace_turn_prompt_tokens_total"] == 20
    assert samples["millrace_turn_cached_tokens_total"] == 8
    assert samples["millrace_turn_completion_tokens_total"] == 4
    assert samples["millrace_turn_duration_seconds_count"] == 2


def test_tokens_that_come_together_count_one_by_one() -> None:
    metrics = Metrics()
    metrics.first_token(0.04)
    metrics.inter_token(0.4, 4)
    metrics.inter_token(0.01, 1)
    samples = read(metrics)
    assert samples["millrace_time_to_first_token_seconds_bucket{le=0.05}"] == 1
    assert samples["millrace_time_to_first_token_seconds_bucket{le=0.025}"] == 0
    assert samples["millrace_inter_token_seconds_count"] == 5
    assert samples["millrace_inter_token_seconds_sum"] == pytest.approx(0.41)
    assert samples["millrace_inter_token_seconds_bucket{le=0.1}"] == 5
    assert samples["millrace_inter_token_seconds_bucket{le=0.05}"] == 1


def test_gauges_follow_the_engine() -> None:
    metrics = Metrics()
    metrics.engine_stats(
        EngineStats(waiting=2, running=3, num_blocks=100, free_blocks=75, cached_blocks=5)
    )
    samples = read(metrics)
    assert samples["millrace_requests_waiting"] == 2
    assert samples["millrace_requests_running"] == 3
    assert samples["millrace_kv_blocks"] == 100
    assert samples["millrace_kv_blocks_free"] == 75
    assert samples["millrace_kv_blocks_cached"] == 5
    assert samples["millrace_kv_usage_ratio"] == 0.25


def test_no_blocks_is_no_division_by_zero() -> None:
    metrics = Metrics()
    metrics.engine_stats(EngineStats())
    assert read(metrics)["millrace_kv_usage_ratio"] == 0


@given(st.lists(st.integers(0, 50), max_size=8))
def test_counters_take_over_totals(added: list[int]) -> None:
    metrics = Metrics()
    total = 0
    for count in added:
        total += count
        metrics.engine_stats(EngineStats(generation_tokens=total, cached_tokens=2 * total))
        metrics.engine_recoveries(Recoveries(restarts=total, recovery_s=total / 4))
    samples = read(metrics)
    assert samples["millrace_generation_tokens_total"] == total
    assert samples["millrace_prefix_cache_hit_tokens_total"] == 2 * total
    assert samples["millrace_engine_restarts_total"] == total
    assert samples["millrace_engine_recovery_seconds_total"] == total / 4


def test_two_servers_in_one_process_do_not_mix() -> None:
    one, other = Metrics(), Metrics()
    one.turn_started("chat")
    assert read(one)["millrace_turns_in_flight"] == 1
    assert read(other)["millrace_turns_in_flight"] == 0


async def test_the_loop_watch_sees_a_callback_that_holds_the_loop() -> None:
    metrics = Metrics()
    watch = LoopWatch(metrics, interval_s=0.001)
    watch.start()
    await asyncio.sleep(0)
    begin = time.thread_time()
    while time.thread_time() - begin < 0.06:
        pass
    while read(metrics)["millrace_event_loop_lag_seconds_count"] == 0:
        await asyncio.sleep(0)
    watch.stop()
    watch.stop()
    samples = read(metrics)
    assert samples["millrace_event_loop_blocked_max_seconds"] >= 0.05
    assert samples["millrace_event_loop_lag_seconds_sum"] >= 0.05
    assert (
        samples["millrace_event_loop_blocked_seconds_sum"]
        <= samples["millrace_event_loop_lag_seconds_sum"]
    )
