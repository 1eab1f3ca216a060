"""The engine alone: decoding and reading tokens a second, beside transformers in the same run.

    python -m tests.bench.engine                      about ten minutes on two cores
    python -m tests.bench.engine --all                and the slow rows
    python -m tests.bench.engine --only 46m decode-64 millrace

``--only`` takes models (46m, 0.6b), works (decode-1, decode-16, decode-64, prefill) and engines
(millrace, generate, generate_batch); what is not named at all is not restricted. Every figure is of
greedy answers to prompts of random tokens: decode-N is N answers at once after 32 prompt tokens
each, its tokens a second counted from when all prompts are read; prefill is one prompt of 2,048
tokens. Times are medians: from handing a request over to its first token, and between tokens.

Millrace multiplies with bfloat16 weights as they are stored. transformers gets the faster type for
this processor: bfloat16 where it has instructions for it, float32 elsewhere.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch

from tests.bench.checkpoints import SHAPES, make_checkpoint
from tests.bench.report import Report
from tests.engine.harness import Engine

WORKS = ("decode-1", "decode-16", "decode-64", "prefill")
ENGINES = ("millrace", "generate", "generate_batch")
SLOW = {("0.6b", "decode-1", "generate_batch"), ("0.6b", "decode-16", "generate_batch"),
        ("0.6b", "decode-64", "generate_batch"), ("0.6b", "prefill", "generate_batch")}  # fmt: skip
PROMPT_TOKENS = 32
PREFILL_TOKENS = 2048
WARM_UP_STEPS = 3
MAX_NEW_TOKENS = 512
BATCH_NEW_TOKENS = 24
"""``generate_batch`` cannot be stopped by the clock."""


class Figures(NamedTuple):
    """What one run of a work showed."""

    tokens_per_s: float
    first_token_s: float
    between_tokens_s: float | None
    """None where there is but one token."""


Measure = Callable[[str], Figures]
"""Name of a work -> its figures."""


def median_figures(runs: list[Figures]) -> Figures:
    """The run in the middle, by tokens a second."""
    return sorted(runs)[len(runs) // 2]


def gaps(moments: list[float]) -> float:
    """The median time between neighbours."""
    return statistics.median(after - before for before, after in itertools.pairwise(moments))


def prompts(vocab_size: int, count: int, length: int) -> list[list[int]]:
    """Random prompts, other ones at each call."""
    return [[random.randrange(3, vocab_size) for _ in range(length)] for _ in range(count)]


def num_streams(work: str) -> int:
    """The N of decode-N."""
    return int(work.removeprefix("decode-"))


class Millrace:
    """Our engine, in this process and without the link."""

    def __init__(self, checkpoint: Path, threads: int, seconds: float) -> None:
        self.seconds = seconds
        self.engine = Engine(
            checkpoint, num_threads=threads, max_model_len=4096, kv_memory_bytes=1 << 30
        )
        self.vocab_size = self.engine.runner.info.vocab_size

    def __call__(self, work: str) -> Figures:
        self.engine.reset()
        return self.prefill() if work == "prefill" else self.decode(num_streams(work))

    def prefill(self) -> Figures:
        """Read a prompt; the first token is part of it."""
        self.engine.generate(*prompts(self.vocab_size, 1, 300), max_tokens=1)
        (prompt,) = prompts(self.vocab_size, 1, PREFILL_TOKENS)
        started = time.perf_counter()
        self.engine.generate(prompt, max_tokens=1)
        took_s = time.perf_counter() - started
        return Figures(PREFILL_TOKENS / took_s, took_s, None)

    def decode(self, streams: int) -> Figures:
        """Step until the time is up."""
        started = time.perf_counter()
        firsts: dict[str, float] = {}
        for prompt in prompts(self.vocab_size, streams, PROMPT_TOKENS):
            self.engine.add(prompt, max_tokens=MAX_NEW_TOKENS, ignore_eos=True)
        while len(firsts) < streams:
            self.engine.step()
            now = time.perf_counter() - started
            for name, answer in self.engine.answers.items():
                if answer.token_ids:
                    firsts.setdefault(name, now)
        for _ in range(WARM_UP_STEPS):
            self.engine.step()
        ends = [time.perf_counter()]
        while ends[-1] - ends[0] < self.seconds and len(ends) <= MAX_NEW_TOKENS // 2:
            self.engine.step()
            ends.append(time.perf_counter())
        rate = streams * (len(ends) - 1) / (ends[-1] - ends[0])
        return Figures(rate, statistics.median(firsts.values()), gaps(ends))


class Transformers:
    """The same checkpoint in transformers, both with and without continuous batching."""

    def __init__(self, checkpoint: Path, threads: int, seconds: float) -> None:
        from transformers import Qwen3ForCausalLM
        from transformers.utils import logging

        quiet: Any = logging
        quiet.set_verbosity_error()
        torch.set_num_threads(threads)
        self.seconds = seconds
        family: Any = Qwen3ForCausalLM
        self.model: Any = family.from_pretrained(checkpoint, dtype=peer_dtype())
        self.model.eval()
        self.model.generation_config.eos_token_id = None
        self.vocab_size: int = self.model.config.vocab_size

    def generate(self, work: str) -> Figures:
        """Plain ``generate``: one batch of prompts of equal length."""
        if work == "prefill":
            self._timed_steps(prompts(self.vocab_size, 1, 300), 1)
            (first_s,) = self._timed_steps(prompts(self.vocab_size, 1, PREFILL_TOKENS), 1)
            return Figures(PREFILL_TOKENS / first_s, first_s, None)
        streams = num_streams(work)
        batch = prompts(self.vocab_size, streams, PROMPT_TOKENS)
        ends = self._timed_steps(batch, MAX_NEW_TOKENS)
        measured = ends[WARM_UP_STEPS:]
        rate = streams * (len(measured) - 1) / (measured[-1] - measured[0])
        return Figures(rate, ends[0], gaps(measured))

    def generate_batch(self, work: str) -> Figures:
        """Continuous batching, timed by its own clock of each token."""
        from transformers import ContinuousBatchingConfig, GenerationConfig

        prefill = work == "prefill"
        length = PREFILL_TOKENS if prefill else PROMPT_TOKENS
        streams = 1 if prefill else num_streams(work)
        page = 256
        new_generation: Any = GenerationConfig
        generation = new_generation(
            max_new_tokens=1 if prefill else BATCH_NEW_TOKENS, do_sample=False, eos_token_id=-1
        )
        config = ContinuousBatchingConfig(
            page_size=page,
            num_blocks=streams * -(-(length + BATCH_NEW_TOKENS) // page) + 1,
            max_batch_tokens=streams * length,  # so that the first step reads everything
            allow_block_sharing=False,
        )
        started = time.perf_counter()
        answers = self.model.generate_batch(
            prompts(self.vocab_size, streams, length),
            generation_config=generation,
            continuous_batching_config=config,
            record_timestamps=True,
            warmup=False,
        )
        times: list[list[float]] = [answer.timestamps for answer in answers.values()]
        first_s = statistics.median(t[0] for t in times) - started
        if prefill:
            return Figures(PREFILL_TOKENS / first_s, first_s, None)
        all_read, first_done = max(t[0] for t in times), min(t[-1] for t in times)
        counted = sum(all_read < moment <= first_done for t in times for moment in t)
        between_s = statistics.median(gaps(t[WARM_UP_STEPS:]) for t in times)
        return Figures(counted / (first_done - all_read), first_s, between_s)

    def _timed_steps(self, batch: list[list[int]], num_tokens: int) -> list[float]:
        """Generate until the time is up: when each step ended, seconds from the start."""
        ends: list[float] = []
        ids = torch.tensor(batch)
        started = time.perf_counter()

        def is_over(input_ids: torch.Tensor, scores: object, **_: object) -> torch.Tensor:
            ends.append(time.perf_counter() - started)
            enough = len(ends) > WARM_UP_STEPS + 3 and ends[-1] > self.seconds
            return torch.full((len(input_ids),), enough)

        with torch.inference_mode():
            self.model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=num_tokens,
                do_sample=False,
                stopping_criteria=[is_over],
                pad_token_id=0,
            )
        return ends


def peer_dtype() -> torch.dtype:
    """What transformers computes fastest with on this processor."""
    flags = Path("/proc/cpuinfo")
    native = flags.exists() and {"avx512_bf16", "amx_bf16"} & set(flags.read_text().split())
    return torch.bfloat16 if native else torch.float32


def engines(checkpoint: Path, args: argparse.Namespace) -> Iterator[tuple[str, Measure]]:
    """The wanted engines, each loaded when its turn comes and forgotten after."""
    if "millrace" in args.engines:
        yield "millrace", Millrace(checkpoint, args.threads, args.seconds)
        gc.collect()
    peers = [name for name in ENGINES[1:] if name in args.engines]
    if peers:
        transformers = Transformers(checkpoint, args.threads, args.seconds)
        for name in peers:
            yield name, getattr(transformers, name)


def measure_model(model: str, args: argparse.Namespace) -> dict[str, dict[str, Figures | str]]:
    """Figures of all wanted works of a model, by work and engine; or why there is none."""
    figures: dict[str, dict[str, Figures | str]] = {work: {} for work in args.works}
    with tempfile.TemporaryDirectory(prefix="millrace-bench-") as folder:
        print(f"{model}: writing random weights", flush=True)
        checkpoint = make_checkpoint(SHAPES[model], Path(folder))
        for engine, measure in engines(checkpoint, args):
            for work in args.works:
                if not args.all and (model, work, engine) in SLOW:
                    continue
                try:
                    runs = [measure(work) for _ in range(args.repeats)]
                except Exception as error:  # a peer's failure is a result
                    if engine == "millrace":
                        raise
                    figures[work][engine] = f"failed: {type(error).__name__}"
                    print(f"{model} {work} {engine}: {error!r}", flush=True)
                    continue
                figures[work][engine] = best = median_figures(runs)
                print(f"{model} {work} {engine}: {best.tokens_per_s:.1f} tok/s", flush=True)
    return figures


def against_best_peer(row: dict[str, Figures | str]) -> str:
    """Our tokens a second over the best of the others'."""
    ours = row.get("millrace")
    peers = [x[0] for name, x in row.items() if name != "millrace" and isinstance(x, Figures)]
    return f"{ours[0] / max(peers):.2f}x" if peers and isinstance(ours, Figures) else ""


