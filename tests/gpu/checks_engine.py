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

from engine.config import DEFAULT_MODEL, Device, Dtype
from engine.tokenizer import Tokenizer
from tests.bench.checkpoints import PEBBLE, make_hollow
from tests.engine import checkpoints
from tests.engine.harness import Answer, Engine
from tests.gpu.engines import MODES
from tests.gpu.journal import Figures
from tests.gpu.parts import Group, Row
from tests.gpu.setting import Setting
from tests.gpu.shapes import GPU_SHAPES
from tests.gpu.weights import bytes_of, made_up_weights

__all__ = ["groups"]

ROOT = Path(__file__).resolve().parents[2]
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
WINDOW = 512
DRY_WINDOW = 48


class Oracle(NamedTuple):
    """A random checkpoint and what transformers says about it in float32."""

    setting: Setting
    folder: Path
    model: Any
    dtype: torch.dtype

    def engine(self, **settings: Any) -> Engine:
        """Our engine on it."""
        return new_engine(self.setting, self.folder, **settings)

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


def new_engine(setting: Setting, folder: Path | str, **settings: Any) -> Engine:
    """An engine on the device of the run."""
    usual: dict[str, Any] = {"kv_memory_bytes": 64 << 20, "max_num_seqs": 8}
    if setting.dry:
        usual |= {"max_model_len": 128, "max_num_seqs": 4}
    device = Device.CPU if setting.dry else Device.CUDA
    return Engine(folder, device=device, **{**usual, **settings})


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
    (prompt,) = [p for p in oracle.prompts() if len(p) == (40 if oracle.setting.dry else 200)]
    rows = checkpoints.all_logprobs(oracle.model, prompt)
    wanted = [rows[place, token].item() for place, token in enumerate(prompt[1:])]
    errors = {}
    for name in ("bf16", mode):
        answer = oracle.engine(**MODES[name]).generate(prompt, max_tokens=1, prompt_logprobs=0)
        got = _prompt_logprobs(answer)
        errors[name] = [abs(a - b) for a, b in zip(got, wanted, strict=True)]
    mean, largest = statistics.fmean(errors[mode]), max(errors[mode])
    usual = statistics.fmean(errors["bf16"])
    shown = f"mean {mean:.3f}, largest {largest:.3f} nats from float32; of bf16 {usual:.3f}"
    assert mean <= FP8_ERROR["mean"], shown
    assert largest <= FP8_ERROR["largest"], shown
    assert mean > 1.5 * usual or oracle.setting.dry, f"not rounded at all? {shown}"
    return {"shown": shown}


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
    """Of the bundled model over this project's documents, in every mode."""
    tokenizer = Tokenizer.load(PEBBLE)
    texts = [ROOT / "README.md", ROOT / "ARCHITECTURE.md", ROOT / "CONTRIBUTING.md"]
    ids = tokenizer.encode("\n".join(path.read_text(encoding="utf-8") for path in texts))
    window = DRY_WINDOW if setting.dry else WINDOW
    windows = [ids[start : start + window] for start in range(0, len(ids), window)]
    windows = [part for part in windows if len(part) > 1][: 2 if setting.dry else None]
    found = {}
    for mode in ("bf16", "fp8", "fp8-kv8"):
        engine = new_engine(
            setting, DEFAULT_MODEL, max_model_len=window + 16, dtype=Dtype.BFLOAT16, **MODES[mode]
        )
        answers = engine.generate_all(windows, max_tokens=1, ignore_eos=True, prompt_logprobs=0)
        logprobs = [value for answer in answers for value in _prompt_logprobs(answer)]
        assert len(logprobs) == sum(len(part) - 1 for part in windows)
        found[mode] = math.exp(-statistics.fmean(logprobs))
    shown = f"{', '.join(f'{mode} {x:.3f}' for mode, x in found.items())}; {len(ids)} tokens"
    for mode, value in found.items():
        assert value <= found["bf16"] * (1 + PERPLEXITY_RISE) or setting.dry, f"{mode}: {shown}"
    return {"shown": shown}


def _saved(setting: Setting) -> Figures:
    """Of 8B: weights and cache, from engines with 2 and 4 of its layers."""
    whole = GPU_SHAPES["8b"]
    if setting.dry:
        whole = whole._replace(
            hidden_size=128, num_heads=2, num_kv_heads=1, intermediate_size=256, vocab_size=300,
            num_layers=6,
        )  # fmt: skip
    weights, cached = {}, {}
    for mode in ("bf16", "fp8-kv8"):
        sizes = []
        for layers in (2, 4):
            with tempfile.TemporaryDirectory(prefix="millrace-gpu-") as name, made_up_weights():
                folder = make_hollow(whole._replace(num_layers=layers), Path(name))
                runner: Any = new_engine(setting, folder, max_model_len=128, **MODES[mode]).runner
            sizes.append(bytes_of(runner._model))
            keys, _ = runner._cache.layers[0][:2]
            cached[mode] = 2 * keys[0].nbytes / runner.info.block_size
            del runner
            setting.forget()
        weights[mode] = sizes[0] + (sizes[1] - sizes[0]) / 2 * (whole.num_layers - 2)
    saved = 1 - weights["fp8-kv8"] / weights["bf16"]
    halved = 1 - cached["fp8-kv8"] / cached["bf16"]
    gib = ", ".join(f"{mode} {size / 2**30:.2f} GiB" for mode, size in weights.items())
    shown = f"weights of 8B: {gib}, -{100 * saved:.1f} %; cache -{100 * halved:.1f} %"
    assert setting.dry or (saved > 0.42 and halved == 0.5), shown
    return {"shown": shown}
