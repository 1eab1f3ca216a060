"""Sampling: the distribution is right, the filters mean what they say, draws can be repeated."""

from __future__ import annotations

import math

import pytest
import torch

from kernels import Ops, cpu
from kernels.cpu.fallback import TorchOps
from kernels.cpu.native import NativeOps
from kernels.noise import row_keys, token_hash
from kernels.reference import ReferenceOps
from tests.kernels.comparisons import Draw, draws, randn

BACKENDS: dict[str, Ops] = {"reference": ReferenceOps(), "torch": TorchOps()}


@pytest.fixture(params=["reference", "native"], scope="module")
def ops(request: pytest.FixtureRequest) -> Ops:
    return BACKENDS.get(request.param) or cpu.load()


def chi_square(counts: torch.Tensor, probs: torch.Tensor) -> float:
    """Pearson's statistic in standard deviations above its mean; impossible tokens must be 0."""
    assert int(counts[probs == 0].sum()) == 0
    counts, probs = counts[probs > 0].double(), probs[probs > 0].double()
    expected = probs * counts.sum()
    assert float(expected.min()) >= 5, "too few draws for the statistic"
    freedom = max(len(probs) - 1, 1)
    statistic = float(((counts - expected) ** 2 / expected).sum())
    return (statistic - freedom) / math.sqrt(2 * freedom)


def histogram(ops: Ops, logits: torch.Tensor, **settings: float) -> torch.Tensor:
    """How often each token is drawn for four seeds and thousands of positions."""
    rows = 2_500 if ops.name == "reference" else 20_000
    total = torch.zeros(logits.numel(), dtype=torch.int64)
    for seed in (0, 1, 12345, 2**62):
        drawn = draws(logits.expand(rows, -1).contiguous(), seed=seed, **settings).run(ops)  # type: ignore[arg-type]
        total += torch.bincount(drawn, minlength=logits.numel())
    return total


@pytest.mark.parametrize("temperature", [0.5, 1.0, 1.7])
@pytest.mark.parametrize("vocab", [2, 37, 500])
def test_distribution(ops: Ops, vocab: int, temperature: float) -> None:
    logits = randn(vocab)
    probs = torch.softmax(logits.double() / temperature, 0)
    counts = histogram(ops, logits, temperature=temperature)
    likely = probs * counts.sum() >= 5
    pooled = torch.cat((counts[likely], counts[~likely].sum()[None]))
    pooled_probs = torch.cat((probs[likely], probs[~likely].sum()[None]))
    if float(pooled_probs[-1] * counts.sum()) < 5:
        pooled, pooled_probs = counts[likely], probs[likely] / probs[likely].sum()
    assert abs(chi_square(pooled, pooled_probs)) < 5


def test_rare_tokens_are_drawn_as_often_as_they_should_be(ops: Ops) -> None:
    """One token of probability 1 - 2^-9, and 512 that share the rest: the noise has fine tails."""
    logits = torch.full((513,), 0.0)
    logits[100] = math.log(512 * 511)
    counts = histogram(ops, logits)
    rare = int(counts.sum()) - int(counts[100])
    expected = int(counts.sum()) / 512
    assert abs(rare - expected) < 5 * math.sqrt(expected)


@pytest.mark.parametrize(
    ("settings", "kept"),
    [
        ({"top_k": 2}, [0, 1]),
        ({"top_k": 3}, [0, 1, 2, 3]),  # 2 and 3 tie for third place
        ({"top_k": 99}, [0, 1, 2, 3, 4]),
        ({"top_p": 0.39}, [0]),
        ({"top_p": 0.41}, [0, 1]),
        ({"top_p": 0.71}, [0, 1, 2, 3]),
        ({"top_p": 0.96}, [0, 1, 2, 3, 4]),
        ({"top_p": 0.0}, [0]),
        ({"min_p": 0.2}, [0, 1, 2, 3]),
        ({"min_p": 0.5}, [0, 1]),
        ({"min_p": 1.0}, [0]),
        ({"top_k": 2, "top_p": 0.56}, [0]),  # 0.4/0.7 = 0.571: renormalised after top-k
        ({"top_k": 2, "top_p": 0.58}, [0, 1]),
        ({"top_p": 0.96, "min_p": 0.31}, [0, 1]),
    ],
)
def test_filters(ops: Ops, settings: dict[str, float], kept: list[int]) -> None:
    # A hair less than 0.4 for the first, so that exact quotients are on the side they look to be.
    probs = torch.tensor([0.3999, 0.3001, 0.12, 0.12, 0.06])
    counts = histogram(ops, probs.log(), **settings)
    wanted = torch.zeros(5)
    wanted[kept] = probs[kept]
    if len(kept) == 1:
        assert int(counts[kept[0]]) == int(counts.sum())
    else:
        assert abs(chi_square(counts, wanted / wanted.sum())) < 5


