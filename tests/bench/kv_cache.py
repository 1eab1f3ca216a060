"""What a KV cache in 8-bit floats costs in perplexity, computed by the kernels' oracle on any CPU.

    python -m tests.bench.kv_cache                                    the fixed prompts, pebble
    python -m tests.bench.kv_cache --model DIR --data text.jsonl …    examples as for millrace tune

Each example is read through the engine, its cache in the weights' type and in e4m3; the targets are
those of a tuning, an assistant's words. Arithmetic is float64 otherwise, so that the cache is the
only difference. ``worst`` is the largest change of one target's log-probability.
"""

from __future__ import annotations

import argparse
import os
from itertools import chain
from pathlib import Path

import torch

from engine.config import KvCacheDtype
from engine.hub import resolve_model
from engine.tokenizer import Tokenizer
from engine.train.evaluation.prompts import PROMPTS
from engine.train.tuning.dataset import Document, encode_examples
from engine.train.tuning.examples import Example, Examples, read_examples
from tests.bench.report import Report
from tests.engine.harness import Engine

BLOCK = 16
COLUMNS = ["data", "tokens", "targets", "perplexity", "with fp8", "change", "worst"]


def documents_of(path: Path | None, tokenizer: Tokenizer, max_tokens: int) -> list[Document]:
    """The examples of a file, or the fixed prompts, encoded."""
    if path is None:
        texts = [Example(i, text="\n".join(one.questions)) for i, one in enumerate(PROMPTS, 1)]
        examples = Examples(tuple(texts), (), len(texts), 0)
    else:
        examples = read_examples(path)
    return encode_examples(examples, tokenizer, max_tokens=max_tokens)


def start(model: Path, kind: KvCacheDtype, longest: int) -> Engine:
    """An engine on the oracle's kernels, whose cache is as small as they copy it often."""
    room = -(-longest // BLOCK) * BLOCK
    return Engine(
        model, block_size=BLOCK, kv_cache_dtype=kind, max_model_len=room, max_num_seqs=1,
        max_num_tokens=512, prefix_cache=False,
    )  # fmt: skip


def target_logprobs(engine: Engine, documents: list[Document]) -> torch.Tensor:
    """Log-probabilities of all targets, in order: float64 ``[targets]``."""
    found = []
    for one in documents:
        answer = engine.generate(one.token_ids.tolist(), max_tokens=1, prompt_logprobs=0)
        assert answer.prompt_logprobs is not None
        pairs = zip(answer.prompt_logprobs, one.learned[1:].tolist(), strict=True)
        found += [entry.logprob for entry, learned in pairs if learned]
    return torch.tensor(found, dtype=torch.float64)


def main() -> None:
    """Measure, print and keep the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--model", default="pebble")
    parser.add_argument("--data", type=Path, nargs="*", default=[None])
    parser.add_argument("--max-tokens", type=int, default=4096, help="of each file")
    arguments = parser.parse_args()
    os.environ["MILLRACE_KERNELS"] = "reference"
    model = resolve_model(arguments.model)
    tokenizer = Tokenizer.load(model)
    texts = {
        "fixed prompts" if path is None else path.name.partition(".")[0]:
        documents_of(path, tokenizer, arguments.max_tokens)
        for path in arguments.data
    }  # fmt: skip
    tokenizer.close()
    longest = max(len(one) for documents in texts.values() for one in documents) + 1
    engines = [start(model, kind, longest) for kind in KvCacheDtype]
    report = Report("kv_cache", COLUMNS)
    logprobs = []
    for name, documents in texts.items():
        logprobs.append(torch.stack([target_logprobs(engine, documents) for engine in engines]))
        add(report, name, documents, logprobs[-1])
        print(f"{name}: done", flush=True)
    if len(texts) > 1:
        add(report, "all", list(chain.from_iterable(texts.values())), torch.cat(logprobs, 1))
    print(report.show())


def add(report: Report, data: str, documents: list[Document], logprobs: torch.Tensor) -> None:
    """A row of ``logprobs [2, targets]``, with the cache in the weights' type and in e4m3."""
    before, after = (-logprobs.mean(1)).exp().tolist()
    report.add(**{
        "data": data, "tokens": sum(map(len, documents)), "targets": logprobs.shape[1],
        "perplexity": f"{before:.4f}", "with fp8": f"{after:.4f}",
        "change": f"{100 * (after / before - 1):+.2f} %",
        "worst": float((logprobs[0] - logprobs[1]).abs().max()),
    })  # fmt: skip


if __name__ == "__main__":
    main()
