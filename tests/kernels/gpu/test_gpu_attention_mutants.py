"""The comparisons have teeth: a bug planted in a kernel's source makes one of them fail."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch
from triton.runtime.errors import InterpreterError

from kernels.gpu import (
    attention,
    attention_decode,
    attention_plan,
    attention_prefill,
    attention_tile,
)
from tests.kernels.gpu.attention_runs import USUAL, check, make_plan
from tests.kernels.gpu.planted import planted
from tests.kernels.gpu.test_gpu_attention_plan import check_plan, lengths_only

Check = Callable[[torch.device, ModuleType], None]


def with_bug(module: ModuleType, old: str, new: str, directory: Path) -> ModuleType:
    """``attention`` on kernels one of whose modules has the bug; the real ones stay as they are."""
    bad = planted(module, old, new, directory)

    def again(other: ModuleType) -> ModuleType:
        """The module loaded anew, with whatever the bad one defines in place of the real."""
        start = "from __future__ import annotations\n"
        loaded = bad if other is module else planted(other, start, start + "\n", directory)
        for name in set(vars(loaded)) & set(bad.__all__):
            setattr(loaded, name, getattr(bad, name))
        return loaded

    decode, prefill = again(attention_decode), again(attention_prefill)
    top = again(attention)
    top.launch_decode = decode.launch_decode  # type: ignore[attr-defined]
    top.launch_prefill = prefill.launch_prefill  # type: ignore[attr-defined]
    return top


TILE_BUGS = [
    ("keys[None, :] <= last_key[:, None]", "keys[None, :] < last_key[:, None]"),
    ("keys[None, :] <= last_key[:, None]", "keys[None, :] <= last_key[:, None] + 1"),
    ("tl.minimum(first_position + 1, end)", "tl.minimum(first_position + KEYS, end)"),
    ("v, sums * old[:, None],", "v, sums,"),
    ("total = tl.fma(total, old, tl.sum(weights, 1))", "total = total + tl.sum(weights, 1)"),
    ("tl.fma(total, old, tile_total * new)", "total + tile_total * new"),
    ("tile_sums * new[:, None]", "tile_sums"),
    ("(keys % BLOCK) * HEAD_DIM", "(start % BLOCK) * HEAD_DIM"),
    ("mask=keys < end, other=0)", "mask=keys < start + 1, other=0)"),
    ("(block >= 0) & (block < num_blocks), block, 0)", "block >= 0, block % 2, 0)"),
    ("head * GROUP + rows % GROUP", "(rows % GROUP) * (Q_HEADS // GROUP) + head"),
    ("(first_token + query)", "first_token"),
    ("(keys < end)[:, None] & ", ""),
]
ITEM_BUGS = [
    ("head.to(tl.int64) * (BLOCK * HEAD_DIM)", "head.to(tl.int64) * HEAD_DIM"),
    ("tl.minimum(query, queries - 1), to_scores", "query * 0, to_scores"),
    ("request * table_width", "request * 1"),
]
KERNEL_BUGS = [("sums / total[:, None] * to_values", "sums * to_values")]
MERGE_BUGS = [
    ("slot = (first + split * new)", "slot = (first + split)"),
    ("slot * 2 + 1, mask=inside & there", "slot * 2, mask=inside & there"),
    ("tl.load(item + 4)", "0"),
    ("(tl.load(item + 6) + query)", "(tl.load(item + 6) + query * 0)"),
    ("range(0, splits, TOGETHER)", "range(0, splits - TOGETHER, TOGETHER)"),
]


def decoding(device: torch.device, module: ModuleType) -> None:
    """With and without splits, over blocks smaller than a tile."""
    check(device, [2, 1, 1], [70, 40, 20], block=8, head_dim=16, module=module)


def prefilling(device: torch.device, module: ModuleType) -> None:
    check(device, [20, 11], [20, 35], block=8, head_dim=16, module=module)


def must_fail(device: torch.device, module: ModuleType, *checks: Check) -> None:
    # What a bug makes of NaN may be a warning, which the interpreter passes on as its own error.
    with pytest.raises((AssertionError, InterpreterError)):
        for one in checks:
            one(device, module)


def test_no_bug(device: torch.device, tmp_path: Path) -> None:
    same = "import math\n"
    module = with_bug(attention_decode, same, same, tmp_path)
    decoding(device, module)
    prefilling(device, module)


@pytest.mark.parametrize(("old", "new"), TILE_BUGS)
def test_bugs_in_the_tile(device: torch.device, tmp_path: Path, old: str, new: str) -> None:
    must_fail(device, with_bug(attention_tile, old, new, tmp_path), decoding, prefilling)


@pytest.mark.parametrize("one", [decoding, prefilling])
@pytest.mark.parametrize(("old", "new"), ITEM_BUGS)
def test_bugs_in_an_item(
    device: torch.device, tmp_path: Path, one: Check, old: str, new: str
) -> None:
    must_fail(device, with_bug(attention_tile, old, new, tmp_path), one)


@pytest.mark.parametrize(
    ("module", "one"), [(attention_decode, decoding), (attention_prefill, prefilling)]
)
@pytest.mark.parametrize(("old", "new"), KERNEL_BUGS)
def test_bugs_in_the_kernels(
    device: torch.device, tmp_path: Path, module: ModuleType, one: Check, old: str, new: str
) -> None:
    must_fail(device, with_bug(module, old, new, tmp_path), one)


@pytest.mark.parametrize(("old", "new"), MERGE_BUGS)
def test_bugs_in_merging(device: torch.device, tmp_path: Path, old: str, new: str) -> None:
    must_fail(device, with_bug(attention_decode, old, new, tmp_path), decoding)


PLAN_BUGS = [
    ("base = context - new ", "base = context - new + 1 "),
    ("(split + 1) * SPLIT", "(split + 1) * SPLIT - 1"),
    ("my_slot + split * my_new + query", "my_slot + split + query"),
    ("upto <= num_slots", "upto <= num_slots + 100"),
    ("ended + tied.to(tl.int32)", "ended"),
    ("past % PREFILL_QUERIES == 0", "past % PREFILL_QUERIES == 1"),
    ("(context == my_context) & (every < row)", "(context == my_context)"),
    ("index % tl.maximum(my_tiles, 1) * DECODE_QUERIES", "index * 0"),
    ("tl.sum(whole_tiles + cut_items, 0)", "tl.sum(cut_items, 0)"),
]


@pytest.mark.parametrize(("old", "new"), PLAN_BUGS)
def test_bugs_in_the_plan(device: torch.device, tmp_path: Path, old: str, new: str) -> None:
    lengths = [2, 8, 40, 0, 1, 8, 24], [200, 170, 40, 5, 20, 20, 24]
    batch = lengths_only(device, *lengths, group=4)
    check_plan(make_plan(batch, USUAL), *lengths)
    with pytest.raises((AssertionError, KeyError, IndexError)):
        check_plan(make_plan(batch, USUAL, planted(attention_plan, old, new, tmp_path)), *lengths)