@pytest.mark.parametrize(
    ("settings", "kept"),
    [({"top_k": 3}, 3), ({"top_p": 0.5}, 5), ({"top_p": 0.19}, 2), ({"top_k": 6, "top_p": 0.5}, 3)],
)
def test_filters_among_nearly_equal_tokens(ops: Ops, settings: dict[str, float], kept: int) -> None:
    """Ten tokens of almost 0.1 each, in a row whose other tokens hardly count."""
    logits = torch.full((60,), -30.0)
    logits[20:30] = -1e-3 * torch.arange(10)
    counts = histogram(ops, logits, **settings)
    assert counts.nonzero().flatten().tolist() == list(range(20, 20 + kept))


def test_greedy(ops: Ops) -> None:
    nan, inf = float("nan"), float("inf")
    logits = torch.tensor(
        [
            [1.0, 3, 3, 2],
            [-inf, -inf, -5, -6],
            [-inf] * 4,
            [nan, 1, nan, 1],
            [nan] * 4,
            [0, inf, 1, inf],
        ]
    )
    assert draws(logits, temperature=0.0).run(ops).tolist() == [1, 2, 0, 1, 0, 1]


def test_rows_without_numbers(ops: Ops) -> None:
    """Padded rows may hold anything; the id must still be one of the vocabulary."""
    nan, inf = float("nan"), float("inf")
    logits = torch.tensor([[-inf] * 9, [nan] * 9, [nan, -inf, nan, 2, nan, nan, nan, nan, nan]])
    for settings in ({}, {"top_k": 3}, {"top_p": 0.5}, {"min_p": 0.5}):
        assert draws(logits, **settings).run(ops).tolist() == [0, 0, 3]
    assert draws(torch.tensor([[0.0, inf, 1, inf]]), seed=3).run(ops).item() in (1, 3)


def test_forbidden_tokens_are_never_drawn(ops: Ops) -> None:
    logits = torch.full((2000, 50), float("-inf"))
    logits[:, 7], logits[:, 31] = 0.0, -1.0
    for settings in ({}, {"top_k": 10}, {"top_p": 0.999}, {"temperature": 50.0}):
        assert set(draws(logits, **settings).run(ops).tolist()) == {7, 31}


def test_tiny_temperature_is_greedy(ops: Ops) -> None:
    logits = randn(100, 300)
    for temperature in (1e-6, 1e-30, 1e-44):
        cold = draws(logits, temperature=temperature).run(ops)
        assert torch.equal(cold, logits.argmax(1))


def test_a_draw_depends_on_seed_position_and_logits_only(ops: Ops) -> None:
    logits = randn(64, 1000)
    full = Draw(
        logits, torch.linspace(0.1, 2, 64), torch.arange(64, dtype=torch.int32),
        torch.linspace(0.2, 1, 64), torch.linspace(0, 0.1, 64),
        torch.arange(64) * 7919, torch.arange(64) * 3 + 5,
    )  # fmt: skip
    want = full.run(ops)
    order = torch.randperm(64, generator=torch.Generator().manual_seed(0))
    for index in (order, order[:1], order[10:33]):
        part = Draw(*(value[index].contiguous() for value in vars(full).values()))
        assert torch.equal(part.run(ops), want[index])
    same = draws(logits[:1].expand(64, -1).contiguous())
    assert len(set(same.run(ops).tolist())) > 20, "positions must differ"


