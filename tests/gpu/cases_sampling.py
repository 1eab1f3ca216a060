"""Logits to tokens: draws, penalties, masks and log-probabilities over the whole vocabulary."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch

from kernels import Draws
from kernels.gpu import GpuOps
from kernels.gpu.cost import Cost
from tests.gpu.cases import Case, Named, Peers, compiled, of_bytes
from tests.gpu.setting import Setting
from tests.gpu.timing import Call

__all__ = ["cases"]

ROWS = (1, 64, 256)
DRAWS = {"greedy": (0.0, 0, 1.0), "plain": (1.0, 0, 1.0), "top-k-top-p": (1.0, 50, 0.9)}
"""Temperature, top-k and top-p of every row; the ops are told what no row asks for."""
TOP = 5
_Make = Callable[[Setting, GpuOps, torch.Tensor], Case]


def cases(setting: Setting) -> Iterator[Named]:
    """Every way to draw, and what is done to logits before."""
    makers: dict[str, _Make] = {
        **{f"sample-{name}": partial(_sample, draw) for name, draw in DRAWS.items()},
        "apply_penalties": _penalties,
        "apply_token_mask": _mask,
        "logprobs": _logprobs,
    }
    for name, make in makers.items():
        for rows in ROWS:
            default = rows == 256 and name.startswith("sample")
            yield f"{name}-{rows}", partial(_case, make, setting.size(rows, 3)), default


def _case(make: _Make, rows: int, setting: Setting, ops: GpuOps) -> Case:
    vocab = setting.size(151_936, 1000)
    return make(setting, ops, torch.randn(rows, vocab, device=setting.device) * 3)


def _sample(
    draw: tuple[float, int, float], setting: Setting, ops: GpuOps, logits: torch.Tensor
) -> Case:
    temperature, top_k, top_p = draw
    rows, device = len(logits), logits.device
    out, seeds = (torch.arange(rows, device=device) for _ in range(2))
    warmth = torch.full((rows,), temperature, device=device)
    k = torch.full((rows,), top_k, dtype=torch.int32, device=device)
    p, floor = torch.full((rows,), top_p, device=device), torch.zeros(rows, device=device)

    asked = Draws(warm=temperature > 0, top_k=top_k > 0, top_p=top_p < 1)

    def torchs() -> torch.Tensor:
        if temperature == 0:
            return logits.argmax(dim=1)
        kept = logits
        if top_k:
            values, ids = logits.sort(dim=1, descending=True)
            probs = values.softmax(dim=1)
            far = (probs.cumsum(dim=1) - probs) > top_p
            far[:, top_k:] = True
            kept = logits.scatter(1, ids, values.masked_fill(far, float("-inf")))
        probs = kept.softmax(dim=1)
        return (probs / torch.empty_like(probs).exponential_()).argmax(dim=1)

    peers: Peers = {
        "torch": lambda: torchs,
        "compiled": lambda: compiled(setting, torchs),
    }
    if temperature:
        peers["flashinfer"] = lambda: _flashinfer(logits, k, p)
    return Case(
        lambda: ops.sample(out, logits, warmth, k, p, floor, seeds, seeds, asked),
        of_bytes(logits),
        peers,
        out if temperature == 0 else None,  # other draws are other dice
        tolerance=0.0,
    )


def _flashinfer(logits: torch.Tensor, k: torch.Tensor, p: torch.Tensor) -> Call:
    """Softmax and draw, both FlashInfer's, as its own engines call it."""
    import flashinfer  # type: ignore[import-not-found]

    if int(k[0]) == 0:
        return lambda: flashinfer.sampling.sampling_from_logits(logits)
    return lambda: flashinfer.sampling.top_k_top_p_sampling_from_logits(logits, k, p)


def _penalties(setting: Setting, ops: GpuOps, logits: torch.Tensor) -> Case:
    rows, vocab = logits.shape
    each, device = min(512, vocab // 2), logits.device
    entry_rows = torch.arange(rows, device=device).repeat_interleave(each)
    ids = torch.cat([torch.randperm(vocab, device=device)[:each] for _ in range(rows)])
    counts = torch.randint(0, 4, ids.shape, dtype=torch.int32, device=device)
    # Nothing changes, so that it may be done over and over.
    one, none = torch.ones(rows, device=device), torch.zeros(rows, device=device)

    def torchs() -> None:
        seen = logits[entry_rows, ids]
        factor = one[entry_rows]
        seen = torch.where(seen > 0, seen / factor, seen * factor)
        seen = seen - none[entry_rows] * counts - none[entry_rows] * (counts > 0)
        logits[entry_rows, ids] = seen

    return Case(
        lambda: ops.apply_penalties(logits, entry_rows, ids, counts, one, none, none),
        Cost(ids.numel() * (8 + 8 + 4 + 8), 8 * ids.numel()),
        {"torch": lambda: torchs, "compiled": lambda: compiled(setting, torchs)},
    )


def _mask(setting: Setting, ops: GpuOps, logits: torch.Tensor) -> Case:
    rows, vocab = logits.shape
    words = -(-vocab // 32)
    mask = torch.randint(-(2**31), 2**31, (rows, words), device=logits.device).int()
    theirs = logits.clone()

    def torchs() -> torch.Tensor:
        bits = torch.arange(32, device=mask.device)
        allowed = (mask[:, :, None] >> bits & 1).bool().flatten(1)[:, :vocab]
        return theirs.masked_fill_(~allowed, float("-inf"))

    return Case(
        lambda: ops.apply_token_mask(logits, mask),
        Cost(mask.nbytes + 2 * rows * vocab, 0),  # half of the logits are written
        {"torch": lambda: torchs, "compiled": lambda: compiled(setting, torchs)},
    )


def _logprobs(setting: Setting, ops: GpuOps, logits: torch.Tensor) -> Case:
    rows, device = len(logits), logits.device
    chosen, ranks = (torch.arange(rows, device=device) for _ in range(2))
    values = torch.empty(rows, TOP + 1, device=device)
    ids = torch.empty(rows, TOP + 1, dtype=torch.int64, device=device)
    their_ranks = torch.empty_like(ranks)

    def torchs() -> torch.Tensor:
        logs = logits.log_softmax(dim=1)
        mine = logs.gather(1, chosen[:, None])
        their_ranks.copy_((logs > mine).sum(dim=1) + 1)
        return torch.cat((mine, logs.topk(TOP, dim=1).values), dim=1)

    return Case(
        lambda: ops.logprobs(values, ids, ranks, logits, chosen, TOP),
        of_bytes(logits, logits),
        {"torch": lambda: torchs, "compiled": lambda: compiled(setting, torchs)},
        values,
        tolerance=1e-4,
    )
