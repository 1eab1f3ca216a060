"""Weights as the GPU ops keep them, and which kernel multiplies by them.

A dense weight stays as it is. One of 8 or 4 bits streams through ``linear_stream`` for few rows;
for many, FP8 goes through the 8-bit tensor cores with ``x`` rounded to e4m3 on the fly, where the
device has them. In the batch-invariant mode the way does not depend on the rows: FP8 always takes
the tensor cores, if there are any. Nothing else rounds ``x``.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from kernels.gpu.linear import linear
from kernels.gpu.linear_fp8 import linear_fp8_block, linear_fp8_row, multiplies_e4m3
from kernels.gpu.linear_stream import MAX_STREAM_ROWS, linear_stream
from kernels.gpu.quantise import quantise_groups, quantise_rows
from kernels.quantised import QuantisedWeight, Scheme

__all__ = ["DenseLinear", "QuantisedLinear", "pack_dense", "pack_quantised", "run_linear"]


@dataclass(frozen=True)
class DenseLinear:
    """A weight ``[O, H]`` of 16 or 32 bits."""

    weight: torch.Tensor

    @property
    def out_features(self) -> int:
        """Rows of the weight."""
        return self.weight.shape[0]

    @property
    def in_features(self) -> int:
        """Columns of the weight."""
        return self.weight.shape[1]

    @property
    def nbytes(self) -> int:
        """Bytes of the weight."""
        return self.weight.nbytes


@dataclass(frozen=True)
class QuantisedLinear:
    """A weight of 8 or 4 bits, as ``kernels.quantised`` has it."""

    weight: QuantisedWeight

    @property
    def out_features(self) -> int:
        """Rows of the weight."""
        return self.weight.out_features

    @property
    def in_features(self) -> int:
        """Columns of the weight."""
        return self.weight.in_features

    @property
    def nbytes(self) -> int:
        """Bytes of the numbers and their scales."""
        return self.weight.nbytes


def pack_dense(weight: torch.Tensor) -> DenseLinear:
    """A copy of ``weight [O, H]``."""
    return DenseLinear(weight.detach().clone())


def pack_quantised(weight: QuantisedWeight) -> QuantisedLinear:
    """A copy of ``weight``."""
    copy = QuantisedWeight(
        weight.data.clone(), weight.scales.clone(), weight.scheme, weight.group_size
    )
    return QuantisedLinear(copy)


def run_linear(
    out: torch.Tensor,
    x: torch.Tensor,
    packed: DenseLinear | QuantisedLinear,
    *,
    batch_invariant: bool,
) -> None:
    """``out [T, O] = x [T, H] @ weight.T``; see ``Ops.linear``."""
    if isinstance(packed, DenseLinear):
        linear(out, x, packed.weight, batch_invariant=batch_invariant)
        return
    weight = packed.weight
    by_row = weight.scheme is Scheme.FP8_ROW
    float8 = (by_row or weight.scheme is Scheme.FP8_BLOCK) and multiplies_e4m3(x.device)
    if not float8 or (len(x) <= MAX_STREAM_ROWS and not batch_invariant):
        linear_stream(out, x, weight, batch_invariant=batch_invariant)
    elif by_row:
        numbers, scales = quantise_rows(x)
        linear_fp8_row(
            out, numbers, scales, weight.data, weight.scales, batch_invariant=batch_invariant
        )
    else:
        numbers, scales = quantise_groups(x)
        linear_fp8_block(
            out, numbers, scales, weight.data, weight.scales, batch_invariant=batch_invariant
        )
