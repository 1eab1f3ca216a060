"""``python -m kernels.gpu.tuning [op ...]``: measure candidates on this GPU, write its data file.

For each op and size all candidates are run on the same tensors, each for some dozens of times with
a cold L2 cache, and the one with the smallest median becomes the rule up to that size. Ops that are
not named keep their rules. The file is ``kernels/gpu/configs/sm_XY.toml`` unless ``--out`` says
otherwise.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from kernels import gpu
from kernels.fp8 import E4M3
from kernels.gpu.tuning import Capability, Config, Rule, capability_of, rules_of, trying

__all__ = ["CASES", "main", "render"]

_ROWS = 64  # rows of a decoding step
_EPS = 1e-6
_BF16 = torch.bfloat16
_Call = Callable[[], None]


@dataclass(frozen=True)
class Case:
    """What is measured for one op.

    Attributes:
        letter: the size by which its rules are told apart.
        sizes: one rule each; the largest one's has no bound.
        constants: candidates for each constant.
        num_warps: candidates.
        make: the call to measure, for a size and a device.
    """

    letter: str
    sizes: tuple[int, ...]
    constants: dict[str, tuple[int, ...]]
    num_warps: tuple[int, ...]
    make: Callable[[int, torch.device], _Call]

    def candidates(self, device_name: str) -> Iterator[Config]:
        """Every combination."""
        for values in itertools.product(*self.constants.values(), self.num_warps):
            constants = dict(zip(self.constants, values[:-1], strict=True))
            yield Config(constants, values[-1], 1, (device_name,))


def _norm(width: int, device: torch.device) -> _Call:
    x, residual, out = (torch.randn(_ROWS, width, device=device).to(_BF16) for _ in range(3))
    weight = torch.ones(width, device=device, dtype=_BF16)
    return lambda: gpu.rows.add_rms_norm(out, residual, x, weight, _EPS)


def _take(width: int, device: torch.device) -> _Call:
    table = torch.randn(20_000, width, device=device).to(_BF16)
    out = torch.empty(_ROWS, width, device=device, dtype=_BF16)
    ids = torch.randint(0, 20_000, (_ROWS,), device=device)
    return lambda: gpu.rows.take_rows(out, table, ids)


def _swiglu(width: int, device: torch.device) -> _Call:
    gate_up = torch.randn(_ROWS, 2 * width, device=device).to(_BF16)
    out = torch.empty(_ROWS, width, device=device, dtype=_BF16)
    return lambda: gpu.gated.swiglu(out, gate_up)


def _swiglu_fp8(width: int, device: torch.device) -> _Call:
    gate_up = torch.randn(_ROWS, 2 * width, device=device).to(_BF16)
    out = torch.empty(_ROWS, width, device=device, dtype=E4M3)
    scales = torch.empty(_ROWS, device=device)
    return lambda: gpu.gated.swiglu(out, gate_up, scales)


def _rotary(head_dim: int, device: torch.device) -> _Call:
    qkv = torch.randn(_ROWS, 48 * head_dim, device=device).to(_BF16)  # 32 + 8 + 8 heads
    q_out = torch.empty(_ROWS, 32, head_dim, device=device, dtype=_BF16)
    weight = torch.ones(head_dim, device=device, dtype=_BF16)
    cos_sin = torch.randn(4096, head_dim, device=device)
    caches = [torch.zeros(256, 8, 16, head_dim, device=device, dtype=_BF16) for _ in range(2)]
    positions = torch.randint(0, 4096, (_ROWS,), device=device)
    slots = torch.randperm(4096, device=device)[:_ROWS]
    return lambda: gpu.rotary.qk_norm_rope_write(
        q_out, qkv, weight, weight, cos_sin, positions, slots, caches[0], caches[1], _EPS
    )


def _sample(vocab: int, device: torch.device) -> _Call:
    logits = torch.randn(_ROWS, vocab, device=device) * 3
    out, positions = (torch.arange(_ROWS, device=device) for _ in range(2))
    one = torch.ones(_ROWS, device=device)
    top_k = torch.full((_ROWS,), 50, dtype=torch.int32, device=device)
    return lambda: gpu.sampling.sample(
        out, logits, one, top_k, 0.9 * one, 0 * one, positions, positions
    )


def _logprobs(vocab: int, device: torch.device) -> _Call:
    logits = torch.randn(_ROWS, vocab, device=device) * 3
    chosen, ranks = (torch.arange(_ROWS, device=device) for _ in range(2))
    values = torch.empty(_ROWS, 21, device=device)
    ids = torch.empty(_ROWS, 21, device=device, dtype=torch.int64)
    return lambda: gpu.logit_ops.logprobs(values, ids, ranks, logits, chosen, 20)


_WIDTHS = (512, 1024, 2048, 4096, 8192, 16384)
_VOCABS = (4096, 32_768, 151_936)
CASES: dict[str, Case] = {
    "rms_norm": Case("H", _WIDTHS, {"ROWS": (1, 2, 4, 8)}, (1, 2, 4, 8, 16), _norm),
    "take_rows": Case(
        "H", _WIDTHS, {"ROWS": (1, 2, 4), "COLS": (256, 1024, 2048, 4096)}, (1, 2, 4, 8), _take
    ),
    "swiglu": Case(
        "I", _WIDTHS, {"ROWS": (1, 2, 4), "COLS": (256, 512, 1024, 2048)}, (2, 4, 8), _swiglu
    ),
    "swiglu_fp8": Case("I", _WIDTHS, {"ROWS": (1, 2)}, (4, 8, 16), _swiglu_fp8),
    "qk_norm_rope_write": Case("D", (64, 128, 256), {"HEADS": (1, 4, 8, 16)}, (1, 2, 4), _rotary),
    "sample": Case(
        "V", _VOCABS, {"CHUNK": (1024, 2048, 4096, 8192), "BITS": (2, 4), "GROUP": (1, 2, 4)},
        (4, 8), _sample,
    ),
    "logprobs": Case("V", _VOCABS, {"CHUNK": (1024, 2048, 4096, 8192)}, (2, 4, 8), _logprobs),
}  # fmt: skip


def _measured(op: str, device: torch.device) -> tuple[Rule, ...]:
    from triton.testing import do_bench

    case, name, rules = CASES[op], torch.cuda.get_device_name(device), []
    for size in case.sizes:
        call, times = case.make(size, device), []
        for candidate in case.candidates(name):
            with trying(op, candidate):
                times.append((float(do_bench(call, return_mode="median")), candidate))
        best_ms, best = min(times, key=lambda pair: pair[0])
        worst_ms = max(times, key=lambda pair: pair[0])[0]
        print(f"{op} {case.letter}={size}: {1e3 * best_ms:.1f} us (worst {1e3 * worst_ms:.1f})")
        rules.append(Rule({} if size == case.sizes[-1] else {case.letter: size}, best))
    return tuple(rules)


def render(capability: Capability, tables: dict[str, tuple[Rule, ...]]) -> str:
    """The text of a data file."""
    lines = [
        f"# sm_{capability[0]}{capability[1]}. A rule without devices in measured_on is untuned: a "
        "considered guess.",
        "# See kernels/gpu/tuning for the form.",
    ]
    for op, rules in tables.items():
        for rule in rules:
            lines += ["", f"[[{op}]]"]
            lines += [f"max_{letter} = {most}" for letter, most in rule.bounds.items()]
            lines += [f"{name} = {value}" for name, value in rule.config.launch.items()]
            devices = ", ".join(f'"{device}"' for device in rule.config.measured_on)
            lines.append(f"measured_on = [{devices}]")
    return "\n".join(lines) + "\n"


def main(arguments: list[str]) -> None:
    """Measure, and write."""
    parser = argparse.ArgumentParser(prog="python -m kernels.gpu.tuning", description=__doc__)
    parser.add_argument("ops", nargs="*", metavar="op", help=", ".join(CASES))
    parser.add_argument("--out", type=Path, help="the file to write")
    given = parser.parse_args(arguments)
    unknown = sorted(set(given.ops) - set(CASES))
    if unknown:
        parser.error(f"unknown ops: {', '.join(unknown)}")
    if not torch.cuda.is_available():
        parser.error("torch finds no GPU, and only on one there is something to measure")
    device = torch.device("cuda", torch.cuda.current_device())
    capability = capability_of(device)
    tables = dict(rules_of(capability))
    for op in given.ops or CASES:
        tables[op] = _measured(op, device)
    name = f"sm_{capability[0]}{capability[1]}.toml"
    out = given.out or Path(gpu.__file__).parent / "configs" / name
    out.write_text(render(capability, tables), encoding="utf-8")
    print(f"written to {out}")


if __name__ == "__main__":
    main(sys.argv[1:])
