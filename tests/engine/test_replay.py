"""A request some of whose answer is known goes on as if it had never been interrupted."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from engine.errors import RequestError
from engine.types import FinishReason
from tests.engine.checkpoints import Shape, make
from tests.engine.harness import Answer, Engine

LENGTH = 24
PROMPT = torch.randint(131, (21,), generator=torch.Generator().manual_seed(7)).tolist()
OTHER = torch.randint(131, (30,), generator=torch.Generator().manual_seed(8)).tolist()

REQUESTS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "sampled": {"temperature": 1.0, "seed": 1},
    "another seed": {"temperature": 1.0, "seed": 2**40 + 3, "top_p": 0.9, "min_p": 0.01},
    "penalties": {
        "temperature": 0.9, "seed": 5, "repetition_penalty": 1.3, "presence_penalty": 0.7,
        "frequency_penalty": 0.4,
    },
    "greedy with penalties": {"frequency_penalty": 0.9, "presence_penalty": 0.5},
    "biased": {"temperature": 0.8, "seed": 9, "logit_bias": {3: 4.0, 50: -100.0, 77: 2.5}},
    "at least 15": {
        "temperature": 1.0, "seed": 11, "min_tokens": 15, "stop_token_ids": tuple(range(60)),
        "ignore_eos": False,
    },
}  # fmt: skip
"""Sampling parameters that depend, each in its way, on what was generated before."""


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Engine:
    shape = Shape(hidden_size=64, intermediate_size=96, head_dim=32, num_kv_heads=2)
    path, _ = make(tmp_path_factory.mktemp("model"), shape)
    return Engine(path, kv_memory_bytes=16 << 20, block_size=4, max_num_tokens=128)


def ask(engine: Engine, known: list[int], sampling: dict[str, Any]) -> Answer:
    options = {"max_tokens": LENGTH, "ignore_eos": True, "logprobs": 3, **sampling}
    return engine.generate(PROMPT, output_ids=known, **options)


def cold(engine: Engine) -> None:
    engine.reset(prefix_cache=False)


def in_chunks(engine: Engine) -> None:
    engine.reset(prefix_cache=False, chunk_tokens=5)


def warm(engine: Engine) -> None:
    """The prompt is in the cache, and so is every answer that was given before."""
    if not engine.scheduler.stats()["cached_blocks"]:
        engine.reset(prefix_cache=True)
        engine.generate(PROMPT, max_tokens=1)


def among_others(engine: Engine) -> None:
    engine.reset(prefix_cache=False)
    for length in (3, 12, 30):
        engine.add(OTHER[:length], max_tokens=10, temperature=0.7, seed=length)


def preempted(engine: Engine) -> None:
    """Room for little more than one: the request asked for gives way and comes back."""
    engine.reset(prefix_cache=False, num_blocks=1 + 16)
    engine.add(OTHER, max_tokens=30, ignore_eos=True)


@pytest.mark.parametrize("name", REQUESTS)
@pytest.mark.parametrize("way", [cold, in_chunks, warm, among_others, preempted])
def test_split_anywhere(engine: Engine, way: Callable[[Engine], None], name: str) -> None:
    cold(engine)
    whole = ask(engine, [], REQUESTS[name])
    assert len(set(whole.token_ids)) > 5
    preemptions = 0
    for k in range(len(whole.token_ids)):
        way(engine)
        rest = ask(engine, whole.token_ids[:k], REQUESTS[name])
        assert whole.token_ids[:k] + rest.token_ids == whole.token_ids, f"after {k} tokens"
        assert rest.finish_reason is whole.finish_reason
        if engine.runner.batch_invariant:
            assert rest.logprobs == whole.logprobs[k:], f"after {k} tokens"  # to the last bit
        assert rest.usage is not None
        assert rest.usage.prompt_tokens == len(PROMPT)
        assert rest.usage.completion_tokens == len(whole.token_ids)
        preemptions += rest.usage.preemptions
    assert preemptions or way is not preempted


def test_what_was_known_is_not_forgotten_by_a_second_interruption(engine: Engine) -> None:
    cold(engine)
    sampling = REQUESTS["penalties"]
    whole = ask(engine, [], sampling).token_ids
    known: list[int] = []
    while len(known) < LENGTH:
        cold(engine)
        request = engine.add(
            PROMPT, output_ids=known, max_tokens=LENGTH, ignore_eos=True, **sampling
        )
        for _ in range(3):
            engine.step()
        known = known + engine.answers[request].token_ids
        assert known == whole[: len(known)]


def test_prompt_logprobs_came_with_the_first_token(engine: Engine) -> None:
    cold(engine)
    whole = ask(engine, [], {"prompt_logprobs": 2})
    assert whole.prompt_logprobs is not None
    assert ask(engine, [], {"prompt_logprobs": 2}).prompt_logprobs == whole.prompt_logprobs
    rest = ask(engine, whole.token_ids[:1], {"prompt_logprobs": 2})
    assert rest.prompt_logprobs is None
    assert rest.logprobs == whole.logprobs[1:]


@pytest.mark.parametrize(
    ("sampling", "reason"),
    [({}, FinishReason.LENGTH), ({"stop_token_ids": tuple(range(131))}, FinishReason.STOP)],
)
def test_a_complete_answer_ends_at_once(
    engine: Engine, sampling: dict[str, Any], reason: FinishReason
) -> None:
    cold(engine)
    whole = ask(engine, [], sampling)
    assert whole.finish_reason is reason
    again = ask(engine, whole.token_ids, sampling)
    assert (again.token_ids, again.finish_reason) == ([], reason)
    assert again.usage == whole.usage
    assert not engine.scheduler.has_work


def test_a_stop_token_before_the_minimum_ends_nothing(engine: Engine) -> None:
    cold(engine)
    stop = {"stop_token_ids": (5,), "min_tokens": 3}
    request = engine.add(PROMPT, output_ids=[5, 5], max_tokens=LENGTH, **stop)
    assert engine.answers[request].finish_reason is None
    engine.run()
    assert len(engine.answers[request].token_ids) >= 1


def test_known_tokens_must_be_tokens(engine: Engine) -> None:
    cold(engine)
    with pytest.raises(RequestError, match="not made of token ids"):
        engine.add(PROMPT, output_ids=[-1])
