"""Work lists: each query meets each key it may see in exactly one item, whatever the lengths."""

from __future__ import annotations

import random

import pytest
import torch

from kernels.gpu import attention_decode, attention_prefill
from kernels.gpu.attention_plan import MOST_DECODED, AttentionPlan, attention_cost
from kernels.gpu.cost import Cost
from kernels.gpu.workspace import Workspace
from tests.kernels.comparisons import Ragged
from tests.kernels.gpu.attention_runs import LARGER, SMALL, Setting, make_plan

SPLIT = SMALL.split


def lengths_only(device: torch.device, new: list[int], context: list[int], group: int) -> Ragged:
    """A batch that has lengths and shapes, and no numbers worth reading."""
    blocks = 1 + sum(-(-length // 16) for length in context)
    return Ragged(
        torch.zeros(sum(new) + 3, 2 * group, 16, device=device),
        torch.zeros(blocks, 2, 16, 16, device=device),
        torch.zeros(blocks, 2, 16, 16, device=device),
        torch.zeros(len(new), -(-max(context) // 16), dtype=torch.int32, device=device),
        torch.tensor([0, *new]).cumsum(0).int().to(device),
        torch.tensor(context, dtype=torch.int32, device=device),
    )


def items(table: torch.Tensor, count: int) -> list[list[int]]:
    assert count <= len(table), "the list has room"
    rows: list[list[int]] = table[:count].tolist()
    return rows


def check_plan(plan: AttentionPlan, new: list[int], context: list[int]) -> None:
    starts = [sum(new[:row]) for row in range(len(new))]
    counts = plan.counts.tolist()
    merges = plan.merges.tolist()
    decode, prefill = items(plan.decode_items, counts[0]), items(plan.prefill_items, counts[1])
    seen: dict[tuple[int, int], list[tuple[int, int]]] = {}
    slots: dict[int, tuple[int, int, int]] = {}
    for listed, most in ((decode, SMALL), (prefill, LARGER)):
        for row, token, queries, position, begin, end, slot, partial in listed:
            assert (new[row] <= MOST_DECODED) == (listed is decode)
            assert 1 <= queries <= most.queries(plan.shape.group)
            for query in range(queries):
                at = token - starts[row] + query
                assert 0 <= at < new[row]
                assert position + query == context[row] - new[row] + at
                seen.setdefault((row, at), []).append((begin, end))
                if partial:
                    assert begin % SPLIT == 0
                    assert slots.setdefault(slot + query, (row, at, begin)) == (row, at, begin)
                    first, count = merges[row][2], merges[row][3]
                    assert slot + query == first + begin // SPLIT * new[row] + at
                    assert begin // SPLIT < count == -(-context[row] // SPLIT)
                else:
                    assert (begin, merges[row][3]) == (0, 0)
    assert all(0 <= slot < len(plan.sums) for slot in slots)
    for row, count in enumerate(new):
        assert merges[row][:2] == [starts[row] if count else merges[row][0], count]
        for at in range(count):
            keys = context[row] - count + at + 1
            ranges = sorted(seen.pop((row, at)))
            covered = [key for begin, end in ranges for key in range(begin, end) if key < keys]
            assert covered == list(range(keys))
    assert not seen
    ends = [item[5] for item in prefill]
    assert ends == sorted(ends, reverse=True), "longest first"
    whole = [context[item[0]] for item in decode if not item[7]]
    assert whole == sorted(whole, reverse=True)
    assert all(not item[7] for item in decode[: len(whole)]), "splits come last"


@pytest.mark.parametrize("seed", range(6))
def test_every_pair_is_in_one_item(device: torch.device, seed: int) -> None:
    draw = random.Random(seed)
    new = [draw.choice([0, 1, 1, 1, 2, 8, 9, 16, 33, 70]) for _ in range(draw.randint(1, 20))]
    context = [count + draw.choice([0, 1, 15, 31, 32, 33, 100, 200]) for count in new]
    context[0] = max(context[0], 1)
    setting = Setting(programs=draw.choice([2, 8, 64]), slots=draw.choice([None, 7]))
    batch = lengths_only(device, new, context, group=draw.choice([1, 3, 8]))
    check_plan(make_plan(batch, setting), new, context)


def test_what_is_cut(device: torch.device) -> None:
    """A long request among few is; one that is small beside all the work is not."""
    few = make_plan(lengths_only(device, [1, 1], [10, 200], 2), Setting(programs=16))
    assert few.merges[:, 3].tolist() == [0, 7]
    many = make_plan(lengths_only(device, [1] * 60, [10] + [64] * 59, 2), Setting(programs=16))
    assert not many.merges[:, 3].any()
    crowded = make_plan(
        lengths_only(device, [1] * 3, [90, 200, 90], 2), Setting(programs=64, slots=6)
    )
    assert crowded.merges[:, 3].tolist() == [3, 0, 0], "in order, as far as there are slots"


def test_rooms(device: torch.device) -> None:
    """Room follows from shapes: the cache's size for decoding, the tokens for the rest."""
    shape = make_plan(lengths_only(device, [1, 1], [100, 20], 2)).shape
    assert shape.num_slots(SPLIT) == 2 * (10 * 16 // SPLIT + 2), "5 tokens for 2 requests: 2 each"
    assert shape.num_decode_items(SMALL) == 2 * 1 + 14
    assert shape.num_prefill_items(LARGER) == 0, "5 tokens are few for one request too"
    longer = make_plan(lengths_only(device, [1, 40], [100, 40], 2)).shape
    assert longer.num_prefill_items(LARGER) == 44 // 16 + 2


def test_plans_lie_where_they_lay() -> None:
    workspace = Workspace(torch.device("cpu"))
    first = workspace.take("a", (5, 3), torch.float32)
    assert first.shape == (5, 3)
    assert workspace.take("a", (16,), torch.float32).data_ptr() == first.data_ptr()
    assert workspace.take("b", (4,), torch.int32).data_ptr() != first.data_ptr()
    larger = workspace.take("a", (17,), torch.float32)
    assert larger.data_ptr() != first.data_ptr()
    first.fill_(1.0)
    larger.zero_()
    assert first.sum() == 15, "what a graph has recorded is kept"
    assert workspace.nbytes == 4 * (16 + 4 + 32)
    assert workspace.take("c", (0, 8), torch.int32).shape == (0, 8)


def test_costs() -> None:
    """Pairs and bytes counted one by one."""
    new, context = [1, 0, 12, 8], [40, 9, 30, 8]
    shape = {"q_heads": 4, "kv_heads": 2, "head_dim": 16, "act_bytes": 2, "cache_bytes": 1}
    for cost, rows in (
        (attention_cost, [0, 2, 3]),
        (attention_decode.cost, [0, 3]),
        (attention_prefill.cost, [2]),
    ):
        pairs = sum(context[r] - new[r] + at + 1 for r in rows for at in range(new[r]))
        tokens, cached = sum(new[r] for r in rows), sum(context[r] for r in rows)
        want = Cost(2 * 2 * 16 * cached + 2 * 4 * 16 * 2 * tokens, 4 * 4 * 16 * pairs)
        assert cost(new, context, **shape) == want
    assert attention_cost([], [], **shape) == Cost(0, 0)
    assert Cost(6, 100) + Cost(4, 11) == Cost(10, 111)
    assert Cost(30, 100).seconds(10.0, 50.0) == 3.0
    assert Cost(30, 200).seconds(10.0, 50.0) == 4.0
