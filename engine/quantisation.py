"""Weights to 8 and 4 bits, by the largest of the numbers that share a scale.

The scale is that number divided by the largest the type has: 448 for e4m3, 127 for 8-bit and 7 for
4-bit integers; 1 where all are zero. It is rounded to the type it is stored in first, then each
weight is divided by it and the quotient rounded to nearest, ties to even. Both are done in float64,
where the quotient of two float32 numbers is never so near to a tie that its own rounding counts.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import NamedTuple

import torch

from engine.config import Quantization
from kernels import QuantisedWeight, Scheme, dequantise

__all__ = ["INT4_GROUP_SIZE", "SCHEMES", "QuantisationError", "error_of", "fits", "quantise"]

SCHEMES: Mapping[Quantization, Scheme] = MappingProxyType(
    {
        Quantization.FP8: Scheme.FP8_ROW,
        Quantization.INT8: Scheme.INT8_ROW,
        Quantization.INT4: Scheme.INT4_GROUP,
    }
)
"""What each choice makes of a matrix."""

INT4_GROUP_SIZE = 128
"""Elements of a row that share a scale of 4-bit integers."""

_LARGEST = {Scheme.FP8_ROW: 448.0, Scheme.INT8_ROW: 127.0, Scheme.INT4_GROUP: 7.0}
_ROWS = 1 << 22
"""Elements that are float64 at a time."""


class QuantisationError(NamedTuple):
    """How far a quantised matrix is from its original."""

    relative_rms: float
    """Root of the summed squares of the errors, over that of the weights."""
    largest: float
    """Largest error of any weight."""


def fits(scheme: Scheme, in_features: int) -> bool:
    """Whether a matrix of this width can be quantised so: whole groups only."""
    return scheme is not Scheme.INT4_GROUP or in_features % INT4_GROUP_SIZE == 0


def quantise(weight: torch.Tensor, scheme: Scheme) -> QuantisedWeight:
    """``weight [O, H]`` in fewer bits, on its device.

    Args:
        weight: float32, bfloat16 or float16, finite.
        scheme: FP8_ROW, INT8_ROW (scales float32) or INT4_GROUP (scales bfloat16).
    """
    out_features, in_features = weight.shape
    group = INT4_GROUP_SIZE if scheme is Scheme.INT4_GROUP else 0
    columns = group or in_features
    scale_dtype = torch.bfloat16 if scheme is Scheme.INT4_GROUP else torch.float32
    step = max(1, _ROWS // in_features)
    data, scales = [], []
    for start in range(0, out_features, step):
        exact = weight[start : start + step].to(torch.float64)
        rows = exact.view(len(exact), -1, columns)
        scale = rows.abs().amax(2) / _LARGEST[scheme]  # [rows, groups]
        scale = torch.where(scale > 0, scale, 1.0).to(torch.float32).to(scale_dtype)
        # The scale of numbers near the least that a float can hold would be zero.
        scale = scale.clamp(min=torch.finfo(scale_dtype).tiny)
        quotient = (rows / scale.to(torch.float64)[:, :, None]).flatten(1)
        data.append(_round(quotient, scheme))
        scales.append(scale)
    all_scales = torch.cat(scales)
    return QuantisedWeight(
        torch.cat(data),
        all_scales if group else all_scales.flatten(),
        scheme,
        group,
    )


def _round(quotient: torch.Tensor, scheme: Scheme) -> torch.Tensor:
    """Float64 ``[rows, H]`` to the numbers of a scheme."""
    largest = _LARGEST[scheme]
    if scheme is Scheme.FP8_ROW:
        # The step between neighbours of size 2^e is 2^(e-3), below 2^-6 always 2^-9.
        exponent = torch.frexp(quotient).exponent.sub(1).clamp(min=-6)
        step = torch.ldexp(torch.ones_like(quotient), exponent - 3)
        rounded = (quotient / step).round().mul(step).clamp(-largest, largest)
        return rounded.to(torch.float32).to(torch.float8_e4m3fn)
    numbers = quotient.round().clamp(-largest, largest).to(torch.int8)
    if scheme is Scheme.INT8_ROW:
        return numbers
    codes = (numbers + 8).to(torch.uint8)
    return codes[:, ::2] | codes[:, 1::2] << 4


def error_of(weight: torch.Tensor, quantised: QuantisedWeight) -> QuantisationError:
    """What is lost of ``weight [O, H]``."""
    exact = weight.to(torch.float64)
    difference = dequantise(quantised, torch.float64) - exact
    size = exact.norm().item()
    return QuantisationError(
        difference.norm().item() / size if size else 0.0, difference.abs().max().item()
    )
