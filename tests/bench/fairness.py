"""One key's load against another's: first-token times, the split of tokens, and an overload.

    python -m tests.bench.fairness                 all of it
    python -m tests.bench.fairness --only single   or: split, overload

``single``: one key keeps 200 requests in flight, from a process of its own; how long does another
key's single request wait for its first token, against the idle server (``times_idle``), and who is
served what meanwhile? With the bundled model and with random ones of other sizes; clients and
server share the cores, which tells most where the model is smallest.
``split``: two keys with weights 1 and 3 always have more work than there are seats; is each served
its share (``due``)? ``overload``: turns arrive at twice the measured capacity; how much of the
capacity is served in full (``share``), is every refusal a 429 with ``Retry-After``, does the
server's memory grow?

All of it takes about four minutes on two cores; ``--seconds`` bounds each measurement.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import multiprocessing
import os
import random
import statistics
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import aiohttp
import orjson
import psutil

from tests.bench.checkpoints import PEBBLE, SHAPES, make_checkpoint
from tests.bench.report import Report
from tests.bench.serve import Server, percentile, server

KEYS = """
[[key]]
key = "crowd"
weight = 1
[[key]]
key = "single"
weight = 1
[[key]]
key = "heavy"
weight = 3
"""
VOCABULARY = 8000
SINGLE = (("pebble", 64), ("pebble", 1000), ("46m", 64), ("46m", 512), ("0.6b", 256))
"""Models, and tokens of the single request's prompt."""


@contextlib.contextmanager
def keyed_server(*options: str, model: Path = PEBBLE) -> Iterator[Server]:
    """Run the real command with three keys."""
    with tempfile.NamedTemporaryFile("w", suffix=".toml") as keys:
        keys.write(KEYS)
        keys.flush()
        os.chmod(keys.name, 0o600)
        all_options = ["--served-model-name=model", f"--api-key-file={keys.name}"]
        all_options += ["--log-level=warning", *options]
        with server("millrace", model, options=all_options, start_s=120, stop_s=60) as running:
            yield running


class Outcome(NamedTuple):
    """One request: its status, when its first token came, and how many there were."""

    status: int
    first_s: float
    tokens: int
    retry_after: str | None


class Client:
    """Asks with one key; counts tokens as they arrive."""

    def __init__(self, session: aiohttp.ClientSession, url: str, key: str) -> None:
        self._session = session
        self._url = f"{url}/v1/completions"
        self._headers = {"Authorization": f"Bearer {key}"}
        self._rng = random.Random(key)
        self.tokens = 0

    async def ask(self, num_prompt: int, num_tokens: int) -> Outcome:
        """Stream one completion of a prompt that no prefix cache knows."""
        body = {
            "model": "model",
            "prompt": [self._rng.randrange(300, VOCABULARY) for _ in range(num_prompt)],
            "max_tokens": num_tokens,
            "temperature": 0,
            "ignore_eos": True,
            "stream": True,
            "return_token_ids": True,
        }
        started = time.perf_counter()
        first_s, tokens = 0.0, 0
        async with self._session.post(self._url, json=body, headers=self._headers) as answer:
            if answer.status != 200:
                return Outcome(answer.status, 0.0, 0, answer.headers.get("Retry-After"))
            async for line in answer.content:
                if line.startswith(b"data: {"):
                    count = len(orjson.loads(line[6:])["choices"][0].get("token_ids") or ())
                    if count and not tokens:
                        first_s = time.perf_counter() - started
                    tokens += count
                    self.tokens += count
        return Outcome(answer.status, first_s, tokens, None)

    async def keep_asking(self, num_prompt: int, num_tokens: int) -> None:
        """Ask again and again, until cancelled."""
        while True:
            outcome = await self.ask(num_prompt, num_tokens)
            if outcome.status != 200:
                await asyncio.sleep(float(outcome.retry_after or 1))


@contextlib.asynccontextmanager
async def load(
    client: Client, streams: int, num_prompt: int, num_tokens: int
) -> AsyncIterator[None]:
    """Keep ``streams`` requests of a client in flight."""
    asks = [client.keep_asking(num_prompt, num_tokens) for _ in range(streams)]
    tasks = [asyncio.create_task(ask) for ask in asks]
    try:
        yield
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _first_tokens(client: Client, num_prompt: int, seconds: float) -> list[float]:
    """Ask one after the other, at most twenty times; when the first tokens came, in seconds."""
    times: list[float] = []
    give_up_s = time.perf_counter() + seconds
    while len(times) < 20 and (len(times) < 5 or time.perf_counter() < give_up_s):
        outcome = await client.ask(num_prompt, 8)
        if outcome.status != 200:
            raise RuntimeError(f"a single request was answered with status {outcome.status}")
        times.append(outcome.first_s)
    return times


def _flood(url: str, served: Any) -> None:
    async def flood() -> None:
        connector = aiohttp.TCPConnector(limit=0)
        async with aiohttp.ClientSession(connector=connector) as session:
            client = Client(session, url, "crowd")
            async with load(client, 200, 64, 256):
                while True:
                    await asyncio.sleep(0.1)
                    served.value = client.tokens

    asyncio.run(flood())


@contextlib.contextmanager
def crowd(url: str) -> Iterator[Callable[[], int]]:
    """Keep 200 requests in flight from another process; gives what counts their tokens.

    In this one they would hold up the loop that reads the clock.
    """
    context = multiprocessing.get_context("spawn")
    served = context.Value("L", 0)
    process = context.Process(target=_flood, args=(url, served), daemon=True)
    process.start()
    try:
        yield lambda: served.value
    finally:
        process.terminate()
        process.join()


