"""The batch-invariant mode: a request has the same bits alone, in a batch and in any chunking.

Through the engine, with tiles so small that a short context has several splits.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest
import torch

from engine.config import KvCacheDtype, Quantization
from kernels import gpu, select
from kernels.gpu import attention, packed
from kernels.gpu.attention_plan import plan_attention
from kernels.gpu.tuning import Config, trying
from tests.engine import checkpoints
from tests.engine.harness import Answer, Engine
from tests.kernels.gpu.engines import engine_on

TILES = Config(
    MappingProxyType({"ROWS": 16, "KEYS": 16, "SPLIT": 16, "PROGRAMS": 1, "MERGED": 2}), 4, 2
)
PROMPT = torch.randint(131, (37,), generator=torch.Generator().manual_seed(1)).tolist()
OTHERS = [PROMPT[::-1][:23], PROMPT[5:6]]
SETTINGS: dict[str, dict[str, Any]] = {
    "dense": {},
    "fp8": {"quantization": Quantization.FP8, "kv_cache_dtype": KvCacheDtype.FP8},
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    shape = checkpoints.Shape(
        hidden_size=48, intermediate_size=64, num_layers=2, num_kv_heads=1, head_dim=16
    )
    return checkpoints.make(tmp_path_factory.mktemp("model"), shape)[0]


@pytest.fixture(autouse=True)
def small_tiles() -> Iterator[None]:
    with trying("attention_invariant", TILES):
        yield


def told(answer: Answer) -> list[tuple[float, ...]]:
    """Everything that is computed of a request: float32 numbers, so equal means to the last bit."""
    assert answer.prompt_logprobs is not None
    entries = answer.prompt_logprobs + answer.logprobs
    return [(one.logprob, *one.top_ids, *one.top_logprobs) for one in entries]


def ask(engine: Engine) -> str:
    return engine.add(PROMPT, max_tokens=2, ignore_eos=True, logprobs=2, prompt_logprobs=2)


def ways(engine: Engine) -> Iterator[tuple[str, list[tuple[float, ...]]]]:
    """The request alone, in chunks that prefill and that decode, and in a batch."""
    for name, chunk_tokens, others in (
        ("alone", None, 0), ("in small chunks", 7, 0), ("in chunks in a batch", 13, 2),
    ):  # fmt: skip
        engine.reset(prefix_cache=False, chunk_tokens=chunk_tokens)
        for prompt in OTHERS[:others]:
            engine.add(prompt, max_tokens=3, ignore_eos=True, temperature=1.0, seed=3)
        request = ask(engine)
        engine.run()
        yield name, told(engine.answers[request])


def check(model: Path, device: torch.device, **settings: Any) -> None:
    sizes = {"max_model_len": 48, "max_num_tokens": 64, "kv_memory_bytes": 1 << 19}
    with engine_on("triton", model, device, batch_invariant=True, **sizes, **settings) as engine:
        assert engine.runner.batch_invariant
        alone = None
        for name, numbers in ways(engine):
            alone = alone or numbers
            assert numbers == alone, name


@pytest.mark.timeout(240)
@pytest.mark.parametrize("name", SETTINGS)
def test_a_request_has_the_same_bits_in_any_company(
    name: str, model: Path, device: torch.device
) -> None:
    check(model, device, **SETTINGS[name])


@pytest.mark.timeout(240)
@pytest.mark.parametrize(("name", "bug"), [("dense", "attention"), ("fp8", "linear")])
def test_what_looks_at_the_batch_is_found(
    name: str, bug: str, model: Path, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    planner: Any = plan_attention
    if bug == "attention":  # prefill does not close its sums where decode does
        monkeypatch.setattr(
            attention, "plan_attention", lambda *arguments: planner(*arguments[:-1], False)
        )
    else:  # few rows are not rounded
        monkeypatch.setattr(packed, "MAX_STREAM_ROWS", 16)
        monkeypatch.setattr(
            gpu,
            "run_linear",
            lambda *a, batch_invariant: packed.run_linear(*a, batch_invariant=False),
        )
    with pytest.raises(AssertionError, match="in small chunks"):
        check(model, device, **SETTINGS[name])


def test_who_asks_gets_it(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MILLRACE_KERNELS", "triton")
    assert not select(device).batch_invariant
    assert select(device, batch_invariant=True).batch_invariant
    assert not select(device).batch_invariant
