"""Logits on the GPU: edits, draws and log-probabilities; and bugs that the comparisons must find.

Thresholds are compared by themselves as well: a draw seldom shows where exactly one lies.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from kernels import ANY_DRAW, GREEDY, Draws, KernelError, Ops, gpu
from kernels.gpu import logits as logit_ops
from kernels.gpu import sampling
from kernels.noise import row_keys, token_hash
from kernels.reference import keep_mask
from tests.kernels import comparisons as compare
from tests.kernels.comparisons import draws, randn
from tests.kernels.gpu.launches import counted_launches
from tests.kernels.gpu.on_device import on_device
from tests.kernels.gpu.planted import planted


@pytest.mark.parametrize(("rows", "vocab", "count"), [(1, 1, 1), (3, 50, 0), (4, 100, 301)])
def test_logit_edits(ops: Ops, rows: int, vocab: int, count: int) -> None:
    compare.apply_penalties(ops, rows=rows, vocab=vocab, count=count)
    compare.add_bias(ops, rows=rows, vocab=vocab, count=count)
    compare.apply_token_mask(ops, rows=rows, vocab=vocab)


def test_a_mask_of_several_chunks(ops: Ops) -> None:
    compare.apply_token_mask(ops, rows=2, vocab=9001)


@pytest.mark.parametrize(
    ("rows", "vocab", "k"),
    [(0, 9, 2), (1, 1, 0), (1, 1, 1), (3, 50, 5), (2, 1000, 0), (2, 2500, 20), (2, 64, 64)],
)
def test_logprobs(ops: Ops, rows: int, vocab: int, k: int) -> None:
    compare.logprobs(ops, rows=rows, vocab=vocab, k=k)


def test_logprobs_of_one_possible_token(ops: Ops) -> None:
    logits = torch.full((1, 1500), float("-inf"))
    logits[0, 1200] = 3.0
    out = torch.zeros(1, 4), torch.zeros(1, 4, dtype=torch.int64), torch.zeros(1, dtype=torch.int64)
    ops.logprobs(*out, logits, torch.tensor([7]), 3)
    inf = float("inf")
    assert out[0].tolist() == [[-inf, 0.0, -inf, -inf]]
    assert out[1].tolist() == [[7, 1200, 0, 1]]
    assert out[2].tolist() == [2]


@pytest.mark.parametrize(("rows", "vocab"), [(1, 1), (8, 2), (20, 60), (4, 1100), (1, 4200)])
def test_sample(ops: Ops, rows: int, vocab: int) -> None:
    compare.sample(ops, rows=rows, vocab=vocab)


def kept(
    logits: torch.Tensor, settings: list[tuple[float, int, float]], device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """What the kernels keep of each row, and what the oracle keeps."""
    temperature, top_k, top_p = (torch.tensor(column) for column in zip(*settings, strict=True))
    moved = [x.to(device) for x in (logits, temperature, top_k.int(), top_p)]
    limits = on_device(sampling, device).truncate(*moved).limits.cpu()  # type: ignore[attr-defined]
    bits = torch.where(logits == 0, 0.0, logits).view(torch.int32).long()
    falling = torch.where(bits >= 0, 0x7FFFFFFF - bits, bits & 0xFFFFFFFF)
    best = logits.max(1, keepdim=True).values
    z = ((logits.double() - best.double()) / temperature.double()[:, None]).clamp(max=0)
    want = keep_mask(z, top_k, top_p.double(), torch.zeros(len(logits), dtype=torch.float64))
    return (falling <= limits[:, None]) | (logits == best), want


SETTINGS = [
    (temperature, top_k, top_p)
    for temperature in (1.0, 0.3)
    for top_k in (0, 1, 7, 500)
    for top_p in (1.0, 0.93, 0.4, 1e-6, 0.0)
]


@pytest.mark.parametrize(("vocab", "settings"), [(40, SETTINGS[::2]), (1300, SETTINGS[7::6])])
def test_thresholds(
    device: torch.device, vocab: int, settings: list[tuple[float, int, float]]
) -> None:
    """Rows of random logits, half of them in ties."""
    logits = randn(len(settings), vocab) * 2
    logits[:, vocab // 2 :] = (logits[:, vocab // 2 :] * 4).round() / 4
    got, want = kept(logits, settings, device)
    assert torch.equal(got, want)


def test_thresholds_among_neighbours(device: torch.device) -> None:
    """Logits one float apart, and both zeros: top-k parts them, and keeps what is equal."""
    steps = torch.arange(-3, 4, dtype=torch.int32)
    near_one = (steps + torch.tensor(1.0).view(torch.int32)).view(torch.float32)
    numbers = torch.cat((near_one, -near_one, torch.tensor([-0.0, 0.0, -3.4e38, float("-inf")])))
    tiny = steps.float() * 1e-45 + torch.tensor([0, 0, -0.0, 0.0, 0, 1e-38, 0])
    rows = torch.full((8, 18), float("-inf"))
    rows[:5] = numbers.flip(0)
    rows[5:, 4:11] = tiny
    ranks = [1, 2, 8, 9, 16, 2, 4, 5]
    got, want = kept(rows, [(1.0, k, 1.0) for k in ranks], device)
    assert torch.equal(got, want)
    assert got.sum(1).tolist() == [1, 2, 9, 9, 16, 2, 4, 5]


def assert_zeros_tie(ops: Ops) -> None:
    for logits in (torch.tensor([1, 0.0, -0.0]), torch.tensor([1, -0.0, 0.0])):
        drawn = draws(logits.repeat(12, 1), temperature=50.0, top_k=2).run(ops)
        assert set(drawn.tolist()) == {0, 1, 2}


def test_both_zeros_are_one_number(
    ops: Ops, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    assert_zeros_tie(ops)
    wrong = planted(sampling, "tl.where(x == 0.0, 0.0, x)", "x", tmp_path)
    monkeypatch.setattr(gpu, "sampling", wrong)
    with pytest.raises(AssertionError):
        assert_zeros_tie(ops)


def test_rows_without_numbers(ops: Ops) -> None:
    nan, inf = float("nan"), float("inf")
    logits = torch.tensor([[-inf] * 4, [nan] * 4, [nan, -inf, nan, 2], [1, 2, nan, 2]])
    for settings in ({}, {"top_k": 3}, {"top_p": 0.5}, {"min_p": 0.5}, {"temperature": 0.0}):
        assert draws(logits, **settings).run(ops).tolist()[:3] == [0, 0, 3]
    assert draws(logits[3:], temperature=0.0).run(ops).tolist() == [1]
    assert draws(torch.tensor([[0.0, inf, 1, inf]]), seed=3).run(ops).item() in (1, 3)
    assert draws(randn(0, 10)).run(ops).tolist() == []


ASKED: list[tuple[dict[str, float], Draws, dict[str, int]]] = [
    ({"temperature": 0.0}, GREEDY, {"_largest": 1, "_pick": 1}),
    ({}, Draws(top_k=False, top_p=False), {"_largest": 1, "_draw": 1, "_pick": 1}),
    ({"min_p": 0.1}, Draws(top_k=False, top_p=False), {"_largest": 1, "_draw": 1, "_pick": 1}),
    ({"top_k": 5}, Draws(top_p=False), {"_narrow": 8, "_settle": 1, "_draw": 1}),
    ({"top_p": 0.7}, Draws(top_k=False), {"_narrow": 8, "_settle": 1, "_draw": 1}),
    ({"top_p": 0.7, "top_k": 9}, ANY_DRAW, {"_narrow": 16, "_settle": 2, "_draw": 1}),
]


@pytest.mark.parametrize(("settings", "promise", "launched"), ASKED)
def test_what_no_row_asks_for_is_not_launched_nor_missed(
    ops: Ops, settings: dict[str, Any], promise: Draws, launched: dict[str, int]
) -> None:
    """Ties, NaN and rows without numbers among the logits, over several chunks."""
    logits = randn(6, 2100)
    logits[1] = (logits[1] * 2).round()
    logits[2, ::3], logits[2, 1::3] = float("nan"), float("-inf")
    logits[3], logits[4] = float("nan"), float("-inf")
    draw = draws(logits, **settings, seed=5)
    with counted_launches() as counts:
        got = draw.run(ops, promise)
    assert torch.equal(got, draw.run(ops))
    assert torch.equal(got, draw.run(compare.ORACLE, promise))
    assert {name: counts[name] for name in launched} == launched
    if promise is GREEDY:
        assert counts.total() == 2


def test_a_wrong_start_of_top_p_is_found(
    ops: Ops, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(
        gpu, "sampling", planted(sampling, "(rows,), 0xFFFFFFFF", "(rows,), 0x3FFFFFFF", tmp_path)
    )
    with pytest.raises(AssertionError):
        test_what_no_row_asks_for_is_not_launched_nor_missed(ops, *ASKED[4])


def test_a_broken_promise_is_seen_where_looking_is_free() -> None:
    for settings, promise, name in (
        ({}, GREEDY, "warm"), ({"top_k": 3}, Draws(top_k=False), "top_k"),
        ({"top_p": 0.5}, Draws(top_p=False), "top_p"),
    ):  # fmt: skip
        with pytest.raises(KernelError, match=rf"draws\.{name} is False, but .*True"):
            draws(randn(2, 10), **settings).run(compare.ORACLE, promise)
    draws(randn(2, 10), temperature=0.0, top_k=3, top_p=0.5).run(compare.ORACLE, GREEDY)


def test_tiny_temperature_is_greedy(ops: Ops) -> None:
    logits = randn(5, 300)
    for temperature in (1e-6, 1e-30, 1e-44):
        assert torch.equal(draws(logits, temperature=temperature).run(ops), logits.argmax(1))


def test_a_draw_depends_on_seed_position_and_logits_only(ops: Ops) -> None:
    full = draws(randn(12, 1500), temperature=0.8, top_k=50, top_p=0.9, seed=77)
    want = full.run(ops)
    for index in (torch.tensor([11, 3]), torch.tensor([0])):
        part = compare.Draw(*(value[index].contiguous() for value in vars(full).values()))
        assert torch.equal(part.run(ops), want[index])


def test_hashes_are_those_of_kernels_noise(device: torch.device) -> None:
    for seed, position in [(0, 0), (1, 0), (2**63 - 1, 2**40), (-1, 17), (-(2**63), 3)]:
        arguments = torch.tensor([seed]), torch.tensor([position])
        for first in (0, 151_000, 2**31 - 256):
            want = token_hash(*row_keys(*arguments), torch.arange(first, first + 256))
            moved = [x.to(device) for x in arguments]
            got = sampling.token_hashes(moved[0], moved[1], first, 256).cpu()
            assert torch.equal(got, want)


BUGS: list[tuple[Any, str, str, str, dict[str, Any]]] = [
    (sampling, "(x >> 31)\n", "(x >> 33)\n", "sample", {}),
    (sampling, "(low + 0.5)", "(low + 0.5) * 3e4", "sample", {}),
    (sampling, "tl.div_rn(gap, tl.zeros_like(gap) + temperature)", "gap", "sample", {}),
    (sampling, "tl.load(min_p_ptr + row)", "0.0", "sample", {}),
    (sampling, "LIMITED:\n", "not LIMITED:\n", "sample", {"rows": 25}),
    (sampling, "!= 0) & (best", "> 9) & (best", "sample", {}),
    (logit_ops, "tl.where(count > 0, presence, 0.0)", "presence", "apply_penalties", {}),
    (logit_ops, "tl.where(logit > 0, tl.div_rn(logit, repetition), ", "(", "apply_penalties", {}),
    (logit_ops, "logit += tl.load(", "logit = tl.load(", "add_bias", {}),
    (logit_ops, "(row < num_rows)", "(row <= num_rows - 2)", "add_bias", {}),
    (logit_ops, "(ids % 32)", "(31 - ids % 32)", "apply_token_mask", {}),
    (logit_ops, "x > chosen_logit", "x >= chosen_logit", "logprobs", {}),
    (logit_ops, "(top - origin) - log_sum", "top - origin", "logprobs", {}),
    (logit_ops, "x == top, open_ids, vocab", "x == top, ids, vocab", "logprobs", {}),
    (logit_ops, "tl.exp(largest - origin)", "1.0", "logprobs", {"vocab": 2500}),
]  # fmt: skip
SHAPES: dict[str, dict[str, Any]] = {
    "sample": {"rows": 14, "vocab": 60},
    "logprobs": {"rows": 3, "vocab": 50, "k": 5},
    "apply_token_mask": {"rows": 3, "vocab": 70},
    "apply_penalties": {"rows": 3, "vocab": 20, "count": 30},
    "add_bias": {"rows": 3, "vocab": 20, "count": 30},
}


@pytest.mark.parametrize(("module", "old", "new", "comparison", "shape"), BUGS)
def test_planted_bugs(
    ops: Ops, monkeypatch: pytest.MonkeyPatch, tmp_path: Path,
    module: Any, old: str, new: str, comparison: str, shape: dict[str, Any],
) -> None:  # fmt: skip
    name = "sampling" if module is sampling else "logit_ops"
    monkeypatch.setattr(gpu, name, planted(module, old, new, tmp_path))
    with pytest.raises(AssertionError):
        getattr(compare, comparison)(ops, **{**SHAPES[comparison], **shape})


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("below < wanted", "below <= wanted"),
        ("0x7FFFFFFF - bits, bits)", "0x7FFFFFFF - bits, 0xFFFFFFFF - bits)"),
        ("there & (bits <= tl.load(limits_ptr + row))", "there"),
        ("(launch - 1) % 2", "launch % 2"),
    ],
)
def test_planted_bugs_of_thresholds(
    device: torch.device, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, old: str, new: str
) -> None:
    wrong = planted(sampling, old, new, tmp_path)
    monkeypatch.setattr(sampling, "truncate", wrong.truncate)
    with pytest.raises(AssertionError):
        test_thresholds(device, 40, SETTINGS[1::9] + SETTINGS[11:13])
        test_thresholds_among_neighbours(device)
