"""The engine against transformers on random checkpoints, and against itself in other company."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from engine.config import Dtype
from tests.engine.checkpoints import Shape, all_logprobs, greedy, load_float32, make
from tests.engine.harness import Answer, Engine

YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}

SHAPES = {
    "gqa1-head32-tied": Shape(num_heads=4, num_kv_heads=4, head_dim=32),
    "gqa2-head64-untied": Shape(num_heads=4, num_kv_heads=2, head_dim=64, tied=False),
    "gqa4-head128-tied": Shape(num_heads=4, num_kv_heads=1, head_dim=128, hidden_size=64),
    "gqa8-head32-untied": Shape(num_heads=8, num_kv_heads=1, head_dim=32, tied=False),
    "gqa2-head128-sharded": Shape(
        num_heads=2, num_kv_heads=1, head_dim=128, max_shard_size="60KB", tied=False
    ),
    "yarn": Shape(rope=YARN, max_positions=256, head_dim=64),
    "yarn-mscale": Shape(
        rope={**YARN, "mscale": 1.2, "mscale_all_dim": 0.7, "beta_fast": 8.0, "beta_slow": 0.5},
        max_positions=256,
        head_dim=128,
    ),
    "yarn-attention-factor": Shape(
        rope={**YARN, "attention_factor": 1.3, "truncate": False}, max_positions=256
    ),
    "odd-sizes": Shape(
        vocab_size=257, hidden_size=51, intermediate_size=77, num_heads=3, num_kv_heads=3
    ),
    "odd-sizes-gqa8-head64": Shape(
        vocab_size=1009, hidden_size=97, intermediate_size=131, num_heads=8, num_kv_heads=1,
        head_dim=64, tied=False, rope={"rope_theta": 1e6},
    ),
    "one-layer": Shape(num_layers=1),
}  # fmt: skip


def some_prompts(vocab_size: int, lengths: tuple[int, ...] = (1, 7, 33, 90)) -> list[list[int]]:
    generator = torch.Generator().manual_seed(vocab_size)
    return [torch.randint(vocab_size, (n,), generator=generator).tolist() for n in lengths]


@pytest.mark.parametrize("name", SHAPES)
def test_matches_transformers_in_float32(name: str, tmp_path: Path) -> None:
    shape = SHAPES[name]
    path, model = make(tmp_path, shape)
    prompts = some_prompts(shape.vocab_size)
    engine = Engine(path, kv_memory_bytes=16 << 20)
    answers = engine.generate_all(
        prompts, max_tokens=64, ignore_eos=True, logprobs=5, prompt_logprobs=5
    )
    for prompt, answer in zip(prompts, answers, strict=True):
        expected = greedy(model, prompt, 64)
        assert answer.token_ids == expected
        assert len(set(expected)) > 8, "a model that repeats itself proves little"
        check_logprobs(answer, prompt, all_logprobs(model, prompt + expected), 2e-4)


def check_logprobs(answer: Answer, prompt: list[int], oracle: torch.Tensor, limit: float) -> None:
    """Compare every entry of an answer with rows of log-probabilities [prompt + answer, V]."""
    assert answer.prompt_logprobs is not None
    entries = answer.prompt_logprobs + answer.logprobs
    tokens = prompt[1:] + answer.token_ids
    assert len(entries) == len(tokens)
    for entry, token, row in zip(entries, tokens, oracle, strict=False):
        assert entry.logprob == pytest.approx(row[token].item(), abs=limit)
        assert len(entry.top_ids) == len(entry.top_logprobs) == 5
        top = row.topk(5).values
        assert torch.allclose(torch.tensor(entry.top_logprobs), top, rtol=0, atol=limit)
        assert torch.allclose(row[entry.top_ids], top, rtol=0, atol=limit)
        better, as_good = (row > row[token] + limit).sum(), (row > row[token] - limit).sum()
        assert better < entry.rank <= as_good + 1


@pytest.mark.parametrize(
    ("stored", "dtype", "limit"),
    [
        # Only the KV cache is rounded to 16 bits where the weights are stored so.
        (torch.bfloat16, Dtype.AUTO, 0.15),
        (torch.float16, Dtype.AUTO, 0.02),
        (torch.bfloat16, Dtype.FLOAT32, 2e-4),
        (torch.float16, Dtype.FLOAT32, 2e-4),
        # Here the weights are, too.
        (torch.float32, Dtype.BFLOAT16, 0.3),
        (torch.float32, Dtype.FLOAT16, 0.05),
    ],
)
def test_16_bit_weights_stay_near_float32(
    stored: torch.dtype, dtype: Dtype, limit: float, tmp_path: Path
) -> None:
    path, _ = make(tmp_path, Shape(dtype=stored, head_dim=64))
    prompt = some_prompts(131, (120,))[0]
    engine = Engine(path, kv_memory_bytes=16 << 20, dtype=dtype)
    wanted = str(stored).removeprefix("torch.") if dtype is Dtype.AUTO else dtype.value
    assert engine.runner.info.dtype == wanted
    answer = engine.generate(prompt, max_tokens=1, prompt_logprobs=0)
    oracle = all_logprobs(load_float32(path), prompt)
    assert answer.prompt_logprobs is not None
    errors = [
        abs(entry.logprob - oracle[place, token].item())
        for place, (entry, token) in enumerate(zip(answer.prompt_logprobs, prompt[1:], strict=True))
    ]
    assert max(errors) < limit
    if limit > 1e-3:
        assert max(errors) > limit / 100, "the limit is too wide to find anything"


# Same request, same answer.

BLOCK = 4
SAMPLED: dict[str, Any] = {
    "temperature": 1.0, "seed": 1234, "top_p": 0.95, "top_k": 50, "repetition_penalty": 1.1,
    "frequency_penalty": 0.2,
}  # fmt: skip


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Engine:
    shape = Shape(hidden_size=64, intermediate_size=96, head_dim=32, num_kv_heads=2)
    path, _ = make(tmp_path_factory.mktemp("model"), shape)
    return Engine(path, kv_memory_bytes=16 << 20, block_size=BLOCK, max_num_tokens=256)


PROMPT = some_prompts(131, (45,))[0]
OTHERS = some_prompts(131, tuple(range(3, 67, 2)))


def ask(engine: Engine, sampling: dict[str, Any]) -> str:
    return engine.add(PROMPT, max_tokens=40, ignore_eos=True, logprobs=4, **sampling)


def alone(engine: Engine, sampling: dict[str, Any]) -> Answer:
    engine.reset(prefix_cache=False)
    request = ask(engine, sampling)
    engine.run()
    return engine.answers[request]


def among_others(engine: Engine, sampling: dict[str, Any]) -> Answer:
    engine.reset(prefix_cache=False)
    assert len(OTHERS) == 32
    for index, prompt in enumerate(OTHERS[:16]):
        engine.add(prompt, max_tokens=10 + 3 * index, temperature=0.8, seed=index)
    request = ask(engine, sampling)
    for index, prompt in enumerate(OTHERS[16:]):
        engine.add(prompt, max_tokens=60 - 3 * index, ignore_eos=True)
    engine.run()
    return engine.answers[request]


def in_chunks(engine: Engine, sampling: dict[str, Any]) -> Answer:
    engine.reset(prefix_cache=False, chunk_tokens=7)
    request = ask(engine, sampling)
    engine.run()
    return engine.answers[request]


def preempted(engine: Engine, sampling: dict[str, Any]) -> Answer:
    # Room for one and a half: the later one gives way, more than once, and has to come back.
    engine.reset(prefix_cache=False, num_blocks=1 + 33)
    for prompt in OTHERS[20:22]:
        engine.add(prompt, max_tokens=50, ignore_eos=True)
    request = ask(engine, sampling)
    engine.run()
    usage = engine.answers[request].usage
    assert usage is not None
    assert usage.preemptions > 0
    return engine.answers[request]


def from_warm_cache(engine: Engine, sampling: dict[str, Any]) -> Answer:
    engine.reset(prefix_cache=True)
    engine.generate(PROMPT[:30], max_tokens=1)
    request = ask(engine, sampling)
    engine.run()
    usage = engine.answers[request].usage
    assert usage is not None
    assert usage.cached_tokens == 28
    return engine.answers[request]


@pytest.mark.parametrize("sampling", [{}, SAMPLED], ids=["greedy", "seeded"])
@pytest.mark.parametrize("way", [among_others, in_chunks, preempted, from_warm_cache])
def test_same_request_same_answer(
    engine: Engine, way: Callable[[Engine, dict[str, Any]], Answer], sampling: dict[str, Any]
) -> None:
    expected, answer = alone(engine, sampling), way(engine, sampling)
    assert len(set(expected.token_ids)) > 15
    assert answer.token_ids == expected.token_ids
    if engine.runner.batch_invariant:
        assert answer.logprobs == expected.logprobs  # to the last bit
    for ours, theirs in zip(answer.logprobs, expected.logprobs, strict=True):
        assert ours.logprob == pytest.approx(theirs.logprob, abs=1e-4)


def test_seeds_make_a_difference(engine: Engine) -> None:
    answers = [alone(engine, {**SAMPLED, "seed": seed}).token_ids for seed in (1, 2, 1)]
    assert answers[0] == answers[2]
    assert answers[0] != answers[1]


def test_prompt_logprobs_do_not_depend_on_chunks(engine: Engine) -> None:
    found = []
    for chunk_tokens in (256, 7, 1):
        engine.reset(prefix_cache=False, chunk_tokens=chunk_tokens)
        engine.add(OTHERS[3], max_tokens=5)
        answer = engine.generate(PROMPT, max_tokens=2, prompt_logprobs=3)
        assert answer.prompt_logprobs is not None
        assert len(answer.prompt_logprobs) == len(PROMPT) - 1
        found.append([entry.logprob for entry in answer.prompt_logprobs])
    assert found[1] == pytest.approx(found[0], abs=1e-4)
    assert found[2] == pytest.approx(found[0], abs=1e-4)
    if engine.runner.batch_invariant:
        assert found[0] == found[1] == found[2]
