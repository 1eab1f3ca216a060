"""Open-loop load: requests come when they come (Poisson), however long earlier ones take.

    python -m tests.bench.open_loop                   46M beside transformers, some rates
    python -m tests.bench.open_loop --rates 1 4 --url http://127.0.0.1:8000

Goodput counts the answers that kept a promise: every token sent, the first in time, and the others
at a steady pace in the mean. What is refused or fails is offered and not good.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import statistics
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import aiohttp

from tests.bench.report import Report
from tests.bench.serve import SERVERS, Answer, ask, model_at, percentile, server

__all__ = ["COLUMNS", "Promise", "Served", "figures_of", "offer"]

COLUMNS = (
    "offered_per_s", "good_per_s", "good %", "refused", "failed", "tokens_per_s", "first_ms_p50",
    "first_ms_p99", "between_ms_p50", "between_ms_p99",
)  # fmt: skip
RATES = (1.0, 4.0, 8.0)
SECONDS = 20
PROMPT_TOKENS = 64
OUTPUT_TOKENS = 64


class Promise(NamedTuple):
    """What a client was promised."""

    first_token_s: float
    between_tokens_s: float
    """In the mean over an answer."""
    tokens: int

    def kept(self, answer: Answer) -> bool:
        """Whether an answer is good."""
        mean_s = statistics.fmean(answer.between_tokens_s) if answer.between_tokens_s else 0.0
        return (
            answer.num_tokens == self.tokens
            and answer.first_token_s <= self.first_token_s
            and mean_s <= self.between_tokens_s
        )


class Served(NamedTuple):
    """What became of the requests that were offered."""

    answers: list[Answer]
    refused: int
    failed: int
    wall_s: float
    """From the first request to the last answer."""


async def offer(
    url: str, model: str, *, rate: float, requests: int, vocab: int, prompt_tokens: int,
    output_tokens: int, seed: int = 0, patience_s: float = 60.0,
) -> Served:  # fmt: skip
    """Send so many requests, ``rate`` a second in the mean, and wait for what becomes of them.

    Whoever is not answered ``patience_s`` after the last was sent has failed.
    """
    dice = random.Random(seed)
    answers: list[Answer] = []
    refused = 0

    async def one(session: aiohttp.ClientSession) -> None:
        nonlocal refused
        prompt = [dice.randrange(300, vocab) for _ in range(prompt_tokens)]
        try:
            answers.append(await ask(session, url, model, prompt, output_tokens))
        except aiohttp.ClientResponseError as error:
            if error.status != 429:
                raise
            refused += 1

    started = due = time.perf_counter()
    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(connector=connector) as session:
        tasks = []
        for _ in range(requests):
            # By the clock's schedule, not after the last one's sending: a late loop catches up.
            await asyncio.sleep(max(0.0, due - time.perf_counter()))
            tasks.append(asyncio.create_task(one(session)))
            due += dice.expovariate(rate)
        done, late = await asyncio.wait(tasks, timeout=patience_s)
        for task in late:
            task.cancel()
        await asyncio.gather(*late, return_exceptions=True)
    failed = len(late) + sum(task.exception() is not None for task in done)
    return Served(answers, refused, failed, time.perf_counter() - started)


def figures_of(served: Served, promise: Promise) -> dict[str, object]:
    """A row of the table: goodput, and what the answered ones saw."""
    good = sum(promise.kept(answer) for answer in served.answers)
    offered = len(served.answers) + served.refused + served.failed
    firsts = [answer.first_token_s * 1e3 for answer in served.answers]
    gaps = [gap * 1e3 for answer in served.answers for gap in answer.between_tokens_s]
    figures: dict[str, object] = {
        "good_per_s": good / served.wall_s,
        "good %": 100.0 * good / max(1, offered),
        "refused": served.refused,
        "failed": served.failed,
        "tokens_per_s": sum(answer.num_tokens for answer in served.answers) / served.wall_s,
    }
    for name, values in (("first_ms", firsts), ("between_ms", gaps)):
        for percent in (50, 99):
            if values:
                figures[f"{name}_p{percent}"] = percentile(values, percent)
    return figures


def measure(report: Report, label: str, url: str, rates: list[float], *, vocab: int) -> None:
    """Add a row for each rate."""
    promise = Promise(first_token_s=1.0, between_tokens_s=0.1, tokens=OUTPUT_TOKENS)
    model = model_at(url)
    for rate in rates:
        served = asyncio.run(
            offer(
                url, model, rate=rate, requests=max(2, round(rate * SECONDS)), vocab=vocab,
                prompt_tokens=PROMPT_TOKENS, output_tokens=OUTPUT_TOKENS,
            )
        )  # fmt: skip
        report.add(what=label, offered_per_s=rate, **figures_of(served, promise))


def main() -> None:
    """Measure what the command line names."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rates", type=float, nargs="+", default=list(RATES))
    parser.add_argument("--only", choices=SERVERS, help="one of the servers")
    parser.add_argument("--url", help="measure this server instead of starting one")
    given = parser.parse_args()
    part = given.url or given.only or given.rates != list(RATES)
    report = Report("open-loop-part" if part else "open-loop", ("what", *COLUMNS))
    if given.url:
        measure(report, given.url, given.url, given.rates, vocab=8000)
    else:
        from tests.bench.checkpoints import SHAPES, make_checkpoint

        shape = SHAPES["46m"]
        with tempfile.TemporaryDirectory(prefix="millrace-bench-") as folder:
            checkpoint = make_checkpoint(shape, Path(folder))
            for kind in [given.only] if given.only else SERVERS:
                with server(kind, checkpoint) as running:
                    label = f"{kind} 46m"
                    measure(report, label, running.url, given.rates, vocab=shape.vocab_size)
    print(report.show())


if __name__ == "__main__":
    main()
