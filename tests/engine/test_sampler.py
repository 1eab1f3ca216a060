"""The sampler's books (who gets which parameter, penalty, bias) against a naive reading."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from engine.batch import Batch, BatchBuilder
from engine.cache import Holding
from engine.sampler import Sampler
from engine.steps import Plan, RequestState, Row
from engine.transfer import Arrivals
from engine.types import Request, SamplingParams, TokenLogprobs
from kernels import select
from kernels.reference import ReferenceOps

V = 50
EOS = (3, 4)
CPU = torch.device("cpu")


def state(prompt: list[int], output: list[int] | None = None, **sampling: Any) -> RequestState:
    """A request in the middle of its answer."""
    params = SamplingParams(**{"max_tokens": 1000, "temperature": 0.0, **sampling})
    request = Request(request_id="r", prompt_ids=prompt, sampling=params)
    made = RequestState(request, 0, Holding("", 1, 16), 4096, EOS)
    made.token_ids += output or []
    made.holding.block_ids[0] += range(1, 30)
    return made


class Bench:
    """A builder and a sampler over hand-made states."""

    def __init__(self) -> None:
        self.builder = BatchBuilder(16, 512, 64, 464, CPU)
        self.sampler = Sampler(select("cpu"), V, EOS, 64, CPU)

    def batch(self, states: list[RequestState]) -> Batch:
        rows = [Row(s, len(s.token_ids) - 1, 1, True, False) for s in states]
        batch = self.builder.build(Plan(rows, len(rows)))
        self.sampler.enter(batch)
        return batch

    def draw(
        self, states: list[RequestState], logits: torch.Tensor
    ) -> tuple[list[int], list[TokenLogprobs | None]]:
        return self.sampler.sample(self.batch(states), logits.clone(), Arrivals(CPU)).read()


def random_logits(rows: int, seed: int = 0) -> torch.Tensor:
    return 2 * torch.randn(rows, V, generator=torch.Generator().manual_seed(seed))


def adjusted(s: RequestState, row: torch.Tensor) -> torch.Tensor:
    """What the draw must see, token by token, by the book."""
    sampling, row = s.request.sampling, row.clone()
    prompt, output = s.token_ids[: s.num_prompt], s.token_ids[s.num_prompt :]
    for token in range(V):
        value = row[token].item()
        if token in prompt or token in output:
            factor = sampling.repetition_penalty
            value = value / factor if value > 0 else value * factor
        if token in output:
            value -= sampling.frequency_penalty * output.count(token)
            value -= sampling.presence_penalty
        value += sampling.logit_bias.get(token, 0.0)
        ends = set(sampling.stop_token_ids) | (set() if sampling.ignore_eos else set(EOS))
        if token in ends and len(output) < sampling.min_tokens:
            value = float("-inf")
        row[token] = value
    return row


MIXED: list[dict[str, Any]] = [
    {},
    {"repetition_penalty": 1.7},
    {"presence_penalty": 1.5, "frequency_penalty": 0.7},
    {"repetition_penalty": 0.6, "presence_penalty": -1.0, "logprobs": 2},
    {"logit_bias": {5: 9.0, 6: -100.0}},
    {"logit_bias": {3: 50.0}, "min_tokens": 6},
    {"logit_bias": {3: 50.0}, "min_tokens": 6, "ignore_eos": True},
    {"min_tokens": 100, "stop_token_ids": (8, 9, 3, 10_000), "logprobs": 0},
    {"logit_bias": {7: 100.0}, "frequency_penalty": 2.0, "logprobs": 5, "min_tokens": 2},
    {"temperature": 1.0, "seed": 5, "logprobs": 3},
    {"temperature": 0.7, "seed": 6, "top_k": 4, "top_p": 0.8, "min_p": 0.02},
    {"temperature": 1.3, "seed": 7, "top_k": 10**6, "repetition_penalty": 1.2},
]


def test_every_row_gets_its_own_parameters() -> None:
    """Many steps with rows coming, going and moving, each draw checked against the oracle."""
    bench, oracle = Bench(), ReferenceOps()
    random = torch.Generator().manual_seed(0)
    states = [
        state(torch.randint(V, (5 + i,), generator=random).tolist(), [11, 12, 11], **sampling)
        for i, sampling in enumerate(MIXED)
    ]
    for step in range(12):
        present = [s for i, s in enumerate(states) if (i + step) % 5 or step % 4 == 0]
        present = present[step % 3 :] + present[: step % 3]
        logits = random_logits(len(present), step)
        logits[:, 3] += 2.0  # end tokens are tempting
        logits[:, 11:13] += 3.0  # and so are tokens that were there before, once and twice
        ids, logprobs = bench.draw(present, logits)
        assert len(ids) == len(logprobs) == len(present)
        for s, raw, token, entry in zip(present, logits, ids, logprobs, strict=True):
            sampling = s.request.sampling
            expected = torch.empty(1, dtype=torch.int64)
            oracle.sample(
                expected,
                adjusted(s, raw)[None],
                torch.tensor([sampling.temperature]),
                torch.tensor([min(sampling.top_k, V)], dtype=torch.int32),
                torch.tensor([sampling.top_p]),
                torch.tensor([sampling.min_p]),
                torch.tensor([sampling.seed]),
                torch.tensor([len(s.token_ids)]),
            )
            assert token == expected.item(), (step, sampling)
            check_entry(entry, raw, token, sampling.logprobs)
            s.token_ids.append(token)


def check_entry(
    entry: TokenLogprobs | None, raw: torch.Tensor, token: int, wanted: int | None
) -> None:
    """The entry is there if wanted, and of the distribution before any change."""
    if wanted is None:
        assert entry is None
        return
    assert entry is not None
    logs = raw.log_softmax(0)
    assert entry.logprob == pytest.approx(logs[token].item(), abs=1e-5)
    assert entry.rank == 1 + int((raw > raw[token]).sum())
    assert entry.top_ids == raw.argsort(descending=True)[:wanted].tolist()
    assert entry.top_logprobs == pytest.approx(logs[entry.top_ids].tolist(), abs=1e-5)


@pytest.mark.parametrize("logprobs", [0, 2, 100])
def test_logprobs_are_of_the_unmodified_distribution(logprobs: int) -> None:
    bench, logits = Bench(), random_logits(3)
    wishes: list[dict[str, Any]] = [{"logit_bias": {5: 9.0}}, {"frequency_penalty": 2.0}, {}]
    states = [state([1], [5, 5, 6], logprobs=logprobs, **wish) for wish in wishes]
    ids, entries = bench.draw(states, logits)
    for entry, raw, token in zip(entries, logits, ids, strict=True):
        check_entry(entry, raw, token, min(logprobs, V))


def test_greedy_rows_alone_and_among_others_agree() -> None:
    bench = Bench()
    logits = random_logits(3)
    plain = [state([1, 2]) for _ in range(3)]
    expected = logits.argmax(1).tolist()
    assert bench.draw(plain, logits) == (expected, [None] * 3)
    with_others = [*plain, state([1], temperature=1.0, logprobs=1)]
    ids, logprobs = bench.draw(with_others, torch.cat((logits, random_logits(1, 9))))
    assert ids[:3] == expected
    assert logprobs[:3] == [None] * 3


def test_frequency_counts_every_time() -> None:
    bench, logits = Bench(), torch.zeros(1, V)
    logits[0, 11], logits[0, 12] = 3.0, 2.5
    asking = state([11, 11, 12], [11, 12, 11], frequency_penalty=0.7)
    assert bench.draw([asking], logits)[0] == [12]  # 2.5 - 0.7 against 3.0 - 2 * 0.7
    asking.token_ids += [12, 12]
    assert bench.draw([asking], logits)[0] == [11]  # 2.5 - 3 * 0.7 against 3.0 - 2 * 0.7


def test_the_draw_depends_on_seed_and_position_only() -> None:
    bench, flat = Bench(), torch.zeros(1, V)

    def draws(seed: int, length: int) -> int:
        return bench.draw([state([1] * length, temperature=1.0, seed=seed)], flat)[0][0]

    assert [draws(11, n) for n in range(1, 30)] == [draws(11, n) for n in range(1, 30)]
    assert [draws(11, n) for n in range(1, 30)] != [draws(12, n) for n in range(1, 30)]
    # Where the prompt ends is no part of it: neither is which tokens came before.
    shifted = state([1] * 3, [2] * 4, temperature=1.0, seed=11)
    assert bench.draw([shifted], flat)[0][0] == draws(11, 7)


def test_everything_banned_still_gives_a_token() -> None:
    bench = Bench()
    everything = state([1], min_tokens=5, stop_token_ids=tuple(range(V)))
    assert bench.draw([everything], random_logits(1))[0] == [0]


@pytest.mark.parametrize("max_rows", [1, 3, 100])
def test_prompt_logprobs_come_in_slices(max_rows: int) -> None:
    bench = Bench()
    random = torch.Generator().manual_seed(3)
    first = state(torch.randint(V, (9,), generator=random).tolist(), prompt_logprobs=2)
    other = state([1, 2, 3])
    last = state(torch.randint(V, (6,), generator=random).tolist(), prompt_logprobs=0)
    rows = [
        Row(first, 2, 7, True, True),
        Row(other, 0, 3, True, False),
        Row(last, 1, 3, False, True),
    ]
    batch = bench.builder.build(Plan(rows, 13))
    logits = random_logits(len(batch.output_rows))

    def head(start: int, end: int) -> torch.Tensor:
        assert end - start <= max_rows
        return logits[start:end]

    parts = bench.sampler.prompt_logprobs(batch, head, max_rows, Arrivals(CPU))
    found = {row: [e for part in entries for e in part.read()] for row, entries in parts.items()}
    assert found.keys() == {0, 2}
    assert len(found[0]) == 6  # predicted by positions 2..7: tokens 3..8
    assert len(found[2]) == 3
    outputs = iter(logits[2:])
    for token, entry in zip(first.token_ids[3:], found[0], strict=True):
        check_entry(entry, next(outputs), token, 2)
    for token, entry in zip(last.token_ids[2:5], found[2], strict=True):
        check_entry(entry, next(outputs), token, 0)
