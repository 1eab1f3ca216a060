"""The books of what is in flight, against an engine that counts upward and dies at any moment."""

from __future__ import annotations

import asyncio
import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule

from engine.errors import EngineClosed, EngineDied
from engine.inflight import MAX_STRIKES, InFlight
from engine.streams import RequestStream
from engine.types import Delta, FinishReason, Request, SamplingParams, Usage


class CountingEngine:
    """After token t comes t + 1. Requests in ``poison`` kill it when it computes them."""

    def __init__(self, poison: frozenset[str]) -> None:
        self.poison = poison
        self.alive = True
        self.requests: dict[str, Request] = {}
        self.brought: dict[str, int] = {}

    def submit(self, request: Request) -> None:
        assert request.request_id not in self.requests, "an engine was given a request twice"
        self.requests[request.request_id] = request
        self.brought[request.request_id] = 0

    def step(self) -> list[Delta]:
        """One token of each request; nothing of them comes out if it dies."""
        deltas = []
        for request_id, request in list(self.requests.items()):
            self.alive = self.alive and request_id not in self.poison
            count = len(request.output_ids) + self.brought[request_id] + 1
            self.brought[request_id] += 1
            last = count == request.sampling.max_tokens
            deltas.append(
                Delta(
                    request_id=request_id,
                    token_ids=[request.prompt_ids[0] + count],
                    finish_reason=FinishReason.LENGTH if last else None,
                    usage=Usage(1, 0, count, 0) if last else None,
                )
            )
            if last:
                del self.requests[request_id]
        return deltas if self.alive else []


class Reader:
    """Reads a stream when asked to, without waiting."""

    def __init__(self, request: Request) -> None:
        self.request = request
        self.stream = RequestStream(request.request_id, lambda _: None)
        self.tokens: list[int] = []
        self.last: Delta | None = None
        self.error: Exception | None = None

    def read(self) -> None:
        while self.last is None and self.error is None:
            step = self.stream.__anext__()
            try:
                step.send(None)
            except StopIteration as done:
                delta: Delta = done.value
                self.tokens += delta.token_ids
                self.last = delta if delta.finish_reason else None
            except (EngineDied, EngineClosed) as error:
                self.error = error
            else:
                step.close()  # it waits: nothing has come
                return

    @property
    def expected(self) -> list[int]:
        first = self.request.prompt_ids[0] + 1
        return list(range(first, first + self.request.sampling.max_tokens))


