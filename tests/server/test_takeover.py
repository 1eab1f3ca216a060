"""A server that dies: another one goes on with its turns, token for token."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, Self, cast

import pytest

from engine import Request
from server.agent.tools import BUILTIN_TOOLS
from server.background import end
from server.control import Control
from server.errors import ApiError
from server.events import (
    TERMINAL_EVENTS,
    Event,
    OutputTextDelta,
    ResponseCancelled,
    ResponseFailed,
    ResponseIncomplete,
    ResponsePrompt,
    ResponseQueued,
)
from server.guard.keys import KeyRing
from server.guard.queue import Place
from server.journal import Entry, JournalLeft
from server.journals import Journals
from server.metering.metrics import Metrics
from server.request import SamplingOptions, ToolOptions, TurnRequest
from server.sessions import Sessions
from server.store import Store, StoreKind
from server.takeover import Takeover
from server.turn import Turn
from server.turns import Turns
from tests.server.gates import open_gate
from tests.server.scripted import Script, ScriptedEngine, byte_tokenizer, call_text, prompt_text

TEXT = "Grüß Gott, STOP says the stop string; 世界 and on it goes"


class Replica:
    """A server without its sockets.

    ``allowed`` tokens of each new request are generated, then none; of one that was taken over all
    up to token ``until``.
    """

    def __init__(
        self,
        store: Store,
        *,
        text: str = TEXT,
        allowed: int | None = None,
        until: int | None = None,
        keys: KeyRing | None = None,
    ) -> None:
        self.store = store
        self.hold = asyncio.Event()
        if allowed is None and until is None:
            self.hold.set()
        self.allowed = allowed
        self.until = until
        self.text = text
        self.engine = ScriptedEngine(self._script)
        self.journals = Journals(store)
        self.metrics = Metrics()
        self.sessions = Sessions(store, self.journals, retention_s=1000)
        self.gate = open_gate(self.engine, store, self.metrics, keys)
        self.turns = Turns(
            cast(Any, self.engine),
            byte_tokenizer(),
            self.journals,
            self.sessions,
            self.metrics,
            store,
            gate=self.gate,
        )
        self.takeover = Takeover(store, self.journals, self.turns, self.metrics)

    def _script(self, request: Request) -> Script:
        steps = [[byte] for byte in self.text.encode()]
        if self.allowed is not None and not request.output_ids:
            # The first step has all that this replica will live to say.
            said = [token for step in steps[: self.allowed] for token in step]
            steps = [said, *steps[self.allowed :]] if said else [[], *steps]
        known = len(request.output_ids)
        if self.until is not None:
            at_once = [token for step in steps[known : self.until] for token in step]
            steps = [*steps[:known], at_once, *steps[self.until :]]
        return Script(steps=steps, hold=self.hold)

    async def start(self) -> Self:
        await self.journals.start()
        return self

    async def die(self) -> None:
        """Stop as a killed process does: nothing more is written, and nothing is tidied up."""
        await end(*self.journals._tasks)
        await self.store.redis.delete(self.journals.replicas.key(self.journals.replica_id))

    async def close(self) -> None:
        await self.takeover.close()
        tasks = [turn._task for turn in self.turns._turns.values() if turn._task is not None]
        for journal in list(self.journals._live.values()):
            journal.move()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self.journals.close()
        self.turns.close()
        await self.engine.close()


@pytest.fixture
async def store() -> AsyncIterator[Store]:
    opened = Store.in_memory()
    await opened.renew_epoch()
    yield opened
    await opened.close()


def request(**fields: Any) -> TurnRequest:
    fields = {"dialect": "completions", "model": "scripted", "prompts": ["hi"], **fields}
    fields.setdefault("sampling", SamplingOptions(seed=7))
    return TurnRequest(**fields)


async def events_of(batches: AsyncIterator[list[Entry]]) -> list[Event]:
    return [entry.event async for batch in batches for entry in batch]


def text_of(events: list[Event], index: int = 0) -> str:
    return "".join(
        event.delta
        for event in events
        if isinstance(event, OutputTextDelta) and event.output_index == index
    )


def check(events: list[Event]) -> None:
    assert [event.sequence_number for event in events] == list(range(len(events)))
    assert [isinstance(event, TERMINAL_EVENTS) for event in events].count(True) == 1
    assert isinstance(events[-1], TERMINAL_EVENTS)


async def until_written(turn: Turn, num_tokens: int) -> None:
    """Wait until the store has what ``num_tokens`` tokens made, in every choice."""
    while sum(s.choice.num_tokens for s in turn._sequences) < num_tokens * len(turn._sequences):
        await asyncio.sleep(0)
    await turn._journal.written()


async def run_over(replica: Replica) -> None:
    """Look twice, as the scan does: one look alone proves nobody dead."""
    await replica.takeover.scan()
    await replica.takeover.scan()


SHAPES: list[dict[str, Any]] = [
    {},
    {"return_token_ids": True},
    {"sampling": SamplingOptions(seed=7, logprobs=2)},
    {"sampling": SamplingOptions(seed=7, stop=("STOP",))},
    {"sampling": SamplingOptions(seed=7, max_tokens=20)},
    {"sampling": SamplingOptions(seed=7, prompt_logprobs=1, logprobs=0), "n": 2, "echo": True},
    {"sampling": SamplingOptions()},
    {
        "dialect": "responses",
        "prompts": None,
        "messages": [{"role": "user", "content": "hi"}],
        "store": True,
        "response_fields": {"store": True, "metadata": {"a": "b"}},
    },
]


@pytest.mark.parametrize("allowed", [0, 1, 3, 14, 19, 30, 1000])
@pytest.mark.parametrize("fields", SHAPES)
async def test_another_server_goes_on(store: Store, fields: dict[str, Any], allowed: int) -> None:
    """What both said together is what one alone would have said, whatever had been shown."""
    allowed = min(allowed, len(TEXT.encode()))
    dying = await Replica(store, allowed=allowed).start()
    alive = await Replica(store).start()
    turn = await dying.turns.start(request(**fields))
    limit = fields.get("sampling", SamplingOptions()).max_tokens or 1000
    stops = bool(fields.get("sampling", SamplingOptions()).stop)
    await until_written(turn, min(allowed, limit, 17 if stops else 1000))
    reader = asyncio.create_task(events_of(await alive.journals.follow(turn.id)))
    await dying.die()
    await run_over(alive)
    events = await asyncio.wait_for(reader, 20)
    check(events)
    alone = await Replica(store).start()
    undisturbed = await alone.turns.start(request(**fields))
    wanted = await events_of(undisturbed.batches())
    assert type(events[-1]) is type(wanted[-1])
    for index in range(turn.request.n):
        assert text_of(events, index) == text_of(wanted, index)
    assert _final(events[-1]) == _final(wanted[-1])
    assert alive.turns.get(turn.id) is None
    assert not await store.redis.exists(alive.journals.stored.work_key(turn.id))
    if turn.request.store:
        record = await alive.sessions.response(turn.id, "")
        assert record.response["output"] == cast(Any, events[-1]).response["output"]
    for replica in (dying, alive, alone):
        await replica.close()


def _final(event: Event) -> Any:
    """A terminal event's answer and cost; ids differ from turn to turn."""
    response = cast(Any, event).response
    output = [{**item, "id": None, "content": item["content"]} for item in response["output"]]
    usage = {name: response["usage"][name] for name in ("input_tokens", "output_tokens")}
    return response["status"], output, usage


