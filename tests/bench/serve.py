"""Through HTTP: tokens a second, time to first token and time between tokens, by number of streams.

    python -m tests.bench.serve                       46M and 0.6B, beside transformers
    python -m tests.bench.serve --only 46m millrace --streams 1 16
    python -m tests.bench.serve --all                 and the slow rows
    python -m tests.bench.serve --url http://127.0.0.1:8000   a server that runs already

Closed loop: each stream asks again as soon as it is answered, until as many requests were answered
as makes two for each stream, of the 0.6B model one. Prompts are token ids, different for each
request, so that no prefix cache can help. The client shares the cores with the server. transformers
stands behind the small front of ``peer.py``.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import itertools
import random
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import aiohttp
import orjson

from tests.bench.report import Report

PROMPT_TOKENS = 32
OUTPUT_TOKENS = 128
STREAMS = (1, 16, 64, 128)
SERVERS = ("millrace", "transformers")
SLOW = {
    ("46m", "transformers"): (128,),
    ("0.6b", "millrace"): (128,),
    ("0.6b", "transformers"): (128,),
}
"""Minutes each: left out unless asked for."""


class Answer(NamedTuple):
    """One answer's times, seconds."""

    first_token_s: float
    between_tokens_s: list[float]
    num_tokens: int


async def ask(
    session: aiohttp.ClientSession,
    url: str,
    model: str,
    prompt: list[int],
    max_tokens: int = OUTPUT_TOKENS,
) -> Answer:
    """Stream one completion and time its tokens as they arrive."""
    body = {
        "model": model,
        "prompt": prompt,
        "max_tokens": max_tokens,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
        "return_token_ids": True,
    }
    started = last = time.perf_counter()
    first_s = 0.0
    gaps: list[float] = []
    tokens = 0
    async with session.post(f"{url}/v1/completions", json=body) as response:
        response.raise_for_status()
        async for line in response.content:
            if not line.startswith(b"data: {"):
                continue
            choice = orjson.loads(line[6:])["choices"][0]
            count = len(choice.get("token_ids") or ())
            if count == 0:
                continue
            now = time.perf_counter()
            if tokens == 0:
                first_s = now - started
            else:
                gaps += [(now - last) / count] * count
            last = now
            tokens += count
    return Answer(first_s, gaps, tokens)


async def load(url: str, model: str, streams: int, requests: int, vocab: int) -> list[Answer]:
    """Keep ``streams`` requests in flight until ``requests`` are answered."""
    rng = random.Random(streams)
    left = itertools.count(requests, -1)
    answers: list[Answer] = []

    async def stream(session: aiohttp.ClientSession) -> None:
        while next(left) > 0:
            prompt = [rng.randrange(300, vocab) for _ in range(PROMPT_TOKENS)]
            answers.append(await ask(session, url, model, prompt))

    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(connector=connector) as session:
        await asyncio.gather(*(stream(session) for _ in range(streams)))
    return answers


def free_port() -> int:
    """Return a port that nobody listens on."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port: int = sock.getsockname()[1]
        return port


def command_of(kind: str, checkpoint: Path, port: int, options: Sequence[str] = ()) -> list[str]:
    """How a server of this kind is started; the options are Millrace's."""
    if kind == "millrace":
        command = [sys.executable, "-m", "server", "serve", str(checkpoint), "--port", str(port)]
        return [*command, *options]
    return [sys.executable, "-m", "tests.bench.peer", str(checkpoint), str(port)]


class Server(NamedTuple):
    """A server that runs."""

    url: str
    pid: int


@contextlib.contextmanager
def server(
    kind: str,
    checkpoint: Path,
    *,
    options: Sequence[str] = (),
    start_s: float = 60.0,
    stop_s: float = 30.0,
) -> Iterator[Server]:
    """Run a server on the checkpoint, ready to answer within ``start_s``."""
    port = free_port()
    command = command_of(kind, checkpoint, port, options)
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    url = f"http://127.0.0.1:{port}"
    try:
        for _ in range(round(10 * start_s)):
            with contextlib.suppress(OSError), urllib.request.urlopen(f"{url}/ready", timeout=1):
                break
            if process.poll() is not None:
                raise RuntimeError(f"the server ended with {process.returncode}")
            time.sleep(0.1)
        else:
            raise RuntimeError(f"the server is not ready after {start_s:.0f} s")
        yield Server(url, process.pid)
    finally:
        process.terminate()
        process.wait(stop_s)


def model_at(url: str) -> str:
    """The name under which a server offers its model."""
    with urllib.request.urlopen(f"{url}/v1/models", timeout=5) as response:
        name: str = orjson.loads(response.read())["data"][0]["id"]
        return name


def percentile(values: list[float], percent: int) -> float:
    """Return a percentile of a non-empty list."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, len(ordered) * percent // 100)]


def measure(
    report: Report, label: str, url: str, streams: list[int], *, vocab: int, rounds: int
) -> None:
    """Add a row for each number of streams, each of which asks ``rounds`` times."""
    model = model_at(url)
    asyncio.run(load(url, model, 1, 1, vocab))
    for count in streams:
        started = time.perf_counter()
        answers = asyncio.run(load(url, model, count, max(2, rounds * count), vocab))
        wall_s = time.perf_counter() - started
        firsts = [answer.first_token_s * 1e3 for answer in answers]
        gaps = [gap * 1e3 for answer in answers for gap in answer.between_tokens_s]
        report.add(
            what=label,
            streams=count,
            tokens_per_s=sum(answer.num_tokens for answer in answers) / wall_s,
            first_ms_p50=statistics.median(firsts),
            first_ms_p99=percentile(firsts, 99),
            between_ms_p50=statistics.median(gaps),
            between_ms_p99=percentile(gaps, 99),
        )


def main() -> None:
    """Measure what the command line names."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    known = ("46m", "0.6b", *SERVERS)
    parser.add_argument("--only", nargs="+", choices=known, default=[], metavar="NAME")
    parser.add_argument("--streams", type=int, nargs="+", default=list(STREAMS))
    parser.add_argument("--all", action="store_true", help="the slow rows, too")
    parser.add_argument("--url", help="measure this server instead of starting one")
    args = parser.parse_args()
    columns = "what streams tokens_per_s first_ms_p50 first_ms_p99 between_ms_p50 between_ms_p99"
    # A part of the table must not replace the whole one that is kept.
    part = args.only or args.url or args.streams != list(STREAMS)
    report = Report("serve-part" if part else "serve", columns.split())
    if args.url:
        measure(report, args.url, args.url, args.streams, vocab=8000, rounds=2)
    else:
        from tests.bench.checkpoints import SHAPES, make_checkpoint

        for name in [name for name in SHAPES if name in args.only] or list(SHAPES):
            with tempfile.TemporaryDirectory(prefix="millrace-bench-") as folder:
                checkpoint = make_checkpoint(SHAPES[name], Path(folder))
                for kind in [kind for kind in SERVERS if kind in args.only] or SERVERS:
                    slow = () if args.all or args.only else SLOW.get((name, kind), ())
                    streams = [count for count in args.streams if count not in slow]
                    if streams:
                        with server(kind, checkpoint) as running:
                            measure(
                                report,
                                f"{kind} {name}",
                                running.url,
                                streams,
                                vocab=SHAPES[name].vocab_size,
                                rounds=1 if name == "0.6b" else 2,
                            )
    report.show()


if __name__ == "__main__":
    main()
