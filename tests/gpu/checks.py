"""What must hold on a GPU; a check that does not, or that was not reached, fails the run."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ET
from collections import Counter
from functools import partial
from pathlib import Path

import torch

from tests.gpu import checks_engine, checks_steps
from tests.gpu.comparisons import LAYERS, SMALL, compare_all
from tests.gpu.journal import Figures
from tests.gpu.parts import Absent, Group, Row
from tests.gpu.setting import Setting

__all__ = ["groups"]

ROOT = Path(__file__).resolve().parents[2]
LEAST_TESTS = 150
"""Of the kernels; fewer were not all of them."""


def groups(setting: Setting) -> list[Group]:
    """Kernels first: where they are wrong, nothing else can be right."""
    f32, bf16 = torch.float32, setting.act
    kernels = (
        Row("real-sizes-fp32", partial(_compare, LAYERS, f32), needs_s=10),
        Row("real-sizes-bf16", partial(_compare, LAYERS, bf16), needs_s=10),
        Row("tests", _pytest, needs_s=20, limit_s=240),
        Row("memcheck", _memcheck, needs_s=20, limit_s=180),
    )
    return [
        Group("kernels", kernels),
        *checks_engine.groups(setting),
        *checks_steps.groups(setting),
    ]


def _compare(
    wanted: tuple[tuple[str, dict[str, object]], ...], dtype: torch.dtype, setting: Setting
) -> Figures:
    done = compare_all(setting, SMALL[:5] if setting.dry else wanted, dtype)
    return {"shown": f"{sum(done.values())} comparisons of {len(done)} ops with the oracle hold"}


def _pytest(setting: Setting) -> Figures:
    """The kernels' own tests, on the device; planted bugs and ahead-of-time compiling need none."""
    with tempfile.TemporaryDirectory(prefix="millrace-gpu-") as name:
        folder = Path(name)
        # Not the project's settings, which name plugins that a bare machine need not have.
        (folder / "pytest.ini").write_text(
            "[pytest]\naddopts = --import-mode=importlib -p no:cacheprovider\n"
            f"pythonpath = {ROOT}\n"
        )
        command = [
            sys.executable, "-m", "pytest", "-c", str(folder / "pytest.ini"), f"--rootdir={ROOT}",
            "-q", "--tb=short", f"--junitxml={folder / 'report.xml'}",
            "-k", "not planted and not bug and not compile",
        ]  # fmt: skip
        if setting.dry:
            command += [f"{ROOT / 'tests/kernels/gpu/test_gpu_rows.py'}::test_wide_rows"]
        else:
            # Most of the time is compiling, which the processor's cores share.
            workers = min(12, os.cpu_count() or 1)
            command += ["-n", str(workers)] if importlib.util.find_spec("xdist") else []
            command += [str(ROOT / "tests/kernels/gpu")]
        run = subprocess.run(command, cwd=ROOT, check=False, capture_output=True, text=True)
        print(run.stdout[-6000:], run.stderr[-2000:], flush=True)
        counts = _counts(folder / "report.xml")
    shown = ", ".join(f"{count} {what}" for what, count in counts.items())
    assert run.returncode == 0, f"pytest ended with {run.returncode}: {shown}"
    assert counts["passed"] >= (1 if setting.dry else LEAST_TESTS), f"only {shown}"
    return {"shown": shown}


def _counts(report: Path) -> Counter[str]:
    counts: Counter[str] = Counter()
    with contextlib.suppress(FileNotFoundError):
        for case in ET.parse(report).iter("testcase"):
            kinds = {child.tag for child in case} & {"failure", "error", "skipped"}
            counts[kinds.pop() if kinds else "passed"] += 1
    return counts


def _memcheck(setting: Setting) -> Figures:
    """compute-sanitizer over small comparisons of every op.

    Each tensor gets memory of its own, or else accesses beyond it would land in torch's pool.
    """
    tool = shutil.which("compute-sanitizer")
    command = [sys.executable, "-m", "tests.gpu.comparisons"]
    if setting.dry:
        command += ["--dry"]
    elif tool is None:
        raise Absent("compute-sanitizer is not on the PATH")
    else:
        command = [tool, "--tool", "memcheck", "--error-exitcode", "9", *command]
    run = subprocess.run(
        command, cwd=ROOT, check=False, capture_output=True, text=True,
        env={**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},
    )  # fmt: skip
    print(run.stdout[-4000:], run.stderr[-2000:], flush=True)
    if not setting.dry and "Device not supported" in run.stdout + run.stderr:
        raise Absent("compute-sanitizer does not support this device")
    assert run.returncode == 0, f"exit status {run.returncode}: {run.stdout[-150:]}"
    if setting.dry:
        return {"shown": "a dry run has no checker"}
    assert "ERROR SUMMARY: 0 errors" in run.stdout + run.stderr, run.stdout[-200:]
    return {"shown": f"no errors in {len(SMALL)} comparisons of two types"}
