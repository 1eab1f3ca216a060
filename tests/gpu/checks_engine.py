"""What the engine says on a GPU, against transformers in float32 and against itself."""

from __future__ import annotations

import contextlib
import math
import statistics
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch

from engine.config import DEFAULT_MODEL, Dtype
from engine.tokenizer import Tokenizer
from engine.train.evaluation.prompts import PROMPTS
from tests.bench.checkpoints import PEBBLE, make_hollow
from tests.engine import checkpoints
from tests.engine.harness import Answer, Engine
from tests.gpu.engines import MODES, new_engine
from tests.gpu.journal import Figures
from tests.gpu.parts import Group, Row
from tests.gpu.setting import Setting
from tests.gpu.shapes import GPU_SHAPES
from tests.gpu.weights import bytes_of, made_up_weights

__all__ = ["groups"]

SHAPE = checkpoints.Shape(
    vocab_size=1009, hidden_size=256, intermediate_size=512, num_layers=4, num_heads=8,
    num_kv_heads=2, head_dim=64,
)  # fmt: skip
NUM_TOKENS = 64
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.3}
"""How much less likely than the oracle's own choice a greedy token may be, in nats."""
FP8_ERROR = {"mean": 0.25, "largest": 1.2}
"""Bounds on the errors of log-probabilities, in nats, where those of all tokens spread by 1.2."""
PERPLEXITY_RISE = 0.01
ANSWER_TOKENS = 128


class Oracle(NamedTuple):
    """A random checkpoint and what transformers says about it in float32."""

    setting: Setting
    folder: Path
    model: Any
    dtype: torch.dtype

    def engine(self, **settings: Any) -> Engine:
        """Our engine on it."""
        return small_engine(self.setting, self.folder, **settings)

    def prompts(self) -> list[list[int]]:
        """Of many lengths, most of them across several blocks."""
        lengths = (1, 17, 40) if self.setting.dry else (1, 7, 33, 90, 200, 16, 64, 129)
        generator = torch.Generator().manual_seed(1)
        return [
            torch.randint(SHAPE.vocab_size, (n,), generator=generator).tolist() for n in lengths
        ]


def groups(setting: Setting) -> list[Group]:
    """Both types, graphs and no graphs, alone and together; FP8; batch-invariant; perplexity."""
    found = []
    for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        rows = tuple(
            Row(f"greedy-{way}", partial(_greedy, settings), needs_s=10)
            for way, settings in (("graphs", {}), ("eager", MODES["bf16-eager"]))
        )
        if dtype is torch.bfloat16:
            rows += (
                Row("fp8-error", partial(_error, "fp8"), needs_s=10),
                Row("fp8-kv8-error", partial(_error, "fp8-kv8"), needs_s=10),
                Row("batch-invariant", _invariant, needs_s=10),
            )
        found.append(Group(f"engine-{name}", rows, partial(_oracle, dtype=dtype), needs_s=15))
    rows = (
        Row("perplexity", _perplexity, needs_s=20, limit_s=180),
        Row("bytes-saved", _saved, needs_s=20, limit_s=180),
    )
    return [*found, Group("model", rows)]


def small_engine(setting: Setting, folder: Path | str, **settings: Any) -> Engine:
    """An engine for few short requests."""
    usual: dict[str, Any] = {"kv_memory_bytes": 64 << 20, "max_num_seqs": 8}
    if setting.dry:
        usual |= {"max_model_len": 128, "max_num_seqs": 4}
    return new_engine(setting, folder, **{**usual, **settings})


@contextlib.contextmanager
def _oracle(setting: Setting, dtype: torch.dtype) -> Iterator[Oracle]:
    shape = replace(SHAPE, dtype=dtype)
    if setting.dry:
        shape = replace(shape, hidden_size=64, intermediate_size=96, num_layers=2)
    model = checkpoints.new_model(shape)
    # Sharp attention makes a chaos of a random model, in which any rounding grows beyond bounds.
    for name, parameter in model.named_parameters():
        if "q_norm" in name or "k_norm" in name:
            parameter.data.fill_(1)
    with tempfile.TemporaryDirectory(prefix="millrace-gpu-") as name:
        folder = checkpoints.save(model, Path(name))
        yield Oracle(setting, folder, checkpoints.load_float32(folder), dtype)


