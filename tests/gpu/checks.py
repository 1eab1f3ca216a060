"""What must hold on a GPU; a check that does not, or that was not reached, fails the run."""

from __future__ import annotations

import atexit
import contextlib
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ET
from collections import Counter
from collections.abc import Iterator
from functools import cache, partial
from pathlib import Path

import torch

from tests.gpu import checks_engine, checks_steps
from tests.gpu.comparisons import LAYERS, SMALL, compare_all
from tests.gpu.journal import Figures
from tests.gpu.parts import Absent, Group, Row
from tests.gpu.setting import Setting

__all__ = ["groups"]

ROOT = Path(__file__).resolve().parents[2]
LEAST_TESTS = 240
"""Of the kernels; fewer were not all of them."""


def groups(setting: Setting) -> list[Group]:
    """The kernels' own tests and the memory checker run beside the others: they mostly compile."""
    f32, bf16 = torch.float32, setting.act
    sizes = (
        Row("real-sizes-bf16", partial(_compare, LAYERS, bf16), needs_s=10),
        Row("real-sizes-fp32", partial(_compare, LAYERS, f32), needs_s=10, default=setting.dry),
    )
    beside = (
        Row("tests", _tests, needs_s=1, limit_s=240),
        Row("memcheck", _memcheck, needs_s=1, limit_s=240),
    )
    return [
        Group("kernels", sizes, _starting),
        *checks_engine.groups(setting),
        Group("beside", beside, _starting),
        # Timed, so alone.
        *checks_steps.groups(setting),
    ]


class Beside:
    """Processes that run while other rows do; one each, whatever asks for them."""

    def __init__(self, setting: Setting) -> None:
        self.setting = setting
        self._folder = Path(tempfile.mkdtemp(prefix="millrace-gpu-"))
        atexit.register(shutil.rmtree, self._folder, ignore_errors=True)
        self.report = self._folder / "report.xml"
        self._running = {"tests": self._start("tests", self._pytest())}
        if (checker := _checker(setting)) is not None:
            self._running["memcheck"] = self._start("memcheck", checker)

    def _start(self, name: str, command: list[str]) -> subprocess.Popen[bytes]:
        with (self._folder / name).open("wb") as output:
            return subprocess.Popen(
                command, cwd=ROOT, stdout=output, stderr=output,
                env={**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
                if name == "memcheck" else None,
            )  # fmt: skip

    def result(self, name: str) -> tuple[int, str]:
        """Wait for one: its exit status and what it printed."""
        if name not in self._running:
            raise Absent("compute-sanitizer is not on the PATH")
        status = self._running[name].wait()
        text = (self._folder / name).read_text(encoding="utf-8", errors="replace")
        print(text[-6000:], flush=True)
        return status, text

    def _pytest(self) -> list[str]:
        """The kernels' own tests; planted bugs and compiling ahead of time need no device."""
        settings = self._folder / "pytest.ini"
        # Not the project's, which name plugins that a bare machine need not have.
        settings.write_text(
            "[pytest]\naddopts = --import-mode=importlib -p no:cacheprovider\n"
            f"pythonpath = {ROOT}\n"
        )
        command = [
            sys.executable, "-m", "pytest", "-c", str(settings), f"--rootdir={ROOT}", "-q",
            "--tb=short", f"--junitxml={self.report}",
            "-k", "not planted and not bug and not compile",
        ]  # fmt: skip
        if self.setting.dry:
            return [*command, f"{ROOT / 'tests/kernels/gpu/test_gpu_rows.py'}::test_wide_rows"]
        if importlib.util.find_spec("xdist"):
            command += ["-n", str(min(10, os.cpu_count() or 1))]
        return [*command, str(ROOT / "tests/kernels/gpu")]


def _checker(setting: Setting) -> list[str] | None:
    """compute-sanitizer over small comparisons of every op; None: it is not there.

    Each tensor gets memory of its own, or else accesses beyond it would land in torch's pool.
    """
    command = [sys.executable, "-m", "tests.gpu.comparisons"]
    if setting.dry:
        return [*command, "--dry"]
    tool = shutil.which("compute-sanitizer")
    return None if tool is None else [tool, "--tool=memcheck", "--error-exitcode=9", *command]


_beside = cache(Beside)


@contextlib.contextmanager
def _starting(setting: Setting) -> Iterator[Setting]:
    """See that what runs beside is under way."""
    _beside(setting)
    yield setting


def _compare(
    wanted: tuple[tuple[str, dict[str, object]], ...], dtype: torch.dtype, setting: Setting
) -> Figures:
    done = compare_all(setting, SMALL[:5] if setting.dry else wanted, dtype)
    return {"shown": f"{sum(done.values())} comparisons of {len(done)} ops with the oracle hold"}


def _tests(setting: Setting) -> Figures:
    beside = _beside(setting)
    status, _ = beside.result("tests")
    counts = _counts(beside.report)
    shown = ", ".join(f"{count} {what}" for what, count in counts.items())
    assert status == 0, f"pytest ended with {status}: {shown}"
    assert counts["passed"] >= (1 if setting.dry else LEAST_TESTS), f"only {shown}"
    return {"shown": shown}


def _memcheck(setting: Setting) -> Figures:
    status, text = _beside(setting).result("memcheck")
    if not setting.dry and "Device not supported" in text:
        raise Absent("compute-sanitizer does not support this device")
    assert status == 0, f"exit status {status}: {text[-150:]}"
    if setting.dry:
        return {"shown": "a dry run has no checker"}
    assert "ERROR SUMMARY: 0 errors" in text, text[-200:]
    return {"shown": f"no errors in {len(SMALL)} comparisons of two types"}


def _counts(report: Path) -> Counter[str]:
    counts: Counter[str] = Counter()
    with contextlib.suppress(FileNotFoundError):
        for case in ET.parse(report).iter("testcase"):
            kinds = {child.tag for child in case} & {"failure", "error", "skipped"}
            counts[kinds.pop() if kinds else "passed"] += 1
    return counts
