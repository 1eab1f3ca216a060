"""Weights of 8 and 4 bits as checkpoints hold them, and what they stand for.

Letters: ``O`` output features, ``H`` input features, ``G`` the group size.

=============  =========================================  ==================================
scheme         ``data``                                   ``scales``
=============  =========================================  ==================================
FP8_ROW        ``[O, H]`` float8_e4m3fn                   ``[O]`` float32
FP8_BLOCK      ``[O, H]`` float8_e4m3fn                   ``[ceil(O/G), ceil(H/G)]`` float32
INT8_ROW       ``[O, H]`` int8                            ``[O]`` float32
INT4_GROUP     ``[O, H/2]`` uint8, see below              ``[O, ceil(H/G)]``
=============  =========================================  ==================================

Each number stands for ``data * scale``. Two numbers of 4 bits share a byte: byte ``j`` of a row
holds element ``2j`` in its low half and ``2j + 1`` in its high half, each plus 8, so that -8 is 0
and 7 is 15. That is also how eight of them lie in the 32-bit words of compressed-tensors on a
machine with the low byte first.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

import torch

from kernels.interface import KernelError

__all__ = ["QuantisedWeight", "Scheme", "check_quantised", "dequantise", "unpack_int4"]

_GROUPS = (32, 64, 128, 256)
_SCALES = (torch.float32, torch.bfloat16, torch.float16)


class Scheme(Enum):
    """What a weight's numbers are, and which of them share a scale."""

    FP8_ROW = "fp8_row"
    FP8_BLOCK = "fp8_block"
    INT8_ROW = "int8_row"
    INT4_GROUP = "int4_group"


_DATA = {
    Scheme.FP8_ROW: torch.float8_e4m3fn,
    Scheme.FP8_BLOCK: torch.float8_e4m3fn,
    Scheme.INT8_ROW: torch.int8,
    Scheme.INT4_GROUP: torch.uint8,
}


@dataclass(frozen=True)
class QuantisedWeight:
    """A weight matrix ``[O, H]`` in few bits; the module says which tensors a scheme has.

    Attributes:
        data: the numbers.
        scales: what they are multiplied by. Those of INT4_GROUP have any float dtype.
        scheme: what the two mean.
        group_size: of FP8_BLOCK 128; of INT4_GROUP 32, 64, 128 or 256; of the others 0.
    """

    data: torch.Tensor
    scales: torch.Tensor
    scheme: Scheme
    group_size: int = 0

    @property
    def out_features(self) -> int:
        """Rows of the weight, ``O``."""
        return self.data.shape[0]

    @property
    def in_features(self) -> int:
        """Columns of the weight, ``H``."""
        return self.data.shape[1] * (2 if self.scheme is Scheme.INT4_GROUP else 1)

    @property
    def nbytes(self) -> int:
        """Bytes of the numbers and their scales."""
        return self.data.nbytes + self.scales.nbytes


def check_quantised(weight: QuantisedWeight) -> tuple[int, int]:
    """Raise KernelError unless all tensors are as the scheme has them; give (O, H)."""
    data, scales, scheme, group = weight.data, weight.scales, weight.scheme, weight.group_size
    if data.dim() != 2 or data.shape[0] < 1 or data.shape[1] < 1:
        raise KernelError(f"pack_quantised: data must be [O,H], got shape {list(data.shape)}")
    rows, width = weight.out_features, weight.in_features
    right: tuple[int, ...] = (0,)
    shape: tuple[int, ...] = (rows,)
    if scheme is Scheme.FP8_BLOCK:
        right, shape = (128,), (-(-rows // 128), -(-width // 128))
    elif scheme is Scheme.INT4_GROUP:
        right, shape = _GROUPS, (rows, -(-width // max(1, group)))
    if group not in right:
        raise KernelError(
            f"pack_quantised: group_size of {scheme.value} must be one of "
            f"{', '.join(map(str, right))}, got {group}"
        )
    dtypes = _SCALES if scheme is Scheme.INT4_GROUP else _SCALES[:1]
    _check("data", data, tuple(data.shape), (_DATA[scheme],))
    _check("scales", scales, shape, dtypes)
    if data.device != scales.device:
        raise KernelError(f"pack_quantised: data is on {data.device}, scales on {scales.device}")
    return rows, width


def _check(
    name: str, tensor: torch.Tensor, shape: tuple[int, ...], dtypes: tuple[torch.dtype, ...]
) -> None:
    if tensor.dtype in dtypes and tuple(tensor.shape) == shape and tensor.is_contiguous():
        return
    kinds = " or ".join(str(dtype) for dtype in dtypes)
    raise KernelError(
        f"pack_quantised: {name} must be a contiguous {kinds} {list(shape)}, "
        f"got {tensor.dtype} {list(tensor.shape)} with strides {list(tensor.stride())}"
    )


def unpack_int4(data: torch.Tensor) -> torch.Tensor:
    """The numbers -8..7 of ``data [O, H/2]`` uint8: int8 ``[O, H]``."""
    halves = torch.stack((data & 0xF, data >> 4), dim=2)  # [O, H/2, 2]
    return halves.flatten(1).to(torch.int8) - 8


def dequantise(weight: QuantisedWeight, dtype: torch.dtype) -> torch.Tensor:
    """What the weight stands for: ``[O, H]`` of ``dtype``.

    The products are exact for float64; for others they are rounded to float32 (which changes none
    whose scale has 16 bits) and then to ``dtype``.
    """
    data, scales, group = weight.data, weight.scales, weight.group_size
    wide = torch.float64 if dtype is torch.float64 else torch.float32
    if weight.scheme is Scheme.INT4_GROUP:
        data = unpack_int4(data)
    if weight.scheme is Scheme.FP8_BLOCK:
        scales = scales.repeat_interleave(group, 0)[: data.shape[0]]
    scales = scales.view(data.shape[0], -1).to(wide)
    out = torch.empty(data.shape, dtype=dtype, device=data.device)
    columns = group or data.shape[1]
    for index, start in enumerate(range(0, data.shape[1], columns)):
        part = data[:, start : start + columns].to(wide)
        out[:, start : start + columns] = part.mul_(scales[:, index : index + 1])
    return out
