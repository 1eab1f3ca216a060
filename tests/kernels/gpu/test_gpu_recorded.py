"""Recorded steps on the GPU kernels: CUDA graphs on a GPU, their stand-in in the interpreter."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from engine.config import Device
from engine.graphs import Repeater
from tests.engine import checkpoints
from tests.engine.harness import Engine

SHAPE = checkpoints.Shape(hidden_size=32, intermediate_size=48, num_layers=1, vocab_size=67)
PROMPTS = [[3, 14, 15, 62, 65, 35, 9], [27, 18], [40, 41, 42]]
SAMPLINGS: list[dict[str, Any]] = [
    {},
    {"temperature": 1.0, "seed": 3, "top_k": 9},
    {"temperature": 0.8, "seed": 4, "top_p": 0.9},
]


def answers(model: Path, device: torch.device, *, recorded: bool, steps_ahead: int) -> Any:
    on_gpu = device.type == "cuda"
    engine = Engine(
        model,
        device=Device.CUDA if on_gpu else Device.CPU,
        recorder=Repeater() if recorded and not on_gpu else None,
        cuda_graphs=recorded,
        steps_ahead=steps_ahead,
        max_model_len=32,
        max_num_seqs=4,
        max_num_tokens=16,
        block_size=4,
        kv_memory_bytes=1 << 20,
    )
    names = [
        engine.add(prompt, max_tokens=4, ignore_eos=True, **sampling)
        for prompt, sampling in zip(PROMPTS, SAMPLINGS, strict=True)
    ]
    engine.run()
    return [engine.answers[name].token_ids for name in names]


def test_recorded_steps_answer_alike(
    tmp_path: Path, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, _ = checkpoints.make(tmp_path, SHAPE)
    monkeypatch.setenv("MILLRACE_KERNELS", "triton")
    # Triton's interpreter is NumPy, which warns of infinities that kernels count on.
    with np.errstate(all="ignore"):
        plain = answers(model, device, recorded=False, steps_ahead=0)
        assert answers(model, device, recorded=True, steps_ahead=1) == plain
