"""Batches against a naive reading of the same plans."""

from __future__ import annotations

import random
from collections.abc import Iterator

import pytest
import torch

from engine.batch import Batch, BatchBuilder
from engine.cache import CacheManager, FullAttentionGroup, Holding
from engine.scheduler import Scheduler
from engine.steps import Plan, RequestState, Row, StepOutput
from engine.types import Request, SamplingParams, TokenLogprobs

CPU = torch.device("cpu")
NOTHING = TokenLogprobs(0.0, 1, [], [])


def plans(seed: int, *, max_num_tokens: int, max_num_seqs: int) -> Iterator[Plan]:
    """What a scheduler makes of random requests, with a pool too small for all of them."""
    rng = random.Random(seed)
    cache = CacheManager([FullAttentionGroup()], num_blocks=30, block_size=4)
    scheduler = Scheduler(
        cache,
        max_num_tokens=max_num_tokens,
        max_num_seqs=max_num_seqs,
        max_model_len=80,
        eos_token_ids=(),
        chunk_tokens=rng.choice([None, 5]),
    )
    for number in range(60):
        sampling = SamplingParams(
            max_tokens=rng.randint(1, 30), prompt_logprobs=rng.choice([None, None, 1])
        )
        prompt = [rng.randrange(3) for _ in range(rng.randint(1, 45))]
        scheduler.add(Request(request_id=str(number), prompt_ids=prompt, sampling=sampling))
        for _ in range(rng.randint(0, 6)):
            plan = scheduler.plan()
            if plan.rows:
                yield plan
            if rng.random() < 0.1:
                continue  # a plan that is never computed
            samples = sum(row.samples for row in plan.rows)
            prompts = {
                index: [NOTHING] * row.num_prompt_logprobs
                for index, row in enumerate(plan.rows)
                if row.prompt_logprobs
            }
            tokens = [rng.randrange(3) for _ in range(samples)]
            scheduler.commit(plan, StepOutput(tokens, [None] * samples, prompts))
        if rng.random() < 0.2:
            scheduler.abort(str(rng.randrange(number + 1)))
    assert scheduler.stats()["preemptions"] > 0


def check(plan: Plan, batch: Batch, block_size: int) -> None:
    """Compare every tensor with loops over the plan."""
    ids: list[int] = []
    positions, slots, starts, contexts = [], [], [0], []
    last_rows, prompt_outputs = [], []
    for row in plan.rows:
        first = len(ids)
        for position in range(row.start, row.start + row.num_new):
            ids.append(row.state.token_ids[position])
            positions.append(position)
            block = row.state.block_ids[0][position // block_size]
            slots.append(block * block_size + position % block_size)
            if row.prompt_logprobs and position + 1 < row.state.num_prompt:
                prompt_outputs.append(first + position - row.start)
        starts.append(len(ids))
        contexts.append(row.start + row.num_new)
        if row.samples:
            last_rows.append(len(ids) - 1)
    assert batch.ids.tolist() == ids
    assert batch.positions.tolist() == positions
    assert batch.slots.tolist() == slots
    assert len(set(slots)) == len(slots), "two tokens write to one place"
    assert batch.query_starts.tolist() == starts
    assert batch.context_lens.tolist() == contexts
    assert batch.output_rows.tolist() == last_rows + prompt_outputs
    assert [row.state for row in batch.samplers] == [r.state for r in plan.rows if r.samples]
    for row, table in zip(plan.rows, batch.block_tables.tolist(), strict=True):
        used = -(-(row.start + row.num_new) // block_size)
        assert table[:used] == row.state.block_ids[0][:used]
    for tensor in batch[:7]:
        assert isinstance(tensor, torch.Tensor)
        assert tensor.is_contiguous()
    predicted = [
        (rows.first_output + i, rows.state.token_ids[rows.first_token + i])
        for rows in batch.prompt_rows
        for i in range(rows.num_rows)
    ]
    for output, token in predicted:  # the token after the one at the output row
        place = int(batch.output_rows[output])
        owner = next(r for r, end in zip(plan.rows, starts[1:], strict=True) if place < end)
        assert owner.state.token_ids[int(batch.positions[place]) + 1] == token
    assert len(predicted) == len(prompt_outputs)


@pytest.mark.parametrize(("max_num_tokens", "max_num_seqs"), [(64, 8), (6, 6), (17, 3)])
@pytest.mark.parametrize("seed", range(4))
def test_batches_say_what_the_plan_says(seed: int, max_num_tokens: int, max_num_seqs: int) -> None:
    builder = BatchBuilder(4, max_num_tokens, max_num_seqs, 80, CPU)
    owners: dict[int, object] = {}
    for plan in plans(seed, max_num_tokens=max_num_tokens, max_num_seqs=max_num_seqs):
        batch = builder.build(plan)
        check(plan, batch, 4)
        # Whoever listens to `entered` knows the owner of every row slot in use.
        owners.update(batch.entered)
        slots = batch.sampler_slots.tolist()
        assert len(set(slots)) == len(slots)
        for slot, row in zip(slots, batch.samplers, strict=True):
            assert owners[slot] is row.state


def test_a_row_slot_stays_while_its_request_is_planned() -> None:
    builder = BatchBuilder(4, 64, 8, 80, CPU)
    before: list[RequestState] = []
    stayed = 0
    for plan in plans(1, max_num_tokens=64, max_num_seqs=8):
        entered = [state for _, state in builder.build(plan).entered]
        now = [row.state for row in plan.rows]
        new = [state for state in now if all(state is not old for old in before)]
        assert entered == new
        stayed += len(now) - len(new)
        before = now
    assert stayed > 100


@pytest.mark.parametrize("blocks", [[9, 8, 7, 6], [9, 8, 7, 6, 5], [9, 8]])
def test_another_list_of_blocks_replaces_the_known_one(blocks: list[int]) -> None:
    """A request can be preempted and let in again between two plans that both name it."""
    builder = BatchBuilder(4, 64, 8, 80, CPU)
    request = Request(request_id="r", prompt_ids=[1] * 16, sampling=SamplingParams(max_tokens=9))
    state = RequestState(request, 0, Holding("", 1, 4), 80, ())
    other = RequestState(request, 1, Holding("", 1, 4), 80, ())
    other.holding.block_ids[0] = [11, 12, 13, 14]
    state.holding.block_ids[0] = [1, 2, 3, 4]
    num_tokens = 4 * min(4, len(blocks))
    for known in ([1, 2, 3, 4], blocks):
        state.holding.block_ids[0] = known
        rows = [Row(state, 0, num_tokens, False, False), Row(other, 15, 1, True, False)]
        plan = Plan(rows, num_tokens + 1)
        check(plan, builder.build(plan), 4)