@pytest.mark.parametrize("after", ["a", None])
@pytest.mark.parametrize("wakes", [False, True])
async def test_an_heir_keeps_the_branch(store: Store, after: str | None, wakes: bool) -> None:
    """The items land once, after what the turn saw, though the head has moved meanwhile."""
    dying = await Replica(store, allowed=5).start()
    alive = await Replica(store).start()
    old: list[dict[str, Any]] = [{"id": name, "type": "reasoning"} for name in "abc"]
    chat = (await dying.sessions.conversations.create("", {}, old)).conversation_id
    claimed = dying.sessions.conversations.claim(chat, "", "resp_1", num_new=2, after=after)
    assert (await claimed).after == after
    fields: dict[str, Any] = {**SHAPES[-1], "input_items": [{"id": "new", "type": "reasoning"}]}
    turn = await dying.turns.start(
        request(turn_id="resp_1", conversation_id=chat, conversation_after=after, **fields)
    )
    await until_written(turn, 5)
    await end(*dying.journals._tasks[1:])
    await store.redis.delete(dying.journals.replicas.key(dying.journals.replica_id))
    await alive.sessions.conversations.update(chat, "", head="b")
    await run_over(alive)
    events = await asyncio.wait_for(events_of(await alive.journals.follow(turn.id)), 20)
    check(events)
    if wakes:
        dying.hold.set()
        await turn.ended()
    answer = cast(Any, events[-1]).response["output"][0]
    tree = await alive.sessions.conversations.tree(chat, "")
    assert [(item["id"], item["parent_id"]) for item in tree] == [
        ("a", None), ("b", "a"), ("c", "b"), ("new", after), (answer["id"], "new"),
    ]  # fmt: skip
    assert (await alive.sessions.conversations.get(chat, "")).head == answer["id"]
    # And the conversation is free again.
    await alive.sessions.conversations.delete_item(chat, "a", "")
    for replica in (dying, alive):
        await replica.close()


