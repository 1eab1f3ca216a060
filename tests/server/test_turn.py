"""One turn: every path ends with exactly one terminal event, and leaves nothing behind."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator
from typing import Any, cast

import pytest

from engine import EngineClosed, EngineState, FinishReason, Request
from server.errors import ApiError
from server.events import (
    TERMINAL_EVENTS,
    Event,
    OutputItemAdded,
    OutputItemDone,
    OutputTextDelta,
    OutputTextDone,
    ResponseCancelled,
    ResponseCompleted,
    ResponseFailed,
    ResponseIncomplete,
    ResponsePrompt,
)
from server.journals import Journals
from server.metering.metrics import Metrics
from server.request import SamplingOptions, TurnRequest
from server.sessions import Sessions
from server.store import Store, StoreError, StoreUnavailable
from server.turn import Turn
from server.turns import Turns
from tests.server.gates import open_gate
from tests.server.scripted import EOS, Script, ScriptedEngine, byte_tokenizer, say


class Bench:
    """Turns over a scripted engine and a memory store."""

    def __init__(self, engine: ScriptedEngine, store: Store) -> None:
        self.engine = engine
        self.store = store
        self.metrics = Metrics()
        self.journals = Journals(store)
        self.sessions = Sessions(store, self.journals, retention_s=1000)
        self.turns = Turns(
            cast(Any, engine),
            byte_tokenizer(),
            self.journals,
            self.sessions,
            self.metrics,
            store,
            gate=open_gate(engine, store, self.metrics),
            max_live=64,
        )

    async def start(self, prompt: str | list[int] = "hello", **fields: Any) -> Turn:
        return await self.turns.start(turn_request(prompt, **fields))

    async def run(self, prompt: str | list[int] = "hello", **fields: Any) -> list[Event]:
        return await events_of(await self.start(prompt, **fields))

    async def idle(self) -> None:
        await self.turns.until_idle()
        await self.engine.settle()
        assert self.turns.live == 0
        assert self.journals.num_live == 0
        assert not self.engine.running
        names = [task.get_name() for task in asyncio.all_tasks()]
        assert not [name for name in names if name.startswith("turn-")]


def turn_request(prompt: str | list[int] = "hello", **fields: Any) -> TurnRequest:
    options = {"dialect": "completions", "model": "scripted", "prompts": [prompt], **fields}
    return TurnRequest(**options)


async def events_of(turn: Turn) -> list[Event]:
    events = [event async for event in turn.follow()]
    assert [event.sequence_number for event in events] == list(range(len(events)))
    assert [isinstance(event, TERMINAL_EVENTS) for event in events].count(True) == 1
    assert isinstance(events[-1], TERMINAL_EVENTS)
    check_items(events)
    return events


def check_items(events: list[Event]) -> None:
    """Every item that begins ends once, its text is the sum of its deltas."""
    added = [event for event in events if isinstance(event, OutputItemAdded)]
    done = [event for event in events if isinstance(event, OutputItemDone)]
    assert sorted(e.item["id"] for e in added) == sorted(e.item["id"] for e in done)
    response = getattr(events[-1], "response", {})
    assert [item["id"] for item in response["output"]] == [
        e.item["id"] for e in sorted(added, key=lambda e: e.output_index)
    ]
    for item in done:
        text = text_of(events, item.output_index)
        assert item.item["content"][0]["text"] == text
        [final] = [
            e.text
            for e in events
            if isinstance(e, OutputTextDone) and e.output_index == item.output_index
        ]
        assert final == text


def text_of(events: list[Event], index: int = 0) -> str:
    return "".join(
        event.delta
        for event in events
        if isinstance(event, OutputTextDelta) and event.output_index == index
    )


def item_done(events: list[Event], index: int = 0) -> OutputItemDone:
    [item] = [e for e in events if isinstance(e, OutputItemDone) and e.output_index == index]
    return item


def usage(events: list[Event]) -> dict[str, Any]:
    return cast(dict[str, Any], getattr(events[-1], "response", {})["usage"])


@pytest.fixture
async def make() -> AsyncIterator[Any]:
    benches: list[Bench] = []
    store = Store.in_memory()
    await store.renew_epoch()

    async def build(script: Any = None, **options: Any) -> Bench:
        bench = Bench(ScriptedEngine(script, **options), store)
        await bench.journals.start()
        benches.append(bench)
        return bench

    yield build
    for bench in benches:
        await bench.idle()
        bench.turns.close()
        await bench.journals.close()
    await store.close()


async def test_completed(make: Any) -> None:
    bench = await make(say("héllo"))
    events = await bench.run()
    assert isinstance(events[-1], ResponseCompleted)
    assert text_of(events) == "héllo"
    assert item_done(events).finish_reason == "stop"
    assert item_done(events).stop_reason is None
    assert usage(events)["input_tokens"] == 5
    assert usage(events)["output_tokens"] == 7


async def test_characters_are_never_split(make: Any) -> None:
    bench = await make(say("a🙂b"))
    deltas = [e.delta for e in await bench.run() if isinstance(e, OutputTextDelta)]
    assert deltas == ["a", "🙂", "b"]


async def test_broken_utf8_at_the_end_is_shown(make: Any) -> None:
    bench = await make(Script(steps=[[97], [0xF0], [0x9F]]))
    events = await bench.run()
    assert text_of(events) == "a\ufffd"


async def test_incomplete_at_max_tokens(make: Any) -> None:
    bench = await make(say("abcdef"))
    events = await bench.run(sampling=SamplingOptions(max_tokens=3))
    assert isinstance(events[-1], ResponseIncomplete)
    assert events[-1].response["incomplete_details"] == {"reason": "max_output_tokens"}
    assert text_of(events) == "abc"
    assert item_done(events).finish_reason == "length"
    assert item_done(events).item["status"] == "incomplete"


@pytest.mark.parametrize("per_step", [1, 2, 5, 100])
@pytest.mark.parametrize(
    ("include", "text"), [(False, "one two "), (True, "one two <end>")], ids=["cut", "included"]
)
async def test_stop_string(make: Any, per_step: int, include: bool, text: str) -> None:
    bench = await make(say("one two <end> three", per_step=per_step))
    sampling = SamplingOptions(stop=("<end>", "zzz"), include_stop_str_in_output=include)
    events = await bench.run(sampling=sampling, return_token_ids=True)
    assert isinstance(events[-1], ResponseCompleted)
    assert text_of(events) == text
    assert item_done(events).stop_reason == "<end>"
    # However the tokens came, those up to the one that completes the match count.
    assert usage(events)["output_tokens"] == len("one two <end>")
    ids = [i for e in events if isinstance(e, OutputTextDelta) for i in e.token_ids or ()]
    assert bytes(ids) == b"one two <end>"


async def test_stop_string_aborts_the_engine_request(make: Any) -> None:
    hold = asyncio.Event()
    bench = await make(Script(steps=[list(b"a<end>b"), list(b"never")], hold=hold))
    events = await bench.run(sampling=SamplingOptions(stop=("<end>",)))
    assert text_of(events) == "a"
    assert bench.engine.aborted == [bench.engine.requests[0].request_id]


async def test_stop_string_not_before_min_tokens(make: Any) -> None:
    bench = await make(say("xx<e>yy<e>zz", per_step=4))
    events = await bench.run(sampling=SamplingOptions(stop=("<e>",), min_tokens=6))
    assert text_of(events) == "xx<e>yy"


async def test_part_of_a_stop_string_at_the_end_is_text(make: Any) -> None:
    bench = await make(say("one <en"))
    events = await bench.run(sampling=SamplingOptions(stop=("<end>",)))
    assert text_of(events) == "one <en"
    assert item_done(events).stop_reason is None


async def test_stop_token_is_named_and_not_shown(make: Any) -> None:
    script = Script(steps=[[97], [98], [99]], end=FinishReason.STOP)
    bench = await make(script)
    sampling = SamplingOptions(stop_token_ids=(99,), ignore_eos=True)
    events = await bench.run(sampling=sampling)
    assert text_of(events) == "ab"
    assert item_done(events).stop_reason == 99
    assert usage(events)["output_tokens"] == 3


async def test_several_prompts_and_choices(make: Any) -> None:
    bench = await make()
    request = turn_request(prompts=["ab", "xyz"], n=2, sampling=SamplingOptions(seed=7))
    events = await events_of(await bench.turns.start(request))
    assert [text_of(events, index) for index in range(4)] == ["ab", "ab", "xyz", "xyz"]
    assert usage(events)["input_tokens"] == 5
    assert usage(events)["output_tokens"] == 3 + 3 + 4 + 4
    seeds = [engine_request.sampling.seed for engine_request in bench.engine.requests]
    assert seeds == [7, 8, 7, 8]


async def test_seed_is_drawn_once_and_recorded(make: Any) -> None:
    bench = await make(say("a"))
    request = turn_request(n=2)
    first = await events_of(await bench.turns.start(request))
    second = await events_of(await bench.turns.start(request))
    seeds = [getattr(events[-1], "response", {})["seed"] for events in (first, second)]
    assert seeds[0] != seeds[1]
    sent = [engine_request.sampling.seed for engine_request in bench.engine.requests]
    assert sent == [seeds[0], seeds[0] + 1, seeds[1], seeds[1] + 1]


async def test_logprobs_and_token_ids(make: Any) -> None:
    bench = await make(say("é"))
    sampling = SamplingOptions(logprobs=2, prompt_logprobs=1)
    events = await bench.run("hi", sampling=sampling, return_token_ids=True)
    [prompt] = [e for e in events if isinstance(e, ResponsePrompt)]
    assert prompt.token_ids == list(b"hi")
    assert prompt.logprobs is not None
    assert prompt.logprobs[0] is None
    assert prompt.logprobs[1] is not None
    assert prompt.logprobs[1].token == "i"
    deltas = [e for e in events if isinstance(e, OutputTextDelta)]
    assert [entry.bytes for e in deltas for entry in e.logprobs] == [[0xC3], [0xA9], []]
    assert all(len(entry.top_logprobs) == 2 for e in deltas for entry in e.logprobs)
    assert [i for e in deltas for i in e.token_ids or ()] == [*"é".encode(), EOS]
    assert events.index(prompt) < events.index(deltas[0])


async def test_prompt_logprobs_come_once_a_prompt(make: Any) -> None:
    bench = await make(say("a"))
    sampling = SamplingOptions(prompt_logprobs=0)
    request = turn_request(prompts=["ab", "cd"], n=3, sampling=sampling)
    events = await events_of(await bench.turns.start(request))
    prompts = [e for e in events if isinstance(e, ResponsePrompt)]
    assert sorted(e.output_index for e in prompts) == [0, 3]
    for prompt in prompts:
        own = range(prompt.output_index, prompt.output_index + 3)
        firsts = [
            events.index(e)
            for e in events
            if isinstance(e, OutputTextDelta) and e.output_index in own
        ]
        assert events.index(prompt) < min(firsts)
    asked = [request.sampling.prompt_logprobs for request in bench.engine.requests]
    assert asked == [0, None, None, 0, None, None]


async def test_engine_death(make: Any) -> None:
    bench = await make(Script(steps=[[97], [98], [99]], dies_after=2))
    events = await bench.run()
    assert isinstance(events[-1], ResponseFailed)
    assert events[-1].response["error"]["code"] == "engine_died"
    assert text_of(events) == "ab"
    assert item_done(events).item["status"] == "incomplete"
    assert item_done(events).finish_reason is None


async def test_engine_refusal(make: Any) -> None:
    bench = await make(Script(steps=[[97]], end=FinishReason.ERROR))
    events = await bench.run()
    assert isinstance(events[-1], ResponseFailed)
    assert events[-1].response["error"] == {
        "code": "request_refused",
        "message": "scripted failure",
    }


async def test_engine_that_aborts_by_itself_is_a_failure(make: Any) -> None:
    bench = await make(Script(steps=[[97]], end=FinishReason.ABORT))
    assert isinstance((await bench.run())[-1], ResponseFailed)


async def test_cancel_is_idempotent_and_frees_the_engine(make: Any) -> None:
    bench = await make(say("abc", hold=asyncio.Event()))
    turn = await bench.start()
    follower = turn.follow()
    async for event in follower:
        if isinstance(event, OutputTextDelta):
            break
    await asyncio.gather(turn.cancel(), turn.cancel())
    rest = [event async for event in follower]
    assert isinstance(rest[-1], ResponseCancelled)
    assert rest[-1].response["output"][0]["content"][0]["text"] == "a"
    assert rest[-1].response["output"][0]["status"] == "incomplete"
    await turn.cancel()
    assert bench.engine.aborted == [bench.engine.requests[0].request_id]


async def test_cancel_before_anything_ran(make: Any) -> None:
    bench = await make(say("abc"))
    turn = await bench.start()
    turn.stop()
    events = await events_of(turn)
    assert isinstance(events[-1], ResponseCancelled)
    assert events[-1].response["output"] == []


@pytest.mark.parametrize(
    ("on_disconnect", "ends_as"), [("cancel", ResponseCancelled), ("finish", ResponseCompleted)]
)
async def test_detach(make: Any, on_disconnect: str, ends_as: type[Event]) -> None:
    bench = await make(say("abc"))
    turn = await bench.start(on_disconnect=on_disconnect)
    turn.detach()
    assert isinstance((await events_of(turn))[-1], ends_as)


@pytest.mark.parametrize(
    ("prompt", "fields", "code", "says"),
    [
        ("", {}, None, "at least one token"),
        (
            "x" * 64,
            {},
            "context_length_exceeded",
            "too long.*64 tokens.*context length is 64 tokens",
        ),
        ("x" * 9000, {}, "context_length_exceeded", "9000 tokens"),
        ([1, 9999], {}, "invalid_token_id", "9999"),
        ([-1], {}, "invalid_token_id", "-1"),
        ("x", {"n": 257}, None, "257"),
    ],
)
async def test_refused_before_anything_starts(
    make: Any, prompt: Any, fields: dict[str, Any], code: str | None, says: str
) -> None:
    bench = await make(max_model_len=64)
    with pytest.raises(ApiError, match=says) as caught:
        await bench.start(prompt, **fields)
    assert caught.value.status == 400
    assert caught.value.code == code
    assert not bench.engine.requests
    assert not await bench.store.redis.keys("millrace:journal:*")


async def test_answer_is_capped_by_the_context(make: Any) -> None:
    bench = await make(max_model_len=64)
    await bench.run("x" * 60, sampling=SamplingOptions(max_tokens=1000))
    assert bench.engine.requests[0].sampling.max_tokens == 4
    await bench.run("x" * 60)
    assert bench.engine.requests[1].sampling.max_tokens == 4


async def test_refused_while_draining_or_busy(make: Any) -> None:
    hold = asyncio.Event()
    bench = await make(say("ab", hold=hold))
    turns = [await bench.start() for _ in range(64)]
    with pytest.raises(ApiError) as busy:
        await bench.start()
    assert (busy.value.status, busy.value.retry_after_s) == (429, 2)
    hold.set()
    for turn in turns:
        await turn.ended()
    await bench.turns.drain(0)
    with pytest.raises(ApiError) as draining:
        await bench.start()
    assert draining.value.status == 503
    assert draining.value.code == "server_draining"


async def test_drain_lets_turns_end_then_cancels(make: Any) -> None:
    hold = asyncio.Event()
    bench = await make(say("ab", hold=hold))
    quick, slow = await bench.start(), await bench.start()
    drain = asyncio.create_task(bench.turns.drain(3600))
    hold.set()
    await drain
    assert isinstance((await events_of(quick))[-1], ResponseCompleted)
    assert isinstance((await events_of(slow))[-1], ResponseCompleted)
    bench.turns.draining = False
    hold.clear()
    stuck = await bench.start()
    await bench.turns.drain(0.01)
    assert isinstance((await events_of(stuck))[-1], ResponseCancelled)


async def test_engine_that_is_not_ready(make: Any) -> None:
    bench = await make()
    bench.engine.state = EngineState.RESTARTING
    with pytest.raises(ApiError, match="restarting") as caught:
        await bench.start()
    assert (caught.value.status, caught.value.retry_after_s) == (503, 5)


async def test_engine_that_closes_between_two_submissions(make: Any) -> None:
    bench = await make(say("ab"))
    real = bench.engine.generate

    def once(request: Request) -> Any:
        if bench.engine.requests:
            raise EngineClosed("gone")
        return real(request)

    bench.engine.generate = once
    with pytest.raises(ApiError, match="gone"):
        await bench.start(n=3)
    assert bench.engine.aborted == [bench.engine.requests[0].request_id]


async def test_store_that_refuses_the_answer(make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    async def refuse(*_: Any) -> None:
        raise StoreError("full")

    bench = await make(say("ab"))
    monkeypatch.setattr(bench.sessions, "end", refuse)
    events = await bench.run(store=True)
    assert isinstance(events[-1], ResponseFailed)
    assert events[-1].response["error"]["code"] == "store_unavailable"
    monkeypatch.setattr(bench.sessions, "begin", refuse)
    with pytest.raises(ApiError) as caught:
        await bench.start(store=True)
    assert caught.value.code == "store_unavailable"


async def test_store_that_is_away_while_the_answer_ends(
    make: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench = await make(say("ab"))
    real, tries = bench.sessions.end, 0

    async def end(*arguments: Any) -> None:
        nonlocal tries
        tries += 1
        if tries < 3:
            raise StoreUnavailable("away")
        await real(*arguments)

    monkeypatch.setattr("server.turns.KEEP_RETRY_S", 0.0)
    monkeypatch.setattr(bench.sessions, "end", end)
    events = await bench.run(store=True)
    assert isinstance(events[-1], ResponseCompleted)
    assert tries == 3


async def test_client_that_leaves_while_its_turn_begins(
    make: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench = await make(say("ab", hold=asyncio.Event()))
    conversation = (await bench.sessions.conversations.create("", {}, [])).conversation_id
    await bench.sessions.conversations.claim(conversation, "", "resp_x", num_new=2)
    real, stored = bench.sessions.begin, asyncio.Event()

    async def slow(*arguments: Any) -> None:
        await real(*arguments)
        stored.set()
        await asyncio.Event().wait()

    monkeypatch.setattr(bench.sessions, "begin", slow)
    start = asyncio.create_task(
        bench.start(store=True, turn_id="resp_x", conversation_id=conversation)
    )
    await stored.wait()
    start.cancel()
    await asyncio.gather(start, return_exceptions=True)
    await bench.turns.drain(0)
    record = await bench.sessions.response("resp_x", "")
    assert record.response["status"] == "failed"
    assert bench.engine.aborted
    await bench.sessions.conversations.claim(conversation, "", "resp_y", num_new=2)


async def test_fault_of_ours_still_ends_the_turn_and_tells_no_prompt(
    make: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*_: Any) -> None:
        raise ValueError(" ".join(["my", "secret", "prompt"]))

    monkeypatch.setattr("server.choice.Choice.feed", fail)
    bench = await make(say("ab"))
    events = await bench.run("my secret prompt")
    assert isinstance(events[-1], ResponseFailed)
    assert events[-1].response["error"]["code"] == "server_error"
    assert "ValueError" in caplog.text
    assert "my secret" not in caplog.text


async def test_metrics_add_up(make: Any) -> None:
    bench = await make(say("abc"))
    await bench.run()
    await bench.run(sampling=SamplingOptions(max_tokens=1))
    await bench.idle()
    text = bench.metrics.render().decode()
    assert 'millrace_turns_total{dialect="completions",status="completed"} 1.0' in text
    assert 'millrace_turns_total{dialect="completions",status="incomplete"} 1.0' in text
    assert "millrace_turns_in_flight 0.0" in text
    assert "millrace_turn_completion_tokens_total 5.0" in text
    assert "millrace_turn_prompt_tokens_total 10.0" in text
    assert "millrace_time_to_first_token_seconds_count 2.0" in text
    assert "millrace_inter_token_seconds_count 3.0" in text


async def test_aborts_at_random_moments_leave_nothing(make: Any) -> None:
    """Cancels, departures and engine deaths at any step; everything returns to where it was."""
    bench = await make(lambda request: say("some words to say", per_step=2))
    chance = random.Random(5)

    async def one(number: int) -> None:
        stop = ("to",) if number % 3 == 0 else ()
        turn = await bench.start(n=1 + number % 3, sampling=SamplingOptions(stop=stop))
        steps = chance.randrange(12)
        if chance.random() < 0.2:
            await events_of(turn)
            return
        async for _ in turn.follow():
            steps -= 1
            if steps <= 0:
                break
        action = chance.choice([turn.stop, turn.detach, bench.engine.die])
        action()
        await events_of(turn)

    before = len(asyncio.all_tasks())
    for round_number in range(8):
        await asyncio.gather(*(one(round_number * 40 + number) for number in range(40)))
    await bench.idle()
    for _ in range(3):
        await asyncio.sleep(0)
    assert len(asyncio.all_tasks()) == before