def test_neighbouring_seeds_and_positions_are_independent(ops: Ops) -> None:
    """Pairs of draws at (s, p) and (s+1, p), (s, p+1): a 4 x 4 table of independent variables."""
    rows = 4_000 if ops.name == "reference" else 40_000
    logits = torch.zeros(rows, 4)
    base = draws(logits, seed=5).run(ops)
    for other in (draws(logits, seed=6).run(ops), torch.roll(base, 1)):
        table = torch.bincount(base * 4 + other, minlength=16)
        assert abs(chi_square(table, torch.full((16,), 1 / 16))) < 5


def test_hash_is_the_documented_one() -> None:
    """The formulas of ``kernels.noise``, in Python integers."""

    def mix64(x: int) -> int:
        mask = 2**64 - 1
        x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 & mask
        x = (x ^ x >> 27) * 0x94D049BB133111EB & mask
        return x ^ x >> 31

    def mix32(x: int) -> int:
        mask = 2**32 - 1
        x = (x ^ x >> 16) * 0x85EBCA6B & mask
        x = (x ^ x >> 13) * 0xC2B2AE35 & mask
        return x ^ x >> 16

    native = cpu.load()
    golden = 0x9E3779B97F4A7C15
    for seed, position in [(0, 0), (1, 0), (0, 1), (2**63 - 1, 2**40), (-1, 17), (-(2**63), 3)]:
        key = mix64((seed % 2**64 + golden) % 2**64)
        key = mix64((key + (position + 1) * golden) % 2**64)
        ids = [0, 1, 2, 15, 16, 17, 151_935, 2**31 - 1]
        want = [mix32(mix32((i * 0x9E3779B9 + key) % 2**32) ^ key >> 32) for i in ids]
        low, high = row_keys(torch.tensor([seed]), torch.tensor([position]))
        assert token_hash(low, high, torch.tensor(ids)).tolist() == want
        if isinstance(native, NativeOps):
            got = [int(native.token_hashes(seed, position, i, 1)) for i in ids]
            assert got == want


def test_hash_bits_are_fair() -> None:
    """Every bit is set half the time, and flips half the time when one input bit flips."""
    ids = torch.arange(20_000)
    low, high = row_keys(torch.tensor([42]), torch.tensor([7]))
    hashes = token_hash(low, high, ids)
    bits = (hashes[:, None] >> torch.arange(32)) & 1
    assert float((bits.double().mean(0) - 0.5).abs().max()) < 5 * 0.5 / math.sqrt(20_000)
    for bit in (0, 1, 7, 15):
        flipped = token_hash(low, high, ids ^ (1 << bit)) ^ hashes
        rate = ((flipped[:, None] >> torch.arange(32)) & 1).double().mean(0)
        assert float((rate - 0.5).abs().max()) < 0.03


def test_penalties_by_hand(ops: Ops) -> None:
    logits = torch.tensor([[2.0, -2.0, 4.0, 1.0, 0.0]])
    ops.apply_penalties(
        logits, torch.tensor([0, 0, 0, 0, 1]), torch.tensor([0, 1, 2, 4, 3]),
        torch.tensor([0, 0, 3, 1, 9], dtype=torch.int32), torch.tensor([2.0]),
        torch.tensor([0.25]), torch.tensor([0.5]),
    )  # fmt: skip
    # Prompt only: divided or multiplied. Generated 3 times: 4/2 - 3*0.5 - 0.25. Row 1 is padding.
    assert logits.tolist() == [[1.0, -4.0, 0.25, 1.0, -0.75]]


def test_bias_by_hand(ops: Ops) -> None:
    logits = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    ops.add_bias(
        logits, torch.tensor([0, 1, 2]), torch.tensor([1, 0, 0]),
        torch.tensor([0.5, float("-inf"), 9.0]),
    )  # fmt: skip
    assert logits.tolist() == [[1.0, 2.5], [float("-inf"), 4.0]]


def test_token_mask_by_hand(ops: Ops) -> None:
    """The highest bit of a word is the sign of its int32; bits past the vocabulary mean nothing."""
    logits = torch.zeros(3, 34)
    mask = torch.tensor([[-(2**31), 0b01], [-1, -1], [0b101, 0b1100]], dtype=torch.int32)
    ops.apply_token_mask(logits, mask)
    left = [[i for i, x in enumerate(row) if x == 0] for row in logits.tolist()]
    assert left == [[31, 32], list(range(34)), [0, 2]]
    assert bool((logits[logits != 0] == -math.inf).all())
