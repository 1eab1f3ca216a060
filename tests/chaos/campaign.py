"""The ground that all scenarios share: a cluster, questions with known answers, rounds of clients.

A round starts some clients, waits until a drawn number of tokens has reached them, strikes, and
waits for every client's end. So a fault always falls into running answers, on a machine of any
speed.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import aiohttp

from tests.chaos.checker import check
from tests.chaos.client import Client
from tests.chaos.cluster import Cluster
from tests.chaos.history import History, Received
from tests.chaos.questions import Answer, Question, answers_of, make_questions
from tests.chaos.tally import Expectation, Tally

__all__ = ["Campaign", "Moment"]

NUM_QUESTIONS = 12


class Moment:
    """Counts the tokens of a round's clients and wakes the nemesis at a drawn count."""

    def __init__(self, at_token: int) -> None:
        self._left = at_token
        self._come = asyncio.Event()

    def see(self, one: Received) -> None:
        """Count an event's tokens."""
        self._left -= len(one.event.get("token_ids") or ()) if one.is_text else 0
        if self._left <= 0:
            self._come.set()

    async def come(self) -> None:
        """Wait for it."""
        await self._come.wait()


class Campaign:
    """One scenario's run on a cluster."""

    def __init__(
        self,
        cluster: Cluster,
        seed: int,
        answers: dict[Question, Answer],
        expected: Expectation,
    ) -> None:
        self.cluster = cluster
        self._hung_s = expected.hung_s
        self.rng = random.Random(seed)
        self.tally = Tally()
        self._log_from = [len(replica.log) for replica in cluster.replicas]
        self._questions = list(answers)
        self._answers = answers

    @staticmethod
    async def answers(cluster: Cluster, seed: int, count: int = NUM_QUESTIONS) -> dict[
        Question, Answer
    ]:  # fmt: skip
        """Ask the seed's questions undisturbed; the answers are the same on every replica."""
        questions = make_questions(random.Random(seed), count)
        async with aiohttp.ClientSession() as session:
            return await answers_of(session, cluster.replicas[0].url, questions)

    @property
    def urls(self) -> list[str]:
        """All replicas."""
        return [replica.url for replica in self.cluster.replicas]

    def draw(self) -> tuple[Question, Answer]:
        """Draw a question; return it with its answer."""
        question = self.rng.choice(self._questions)
        return question, self._answers[question]

    def client(
        self,
        addresses: Sequence[str],
        *,
        transport: str | None = None,
        on_event: Callable[[Received], None] | None = None,
    ) -> Client:
        """Return a client with a drawn question, seed and transport."""
        rng = self.rng
        return Client(
            rng.choice(self._questions),
            addresses,
            transport=transport or rng.choice(("sse", "websocket")),
            seed=rng.randrange(2**31),
            on_event=on_event,
        )

    async def strike_amid(
        self, num_clients: int, strike: Callable[[], Awaitable[str]], *, addresses: Sequence[str]
    ) -> list[History]:
        """One round: strike amid ``num_clients`` answers and judge them all.

        ``strike`` returns the name of what it did.
        """
        moment = Moment(self.rng.randint(1, 40 * num_clients))
        clients = [self.client(addresses, on_event=moment.see) for _ in range(num_clients)]
        runs = [asyncio.create_task(client.run()) for client in clients]
        waiting = asyncio.create_task(moment.come())
        everyone: asyncio.Future[Any] = asyncio.gather(*runs)
        ways: list[asyncio.Future[Any]] = [waiting, everyone]
        # Short answers may all end before the drawn token; that round strikes nothing.
        await asyncio.wait(ways, return_when=asyncio.FIRST_COMPLETED)
        struck_s = None
        if not waiting.done() or all(run.done() for run in runs):
            waiting.cancel()
        else:
            struck_s = time.monotonic()
            self.tally.struck[await strike()] += 1
        histories: list[History] = await everyone
        for history in histories:
            if struck_s is not None and history.is_open_at(struck_s):
                self.tally.back(history.silence_after_s(struck_s))
            await self.judge(history)
        return histories

    async def judge(self, history: History) -> None:
        """Check one history and count it."""
        journal = None
        if history.response_id is not None:
            journal = await asyncio.to_thread(self.cluster.redis.journal, history.response_id)
        answer = self._answers[history.question]
        verdict = check(history, journal, answer, hung_s=self._hung_s)
        if verdict.faults:
            self.tally.notes.append(
                f"{history.transport} {history.response_id}: {dict(verdict.faults)}, "
                f"{verdict.ending}, last notes {[note.what for note in history.notes[-3:]]}"
            )
        self.tally.add(verdict)

    def check_logs(self) -> None:
        """No server crashed."""
        for replica, begin in zip(self.cluster.replicas, self._log_from, strict=True):
            _, crash, rest = replica.log[begin:].partition("Traceback")
            if crash:
                self.tally.notes.append(f"a crash of {replica.url}: {rest[-1500:]}")