async def test_a_paused_server_that_wakes_up_gives_way(store: Store) -> None:
    """It was taken for dead and its turn is run elsewhere: nothing of it is stored any more, and
    its own readers go on with what the other one says."""
    paused = await Replica(store, allowed=5).start()
    alive = await Replica(store).start()
    turn = await paused.turns.start(request())
    await until_written(turn, 5)
    reader = asyncio.create_task(events_of(turn.batches()))
    await end(paused.journals._tasks[1])
    await store.redis.delete(paused.journals.replicas.key(paused.journals.replica_id))
    alive.until = 8
    alive.hold.clear()
    await run_over(alive)
    assert alive.turns.get(turn.id) is not None
    # Both engines go on: the old one first, whose words are refused.
    paused.hold.set()
    await turn.ended()
    alive.hold.set()
    events = await asyncio.wait_for(reader, 20)
    check(events)
    assert text_of(events) == TEXT
    stored = [entry.event for entry in await alive.journals.stored.entries(turn.id)]
    assert stored == events
    assert paused.turns.live == 0
    assert b"millrace_turns_in_flight 0.0" in paused.metrics.render()
    await paused.close()
    await alive.close()


@pytest.mark.parametrize("allowed", [0, 3])
@pytest.mark.parametrize(
    "fields", [{}, {"sampling": SamplingOptions(seed=7, prompt_logprobs=1), "echo": True}]
)
async def test_places_in_the_queue_are_not_said_again(
    store: Store, fields: dict[str, Any], allowed: int
) -> None:
    """They come of the time: the heir makes none of its own, and keeps those that were shown."""
    dying = await Replica(store, allowed=allowed).start()
    alive = await Replica(store).start()
    turn = await dying.turns.start(request(**fields))
    for place in (Place(2, None), Place(1, 0.5)):
        turn.show_place(place)
    await until_written(turn, allowed)
    reader = asyncio.create_task(events_of(await alive.journals.follow(turn.id)))
    await dying.die()
    await run_over(alive)
    events = await asyncio.wait_for(reader, 20)
    check(events)
    assert text_of(events) == TEXT
    places = [event.place for event in events if isinstance(event, ResponseQueued)]
    assert places == [2, 1]
    assert sum(isinstance(event, ResponsePrompt) for event in events) == len(fields) // 2
    for replica in (dying, alive):
        await replica.close()


async def test_an_heir_keeps_the_deadline_of_a_turn_without_a_token(store: Store) -> None:
    dying = await Replica(store, allowed=0).start()
    alive = await Replica(store, until=0).start()
    sampling = SamplingOptions(seed=7, deadline_s=0.3)
    turn = await dying.turns.start(request(sampling=sampling))
    await until_written(turn, 0)
    await dying.die()
    await run_over(alive)
    events = await asyncio.wait_for(events_of(await alive.journals.follow(turn.id)), 20)
    check(events)
    assert isinstance(events[-1], ResponseIncomplete)
    assert events[-1].response["incomplete_details"] == {"reason": "deadline"}
    for replica in (dying, alive):
        await replica.close()