def add_row(report: Report, model: str, work: str, engine: str, found: Figures | str) -> None:
    """One engine's figures for one work, or why it has none."""
    if isinstance(found, str):
        report.add(model=model, work=work, engine=engine, tokens_per_s=found)
        return
    between_s = found.between_tokens_s
    report.add(
        model=model,
        work=work,
        engine=engine,
        tokens_per_s=found.tokens_per_s,
        first_ms=found.first_token_s * 1e3,
        between_ms="" if between_s is None else between_s * 1e3,
    )


def parse_arguments() -> argparse.Namespace:
    """The command line, with ``--only`` sorted into models, works and engines."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    known = (*SHAPES, *WORKS, *ENGINES)
    parser.add_argument("--only", nargs="+", choices=known, default=[], metavar="NAME")
    parser.add_argument("--all", action="store_true", help="the slow rows, too")
    parser.add_argument("--seconds", type=float, default=8.0, help="time for one decode figure")
    parser.add_argument("--repeats", type=int, default=1, help="median of so many runs")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args()
    args.models, args.works, args.engines = (
        [name for name in group if name in args.only] or list(group)
        for group in (SHAPES, WORKS, ENGINES)
    )
    args.all = args.all or bool(args.only)
    return args


def main() -> None:
    """Measure, print, keep."""
    args = parse_arguments()
    random.seed(0)
    # A part of the table must not replace the whole one that is kept.
    name = "engine-part" if args.only else "engine"
    columns = "model work engine tokens_per_s first_ms between_ms against_best_peer threads dtype"
    report = Report(name, columns.split())
    peers_dtype = str(peer_dtype()).removeprefix("torch.")
    for model in args.models:
        for work, row in measure_model(model, args).items():
            for engine, found in row.items():
                add_row(report, model, work, engine, found)
                ours = engine == "millrace"
                report.rows[-1] |= {
                    "against_best_peer": against_best_peer(row) if ours else "",
                    "threads": str(args.threads),
                    "dtype": "bfloat16" if ours else peers_dtype,
                }
    print(report.show())


if __name__ == "__main__":
    main()
