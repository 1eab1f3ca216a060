"""What a step of the engine launches."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
import torch

from kernels.gpu import GpuOps
from tests.engine import checkpoints
from tests.engine.harness import Engine
from tests.kernels.gpu.engines import engine_on
from tests.kernels.gpu.launches import counted_launches

LAYERS = 3
PROMPTS = [[3, 14, 15, 92, 65, 35, 89, 79, 32, 38, 46], [27, 18]]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    shape = checkpoints.Shape(hidden_size=32, intermediate_size=48, num_layers=LAYERS)
    return checkpoints.make(tmp_path_factory.mktemp("model"), shape)[0]


def steps(engine: Engine) -> tuple[Counter[str], Counter[str]]:
    """The launches of a step with a prompt of many tokens, and of one with a token a request."""
    for prompt in PROMPTS:
        engine.add(prompt, max_tokens=4, ignore_eos=True)
    found = []
    for _ in range(2):
        with counted_launches() as counts:
            engine.step()
        found.append(counts)
    engine.run()
    return found[0], found[1]


def test_a_step_plans_its_attention_once(model: Path, device: torch.device) -> None:
    with engine_on("triton", model, device) as engine:
        prefill, decode = steps(engine)
    assert prefill["_plan"] == decode["_plan"] == 1
    assert prefill["_decode"] == prefill["_prefill"] == decode["_decode"] == LAYERS
    assert decode["_prefill"] == 0, "no request has more than a token, and the host knows"


def answers(engine: Engine) -> list[list[tuple[int, float]]]:
    """Tokens and log-probabilities, to the last bit."""
    found = engine.generate_all(PROMPTS, max_tokens=4, ignore_eos=True, logprobs=0)
    return [
        [(token, entry.logprob) for token, entry in zip(one.token_ids, one.logprobs, strict=True)]
        for one in found
    ]


def test_one_plan_for_all_layers_gives_the_bits_of_one_for_each(
    model: Path, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    with engine_on("triton", model, device) as engine:
        once = answers(engine)
        original = GpuOps.paged_attention
        monkeypatch.setattr(
            GpuOps, "paged_attention", lambda self, *arguments: original(self, *arguments[:8])
        )
        engine.reset()
        with counted_launches() as counts:
            assert answers(engine) == once
        assert counts["_plan"] > LAYERS * 4