def _greedy(settings: dict[str, Any], oracle: Oracle) -> Figures:
    """Every token is the oracle's choice at its place, or as likely within rounding."""
    engine = oracle.engine(**settings)
    prompts = oracle.prompts()
    tokens = NUM_TOKENS // 8 if oracle.setting.dry else NUM_TOKENS
    asked: dict[str, Any] = {"max_tokens": tokens, "ignore_eos": True}
    together = engine.generate_all(prompts, **asked)
    engine.reset()
    alone = [engine.generate(prompt, **asked) for prompt in prompts]
    same, gap = 0, 0.0
    for prompt, *answers in zip(prompts, together, alone, strict=True):
        for answer in answers:
            assert len(answer.token_ids) == tokens
            rows = checkpoints.all_logprobs(oracle.model, prompt + answer.token_ids)
            rows = rows[len(prompt) - 1 : -1]
            chosen = torch.tensor(answer.token_ids)
            best = rows.max(1)
            same += int((best.indices == chosen).sum())
            gap = max(gap, float((best.values - rows.gather(1, chosen[:, None])[:, 0]).max()))
    count = 2 * tokens * len(prompts)
    shown = f"{same} of {count} tokens are transformers', others as likely within {gap:.1e} nats"
    assert gap <= TOLERANCE[oracle.dtype], shown
    assert same >= 0.9 * count, shown
    return {"shown": shown}


def _error(mode: str, oracle: Oracle) -> Figures:
    """Of the log-probabilities of random tokens, which are all unlikely ones."""
    usual, errors = (statistics.fmean(_errors(oracle, "bf16")), _errors(oracle, mode))
    mean, largest = statistics.fmean(errors), max(errors)
    shown = f"mean {mean:.3f}, largest {largest:.3f} nats from float32; of bf16 {usual:.3f}"
    assert mean <= FP8_ERROR["mean"], shown
    assert largest <= FP8_ERROR["largest"], shown
    assert mean > 1.5 * usual, f"not rounded at all? {shown}"
    return {"shown": shown}


def _errors(oracle: Oracle, mode: str) -> list[float]:
    prompt = max(oracle.prompts(), key=len)
    rows = checkpoints.all_logprobs(oracle.model, prompt)
    answer = oracle.engine(**MODES[mode]).generate(prompt, max_tokens=1, prompt_logprobs=0)
    pairs = zip(_prompt_logprobs(answer), prompt[1:], strict=True)
    return [abs(got - rows[place, token].item()) for place, (got, token) in enumerate(pairs)]


def _prompt_logprobs(answer: Answer) -> list[float]:
    assert answer.prompt_logprobs is not None
    return [entry.logprob for entry in answer.prompt_logprobs]


def _invariant(oracle: Oracle) -> Figures:
    """The same bits alone, in a batch and in pieces; and whether they differ without the mode."""
    differ = _company(oracle, MODES["bf16-invariant"])
    assert not differ, f"log-probabilities differ in company: {differ}"
    usual = _company(oracle, {})
    return {"shown": f"bitwise the same in all company; without the mode {len(usual)} differ"}


def _company(oracle: Oracle, settings: dict[str, Any]) -> list[tuple[str, int]]:
    """The prompts whose answers are other numbers together, or in chunks, than alone."""
    asked: dict[str, Any] = {"max_tokens": 16, "ignore_eos": True, "logprobs": 2}
    prompts = oracle.prompts()
    engine = oracle.engine(prefix_cache=False, **settings)
    alone = [engine.generate(prompt, **asked) for prompt in prompts]
    engine.reset(prefix_cache=False)
    found = {"together": engine.generate_all(prompts, **asked)}
    engine.reset(prefix_cache=False, chunk_tokens=16)
    found["in chunks"] = engine.generate_all(prompts, **asked)
    return [
        (name, len(prompt))
        for name, answers in found.items()
        for prompt, one, other in zip(prompts, alone, answers, strict=True)
        if (one.token_ids, one.logprobs) != (other.token_ids, other.logprobs)
    ]


