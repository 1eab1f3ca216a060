"""Small steps for tests of the scheduler's single rules: add, plan, commit by hand."""

from __future__ import annotations

from typing import Any

from engine.cache import CacheManager, FullAttentionGroup
from engine.scheduler import Plan, Scheduler, StepOutput
from engine.types import Delta, TokenLogprobs
from tests.engine.scheduler_world import EOS, request_of

__all__ = ["ENTRY", "add", "finish_step", "run_to_end", "scheduler", "shape", "step"]

ENTRY = TokenLogprobs(-1.0, 1, [5], [-1.0])


def scheduler(num_blocks: int = 100, block_size: int = 4, **limits: Any) -> Scheduler:
    cache = CacheManager([FullAttentionGroup()], num_blocks, block_size)
    defaults: dict[str, Any] = {"max_num_tokens": 64, "max_num_seqs": 16, "max_model_len": 256}
    return Scheduler(cache, eos_token_ids=(EOS,), **{**defaults, **limits})


def add(sched: Scheduler, request_id: str, num_prompt: int = 4, **options: Any) -> None:
    # Prompts differ from their first token on, so that nothing is shared by accident.
    prompt = [1000 + sum(map(ord, request_id)), *range(1, num_prompt)]
    sched.add(request_of(request_id, prompt, **{"max_tokens": 50, **options}))


def shape(plan: Plan) -> list[tuple[str, int, int, bool]]:
    return [(r.state.request.request_id, r.start, r.num_new, r.samples) for r in plan.rows]


def finish_step(sched: Scheduler, plan: Plan, token: int = 5) -> list[Delta]:
    drawn = sum(row.samples for row in plan.rows)
    wanted = {
        index: [ENTRY] * row.num_prompt_logprobs
        for index, row in enumerate(plan.rows)
        if row.prompt_logprobs
    }
    deltas = sched.commit(plan, StepOutput([token] * drawn, [None] * drawn, wanted))
    sched.check_integrity()
    return deltas


def step(sched: Scheduler, token: int = 5) -> list[tuple[str, int, int, bool]]:
    plan = sched.plan()
    finish_step(sched, plan, token)
    return shape(plan)


def run_to_end(sched: Scheduler, limit: int = 1000) -> list[str]:
    """Names in the order in which they end."""
    ended: list[str] = []
    for _ in range(limit):
        if not sched.has_work:
            return ended
        ended += [d.request_id for d in finish_step(sched, sched.plan()) if d.finish_reason]
    raise AssertionError(f"still work after {limit} steps")
