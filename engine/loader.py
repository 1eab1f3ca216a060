"""Checkpoint directory -> weights in their stored type, one tensor at a time.

Single or sharded safetensors, never pickle. A quantised matrix comes as one where it is asked for
as a linear layer's, and as the numbers it stands for where it is asked for as any other tensor.
Each tensor is read straight into its place, merged with its neighbours where the model multiplies
by them together, and converted a piece at a time, so that memory peaks near the model's own size.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from engine.adapter import Adapter
from engine.errors import CheckpointError
from engine.json_file import read_json
from engine.quantisation import fits, quantise
from engine.quantised_tensors import join_rows, read_quantised, scales_name
from engine.quantization_config import StoredQuantization
from engine.tensor_file import TensorFile
from kernels import QuantisedWeight, Scheme, dequantise

__all__ = ["WeightSource", "open_checkpoint"]

_EXPONENTS = {
    torch.bfloat16: (torch.int16, 0x7F80),
    torch.float16: (torch.int16, 0x7C00),
    torch.float32: (torch.int32, 0x7F800000),
}
"""Integer type of the same size, and the bits of the exponent (IEEE 754)."""
_HEAD = "lm_head.weight"
_SINGLE = "model.safetensors"
_INDEX = "model.safetensors.index.json"


class WeightSource:
    """The tensors of a checkpoint, each to be taken once.

    Args:
        directory: holds ``model.safetensors`` or ``model.safetensors.index.json`` and its shards.
        dtype: type of the tensors given out; None: the type of the first tensor asked for.
        device: where they are put.
        on_progress: called with the fraction of bytes taken, 0 to 1.
        adapter: added to the weights as they are taken.
        stored: how the checkpoint's matrices are quantised, if they are.
        wanted: what linear layers' matrices are quantised to as they are taken, but the head's.

    Raises CheckpointError when a file is missing, damaged, truncated, or not where the index says.
    """

    def __init__(
        self,
        directory: Path,
        dtype: torch.dtype | None = None,
        device: torch.device | str = "cpu",
        on_progress: Callable[[float], None] | None = None,
        adapter: Adapter | None = None,
        stored: StoredQuantization | None = None,
        wanted: Scheme | None = None,
    ) -> None:
        self._directory = directory
        self._adapter = adapter
        self._stored = stored
        self._wanted = wanted
        self._files = open_checkpoint(directory)
        self._dtype = dtype
        self._device = torch.device(device)
        self._on_progress = on_progress or (lambda fraction: None)
        self._total_bytes = sum(file.nbytes(name) for name, file in self._files.items())
        self._taken_bytes = 0
        self._taken: set[str] = set()

    def __contains__(self, name: str) -> bool:
        return name in self._files

    @property
    def dtype(self) -> torch.dtype:
        """Type of the tensors given out."""
        if self._dtype is None:
            raise CheckpointError(f"{self._directory} names no dtype and no tensor was read yet")
        return self._dtype

    def take(self, name: str, shape: Sequence[int]) -> torch.Tensor:
        """A contiguous copy of one tensor.

        Raises CheckpointError when it is missing, has another shape, an unsupported type, or holds
        a value that is not finite in the wanted type.
        """
        return self.take_rows([name], [shape])

    def take_rows(self, names: Sequence[str], shapes: Sequence[Sequence[int]]) -> torch.Tensor:
        """Several tensors, one below the other: equal shapes but for the first dimension.

        Raises CheckpointError as ``take`` does.
        """
        if self._dtype is None:
            quantised = self._is_quantised(names[0])
            file = None if quantised else self._find(names[0], shapes[0])
            self._dtype = torch.bfloat16 if file is None else file.dtype(names[0])
        num_rows = sum(shape[0] for shape in shapes)
        merged = torch.empty((num_rows, *shapes[0][1:]), dtype=self._dtype, device=self._device)
        row = 0
        for name, shape in zip(names, shapes, strict=True):
            part = merged[row : row + shape[0]]
            if quantised := self._is_quantised(name):
                part.copy_(dequantise(self._take_quantised(name, shape), part.dtype))
            else:
                self._copy(name, self._find(name, shape), part)
            if self._adapter is not None:
                exact = not quantised and self._files[name].dtype(name) is part.dtype
                self._adapter.add_to(name, part, exact=exact)
            row += shape[0]
            if not quantised:
                self._done(name)
        return merged

    def take_linear(
        self, names: Sequence[str], outs: Sequence[int], in_features: int
    ) -> torch.Tensor | QuantisedWeight:
        """The matrix ``[sum(outs), in_features]`` of a linear layer, its rows from these tensors.

        Quantised if all of them are and none gets an adapter's part, or if it was asked for. An
        adapter's part is added before the matrix is quantised.

        Raises CheckpointError as ``take`` does.
        """
        shapes = [(out, in_features) for out in outs]
        if self._adapter is None and all(self._is_quantised(name) for name in names):
            parts = [self._take_quantised(*one) for one in zip(names, shapes, strict=True)]
            joined = join_rows(parts)
            if joined is not None:
                return joined
        weight = self.take_rows(names, shapes)
        scheme = self._wanted
        if scheme is None or _HEAD in names or not fits(scheme, in_features):
            return weight
        return quantise(weight, scheme)

    def take_scales(self, names: Sequence[str], count: int) -> torch.Tensor:
        """One positive scale for each of ``count`` heads: float32 ``[count]``.

        From the first of these tensors that is there, which holds one for each or one for all; ones
        where none is. Raises CheckpointError when what is there is no such tensor.
        """
        name = next((name for name in names if name in self._files), None)
        if name is None:
            return torch.ones(count, device=self._device)
        file = self._files[name]
        if math.prod(file.shape(name)) not in (1, count):
            raise CheckpointError(
                f"{file.path}: tensor {name} has shape {list(file.shape(name))}; it must be one "
                f"scale, or one for each of {count} heads"
            )
        scales = file.whole(name, ("BF16", "F16", "F32")).to(torch.float32).flatten()
        if not bool((torch.isfinite(scales) & (scales > 0)).all()):
            raise CheckpointError(f"{file.path}: tensor {name} holds scales that are not positive")
        self._done(name)
        return scales.expand(count).contiguous().to(self._device)

    def skip(self, name: str) -> None:
        """Leave a tensor out on purpose, if it is there."""
        if name in self._files:
            self._done(name)

    def finish(self) -> None:
        """Forget the files. Raises CheckpointError if tensors were left over."""
        left = sorted(self._files.keys() - self._taken)
        if left:
            more = f" and {len(left) - 3} more" if len(left) > 3 else ""
            raise CheckpointError(
                f"{self._files[left[0]].path} holds tensors that the model does not have: "
                f"{', '.join(left[:3])}{more}; config.json and the weights do not belong together"
            )
        if self._adapter is not None:
            self._adapter.finish()
        self._files = {}
        self._on_progress(1.0)

    def _find(self, name: str, shape: Sequence[int]) -> TensorFile:
        file = self._files.get(name)
        if file is None:
            raise CheckpointError(f"{self._directory}: tensor {name} {list(shape)} is missing")
        if file.shape(name) != tuple(shape):
            raise CheckpointError(
                f"{file.path}: tensor {name} has shape {list(file.shape(name))}; "
                f"by config.json it must be {list(shape)}"
            )
        return file

    def _copy(self, name: str, file: TensorFile, out: torch.Tensor) -> None:
        """Read one tensor into ``out``, converting and checking each piece."""
        stored = file.dtype(name)
        in_place = stored is out.dtype and out.device.type == "cpu"
        flat, start = out.view(-1), 0
        for piece in file.chunks(name, out if in_place else None):
            converted = piece.to(out.dtype)
            if not _is_finite(converted):
                hint = "" if stored is out.dtype else f" as {out.dtype} (stored as {stored})"
                raise CheckpointError(
                    f"{file.path}: tensor {name} holds values that are not finite{hint}"
                )
            if not in_place:
                flat[start : start + len(piece)].copy_(converted)
            start += len(piece)

    def _is_quantised(self, name: str) -> bool:
        return self._stored is not None and scales_name(name, self._stored) in self._files

    def _take_quantised(self, name: str, shape: Sequence[int]) -> QuantisedWeight:
        assert self._stored is not None
        rows, width = shape
        weight, parts = read_quantised(self._files, name, (rows, width), self._stored)
        for part in parts:
            self._done(part)
        data, scales = weight.data.to(self._device), weight.scales.to(self._device)
        return QuantisedWeight(data, scales, weight.scheme, weight.group_size)

    def _done(self, name: str) -> None:
        if name not in self._taken:
            self._taken.add(name)
            self._taken_bytes += self._files[name].nbytes(name)
            self._on_progress(self._taken_bytes / max(1, self._total_bytes))


def _is_finite(piece: torch.Tensor) -> bool:
    """Whether no exponent has all its bits set; torch's own test is 20 times slower."""
    integer, exponent = _EXPONENTS[piece.dtype]
    bits = piece.view(integer).numpy()
    return not len(bits) or int((bits & bits.dtype.type(exponent)).max()) != exponent


