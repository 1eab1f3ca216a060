"""A world to test the scheduler in: a model that can be known in full, and a KV cache that tells.

The "model" draws a token from a fingerprint of everything before it. The "KV cache" is a dict from
slot to the fingerprint that was written there, so a row that would read another request's state, or
state that was never written, is found at once.

A world may be one step ahead: a step's rows are computed when it is launched, and what they brought
is told to the scheduler after the next step is planned and launched.
"""

from __future__ import annotations

import random
from collections import Counter, deque
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
    drawn: list[int] = field(default_factory=list)
    """What the model drew, tokens that were not told yet or never will be included."""
    fingerprints: list[int] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    prompt_logprobs: list[TokenLogprobs] | None = None
    last: Delta | None = None
    deaths: int = 0
    """Schedulers that were lost while it was in flight."""

    def fingerprint_at(self, position: int) -> int:
        """Of the sequence up to this position, whose token the model knows."""
        tokens = self.request.prompt_ids + self.drawn
        last = self.fingerprints[-1] if self.fingerprints else _root(self.request.cache_salt)
        for token in tokens[len(self.fingerprints) : position + 1]:
            last = fingerprint(last, token)
            self.fingerprints.append(last)
        return self.fingerprints[position]

    def draw(self, end: int) -> int:
        """The token at index ``end``."""
        sampling = self.request.sampling
        index = end - len(self.request.prompt_ids)
        masked = _stop_ids(sampling) if index < sampling.min_tokens else frozenset()
        token = _draw(self.fingerprint_at(end - 1), masked)
        if index == len(self.drawn):
            self.drawn.append(token)
        assert self.drawn[index] == token
        return token


@dataclass(frozen=True)
class WorldSettings:
    num_blocks: int = 8
    block_size: int = 2
    max_num_tokens: int = 8
    max_num_seqs: int = 4
    max_model_len: int = 20
    chunk_tokens: int | None = None
    prefix_cache: bool = True
    steps_ahead: int = 0


@dataclass(frozen=True)
class _Flight:
    """A step that was launched and not committed."""

    plan: Any
    output: Any


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
        self.steps_ahead = 0
        """Steps that were launched before the one ahead of them was committed."""
        self._arrivals = 0
        self._past: Counter[str] = Counter()
        """Figures of schedulers that are gone."""
        self._begin()

    def _begin(self) -> None:
        settings, modules = self.settings, self.modules
        self.slots: dict[int, int] = {}
        self.flights: deque[_Flight] = deque()
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
        """Launch what may be launched and commit one step; returns its number of rows.

        After what happens ``meanwhile`` the scheduler may want the step dropped, where nothing is
        launched ahead: it computed some or all of its rows, and nobody is told.
        """
        while len(self.flights) <= self.settings.steps_ahead and self._launch():
            pass
        if meanwhile is not None:
            meanwhile()
            if not self.settings.steps_ahead and self.scheduler.gives_way():
                self.dropped += 1
                self.flights.clear()
                self.scheduler.check_integrity()
                return 0
        if not self.flights:
            return 0
        flight = self.flights.popleft()
        self._receive(self.scheduler.commit(flight.plan, flight.output))
        self.scheduler.check_integrity()
        return len(flight.plan.rows)

    def _launch(self) -> bool:
        """Plan and compute one more step; False if there is none."""
        waited = self.live.keys() - self._seated()
        plan = self._plan()
        self._check_admitted(waited & self._seated())
        if not plan.rows:
            assert self.flights or not self.live, "nobody is served"
            return False
        self._check_plan(plan)
        self.flights.append(_Flight(plan, self._forward(plan)))
        if len(self.flights) > 1:
            self.steps_ahead += 1
        return True

    def _plan(self) -> Any:
        plan = self.scheduler.plan(after=self.flights[-1].plan if self.flights else None)
        self.scheduler.check_integrity()
        return plan

    def forget_a_plan(self) -> None:
        """Plan a step that is not computed."""
        self._plan()

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
        # A step ahead may be of requests that turn out to have ended, and others wait meanwhile.
        bound = (bound + 1) * (1 + self.settings.steps_ahead)
        for _ in range(bound):
            if not self.scheduler.has_work and not self.flights:
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
            computed, known = row.state.num_computed, len(row.state.token_ids)
            for before in self._rows_of(row.state):
                computed += before.num_new
                known += before.samples
                assert not (before.samples and row.state.request.sampling.penalises)
            assert row.start == computed
            end = row.start + row.num_new
            assert row.samples == (end == known)
            total = len(row.state.request.prompt_ids) + row.state.request.sampling.max_tokens
            assert end < min(total, settings.max_model_len), "its last token is computed, too"
        live = [record for record in self.live.values() if not self._is_ending(record)]
        if live:
            first = min(live, key=lambda record: record.order)
            if len({record.request.tenant for record in live}) == 1:
                # One that is due earlier takes no seat from one that has it.
                seated = min(
                    (r for r in live if r.request.request_id in self._seated()),
                    key=lambda r: r.order,
                )
                assert seated.request.request_id in ids, "the first in order makes no progress"
            # It may have to wait for the place of one of its own priority that is ending.
            ending = [r.request.priority for r in self.live.values() if self._is_ending(r)]
            priorities = [row.state.request.priority for row in plan.rows] + ending
            assert first.request.priority in priorities, "the first priority makes no progress"

    def _rows_of(self, state: Any) -> list[Any]:
        """Rows of a request in steps that are computed."""
        return [row for flight in self.flights for row in flight.plan.rows if row.state is state]

    def _is_ending(self, record: _Record) -> bool:
        """Whether a step that is computed draws its last token, whichever that is."""
        state = self.scheduler._requests[record.request.request_id]
        drawing = sum(row.samples for row in self._rows_of(state))
        total = len(record.request.prompt_ids) + record.request.sampling.max_tokens
        return bool(len(state.token_ids) + drawing >= min(total, self.settings.max_model_len))

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
            assert row.state.token_ids == record.request.prompt_ids + record.tokens
            for position in range(row.start):
                slot = self._slot(row, position)
                assert self.slots.get(slot) == record.fingerprint_at(position), (
                    f"{row.state} would read wrong state at position {position}"
                )
                read.add(slot)
            for position in range(row.start, row.start + row.num_new):
                slot = self._slot(row, position)
                assert slot not in written, f"two rows write slot {slot}"
                written[slot] = record.fingerprint_at(position)
        assert not read & written.keys(), "a row writes what another reads"
        self.slots.update(written)
        return self._output(plan)

    def _output(self, plan: Any) -> Any:
        tokens: list[int] = []
        logprobs: list[TokenLogprobs | None] = []
        prompt_logprobs: dict[int, list[TokenLogprobs]] = {}
        for index, row in enumerate(plan.rows):
            record = self.live[row.state.request.request_id]
            end = row.start + row.num_new
            if row.samples:
                token = record.draw(end)
                tokens.append(token)
                wanted = record.request.sampling.logprobs is not None
                logprobs.append(_entry(record.fingerprint_at(end - 1), token) if wanted else None)
            if row.prompt_logprobs:
                prompt = record.request.prompt_ids
                prompt_logprobs[index] = [
                    _entry(record.fingerprint_at(position), prompt[position + 1])
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
        steps_ahead=seed // 2 % 2,
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
                presence_penalty=rng.choice([0.0, 0.0, 0.0, 0.0, 0.5]),
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
        elif action < 0.47:
            world.forget_a_plan()
        else:
            world.step()
    world.drain()
    return world
