"""The tensors of a checkpoint that stand for one quantised matrix ``X.weight [O, H]``.

============  ======================================================  ============================
layout        numbers                                                 scales
============  ======================================================  ============================
FLOAT         ``X.weight`` F8_E4M3 ``[O, H]``                         ``X.weight_scale`` ``[O, 1]``
INT           ``X.weight`` I8 ``[O, H]``                              ``X.weight_scale`` ``[O, 1]``
PACKED        ``X.weight_packed`` I32 ``[O, ceil(H/8)]``, eight to    ``X.weight_scale``
              a word, the first lowest, each plus 8;                  ``[O, H/G]``
              ``X.weight_shape`` I64: ``O, H``
FP8_BLOCKS    ``X.weight`` F8_E4M3 ``[O, H]``                         ``X.weight_scale_inv``
                                                                      ``[ceil(O/128), ceil(H/128)]``
============  ======================================================  ============================

Scales are BF16, F16 or F32; of FLOAT and INT one number for the whole matrix is read, too.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from engine.errors import CheckpointError
from engine.quantization_config import Layout, StoredQuantization
from engine.tensor_file import TensorFile
from kernels import QuantisedWeight, Scheme

__all__ = ["join_rows", "layout_of", "read_quantised", "scales_name", "tensors_of"]

_SCALES = ("BF16", "F16", "F32")
_LAYOUTS = {
    Scheme.FP8_ROW: Layout.FLOAT,
    Scheme.INT8_ROW: Layout.INT,
    Scheme.INT4_GROUP: Layout.PACKED,
}
_NAN = 0x7F  # of e4m3, but for the sign; it has no infinities


def layout_of(scheme: Scheme) -> Layout:
    """The layout in which a matrix of this scheme is written."""
    return _LAYOUTS[scheme]


def scales_name(name: str, quantization: StoredQuantization) -> str:
    """Where the scales of ``X.weight`` lie; it is quantised exactly if that tensor is there."""
    return f"{name}_scale_inv" if quantization.layout is Layout.FP8_BLOCKS else f"{name}_scale"


def read_quantised(
    files: Mapping[str, TensorFile],
    name: str,
    shape: tuple[int, int],
    quantization: StoredQuantization,
) -> tuple[QuantisedWeight, list[str]]:
    """The matrix ``X.weight``, and the names of the tensors it was made of.

    Args:
        files: the file of each tensor.
        name: of the matrix.
        shape: that it must have.
        quantization: how it is stored.

    Raises CheckpointError when a tensor is missing, of another type or shape, or not finite.
    """
    reader = _Reader(files, shape)
    rows, width = shape
    scales_at = scales_name(name, quantization)
    layout = quantization.layout
    if layout is Layout.PACKED:
        data = _read_packed(reader, name)
        groups = (rows, -(-width // quantization.group_size))
        scales = reader.take(scales_at, _SCALES, groups)
        _check_scales(reader, scales_at, scales)
        if width % quantization.group_size:
            raise CheckpointError(
                f"{reader.files[scales_at].path}: {name} has {width} columns, which is no multiple "
                f"of group_size {quantization.group_size}"
            )
        weight = QuantisedWeight(data, scales, Scheme.INT4_GROUP, quantization.group_size)
        return weight, reader.taken
    data = reader.take(name, ("I8",) if layout is Layout.INT else ("F8_E4M3",), shape)
    if layout is not Layout.INT and bool(((data.view(torch.uint8) & _NAN) == _NAN).any()):
        raise CheckpointError(f"{files[name].path}: tensor {name} holds values that are not finite")
    if layout is Layout.FP8_BLOCKS:
        blocks = (-(-rows // 128), -(-width // 128))
        scales = reader.take(scales_at, _SCALES, blocks).to(torch.float32)
        _check_scales(reader, scales_at, scales)
        return QuantisedWeight(data, scales, Scheme.FP8_BLOCK, 128), reader.taken
    scales = reader.take(scales_at, _SCALES, (rows, 1), (1,), ()).to(torch.float32)
    _check_scales(reader, scales_at, scales)
    scheme = Scheme.INT8_ROW if layout is Layout.INT else Scheme.FP8_ROW
    return QuantisedWeight(data, scales.flatten().expand(rows).contiguous(), scheme), reader.taken


class _Reader:
    """Takes tensors and checks them."""

    def __init__(self, files: Mapping[str, TensorFile], shape: tuple[int, int]) -> None:
        self.files = files
        self.shape = shape
        self.taken: list[str] = []

    def take(self, name: str, stored: Sequence[str], *shapes: tuple[int, ...]) -> torch.Tensor:
        """A tensor of one of these types and shapes."""
        file = self.files.get(name)
        if file is None:
            raise CheckpointError(f"tensor {name} of a quantised matrix is missing")
        if file.shape(name) not in shapes:
            raise CheckpointError(
                f"{file.path}: tensor {name} has shape {list(file.shape(name))}; by config.json "
                f"it must be {' or '.join(str(list(shape)) for shape in shapes)}"
            )
        self.taken.append(name)
        return file.whole(name, stored)


def _read_packed(reader: _Reader, name: str) -> torch.Tensor:
    """The numbers of a PACKED matrix, two to a byte."""
    rows, width = reader.shape
    packed_at, shape_at = f"{name}_packed", f"{name}_shape"
    words = reader.take(packed_at, ("I32",), (rows, -(-width // 8)))
    stated = reader.take(shape_at, ("I64", "I32"), (2,)).tolist()
    if stated != [rows, width]:
        raise CheckpointError(
            f"{reader.files[shape_at].path}: {shape_at} is {stated}; by config.json it must be "
            f"{[rows, width]}"
        )
    return words.view(torch.uint8)[:, : width // 2].contiguous()


def _check_scales(reader: _Reader, name: str, scales: torch.Tensor) -> None:
    if not bool(torch.isfinite(scales).all()):
        raise CheckpointError(
            f"{reader.files[name].path}: tensor {name} holds values that are not finite"
        )


def join_rows(parts: Sequence[QuantisedWeight]) -> QuantisedWeight | None:
    """One matrix of the rows of several; None if their schemes or blocks do not allow it."""
    first = parts[0]
    if any((one.scheme, one.group_size) != (first.scheme, first.group_size) for one in parts):
        return None
    if first.scheme is Scheme.FP8_BLOCK and any(one.out_features % 128 for one in parts[:-1]):
        return None
    if any(one.scales.dtype is not first.scales.dtype for one in parts):
        return None
    return QuantisedWeight(
        torch.cat([one.data.view(torch.uint8) for one in parts]).view(first.data.dtype),
        torch.cat([one.scales for one in parts]),
        first.scheme,
        first.group_size,
    )


def tensors_of(name: str, weight: QuantisedWeight) -> dict[str, torch.Tensor]:
    """What to write for the matrix ``name``, in the layout of its scheme."""
    if weight.scheme is not Scheme.INT4_GROUP:
        return {name: weight.data, f"{name}_scale": weight.scales[:, None]}
    shape = torch.tensor([weight.out_features, weight.in_features])
    return {
        f"{name}_packed": weight.data.view(torch.int32),
        f"{name}_scale": weight.scales,
        f"{name}_shape": shape,
    }