def open_checkpoint(directory: Path) -> dict[str, TensorFile]:
    """The file of every tensor.

    Raises CheckpointError when a file is missing, damaged, or not where the index says.
    """
    if (directory / _SINGLE).exists():
        file = TensorFile(directory / _SINGLE)
        return dict.fromkeys(file.names, file)
    if (directory / _INDEX).exists():
        return _open_shards(directory, directory / _INDEX)
    suffixes = (".bin", ".pt", ".pth", ".safetensors")
    others = sorted(path.name for path in directory.glob("*") if path.suffix in suffixes)
    found = f"; found {', '.join(others[:4])}, which are not read" if others else ""
    raise CheckpointError(f"{directory} holds neither {_SINGLE} nor {_INDEX}{found}")


def _open_shards(directory: Path, index: Path) -> dict[str, TensorFile]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index}: weight_map must be an object of tensor and file names")
    shards: dict[str, TensorFile] = {}
    for name, shard in weight_map.items():
        # A name with a directory in it could make us read any file of the machine.
        if not isinstance(shard, str) or Path(shard).name != shard or shard in ("", ".", ".."):
            raise CheckpointError(
                f"{index}: weight_map puts {name} in {shard!r}; it must be a file name"
            )
        if shard not in shards:
            shards[shard] = TensorFile(directory / shard)
        if name not in shards[shard]:
            raise CheckpointError(f"{index} puts tensor {name} in {shard}, which does not hold it")
    return {name: file for file in shards.values() for name in file.names}
