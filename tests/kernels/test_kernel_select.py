"""Choosing a backend, building it, doing without a compiler; arguments that are refused."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import kernels
from kernels import BackendUnavailable, KernelError, Ops, cpu, select
from kernels.cpu import build
from kernels.cpu.fallback import TorchOps
from kernels.cpu.native import NativeOps
from kernels.reference import ReferenceOps
from tests.kernels import comparisons as compare
from tests.kernels.comparisons import BF16, EPS, Ragged, draws, poison, ragged_batch, randn

ROOT = Path(kernels.__file__).resolve().parents[1]


@pytest.fixture
def fresh_load() -> Iterator[None]:
    """``cpu.load`` starts over in the test, and after it."""
    cpu._native.cache_clear()
    yield
    cpu._native.cache_clear()


def test_select(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MILLRACE_KERNELS", raising=False)
    assert select("cpu").name in ("cpu-native", "cpu-torch")
    assert select(torch.device("cpu")).name == select("cpu").name
    monkeypatch.setenv("MILLRACE_KERNELS", "reference")
    assert isinstance(select("cpu"), ReferenceOps)
    monkeypatch.setenv("MILLRACE_KERNELS", "torch")
    assert type(select("cpu")) is TorchOps
    monkeypatch.setenv("MILLRACE_KERNELS", "fast")
    with pytest.raises(BackendUnavailable, match="auto, reference, torch or triton, got 'fast'"):
        select("cpu")
    monkeypatch.setenv("MILLRACE_KERNELS", "auto")
    with pytest.raises(BackendUnavailable, match="'cuda'"):
        select("cuda:0")


def test_names_of_ops_are_those_of_the_protocol() -> None:
    wanted = {name for name in vars(Ops) if not name.startswith("_")}
    for ops in (ReferenceOps(), TorchOps(), cpu.load()):
        assert wanted <= set(dir(ops))


def test_no_compiler_falls_back_and_says_so_once(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    fresh_load: None,
) -> None:
    monkeypatch.setenv("MILLRACE_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv("MILLRACE_CXX", "no-such-compiler")
    with caplog.at_level(logging.WARNING, logger="kernels.cpu"):
        ops = [cpu.load(), cpu.load()]
    assert [type(one) for one in ops] == [TorchOps, TorchOps]
    assert not ops[0].batch_invariant
    assert len(caplog.records) == 1
    assert "no-such-compiler" in caplog.text
    compare.linear(ops[0], tokens=3, width=10, features=4)


def test_failing_compiler_falls_back(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    fresh_load: None,
) -> None:
    broken = tmp_path / "broken-c++"
    broken.write_text("#!/bin/sh\n[ $1 = --version ] && exit 0\necho 'out of ideas' >&2; exit 1\n")
    broken.chmod(0o755)
    monkeypatch.setenv("MILLRACE_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv("MILLRACE_CXX", str(broken))
    assert type(cpu.load()) is TorchOps
    assert "out of ideas" in caplog.text
    assert not list((tmp_path / "kernels").glob("*.so"))


def test_march(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MILLRACE_KERNELS_MARCH", "pentium")
    with pytest.raises(build.BuildError, match="native, x86-64-v3, x86-64-v4; got 'pentium'"):
        build.library()
    monkeypatch.setenv("MILLRACE_KERNELS_MARCH", "x86-64-v4")
    monkeypatch.setattr(build, "cpu_features", lambda: frozenset(("avx2", "fma")))
    with pytest.raises(build.BuildError, match="avx512bw"):
        build.library()


def test_cache_that_others_can_write_is_not_used(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("MILLRACE_CACHE_DIR", str(tmp_path))
    (tmp_path / "kernels").mkdir(mode=0o777)
    (tmp_path / "kernels").chmod(0o777)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    chosen = build._private_dir()
    assert chosen != tmp_path / "kernels"
    assert chosen.stat().st_mode & 0o077 == 0


@pytest.mark.timeout(240)
def test_builders_race(tmp_path: Path) -> None:
    """Three processes that find no library end with one, whole, and all of them use it."""
    if not cpu.load().batch_invariant:
        pytest.skip("no C++ compiler")
    code = (
        "import torch; from kernels import select; ops = select('cpu'); assert ops.batch_invariant;"
        "w = ops.pack_linear(torch.eye(20)); o = torch.zeros(2, 20);"
        "ops.linear(o, torch.ones(2, 20), w); assert bool((o == 1).all()); print('right')"
    )
    environment = os.environ | {"MILLRACE_CACHE_DIR": str(tmp_path), "PYTHONPATH": str(ROOT)}
    environment.pop("MILLRACE_KERNELS", None)
    racers = [
        subprocess.Popen(
            [sys.executable, "-c", code], env=environment, stdout=subprocess.PIPE, text=True
        )
        for _ in range(3)
    ]
    assert [racer.communicate()[0] for racer in racers] == ["right\n"] * 3
    left = {path.name for path in (tmp_path / "kernels").iterdir()}
    assert len(left) == 2  # the library and its lock: no litter
    assert ".lock" in left


def test_number_of_threads() -> None:
    with pytest.raises(ValueError, match="at least 1, got 0"):
        cpu.set_num_threads(0)


def test_a_forked_child_computes() -> None:
    """Threads do not survive a fork; the ops must not wait for them."""
    if not cpu.load().batch_invariant:
        pytest.skip("no C++ compiler")
    code = (
        "import os, torch; from kernels import cpu; ops = cpu.load(); cpu.set_num_threads(2)\n"
        "w = ops.pack_linear(torch.ones(2000, 600)); o = torch.zeros(9, 2000)\n"
        "x = torch.ones(9, 600); ops.linear(o, x, w); o.zero_()\n"
        "pid = os.fork()\n"
        "ops.linear(o, x, w)\n"
        "assert bool((o == 600).all())\n"
        "if pid == 0: cpu.set_num_threads(2); ops.linear(o, x, w); os._exit(0)\n"
        "assert os.waitpid(pid, 0)[1] == 0; print('right')"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], env=environment, capture_output=True,
        text=True, timeout=50,
    )  # fmt: skip
    assert done.stdout == "right\n", done.stderr


BACKENDS: list[Callable[[], Ops]] = [ReferenceOps, TorchOps, cpu.load]


@pytest.fixture(params=BACKENDS, ids=["reference", "torch", "native"])
def ops(request: pytest.FixtureRequest) -> Ops:
    made: Ops = request.param()
    return made


def test_bad_shapes_and_dtypes(ops: Ops) -> None:
    x, out, weight = randn(3, 8), poison(3, 8), randn(8)
    ids = torch.tensor([0, 1, 2])
    cases: list[tuple[str, Callable[[], Any]]] = [
        ("embed: ids", lambda: ops.embed(out, ids.int(), x)),
        ("embed: table", lambda: ops.embed(out, ids, randn(5, 7))),
        ("rms_norm: x must be float32", lambda: ops.rms_norm(out, x.double(), weight, EPS)),
        ("rms_norm: out", lambda: ops.rms_norm(poison(3, 9), x, weight, EPS)),
        ("rms_norm: out", lambda: ops.rms_norm(out.to(BF16), x, weight, EPS)),
        ("rms_norm: weight", lambda: ops.rms_norm(out, x, randn(9), EPS)),
        ("rms_norm: x must be .*strides", lambda: ops.rms_norm(out, randn(8, 3).T, weight, EPS)),
        ("rms_norm: x must be .T,H.", lambda: ops.rms_norm(out, weight, weight, EPS)),
        ("add_rms_norm: residual", lambda: ops.add_rms_norm(out, randn(2, 8), x, weight, EPS)),
        ("swiglu: gate_up", lambda: ops.swiglu(out, x)),
        ("pack_linear: weight", lambda: ops.pack_linear(randn(4, 6).T)),
        ("pack_linear: weight must not be empty", lambda: ops.pack_linear(torch.zeros(0, 6))),
        ("linear: x", lambda: ops.linear(out, x, ops.pack_linear(randn(8, 9)))),
        ("linear: out", lambda: ops.linear(out, x, ops.pack_linear(randn(9, 8)))),
        ("linear: out", lambda: ops.linear(out.to(BF16), x, ops.pack_linear(randn(8, 8)))),
        ("linear: packed", lambda: ops.linear(out, x, object())),  # type: ignore[arg-type]
        ("gather_rows: rows", lambda: ops.gather_rows(out, x, ids.float())),
        ("add_bias: logits", lambda: ops.add_bias(x.to(BF16), ids, ids, weight[:3])),
        ("add_bias: bias_values", lambda: ops.add_bias(x, ids, ids, weight)),
        ("apply_token_mask: mask", lambda: ops.apply_token_mask(x, ids[:, None].contiguous())),
        ("apply_token_mask: mask", lambda: ops.apply_token_mask(x, ids.int()[:2, None])),
        ("logprobs: k", lambda: ops.logprobs(x, ids, ids, x, ids, 9)),
        ("logprobs: k", lambda: ops.logprobs(x, ids, ids, x, ids, -1)),
    ]
    for message, call in cases:
        with pytest.raises(KernelError, match=message):
            call()
    assert torch.equal(out, poison(3, 8)), "a refused call writes nothing"


def test_bad_values(ops: Ops) -> None:
    x, out = randn(3, 8), poison(3, 8)
    three = torch.tensor([0, 1, 2])
    for bad in (torch.tensor([0, 3, 1]), torch.tensor([0, 1, -1])):
        with pytest.raises(KernelError, match=r"embed: ids must be in 0\.\.2"):
            ops.embed(out, bad, x)
        with pytest.raises(KernelError, match=r"gather_rows: rows must be in 0\.\.2"):
            ops.gather_rows(out, x, bad)
        with pytest.raises(KernelError, match=r"logprobs: chosen must be in 0\.\.2"):
            ops.logprobs(poison(3, 1), three[:, None].clone(), three, x[:, :3].contiguous(), bad, 0)
    assert torch.equal(out, poison(3, 8))
    for rows, ids in ((three, three + 6), (three - 1, three), (three, three - 1)):
        with pytest.raises(KernelError, match="add_bias: bias_"):
            ops.add_bias(x, rows, ids, torch.zeros(3))


def attention_case(**changes: torch.Tensor) -> Ragged:
    made = ragged_batch(new=[2, 1], context=[5, 9], q_heads=2, kv_heads=1, head_dim=8, block=4)
    return Ragged(**{**vars(made), **changes})


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("query_starts", [0, 2, 4]),
        ("query_starts", [1, 2, 3]),
        ("query_starts", [0, 3, 2]),
        ("context_lens", [1, 9]),
        ("context_lens", [5, 17]),
        ("context_lens", [-1, 9]),
    ],
)
def test_bad_ragged_batches(ops: Ops, name: str, values: list[int]) -> None:
    batch = attention_case(**{name: torch.tensor(values, dtype=torch.int32)})
    with pytest.raises(KernelError, match=f"paged_attention: {name}"):
        batch.run(ops)


@pytest.mark.parametrize("beyond", [None, 0, 2**20])
def test_bad_block_tables(ops: Ops, beyond: int | None) -> None:
    batch = attention_case()
    batch.block_tables[1, 2] = -1 if beyond is None else batch.k_cache.shape[0] + beyond
    with pytest.raises(KernelError, match="paged_attention: block_tables"):
        batch.run(ops)


@pytest.mark.parametrize("name", ["positions", "slots"])
def test_bad_positions_and_slots(ops: Ops, name: str) -> None:
    for bad in (-1, 8):
        values = {"positions": torch.tensor([1, 2]), "slots": torch.tensor([3, 4])}
        values[name][1] = bad
        cache = torch.zeros(2, 1, 4, 8)
        with pytest.raises(KernelError, match=f"qk_norm_rope_write: {name}"):
            ops.qk_norm_rope_write(
                poison(2, 2, 8), randn(2, 32), randn(8), randn(8), compare.rotary_table(8, 8),
                values["positions"], values["slots"], cache, cache.clone(), EPS,
            )  # fmt: skip
        assert not bool(cache.any())


def test_other_backends_weights_are_refused() -> None:
    theirs = ReferenceOps().pack_linear(randn(8, 8))
    for ops in (TorchOps(), cpu.load()):
        with pytest.raises(KernelError, match="another backend"):
            ops.linear(poison(3, 8), randn(3, 8), theirs)


def test_packed_sizes() -> None:
    weight = randn(33, 20, dtype=BF16)
    assert ReferenceOps().pack_linear(weight).nbytes == 33 * 20 * 2
    packed = cpu.load().pack_linear(weight)
    if isinstance(cpu.load(), NativeOps):
        assert packed.nbytes == 48 * 20 * 2  # to whole panels of 16, still 16 bits each


def test_empty_batches(ops: Ops) -> None:
    assert draws(randn(0, 10)).run(ops).tolist() == []
    compare.logprobs(ops, rows=0, vocab=10, k=3)
    compare.apply_penalties(ops, rows=2, vocab=10, count=0)
    compare.add_bias(ops, rows=2, vocab=10, count=0)
