"""The engine in this process, without a link: a scheduler and a runner in a loop."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import Any

from engine.cache import CacheManager, FullAttentionGroup
from engine.config import Device, EngineConfig
from engine.graphs import Recorder
from engine.runner import LaunchedStep, Runner
from engine.scheduler import Scheduler
from engine.steps import Plan
from engine.types import Delta, FinishReason, Request, SamplingParams, TokenLogprobs, Usage


@dataclass
class Answer:
    """All deltas of one request, put together."""

    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    prompt_logprobs: list[TokenLogprobs] | None = None
    finish_reason: FinishReason | None = None
    usage: Usage | None = None

    def add(self, delta: Delta) -> None:
        """Append a delta; there must be none after the last one."""
        assert self.finish_reason is None, delta
        self.token_ids += delta.token_ids
        self.logprobs += delta.logprobs or []
        if delta.prompt_logprobs is not None:
            assert self.prompt_logprobs is None
            self.prompt_logprobs = delta.prompt_logprobs
        self.finish_reason, self.usage = delta.finish_reason, delta.usage


class Engine:
    """Scheduler and runner of one model.

    Args:
        model: checkpoint directory.
        num_blocks: blocks the scheduler may use, at most those the runner has; None: all.
        recorder: for steps that only decode.
        settings: fields of EngineConfig; device cpu and one thread unless given.
    """

    def __init__(
        self,
        model: Path | str,
        *,
        num_blocks: int | None = None,
        recorder: Recorder | None = None,
        **settings: Any,
    ) -> None:
        defaults: dict[str, Any] = {"device": Device.CPU, "num_threads": 1}
        self.config = EngineConfig(model=str(model), **{**defaults, **settings})
        self.runner = Runner(self.config, recorder=recorder)
        self._ids = count()
        self.answers: dict[str, Answer] = {}
        self.reset(num_blocks=num_blocks)

    def reset(self, *, num_blocks: int | None = None, **settings: Any) -> None:
        """A new scheduler with an empty cache, and other limits than the config's if given."""
        config, info, limits = self.config, self.runner.info, self.runner.limits
        cache = CacheManager(
            [FullAttentionGroup()],
            num_blocks=num_blocks or info.num_blocks,
            block_size=info.block_size,
            enable_prefix_cache=settings.get("prefix_cache", config.prefix_cache),
        )
        self.scheduler = Scheduler(
            cache,
            max_num_tokens=settings.get("max_num_tokens", limits.max_num_tokens),
            max_num_seqs=settings.get("max_num_seqs", limits.max_num_seqs),
            max_model_len=info.max_model_len,
            eos_token_ids=info.eos_token_ids,
            chunk_tokens=settings.get("chunk_tokens", config.chunk_tokens),
        )
        self.steps_ahead = settings.get("steps_ahead", self.runner.steps_ahead)
        self._flights: deque[tuple[Plan, LaunchedStep]] = deque()
        self.answers = {}

    def add(self, prompt: list[int], *, output_ids: Sequence[int] = (), **sampling: Any) -> str:
        """Submit a request, some of whose answer may be known; greedy unless told otherwise."""
        request_id = f"r{next(self._ids)}"
        params = SamplingParams(**{"temperature": 0.0, "max_tokens": 16, **sampling})
        request = Request(
            request_id=request_id,
            prompt_ids=prompt,
            sampling=params,
            output_ids=list(output_ids),
        )
        self.answers[request_id] = Answer()
        if last := self.scheduler.add(request):
            self.answers[request_id].add(last)
        return request_id

    def step(self) -> Plan:
        """One step, as the core drives it; a plan without rows when there is nothing to do."""
        flights = self._flights
        while len(flights) <= self.steps_ahead:
            plan = self.scheduler.plan(after=flights[-1][0] if flights else None)
            if not plan.rows:
                break
            flights.append((plan, self.runner.launch(plan)))
        if not flights:
            return plan
        plan, step = flights.popleft()
        for delta in self.scheduler.commit(plan, step.collect()):
            self.answers[delta.request_id].add(delta)
        return plan

    def abort(self, request_id: str) -> None:
        """End a request, as a client that leaves does."""
        if last := self.scheduler.abort(request_id):
            self.answers[request_id].add(last)

    def run(self, until: Callable[[], bool] = lambda: False) -> None:
        """Step until nothing is left to do, or ``until`` says so."""
        while (self.scheduler.has_work or self._flights) and not until():
            self.step()
        self.scheduler.check_integrity()

    def generate(
        self, prompt: list[int], *, output_ids: Sequence[int] = (), **sampling: Any
    ) -> Answer:
        """The answer to one request, together with whatever else is in flight."""
        request_id = self.add(prompt, output_ids=output_ids, **sampling)
        self.run()
        return self.answers[request_id]

    def generate_all(self, prompts: Iterable[list[int]], **sampling: Any) -> list[Answer]:
        """The answers to several requests, submitted together."""
        ids = [self.add(prompt, **sampling) for prompt in prompts]
        self.run()
        return [self.answers[request_id] for request_id in ids]
