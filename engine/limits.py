"""How large steps become. What the settings leave open follows from the device: how many requests
run at once from its memory, how many tokens a step has from what steps cost on it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from time import monotonic
from typing import NamedTuple

from engine.cache import CacheManager, FullAttentionGroup
from engine.scheduler import Scheduler
from engine.steps import Plan, StepOutput
from engine.types import ModelInfo, Request, SamplingParams, StepCost

__all__ = ["Limits", "choose_num_tokens", "first_limits", "measure", "warm_up"]

_CPU_TOKENS, _CPU_SEQS = 2048, 256
_GPU_TOKENS = 8192
"""Most tokens that there is room for; a step has fewer where so many take too long."""
_GPU_SEQS = 512
_TOKENS_OF_A_REQUEST = 1024
"""Of so many at once the memory holds this many tokens each."""
_LONGEST_S = 0.05
"""A step may take so long: nobody's next token waits longer for others' prompts."""
_LEAST_TOKENS = 512
"""Fewer make no step much shorter, for the weights are read all the same."""
_REPEATS = 5

Step = Callable[[Plan], StepOutput]


class Limits(NamedTuple):
    """The most of a step."""

    max_num_tokens: int
    max_num_seqs: int

    @property
    def max_rows(self) -> int:
        """Requests in one step at most."""
        return min(self)


def first_limits(
    max_num_tokens: int | None,
    max_num_seqs: int | None,
    *,
    on_gpu: bool,
    token_bytes: int,
    free_bytes: int,
) -> Limits:
    """Limits before any step was computed.

    Args:
        max_num_tokens: as set; None: chosen.
        max_num_seqs: as set; None: chosen.
        on_gpu: whether the device is one.
        token_bytes: memory that the KV cache takes for a token.
        free_bytes: memory there is for it.
    """
    if not on_gpu:
        return Limits(max_num_tokens or _CPU_TOKENS, max_num_seqs or _CPU_SEQS)
    held = free_bytes // token_bytes // _TOKENS_OF_A_REQUEST
    return Limits(max_num_tokens or _GPU_TOKENS, max_num_seqs or max(8, min(_GPU_SEQS, held)))


def choose_num_tokens(costs: Sequence[StepCost], limits: Limits) -> int:
    """The most tokens of a measured step that is over in time; never fewer than there are seats."""
    fitting = [cost.num_tokens for cost in costs if cost.duration_s <= _LONGEST_S]
    least = max(_LEAST_TOKENS, limits.max_num_seqs)
    return min(max([least, *fitting]), limits.max_num_tokens)


def warm_up(step: Step, info: ModelInfo, num_tokens: int) -> None:
    """Run a prompt and a token through everything, so that no request pays for first calls."""
    for temperature in (0.0, 1.0):
        sampling = SamplingParams(max_tokens=2, temperature=temperature, logprobs=1)
        _run(step, info, 1, max(1, num_tokens - 1), sampling)


def measure(step: Step, info: ModelInfo, limits: Limits) -> tuple[StepCost, ...]:
    """What steps cost here that only decode, and that read one prompt; contexts are short."""
    costs = []
    for num_rows in sorted({1, 8, 64, limits.max_rows}):
        if num_rows <= min(limits.max_rows, info.num_blocks - 1):
            sampling = SamplingParams(max_tokens=_REPEATS, ignore_eos=True)
            durations = _run(step, info, num_rows, 1, sampling)
            costs.append(StepCost(num_rows, num_rows, min(durations)))
    num_tokens = _LEAST_TOKENS
    while num_tokens <= limits.max_num_tokens and num_tokens < info.max_model_len:
        durations = []
        for _ in range(2):  # the first one may compile
            durations = _run(step, info, 1, num_tokens, SamplingParams(max_tokens=1))
        costs.append(StepCost(1, num_tokens, durations[0]))
        num_tokens *= 2
    return tuple(costs)


def _run(
    step: Step, info: ModelInfo, num_requests: int, num_prompt: int, sampling: SamplingParams
) -> list[float]:
    """Answer equal requests together; returns the seconds that each step took."""
    cache = CacheManager(
        [FullAttentionGroup()], info.num_blocks, info.block_size, enable_prefix_cache=False
    )
    scheduler = Scheduler(
        cache,
        max_num_tokens=max(num_requests, num_prompt),
        max_num_seqs=num_requests,
        max_model_len=info.max_model_len,
        eos_token_ids=(),
    )
    for number in range(num_requests):
        scheduler.add(
            Request(request_id=str(number), prompt_ids=[0] * num_prompt, sampling=sampling)
        )
    durations = []
    while scheduler.has_work:
        started_s = monotonic()
        plan = scheduler.plan()
        scheduler.commit(plan, step(plan))
        durations.append(monotonic() - started_s)
    return durations