async def test_a_turn_on_two_servers_is_charged_once(store: Store, tmp_path: Path) -> None:
    """The heir lets it in though its key has no turn left, and settles what was counted for it;
    the server that it was taken from, which is only slow, does not."""
    path = tmp_path / "keys"
    path.write_text('[[key]]\nkey = "one"\nmax_turns = 1\ntokens_per_minute = 5000\nweight = 3\n')
    path.chmod(0o600)
    keys = KeyRing.load(path)
    owner = keys.owner("Bearer one")
    paused = await Replica(store, allowed=5, keys=keys).start()
    # The heir was never shown the key: it does not know whose turn it is.
    alive = await Replica(store, until=8, keys=KeyRing.load(path)).start()
    sampling = SamplingOptions(seed=7, max_tokens=1000)
    turn = await paused.turns.start(request(owner=owner, sampling=sampling))
    await until_written(turn, 5)
    await end(paused.journals._tasks[1])
    await store.redis.delete(paused.journals.replicas.key(paused.journals.replica_id))
    await run_over(alive)
    with pytest.raises(ApiError, match="1 turns running"):
        await paused.turns.start(request(owner=owner))
    paused.hold.set()
    await turn.ended()
    taken = alive.turns.get(turn.id)
    assert taken is not None
    asked = alive.engine.requests[0]
    assert (asked.tenant, asked.weight) == (owner, 3.0)
    alive.hold.set()
    await taken.ended()
    for replica in (paused, alive):
        await replica.gate.close()
    keys_of = [key async for key in store.redis.scan_iter(f"millrace:l*:{owner}:*")]
    ledger = [key for key in keys_of if b":ledger:" in key]
    sums = cast(Any, await store.redis.hgetall(ledger[0]))
    assert len(ledger) == 1
    counted = [int(sums[name]) for name in (b"turns", b"prompt_tokens", b"completion_tokens")]
    num_said = len(TEXT.encode()) + 1  # and the token that ends it
    assert counted == [1, 2, num_said]
    minutes = [cast(Any, await store.redis.get(key)) for key in keys_of if b":tokens:" in key]
    assert [int(count) for count in minutes] == [2 + num_said]
    assert not [key for key in keys_of if key.endswith(b":turns")]
    for replica in (paused, alive):
        await replica.close()


async def test_only_one_server_takes_a_turn(store: Store) -> None:
    dying = await Replica(store, allowed=3).start()
    heirs = [await Replica(store).start() for _ in range(5)]
    turn = await dying.turns.start(request())
    await until_written(turn, 3)
    reader = asyncio.create_task(events_of(await heirs[0].journals.follow(turn.id)))
    await dying.die()
    await asyncio.gather(*(run_over(heir) for heir in heirs))
    events = await asyncio.wait_for(reader, 20)
    check(events)
    assert text_of(events) == TEXT
    assert sum(len(heir.engine.requests) for heir in heirs) == 1
    for replica in (dying, *heirs):
        await replica.close()


@pytest.mark.parametrize("allowed", [0, 5, 40])
async def test_a_server_that_ends_hands_its_turns_over(store: Store, allowed: int) -> None:
    """One look is enough: nobody waits until it is taken for dead. Its own readers are sent on, and
    go on behind the last event that they have."""
    store.kind = StoreKind.REDIS
    ending = await Replica(store, allowed=allowed).start()
    alive = await Replica(store).start()
    turn = await ending.turns.start(request())
    await until_written(turn, allowed)
    seen: list[Event] = []

    async def read() -> None:
        async for batch in turn.batches():
            seen.extend(entry.event for entry in batch)

    reader = asyncio.create_task(read())
    await ending.turns.drain(0.0)
    with pytest.raises(JournalLeft):
        await asyncio.wait_for(reader, 20)
    assert ending.turns.live == 0
    assert await alive.journals.replicas.others() == 0
    await alive.takeover.scan()
    last = seen[-1].sequence_number
    rest = await asyncio.wait_for(events_of(await alive.journals.follow(turn.id, last)), 20)
    check([*seen, *rest])
    assert text_of([*seen, *rest]) == TEXT
    for replica in (ending, alive):
        await replica.close()


