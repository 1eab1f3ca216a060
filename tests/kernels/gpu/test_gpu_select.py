"""When the GPU kernels are chosen, and what is said where they cannot be."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import kernels
from kernels import BackendUnavailable, Ops, cpu, select
from kernels.cpu.fallback import TorchOps
from kernels.fp8 import Fp8Ops
from kernels.gpu import GpuFp8Ops, GpuOps
from kernels.reference_fp8 import ReferenceFp8Ops

ROOT = Path(kernels.__file__).resolve().parents[1]


def test_select(monkeypatch: pytest.MonkeyPatch, device: torch.device) -> None:
    monkeypatch.setenv("MILLRACE_KERNELS", "triton")
    assert isinstance(select(device), GpuOps)
    with pytest.raises(BackendUnavailable, match="CUDA device, got 'meta'"):
        select("meta")
    monkeypatch.setenv("MILLRACE_KERNELS", "auto")
    assert not isinstance(select("cpu"), GpuOps)
    if device.type == "cuda":
        assert isinstance(select(device), GpuOps)
    else:
        with pytest.raises(BackendUnavailable, match="'cuda': torch finds no GPU"):
            select("cuda")


def test_names_of_ops_are_those_of_the_protocols() -> None:
    for protocol in (Ops, Fp8Ops):
        wanted = {name for name in vars(protocol) if not name.startswith("_")}
        for ops in (GpuFp8Ops(), ReferenceFp8Ops()):
            assert wanted <= set(dir(ops))
    assert isinstance(GpuFp8Ops(), Fp8Ops)
    assert isinstance(ReferenceFp8Ops(), Fp8Ops)
    assert not isinstance(TorchOps(), Fp8Ops)
    assert not isinstance(cpu.load(), Fp8Ops)


@pytest.mark.parametrize(
    ("code", "variables", "message"),
    [
        ("sys.modules['triton'] = None", {}, "need triton, which is not installed"),
        ("", {"TRITON_INTERPRET": "0"}, "set TRITON_INTERPRET=1"),
    ],
)
def test_without_triton_or_its_interpreter(
    code: str, variables: dict[str, str], message: str
) -> None:
    run = subprocess.run(
        [sys.executable, "-c", f"import sys; {code}\nimport kernels; kernels.select('cpu')"],
        env={**os.environ, **variables, "MILLRACE_KERNELS": "triton", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=50,
        check=False,
    )
    assert run.returncode == 1
    assert "BackendUnavailable" in run.stderr
    assert message in run.stderr
