"""What happens to logits but for the draw: penalties, biases, token masks, log-probabilities.

Floors, in bytes: penalties and biases touch 28 and 20 for each entry and one logit in and out; a
token mask reads ``S*V/8`` and writes 4 for each forbidden token; ``logprobs`` reads ``S*V*4`` once
(77 us for 64 rows of 152k at 3.35 TB/s, less from the L2 cache, where the product left them).

``logprobs`` parts a row into chunks, one program each: its largest logit, sum of exponentials,
how many logits beat the chosen one, and its own ``k`` largest by taking the maximum ``k`` times.
One more program a row merges the chunks, in their order. No sort of ``V``; beyond ``FAST_TOP``
tokens, which no dialect asks for, torch sorts. All orders depend on V alone, not on the batch.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from kernels.gpu.tuning import capability_of, config

__all__ = ["FAST_TOP", "add_bias", "apply_penalties", "apply_token_mask", "logprobs"]

FAST_TOP = 20  # what the OpenAI dialects allow


@triton.jit(do_not_specialize=["entries", "num_rows"])
def _edit(
    logits_ptr,
    rows_ptr,
    ids_ptr,
    values_ptr,
    repetition_ptr,
    presence_ptr,
    frequency_ptr,
    entries,
    num_rows,
    vocab,
    PENALISES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    entry = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    given = entry < entries
    row = tl.load(rows_ptr + entry, mask=given, other=-1)
    token = tl.load(ids_ptr + entry, mask=given, other=-1)
    real = (row >= 0) & (row < num_rows) & (token >= 0) & (token < vocab)
    at = logits_ptr + row * vocab + token
    logit = tl.load(at, mask=real, other=0.0)
    if PENALISES:
        count = tl.load(values_ptr + entry, mask=real, other=0)
        repetition = tl.load(repetition_ptr + row, mask=real, other=1.0)
        presence = tl.load(presence_ptr + row, mask=real, other=0.0)
        frequency = tl.load(frequency_ptr + row, mask=real, other=0.0)
        logit = tl.where(logit > 0, tl.div_rn(logit, repetition), logit * repetition)
        logit -= frequency * count.to(tl.float32)
        logit -= tl.where(count > 0, presence, 0.0)
    else:
        logit += tl.load(values_ptr + entry, mask=real, other=0.0)
    tl.store(at, logit, mask=real)


def apply_penalties(
    logits: torch.Tensor,
    entry_rows: torch.Tensor,
    entry_ids: torch.Tensor,
    entry_output_counts: torch.Tensor,
    repetition: torch.Tensor,
    presence: torch.Tensor,
    frequency: torch.Tensor,
) -> None:
    """See ``Ops.apply_penalties``."""
    entries, (rows, vocab) = entry_rows.shape[0], logits.shape
    if not entries:
        return
    best = config("edit_logits", capability_of(logits.device))
    _edit[(triton.cdiv(entries, best["BLOCK"]),)](
        logits, entry_rows, entry_ids, entry_output_counts, repetition, presence, frequency,
        entries, rows, vocab, PENALISES=True, **best.launch,
    )  # fmt: skip


def add_bias(
    logits: torch.Tensor, bias_rows: torch.Tensor, bias_ids: torch.Tensor, bias_values: torch.Tensor
) -> None:
    """See ``Ops.add_bias``."""
    entries, (rows, vocab) = bias_rows.shape[0], logits.shape
    if not entries:
        return
    best = config("edit_logits", capability_of(logits.device))
    _edit[(triton.cdiv(entries, best["BLOCK"]),)](
        logits, bias_rows, bias_ids, bias_values, logits, logits, logits,
        entries, rows, vocab, PENALISES=False, **best.launch,
    )  # fmt: skip


@triton.jit
def _apply_token_mask(logits_ptr, mask_ptr, vocab, words, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    ids = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    word = tl.load(mask_ptr + row * words + ids // 32, mask=ids < vocab, other=-1)
    forbidden = ((word >> (ids % 32)) & 1) == 0
    tl.store(logits_ptr + row * vocab + ids, float("-inf"), mask=(ids < vocab) & forbidden)


def apply_token_mask(logits: torch.Tensor, mask: torch.Tensor) -> None:
    """See ``Ops.apply_token_mask``."""
    rows, vocab = logits.shape
    if not rows:
        return
    best = config("token_mask", capability_of(logits.device))
    grid = (rows, triton.cdiv(vocab, best["BLOCK"]))
    _apply_token_mask[grid](logits, mask, vocab, mask.shape[1], **best.launch)


@triton.jit
def _chunk_tops(
    tops_ptr,
    top_ids_ptr,
    largest_ptr,
    sums_ptr,
    beaten_by_ptr,
    logits_ptr,
    chosen_ptr,
    vocab,
    K: tl.constexpr,
    CHUNK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    chunk = tl.program_id(1)
    ids = chunk * CHUNK + tl.arange(0, CHUNK)
    x = tl.load(logits_ptr + row * vocab + ids, mask=ids < vocab, other=float("-inf"))
    chosen = tl.load(chosen_ptr + row)
    known = (chosen >= 0) & (chosen < vocab)
    chosen_logit = tl.load(logits_ptr + row * vocab + chosen, mask=known, other=0.0)
    largest = tl.max(x, axis=0)
    origin = tl.where(largest == float("-inf"), 0.0, largest)
    part = row * tl.num_programs(1) + chunk
    tl.store(largest_ptr + part, largest)
    tl.store(sums_ptr + part, tl.sum(tl.exp(x - origin), axis=0))
    tl.store(beaten_by_ptr + part, tl.sum((x > chosen_logit).to(tl.int32), axis=0))
    open_ids = tl.where(ids < vocab, ids, vocab)  # what is taken or not there has the id ``vocab``
    for k in tl.range(K):
        top = tl.max(tl.where(open_ids < vocab, x, float("-inf")), axis=0)
        token = tl.min(tl.where(x == top, open_ids, vocab), axis=0)
        tl.store(tops_ptr + part * K + k, top)
        tl.store(top_ids_ptr + part * K + k, token)
        open_ids = tl.where(ids == token, vocab, open_ids)


@triton.jit
def _merge_tops(
    out_logprobs_ptr,
    out_ids_ptr,
    out_ranks_ptr,
    tops_ptr,
    top_ids_ptr,
    largest_ptr,
    sums_ptr,
    beaten_by_ptr,
    logits_ptr,
    chosen_ptr,
    vocab,
    chunks,
    K: tl.constexpr,
    CHUNKS: tl.constexpr,
    CANDIDATES: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    parts = tl.arange(0, CHUNKS)
    here = parts < chunks
    at = row * chunks + parts
    largest = tl.load(largest_ptr + at, mask=here, other=float("-inf"))
    sums = tl.load(sums_ptr + at, mask=here, other=0.0)
    best = tl.max(largest, axis=0)
    origin = tl.where(best == float("-inf"), 0.0, best)
    log_sum = tl.log(tl.sum(sums * tl.exp(largest - origin), axis=0))
    ahead = tl.sum(tl.load(beaten_by_ptr + at, mask=here, other=0), axis=0)
    tl.store(out_ranks_ptr + row, 1 + ahead.to(tl.int64))

    chosen = tl.load(chosen_ptr + row)
    known = (chosen >= 0) & (chosen < vocab)
    logit = tl.load(logits_ptr + row * vocab + chosen, mask=known, other=float("-inf"))
    to = row * (K + 1)
    tl.store(out_ids_ptr + to, chosen)
    tl.store(out_logprobs_ptr + to, (logit - origin) - log_sum)
    candidates = tl.arange(0, CANDIDATES)
    there = candidates < chunks * K
    x = tl.load(tops_ptr + row * chunks * K + candidates, mask=there, other=float("-inf"))
    ids = tl.load(top_ids_ptr + row * chunks * K + candidates, mask=there, other=vocab)
    for k in tl.range(K):
        top = tl.max(tl.where(ids < vocab, x, float("-inf")), axis=0)
        token = tl.min(tl.where(x == top, ids, vocab), axis=0)
        tl.store(out_ids_ptr + to + 1 + k, token.to(tl.int64))
        tl.store(out_logprobs_ptr + to + 1 + k, (top - origin) - log_sum)
        ids = tl.where(ids == token, vocab, ids)


def logprobs(
    out_logprobs: torch.Tensor,
    out_ids: torch.Tensor,
    out_ranks: torch.Tensor,
    logits: torch.Tensor,
    chosen: torch.Tensor,
    k: int,
) -> None:
    """See ``Ops.logprobs``."""
    rows, vocab = logits.shape
    if not rows:
        return
    if k > FAST_TOP:
        _logprobs_by_sorting(out_logprobs, out_ids, out_ranks, logits, chosen, k)
        return
    best = config("logprobs", capability_of(logits.device), V=vocab)
    chunks = triton.cdiv(vocab, best["CHUNK"])
    tops, top_ids = (
        torch.empty((rows, chunks, max(k, 1)), dtype=dtype, device=logits.device)
        for dtype in (torch.float32, torch.int32)
    )
    largest, sums, beaten_by = (
        torch.empty((rows, chunks), dtype=dtype, device=logits.device)
        for dtype in (torch.float32, torch.float32, torch.int32)
    )
    _chunk_tops[(rows, chunks)](
        tops, top_ids, largest, sums, beaten_by, logits, chosen, vocab, K=k, **best.launch
    )
    _merge_tops[(rows,)](
        out_logprobs, out_ids, out_ranks, tops, top_ids, largest, sums, beaten_by, logits, chosen,
        vocab, chunks, K=k, CHUNKS=triton.next_power_of_2(chunks),
        CANDIDATES=triton.next_power_of_2(chunks * max(k, 1)), num_warps=best.num_warps,
    )  # fmt: skip


def _logprobs_by_sorting(
    out_logprobs: torch.Tensor,
    out_ids: torch.Tensor,
    out_ranks: torch.Tensor,
    logits: torch.Tensor,
    chosen: torch.Tensor,
    k: int,
) -> None:
    ids = logits.sort(dim=1, descending=True, stable=True).indices[:, :k]
    torch.cat((chosen[:, None], ids), dim=1, out=out_ids)
    torch.gather(logits.log_softmax(dim=1), 1, out_ids, out=out_logprobs)
    out_ranks.copy_((logits > logits.gather(1, chosen[:, None])).sum(dim=1)).add_(1)
