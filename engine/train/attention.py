"""Causal attention inside each document of a packed row of tokens, forward and backward.

No mask of [tokens, tokens] exists anywhere: on a CPU each document is one call of torch's flash
kernel on a slice, on a GPU one FlexAttention kernel (arXiv:2412.05496) skips the blocks between
documents. A packed row so costs what its documents cost apart.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

__all__ = ["Segments", "attend", "attend_flex", "block_mask_of"]

_forward: Any = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_backward: Any = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


@dataclass(frozen=True, slots=True)
class Segments:
    """Where the documents of a row of tokens lie.

    Args:
        lengths: tokens of each document, in order; they sum to the row's tokens.
        positions: int64 [N], each token's place in its document.
        block_mask: for FlexAttention; None on a CPU.
    """

    lengths: tuple[int, ...]
    positions: Tensor
    block_mask: BlockMask | None = None

    @classmethod
    def of(cls, document_ids: npt.NDArray[np.int64], device: torch.device) -> Segments:
        """Segments of the runs of equal numbers in `document_ids` [..., T]; rows stay apart."""
        rows = document_ids.reshape(-1, document_ids.shape[-1])
        borders = np.ones(rows.shape, dtype=bool)
        borders[:, 1:] = rows[:, 1:] != rows[:, :-1]
        starts = np.flatnonzero(borders)
        lengths = np.diff(np.append(starts, rows.size))
        positions = np.arange(rows.size) - np.repeat(starts, lengths)
        mask = None if device.type == "cpu" else block_mask_of(lengths, device)
        return cls(tuple(lengths.tolist()), torch.from_numpy(positions).to(device), mask)

    @classmethod
    def single(cls, num_tokens: int, device: torch.device) -> Segments:
        """One document of `num_tokens`."""
        return cls.of(np.zeros((1, num_tokens), dtype=np.int64), device)


def block_mask_of(lengths: npt.NDArray[np.int64], device: torch.device) -> BlockMask:
    """Causal inside each of the documents that have these lengths."""
    numbers = torch.from_numpy(np.repeat(np.arange(len(lengths)), lengths)).to(device)

    def visible(_batch: Tensor, _head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (query >= key) & (numbers[query] == numbers[key])

    size = len(numbers)
    return create_block_mask(visible, None, None, size, size, device=str(device))


def attend(q: Tensor, k: Tensor, v: Tensor, segments: Segments) -> Tensor:
    """Mixes values over the earlier tokens of the same document.

    Args:
        q: [N, H, D].
        k: [N, K, D], K dividing H; query head h reads key head h // (H / K).
        v: [N, K, D].
        segments: the documents; they decide between the two kernels.

    Returns:
        [N, H, D].
    """
    if segments.block_mask is not None:
        return attend_flex(q, k, v, segments.block_mask)
    groups = q.shape[1] // k.shape[1]
    k, v = (x.repeat_interleave(groups, dim=1) for x in (k, v))
    mixed: Tensor = _EachDocument.apply(q, k, v, segments.lengths)  # type: ignore[no-untyped-call]
    return mixed


def attend_flex(q: Tensor, k: Tensor, v: Tensor, block_mask: BlockMask) -> Tensor:
    """`attend` as one kernel; shapes as there."""
    kernel: Any = torch.compile(flex_attention) if q.is_cuda else flex_attention
    heads_first = (x.transpose(0, 1)[None] for x in (q, k, v))
    mixed: Tensor = kernel(*heads_first, block_mask=block_mask, enable_gqa=True)
    return mixed[0].transpose(0, 1)


def _heads_first(x: Tensor, part: slice) -> Tensor:
    return x[None, part].transpose(1, 2)  # [1, H, L, D], a view


class _EachDocument(torch.autograd.Function):
    """One function for the row, so that slices share their outputs instead of being joined."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, lengths: tuple[int, ...]) -> Tensor:
        mixed = torch.empty_like(q)
        sums, begin = [], 0
        for length in lengths:
            part = slice(begin, begin + length)
            begin += length
            own, log_sum = _forward(*(_heads_first(x, part) for x in (q, k, v)), 0.0, True)
            mixed[part] = own[0].transpose(0, 1)
            sums.append(log_sum)
        ctx.save_for_backward(q, k, v, mixed, *sums)
        ctx.lengths = lengths
        return mixed

    @staticmethod
    def backward(ctx: FunctionCtx, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        saved: tuple[Tensor, ...] = ctx.saved_tensors  # type: ignore[attr-defined]
        q, k, v, mixed, *sums = saved
        (grad,) = grads
        outputs = tuple(torch.empty_like(x) for x in (q, k, v))
        begin = 0
        for length, log_sum in zip(ctx.lengths, sums, strict=True):  # type: ignore[attr-defined]
            part = slice(begin, begin + length)
            begin += length
            views = (_heads_first(x, part) for x in (grad, q, k, v, mixed))
            for output, own in zip(outputs, _backward(*views, log_sum, 0.0, True), strict=True):
                output[part] = own[0].transpose(0, 1)
        return outputs[0], outputs[1], outputs[2], None
