"""A world to test the scheduler in: a model that can be known in full, and a KV cache that tells.

The "model" draws a token from a fingerprint of everything before it. The "KV cache" is a dict from
slot to the fingerprint that was written there, so a row that would read another request's state, or
state that was never written, is found at once.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import msgspec

from engine.errors import RequestError
from engine.types import Delta, FinishReason, Request, SamplingParams, TokenLogprobs, Usage

__all__ = [
    "EOS",
    "VOCABULARY",
    "World",
    "WorldSettings",
    "drive",
    "expected_answer",
    "fingerprint",
    "random_settings",
    "request_of",
]

EOS = 0
VOCABULARY = 4
"""Tokens 0 to 3 are drawn, so few that prefixes are often shared; 4 stands in for masked ones."""
_MODULUS = 2**61 - 1


def fingerprint(previous: int, token: int) -> int:
    """Of a prefix that ends with ``token``, from that of the prefix before it."""
    return (previous * 1_000_003 + token * 7919 + 12_345) % _MODULUS


def _root(salt: str) -> int:
    # The salt is part of it, so that state shared across salts counts as wrong state.
    return sum((index + 1) * ord(letter) for index, letter in enumerate(salt)) + 1


def _draw(last: int, masked: frozenset[int]) -> int:
    token = (last >> 7) % VOCABULARY
    return VOCABULARY if token in masked else token


def _entry(last: int, token: int) -> TokenLogprobs:
    return TokenLogprobs(-float(last % 1000), 1, [token], [-float(last % 1000)])


def _stop_ids(sampling: SamplingParams) -> frozenset[int]:
    return frozenset(sampling.stop_token_ids) | (frozenset() if sampling.ignore_eos else {EOS})


def expected_answer(request: Request, max_model_len: int) -> tuple[list[int], FinishReason]:
    """What the model says to a request that has the machine to itself."""
    sampling = request.sampling
    stop_ids = _stop_ids(sampling)
    last = _root(request.cache_salt)
    for token in request.prompt_ids:
        last = fingerprint(last, token)
    answer: list[int] = []
    while True:
        masked = stop_ids if len(answer) < sampling.min_tokens else frozenset()
        token = _draw(last, masked)
        answer.append(token)
        if token in stop_ids:
            return answer, FinishReason.STOP
        if len(answer) == sampling.max_tokens:
            return answer, FinishReason.LENGTH
        if len(request.prompt_ids) + len(answer) == max_model_len:
            return answer, FinishReason.LENGTH
        last = fingerprint(last, token)


def request_of(request_id: str, prompt_ids: list[int], **options: Any) -> Request:
    """A request; options of SamplingParams and of Request are told apart by name."""
    outer = {
        name: options.pop(name)
        for name in ("priority", "cache_salt", "tenant", "weight", "due_s")
        if name in options
    }
    sampling = SamplingParams(**{"max_tokens": 4, **options})
    return Request(request_id=request_id, prompt_ids=prompt_ids, sampling=sampling, **outer)


@dataclass
class _Record:
    request: Request
    order: tuple[int, float, int]
    fingerprints: list[int] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    prompt_logprobs: list[TokenLogprobs] | None = None
    last: Delta | None = None
    deaths: int = 0
    """Schedulers that were lost while it was in flight."""


@dataclass(frozen=True)
class WorldSettings:
    num_blocks: int = 8
    block_size: int = 2
    max_num_tokens: int = 8
    max_num_seqs: int = 4
    max_model_len: int = 20
    chunk_tokens: int | None = None
    prefix_cache: bool = True


class World:
    """One scheduler with its cache, the model, and books of what everyone was told.

    Every method checks the integrity of the scheduler afterwards.
    """

    def __init__(self, settings: WorldSettings, modules: Any) -> None:
        self.settings = settings
        self.modules = modules
        self.live: dict[str, _Record] = {}
        self.done: list[_Record] = []
        self.deaths = self.dropped = 0
        self._arrivals = 0
        self._past: Counter[str] = Counter()
        """Figures of schedulers that are gone."""
        self._begin()

    def _begin(self) -> None:
        settings, modules = self.settings, self.modules
        self.slots: dict[int, int] = {}
        self.cache = modules.cache.CacheManager(
            [modules.cache.FullAttentionGroup()],
            settings.num_blocks,
            settings.block_size,
            settings.prefix_cache,
        )
        self.scheduler = modules.scheduler.Scheduler(
            self.cache,
            max_num_tokens=settings.max_num_tokens,
            max_num_seqs=settings.max_num_seqs,
            max_model_len=settings.max_model_len,
            eos_token_ids=(EOS,),
            chunk_tokens=settings.chunk_tokens,
        )

    @property
    def max_request_tokens(self) -> int:
        """Most tokens of prompt and answer together that can be served: the last needs no slot."""
        usable_tokens = (self.settings.num_blocks - 1) * self.settings.block_size
        return min(self.settings.max_model_len, usable_tokens + 1)

    def add(self, request: Request) -> bool:
        """Submit; False if it was refused, which must be because it could never fit."""
        prompt_len = len(request.prompt_ids)
        total = min(prompt_len + request.sampling.max_tokens, self.settings.max_model_len)
        too_long = prompt_len >= self.settings.max_model_len
        could_fit = not too_long and total <= self.max_request_tokens
        try:
            self.scheduler.add(request)
        except RequestError:
            assert not could_fit, f"{request} was refused but fits"
            self.scheduler.check_integrity()
            return False
        assert could_fit, f"{request} was taken but can never fit"
        record = _Record(request, (request.priority, request.due_s, self._arrivals))
        self._arrivals += 1
        self.live[request.request_id] = record
        self.scheduler.check_integrity()
        return True

    def total(self, name: str) -> int:
        """A figure of the scheduler's, summed over all there were."""
        return self._past[name] + int(self.scheduler.stats()[name])

    def die(self) -> None:
        """Lose scheduler and cache; a new one is given what was in flight and was said of it."""
        self.deaths += 1
        self._past.update(self.scheduler.stats())
        self._begin()
        for record in self.live.values():
            record.deaths += 1
            request = msgspec.structs.replace(record.request, output_ids=list(record.tokens))
            assert self.scheduler.add(request) is None
        self.scheduler.check_integrity()

    def abort(self, request_id: str) -> None:
        """End a request; its blocks are free at once and it is told so once."""
        held = {name: set(s.block_ids[0]) for name, s in self.scheduler._requests.items()}
        others = set().union(*(blocks for name, blocks in held.items() if name != request_id))
        num_free = self.cache.num_free
        delta = self.scheduler.abort(request_id)
        assert self.cache.num_free == num_free + len(held[request_id] - others)
        assert delta is not None
        assert delta.finish_reason is FinishReason.ABORT
        assert delta.token_ids == []
        self._receive([delta])
        assert self.scheduler.abort(request_id) is None
        self.scheduler.check_integrity()

    def step(self, meanwhile: Callable[[], object] | None = None) -> int:
        """Plan, compute and commit one step; returns the number of rows.

        After what happens ``meanwhile`` the scheduler may want the step dropped: it computed some
        or all of its rows, and nobody is told.
        """
        waited = self.live.keys() - self._seated()
        plan = self.scheduler.plan()
        self.scheduler.check_integrity()
        self._check_plan(plan)
        self._check_admitted(waited & self._seated())
        output = self._forward(plan)
        if meanwhile is not None:
            meanwhile()
            if self.scheduler.gives_way():
                self.dropped += 1
                self.scheduler.check_integrity()
                return 0
        self._receive(self.scheduler.commit(plan, output))
        self.scheduler.check_integrity()
        return len(plan.rows)

    def drain(self) -> None:
        """Step until all requests ended, which they must in a bounded number of steps."""
        # The first in order gains a token a step, and no one is added who could displace it.
        bound = sum(
            len(r.request.prompt_ids) + r.request.sampling.max_tokens for r in self.live.values()
        )
        if len({(r.request.tenant, r.request.due_s) for r in self.live.values()}) > 1:
            # Between two charges the first in turn may compute all its tokens again; and each that
            # is due before it may have had to wait for a place, and send it back then.
            bound *= self.settings.max_model_len
        for _ in range(bound):
            if not self.scheduler.has_work:
                break
            self.step()
        assert not self.live, f"still not finished after {bound} steps: {sorted(self.live)}"
        assert not self.scheduler.has_work
        assert self.cache.num_free == self.cache.num_usable
        stats = self.scheduler.stats()
        assert stats["running"] == stats["waiting"] == 0
        assert self.total("generation_tokens") == sum(len(r.tokens) for r in self.done)
        prompts = sum(len(r.request.prompt_ids) for r in self.done)
        counted = stats["prompt_tokens"] + stats["cached_tokens"]
        aborted = any(r.last and r.last.finish_reason is FinishReason.ABORT for r in self.done)
        assert counted <= prompts if aborted or self.deaths else counted == prompts

    def _check_plan(self, plan: Any) -> None:
        settings = self.settings
        assert plan.num_tokens == sum(row.num_new for row in plan.rows) <= settings.max_num_tokens
        assert len(plan.rows) <= settings.max_num_seqs
        ids = [row.state.request.request_id for row in plan.rows]
        assert len(set(ids)) == len(ids), "a request has two rows"
        for row in plan.rows:
            assert row.num_new >= 1
            assert row.num_new <= (settings.chunk_tokens or settings.max_num_tokens)
            assert row.start == row.state.num_computed
            end = row.start + row.num_new
            assert row.samples == (end == len(row.state.token_ids))
        if self.live:
            first = min(self.live.values(), key=lambda record: record.order)
            if len({record.request.tenant for record in self.live.values()}) == 1:
                # One that is due earlier takes no seat from one that has it.
                seated = min((self.live[name] for name in self._seated()), key=lambda r: r.order)
                assert seated.request.request_id in ids, "the first in order makes no progress"
            priorities = [row.state.request.priority for row in plan.rows]
            assert first.request.priority in priorities, "the first priority makes no progress"

    def _seated(self) -> set[str]:
        """Requests that run."""
        running = self.modules.scheduler.Phase.RUNNING
        return {name for name, state in self.scheduler._requests.items() if state.phase is running}

    def _check_admitted(self, admitted: set[str]) -> None:
        """Within a tenant and a priority nobody is let in before one that is due earlier."""
        for waiting in self.live.keys() - self._seated():
            other = self.live[waiting]
            for name in admitted:
                record = self.live[name]
                if (record.request.tenant, record.order[0]) == (
                    other.request.tenant,
                    other.order[0],
                ):
                    assert record.order < other.order, f"{name} was let in before {waiting}"

    def _slot(self, row: Any, position: int) -> int:
        block_size = self.settings.block_size
        block = row.state.block_ids[0][position // block_size]
        assert 0 < block < self.settings.num_blocks
        return int(block) * block_size + position % block_size

    def _forward(self, plan: Any) -> Any:
        read: set[int] = set()
        written: dict[int, int] = {}
        for row in plan.rows:
            record = self.live[row.state.request.request_id]
            tokens = record.request.prompt_ids + record.tokens
            assert row.state.token_ids == tokens
            last = (
                record.fingerprints[-1] if record.fingerprints else _root(record.request.cache_salt)
            )
            for token in tokens[len(record.fingerprints) :]:
                last = fingerprint(last, token)
                record.fingerprints.append(last)
            for position in range(row.start):
                slot = self._slot(row, position)
                assert self.slots.get(slot) == record.fingerprints[position], (
                    f"{row.state} would read wrong state at position {position}"
                )
                read.add(slot)
            for position in range(row.start, row.start + row.num_new):
                slot = self._slot(row, position)
                assert slot not in written, f"two rows write slot {slot}"
                written[slot] = record.fingerprints[position]
        assert not read & written.keys(), "a row writes what another reads"
        self.slots.update(written)
        return self._output(plan)

    def _output(self, plan: Any) -> Any:
        tokens: list[int] = []
        logprobs: list[TokenLogprobs | None] = []
        prompt_logprobs: dict[int, list[TokenLogprobs]] = {}
        for index, row in enumerate(plan.rows):
            record = self.live[row.state.request.request_id]
            sampling = record.request.sampling
            end = row.start + row.num_new
            if row.samples:
                early = len(record.tokens) < sampling.min_tokens
                token = _draw(
                    record.fingerprints[end - 1], _stop_ids(sampling) if early else frozenset()
                )
                tokens.append(token)
                wanted = sampling.logprobs is not None
                logprobs.append(_entry(record.fingerprints[end - 1], token) if wanted else None)
            if row.prompt_logprobs:
                prompt = record.request.prompt_ids
                prompt_logprobs[index] = [
                    _entry(record.fingerprints[position], prompt[position + 1])
                    for position in range(row.start, min(end, len(prompt) - 1))
                ]
        return self.modules.scheduler.StepOutput(tokens, logprobs, prompt_logprobs)

    def _receive(self, deltas: list[Delta]) -> None:
        for delta in deltas:
            record = self.live[delta.request_id]  # a KeyError is a delta after the last one
            first = not record.tokens
            record.tokens += delta.token_ids
            record.logprobs += delta.logprobs or []
            if delta.prompt_logprobs is not None:
                assert first, "prompt logprobs come with the first delta"
                record.prompt_logprobs = delta.prompt_logprobs
            if delta.finish_reason is None:
                assert delta.usage is None
                assert len(delta.token_ids) == 1
            else:
                record.last = delta
                self.done.append(self.live.pop(delta.request_id))
                self._check_finished(record, delta)

    def _check_finished(self, record: _Record, delta: Delta) -> None:
        request = record.request
        answer, reason = expected_answer(request, self.settings.max_model_len)
        if delta.finish_reason is FinishReason.ABORT:
            assert record.tokens == answer[: len(record.tokens)]
            assert len(record.tokens) < len(answer)
        else:
            assert (record.tokens, delta.finish_reason) == (answer, reason)
        assert isinstance(delta.usage, Usage)
        assert delta.usage.prompt_tokens == len(request.prompt_ids)
        assert delta.usage.completion_tokens == len(record.tokens)
        assert 0 <= delta.usage.cached_tokens <= len(request.prompt_ids)
        last = [_root(request.cache_salt)]
        for token in request.prompt_ids + record.tokens:
            last.append(fingerprint(last[-1], token))
        if request.sampling.logprobs is not None:
            start = len(request.prompt_ids)
            assert record.logprobs == [
                _entry(last[start + index], token) for index, token in enumerate(record.tokens)
            ]
        if request.sampling.prompt_logprobs is not None and record.tokens:
            assert delta.usage.cached_tokens == 0 or record.deaths
            assert record.prompt_logprobs == [
                _entry(last[index], request.prompt_ids[index])
                for index in range(1, len(request.prompt_ids))
            ]
        elif record.tokens:
            assert record.prompt_logprobs is None


def random_settings(seed: int) -> WorldSettings:
    """Settings of a world with hardly any room."""
    rng = random.Random(seed)
    return WorldSettings(
        num_blocks=rng.randrange(2, 13),
        block_size=rng.randrange(1, 5),
        max_num_tokens=rng.randrange(1, 12),
        max_num_seqs=rng.randrange(1, 6),
        max_model_len=rng.randrange(4, 24),
        chunk_tokens=rng.choice([None, None, 1, 3]),
        prefix_cache=rng.random() < 0.9,
    )


def drive(settings: WorldSettings, modules: Any, seed: int, num_actions: int = 60) -> World:
    """Do a random but repeatable sequence of things to a new world, then let it finish."""
    rng = random.Random(seed)
    world = World(settings, modules)
    tenants = [["one"], ["one", "two", "three"]][seed % 2]
    dues = [[0.0], [0.0, 1.0, 2.5]][seed % 3 > 0]
    shared = [rng.randrange(1, VOCABULARY) for _ in range(settings.max_model_len)]
    count = 0
    for _ in range(num_actions):
        action = rng.random()
        if action < 0.35:
            head = shared[: rng.randrange(settings.max_model_len - 1)]
            tail = [rng.randrange(1, VOCABULARY) for _ in range(rng.randrange(1, 4))]
            count += 1
            request = request_of(
                f"r{count}",
                head + tail,
                max_tokens=rng.randrange(1, 12),
                min_tokens=rng.choice([0, 0, 3]),
                ignore_eos=rng.random() < 0.6,
                stop_token_ids=rng.choice([(), (), (2,)]),
                logprobs=rng.choice([None, 1]),
                prompt_logprobs=rng.choice([None, None, 0]),
                priority=rng.choice([0, 0, 0, -1, 2]),
                cache_salt=rng.choice(["", "", "other"]),
                tenant=rng.choice(tenants),
                due_s=rng.choice(dues),
                weight=rng.choice([1.0, 1.0, 3.0]),
            )
            if rng.random() < 0.7:
                world.add(request)
            else:
                world.step(partial(world.add, request))
        elif action < 0.42 and world.live:
            victim = rng.choice(sorted(world.live))
            if rng.random() < 0.5:
                world.abort(victim)
            else:
                world.step(partial(world.abort, victim))
        elif action < 0.45:
            world.die()
        else:
            world.step()
    world.drain()
    return world