async def test_without_others_to_share_with_turns_are_cancelled(store: Store) -> None:
    ending = await Replica(store, allowed=5).start()
    turn = await ending.turns.start(request())
    await until_written(turn, 5)
    await ending.turns.drain(0.0)
    events = await events_of(turn.batches())
    check(events)
    assert isinstance(events[-1], ResponseCancelled)
    await ending.close()


async def test_heirs_may_die_too(store: Store) -> None:
    replicas = [await Replica(store, allowed=4).start()]
    turn = await replicas[0].turns.start(request())
    await until_written(turn, 4)
    for said in (9, 20):
        heir = Replica(store, until=said)
        await heir.start()
        await replicas[-1].die()
        await run_over(heir)
        taken = heir.turns.get(turn.id)
        assert taken is not None
        await until_written(taken, said)
        replicas.append(heir)
    last = await Replica(store).start()
    reader = asyncio.create_task(events_of(await last.journals.follow(turn.id)))
    await replicas[-1].die()
    await run_over(last)
    events = await asyncio.wait_for(reader, 20)
    check(events)
    assert text_of(events) == TEXT
    for replica in (*replicas, last):
        await replica.close()


async def test_a_turn_that_cannot_go_on_ends_with_a_reason(store: Store) -> None:
    """Another version makes other events of the same tokens."""
    dying = await Replica(store, allowed=4).start()
    alive = await Replica(store).start()
    turn = await dying.turns.start(request())
    await until_written(turn, 4)
    key = dying.journals.stored.key(turn.id)
    rows = cast(Any, await store.redis.xrange(key))
    place, row = rows[-1]
    await store.redis.xdel(key, place)
    changed = row[b"d"].replace(b'"delta":"', b'"delta":"never said ')
    assert changed != row[b"d"]
    # Behind the mark of a take-over that came no further.
    await store.redis.xadd(key, {"r": "nobody"}, id="1-0")
    await store.redis.xadd(key, {**row, b"d": changed}, id=f"1-{len(rows)}")
    reader = asyncio.create_task(events_of(await alive.journals.follow(turn.id)))
    await dying.die()
    await run_over(alive)
    events = await asyncio.wait_for(reader, 20)
    check(events)
    assert isinstance(events[-1], ResponseFailed)
    assert events[-1].response["error"]["code"] == "takeover_failed"
    for replica in (dying, alive):
        await replica.close()


CALL = call_text("calculator", '{"expression": "2340 * 17 / 100"}')
CLOCK_CALL = call_text("get_current_time", '{"city": "Rome"}')
ROUNDS = (f"Let me see. {CALL}", f"{CLOCK_CALL}\n{CALL}", "17 % of 2,340 is 397.8.")
"""What the model says when it has been given no result, one round's, and both rounds'."""


class ToolReplica(Replica):
    """Calls tools in two rounds; it stops in round ``at[0]``, after ``at[1]`` tokens of it."""

    def __init__(self, store: Store, at: tuple[int, int] | None = None) -> None:
        super().__init__(store)
        self.at = at
        if at is not None:
            self.hold.clear()

    def _script(self, request: Request) -> Script:
        results = prompt_text(request).count("\ntool: ")
        number = (results + 1) // 2
        steps = [[byte] for byte in ROUNDS[number].encode()]
        if self.at is None or number < self.at[0]:
            return Script(steps=steps)
        count = self.at[1]
        said = [token for step in steps[:count] for token in step]
        return Script(steps=[said, *steps[count:]], hold=self.hold)

    async def until_there(self, turn: Turn) -> None:
        """Wait until the place is reached at which this replica stops."""
        assert self.at is not None
        number, count = self.at
        async with asyncio.timeout(20):
            while len(turn._sequences) <= number:
                await asyncio.sleep(0.001)
        while turn._sequences[number].choice.num_tokens < count:
            await asyncio.sleep(0)
        await turn._journal.written()


def tool_request(**fields: Any) -> TurnRequest:
    kinds = ("millrace:calculator", "millrace:current_time")
    tools = [BUILTIN_TOOLS[kind] for kind in kinds]
    options = ToolOptions(
        functions=[tool.function() for tool in tools],
        builtin={tool.name: tool.kind for tool in tools},
    )
    fields = {"messages": [{"role": "user", "content": "What is it?"}], "tools": options, **fields}
    return request(dialect="responses", prompts=None, **fields)