class InFlightMachine(RuleBasedStateMachine):
    """Requests come, leave and are aborted; engines compute and die."""

    @initialize(poison=st.frozensets(st.integers(1, 12), max_size=2))
    def begin(self, poison: frozenset[int]) -> None:
        self.books = InFlight()
        self.poison = frozenset(f"r{number}" for number in poison)
        self.engine = CountingEngine(self.poison)
        self.readers: dict[str, Reader] = {}
        self.numbers = itertools.count(1)
        self.outside_deaths = 0

    def submit(self) -> None:
        for request in self.books.due():
            self.engine.submit(request)

    @rule(max_tokens=st.integers(1, 12))
    def add(self, max_tokens: int) -> None:
        number = next(self.numbers)
        request = Request(
            request_id=f"r{number}",
            prompt_ids=[1000 * number],
            sampling=SamplingParams(max_tokens=max_tokens),
        )
        reader = self.readers[request.request_id] = Reader(request)
        self.books.add(request, reader.stream)
        self.submit()

    @rule(steps=st.integers(1, 5))
    def step(self, steps: int) -> None:
        for _ in range(steps):
            deltas = self.engine.step()
            if not self.engine.alive:
                self.restart()
                return
            for delta in deltas:
                self.books.deliver(delta)
            self.submit()

    @rule()
    def die(self) -> None:
        self.outside_deaths += 1
        self.engine.step()  # what it computed last is lost
        self.restart()

    def restart(self) -> None:
        self.books.engine_died()
        self.engine = CountingEngine(self.poison)
        self.submit()

    @precondition(lambda self: len(self.books) > 0)
    @rule(data=st.data(), leave=st.booleans(), gap=st.booleans())
    def end(self, data: st.DataObject, leave: bool, gap: bool) -> None:
        victim = data.draw(st.sampled_from([name for name in self.readers if name in self.books]))
        if gap:  # after a death, before there is another engine
            self.outside_deaths += 1
            self.books.engine_died()
            self.engine = CountingEngine(self.poison)
        if victim in self.books:
            self.leave(victim) if leave else self.abort(victim)
        self.submit()

    def leave(self, victim: str) -> None:
        assert self.books.drop(victim) == (self.engine.requests.pop(victim, None) is not None)
        del self.readers[victim]

    def abort(self, victim: str) -> None:
        request = self.engine.requests.pop(victim, None)
        assert self.books.abort(victim) == (request is not None)
        if request is not None:
            count = len(request.output_ids) + self.engine.brought[victim]
            last = Delta(
                request_id=victim,
                token_ids=[],
                finish_reason=FinishReason.ABORT,
                usage=Usage(1, 0, count, 0),
            )
            assert self.books.deliver(last)
        reader = self.readers[victim]
        reader.read()
        assert reader.last is not None
        assert reader.last.finish_reason is FinishReason.ABORT
        assert reader.last.usage is not None
        assert reader.last.usage.completion_tokens == len(reader.tokens)

    def teardown(self) -> None:
        if not hasattr(self, "books"):
            return
        for _ in range(2000):
            if not len(self.books):
                break
            self.step(1)
        assert not len(self.books), "requests are left over"
        given_up = 0
        for name, reader in self.readers.items():
            reader.read()
            assert reader.tokens == reader.expected[: len(reader.tokens)]
            if reader.error is not None:
                assert isinstance(reader.error, EngineDied)
                given_up += name not in self.poison
            elif reader.last is not None and reader.last.finish_reason is FinishReason.LENGTH:
                assert reader.tokens == reader.expected
                assert name not in self.poison
        assert given_up <= self.outside_deaths, "the poison was not found, others were"


InFlightMachine.TestCase.settings = settings(
    max_examples=100, stateful_step_count=40, deadline=None
)
TestInFlight = InFlightMachine.TestCase


@given(position=st.integers(0, 30), size=st.integers(1, 31))
@settings(max_examples=60, deadline=None)
def test_one_poison_among_many_takes_nobody_with_it(position: int, size: int) -> None:
    bad = f"r{position % size}"
    books = InFlight()
    readers = []
    for number in range(size):
        request = Request(
            request_id=f"r{number}",
            prompt_ids=[100 * number],
            sampling=SamplingParams(max_tokens=9),
        )
        readers.append(Reader(request))
        books.add(request, readers[-1].stream)
    engine = CountingEngine(frozenset([bad]))
    deaths = 0
    while len(books):
        for request in books.due():
            engine.submit(request)
        deltas = engine.step()
        if not engine.alive:
            deaths += 1
            books.engine_died()
            engine = CountingEngine(engine.poison)
        for delta in deltas:
            books.deliver(delta)
    assert deaths == MAX_STRIKES
    for reader in readers:
        reader.read()
        if reader.request.request_id == bad:
            assert isinstance(reader.error, EngineDied)
        else:
            assert reader.tokens == reader.expected


async def test_all_streams_fail_when_told_so() -> None:
    books = InFlight()
    readers = [
        Reader(Request(request_id=name, prompt_ids=[1], sampling=SamplingParams(max_tokens=3)))
        for name in ("a", "b")
    ]
    for reader in readers:
        books.add(reader.request, reader.stream)
    assert [request.request_id for request in books.due()] == ["a", "b"]
    assert books.fail_all(EngineClosed("shut down")) == 2
    for reader in readers:
        async with asyncio.timeout(1):
            with pytest.raises(EngineClosed):
                await anext(reader.stream)
    assert not len(books)
    assert not books.deliver(Delta(request_id="a", token_ids=[2]))