def _perplexity(setting: Setting) -> Figures:
    """Of the bundled model over answers of its own, in every mode."""
    asked = _questions()[: 2 if setting.dry else None]
    length, seeds = (8, 1) if setting.dry else (ANSWER_TOKENS, 4)
    longest = max(map(len, asked)) + length + 1
    found: dict[str, float] = {}
    texts: list[list[int]] = []
    for mode in ("bf16", "fp8", "fp8-kv8"):
        engine = small_engine(
            setting, DEFAULT_MODEL, max_model_len=longest, dtype=Dtype.BFLOAT16, **MODES[mode]
        )
        if not texts:
            for seed in range(seeds):
                answers = engine.generate_all(asked, max_tokens=length, temperature=1.0, seed=seed)
                texts += [p + a.token_ids for p, a in zip(asked, answers, strict=True)]
        scored = engine.generate_all(texts, max_tokens=1, ignore_eos=True, prompt_logprobs=0)
        found[mode] = math.exp(-statistics.fmean(_answers_logprobs(asked * seeds, scored)))
    tokens = sum(map(len, texts)) - seeds * sum(map(len, asked))
    shown = f"{', '.join(f'{mode} {x:.4f}' for mode, x in found.items())}; {tokens} tokens"
    for mode, value in found.items():
        assert value <= found["bf16"] * (1 + PERPLEXITY_RISE) or setting.dry, f"{mode}: {shown}"
    return {"shown": shown}


def _questions() -> list[list[int]]:
    """The questions of the model's evaluation, as it is asked them."""
    tokenizer = Tokenizer.load(PEBBLE)
    try:
        return [
            tokenizer.render_chat([{"role": "user", "content": question}])
            for prompt in PROMPTS
            if not prompt.tools
            for question in prompt.questions
        ]
    finally:
        tokenizer.close()


def _answers_logprobs(asked: list[list[int]], scored: list[Answer]) -> list[float]:
    """Of the tokens behind each question."""
    pairs = zip(asked, scored, strict=True)
    return [x for question, answer in pairs for x in _prompt_logprobs(answer)[len(question) - 1 :]]


def _saved(setting: Setting) -> Figures:
    """Of 8B: weights and cache, from engines with two of its layers."""
    whole, layers = GPU_SHAPES["8b"], 2
    if setting.dry:
        whole = whole._replace(
            hidden_size=128, num_heads=2, num_kv_heads=1, intermediate_size=256, vocab_size=300
        )
    weights, cached = {}, {}
    for mode in ("bf16", "fp8-kv8"):
        with tempfile.TemporaryDirectory(prefix="millrace-gpu-") as name, made_up_weights():
            folder = make_hollow(whole._replace(num_layers=layers), Path(name))
            runner: Any = small_engine(setting, folder, max_model_len=128, **MODES[mode]).runner
        in_layers = bytes_of(runner._model.layers)
        others = bytes_of(runner._model) - in_layers
        weights[mode] = others + in_layers / layers * whole.num_layers
        keys, _ = runner._cache.layers[0][:2]
        cached[mode] = 2 * keys[0].nbytes / runner.info.block_size
        del runner
        setting.forget()
    saved = 1 - weights["fp8-kv8"] / weights["bf16"]
    halved = 1 - cached["fp8-kv8"] / cached["bf16"]
    gib = ", ".join(f"{mode} {size / 2**30:.2f} GiB" for mode, size in weights.items())
    shown = f"weights of 8B: {gib}, {-100 * saved:+.1f} %; cache {-100 * halved:+.1f} %"
    assert setting.dry or (saved > 0.42 and halved == 0.5), shown
    return {"shown": shown}