def items_of(event: Event) -> list[Any]:
    """A terminal event's items without their ids, and without the time of day."""
    output = cast(Any, event).response["output"]
    return [
        {
            **{name: item[name] for name in item if name not in ("id", "call_id")},
            **({"output": "the time"} if "time" in item.get("output", "") else {}),
        }
        for item in output
    ]


async def alone(store: Store, asked: TurnRequest) -> Event:
    """The end of a turn that nobody disturbs."""
    replica = await ToolReplica(store).start()
    events = await events_of((await replica.turns.start(asked)).batches())
    await replica.close()
    return events[-1]


@pytest.mark.parametrize("limit", [None, len("".join(ROUNDS))])
@pytest.mark.parametrize("at", [(0, 5), (0, 40), (1, 0), (1, 30), (2, 0), (2, 9)])
async def test_a_turn_that_calls_tools_goes_on(
    store: Store, at: tuple[int, int], limit: int | None
) -> None:
    """What the tools said is in the log: it is given to the model again, and no tool is asked
    twice. A limit of tokens is the whole turn's."""
    sampling = SamplingOptions(seed=7, max_tokens=limit)
    dying = await ToolReplica(store, at).start()
    alive = await ToolReplica(store).start()
    turn = await dying.turns.start(tool_request(sampling=sampling))
    await dying.until_there(turn)
    reader = asyncio.create_task(events_of(await alive.journals.follow(turn.id)))
    await dying.die()
    await run_over(alive)
    events = await asyncio.wait_for(reader, 20)
    check(events)
    undisturbed = await alone(store, tool_request(sampling=sampling))
    assert type(events[-1]) is type(undisturbed)
    assert items_of(events[-1]) == items_of(undisturbed)
    assert cast(Any, events[-1]).response["usage"] == cast(Any, undisturbed).response["usage"]
    assert len(alive.engine.requests) == len(ROUNDS) - at[0]
    for replica in (dying, alive):
        await replica.close()


@pytest.mark.parametrize("repeatable", [True, False])
async def test_a_call_without_a_result(
    store: Store, repeatable: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its server died while the tool ran: it is run again where that does no harm."""
    calculator = BUILTIN_TOOLS["millrace:calculator"]
    monkeypatch.setitem(BUILTIN_TOOLS, calculator.kind, calculator._replace(repeatable=repeatable))
    dying = await ToolReplica(store).start()
    alive = await ToolReplica(store).start()
    turn = await dying.turns.start(tool_request())
    asked, answer = threading.Event(), threading.Event()

    def hang(*_: Any, **__: Any) -> None:
        asked.set()
        answer.wait(20)

    monkeypatch.setattr(turn._rounds, "run", hang)
    assert await asyncio.to_thread(asked.wait, 20)
    await turn._journal.written()
    reader = asyncio.create_task(events_of(await alive.journals.follow(turn.id)))
    await dying.die()
    await run_over(alive)
    events = await asyncio.wait_for(reader, 20)
    answer.set()
    check(events)
    items = cast(Any, events[-1]).response["output"]
    outputs = [json.loads(one["output"]) for one in items if "output" in one]
    assert [next(iter(one)) for one in outputs] == [
        "result" if repeatable else "error",
        "time",
        "result",
    ]
    assert items[-1]["content"][0]["text"] == ROUNDS[-1]
    for replica in (dying, alive):
        await replica.close()


async def test_a_cancel_reaches_a_turn_that_is_being_taken_over(store: Store) -> None:
    dying = await Replica(store, allowed=3).start()
    alive = await Replica(store, until=10).start()
    control = Control(store, alive.journals, alive.turns)
    control.start()
    turn = await dying.turns.start(request())
    await until_written(turn, 3)
    await dying.die()
    cancel = asyncio.create_task(control.cancel(turn.id))
    await run_over(alive)
    await asyncio.wait_for(cancel, 20)
    last = await alive.journals.stored.last(turn.id)
    assert last is not None
    assert isinstance(last.event, ResponseCancelled)
    await control.close()
    for replica in (dying, alive):
        await replica.close()