async def single(report: Report, model: str, url: str, num_prompt: int, seconds: float) -> None:
    """One key with 200 requests, another with one at a time."""
    async with aiohttp.ClientSession() as session:
        one = Client(session, url, "single")
        for _ in range(3):
            await one.ask(num_prompt, 4)
        idle = await _first_tokens(one, num_prompt, seconds)
        with crowd(url) as crowd_tokens:
            while crowd_tokens() < 1000:
                await asyncio.sleep(0.1)
            before, began_s = (one.tokens, crowd_tokens()), time.perf_counter()
            busy = await _first_tokens(one, num_prompt, seconds)
            served = one.tokens - before[0], crowd_tokens() - before[1]
            took_s = time.perf_counter() - began_s
    for label, times in (("alone", idle), ("flood", busy)):
        report.add(
            what=f"{model}, {num_prompt}, {label}",
            key="light",
            weight=1,
            requests=len(times),
            tokens_per_s=served[0] / took_s if times is busy else "",
            share=served[0] / sum(served) if times is busy else "",
            first_ms_p50=statistics.median(times) * 1e3,
            first_ms_max=max(times) * 1e3,
            times_idle=statistics.median(times) / statistics.median(idle),
        )
    report.add(
        what=f"{model}, {num_prompt}, flood",
        key="flood",
        weight=1,
        requests=200,
        tokens_per_s=served[1] / took_s,
        share=served[1] / sum(served),
    )


async def split(report: Report, url: str, seconds: float) -> None:
    """Two keys of weights 1 and 3 that always have more work than there are seats."""
    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(connector=connector) as session:
        light, heavy = Client(session, url, "crowd"), Client(session, url, "heavy")
        async with load(light, 48, 32, 64), load(heavy, 48, 32, 64):
            await asyncio.sleep(seconds / 4)
            before = light.tokens, heavy.tokens
            await asyncio.sleep(seconds)
            served = light.tokens - before[0], heavy.tokens - before[1]
    for weight, count, due in ((1, served[0], 0.25), (3, served[1], 0.75)):
        report.add(
            what="both flood",
            key=f"flood {weight}",
            weight=weight,
            requests=48,
            tokens_per_s=count / seconds,
            share=count / max(1, sum(served)),
            due=due,
        )


async def overload(report: Report, running: Server, seconds: float) -> None:
    """Measure the capacity in a closed loop, then let twice as much arrive."""
    connector = aiohttp.TCPConnector(limit=0)
    process = psutil.Process(running.pid)
    async with aiohttp.ClientSession(connector=connector) as session:
        client = Client(session, running.url, "crowd")
        async with load(client, 64, 32, 64):
            await asyncio.sleep(4)
            before = client.tokens
            await asyncio.sleep(8)
            capacity = (client.tokens - before) / 8
        rate = 2 * capacity / 64
        outcomes: list[Outcome] = []
        memory: list[int] = []

        async def one() -> None:
            outcomes.append(await client.ask(32, 64))

        tasks: list[asyncio.Task[None]] = []
        started, counted = time.perf_counter(), client.tokens
        rng = random.Random(1)
        due_s = started
        while (now := time.perf_counter()) < started + seconds:
            if now >= due_s:
                due_s += rng.expovariate(rate)
                tasks.append(asyncio.create_task(one()))
            if len(memory) < (now - started) * 2:
                family = [process, *process.children(recursive=True)]
                memory.append(sum(member.memory_info().rss for member in family))
            await asyncio.sleep(max(0.0, min(due_s - time.perf_counter(), 0.5)))
        goodput = (client.tokens - counted) / (time.perf_counter() - started)
        await asyncio.gather(*tasks)
    good = [outcome for outcome in outcomes if outcome.status == 200]
    refused = [outcome for outcome in outcomes if outcome.status != 200]
    right = [one for one in refused if one.status == 429 and int(one.retry_after or 0) >= 1]
    third = len(memory) // 3
    report.add(
        what="overload x 2",
        key="flood",
        weight=1,
        requests=len(outcomes),
        tokens_per_s=goodput,
        share=goodput / capacity,
        due=1,
        first_ms_p50=statistics.median(one.first_s for one in good) * 1e3,
        first_ms_max=percentile([one.first_s for one in good], 99) * 1e3,
        refused=len(refused),
        refused_right=len(right),
        grown_mib=(max(memory[-third:]) - max(memory[third:-third])) / 2**20,
    )


def main() -> None:
    """Measure what the command line names."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", choices=["single", "split", "overload"])
    parser.add_argument("--model", choices=["pebble", *SHAPES], help="of single (default: all)")
    parser.add_argument("--seconds", type=float, default=30.0)
    args = parser.parse_args()
    columns = "what key weight requests tokens_per_s share due first_ms_p50 first_ms_max"
    report = Report(
        "fairness", [*columns.split(), "times_idle", "refused", "refused_right", "grown_mib"]
    )
    wanted = [args.only] if args.only else ["single", "split", "overload"]
    if "single" in wanted:
        for model, num_prompt in SINGLE:
            if args.model not in (None, model):
                continue
            with tempfile.TemporaryDirectory(prefix="millrace-bench-") as folder:
                known = (
                    PEBBLE if model == "pebble" else make_checkpoint(SHAPES[model], Path(folder))
                )
                with keyed_server(model=known) as running:
                    asyncio.run(single(report, model, running.url, num_prompt, args.seconds / 3))
    if "split" in wanted:
        with keyed_server("--max-num-seqs=32") as running:
            asyncio.run(split(report, running.url, args.seconds / 2))
    if "overload" in wanted:
        with keyed_server("--max-num-seqs=64", "--max-queue-wait=5") as running:
            asyncio.run(overload(report, running, args.seconds))
    report.show()


if __name__ == "__main__":
    main()
