"""The whole of it: an engine on the GPU kernels says what one on the oracle says.

In processes of their own, since a backend is chosen by the environment.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import kernels
from tests.engine import checkpoints

ROOT = Path(kernels.__file__).resolve().parents[1]
GENERATE = """
import sys
from engine.config import Device
from kernels import select
from tests.engine.harness import Engine

device = Device.CUDA if sys.argv[2] == "cuda" else Device.CPU
engine = Engine(sys.argv[1], max_model_len=64, max_num_seqs=2, max_num_tokens=16, device=device,
                kv_memory_bytes=1 << 20)
answers = engine.generate_all([[3, 14, 15, 92, 65, 35], [27, 18]], max_tokens=8, ignore_eos=True)
print(select(device.value).name, [answer.token_ids for answer in answers])
"""


@pytest.mark.timeout(240)
def test_greedy_tokens_are_the_oracles(tmp_path: Path, device: torch.device) -> None:
    shape = checkpoints.Shape(hidden_size=64, intermediate_size=96, num_layers=2)
    model, _ = checkpoints.make(tmp_path, shape)
    said = {}
    for backend, place in (("reference", "cpu"), ("triton", device.type)):
        run = subprocess.run(
            [sys.executable, "-W", "ignore", "-c", GENERATE, str(model), place],
            env={**os.environ, "MILLRACE_KERNELS": backend, "PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
            timeout=200,
            check=False,
        )
        assert run.returncode == 0, run.stderr[-3000:]
        name, _, said[backend] = run.stdout.partition(" ")
        assert name == backend
    assert said["triton"] == said["reference"]
    assert said["triton"].count(",") == 15
