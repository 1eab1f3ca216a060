"""Read one safetensors file.

Format: eight bytes with the header's length (little endian), the header in JSON with each tensor's
dtype, shape and byte range, then the data (https://huggingface.co/docs/safetensors). Nothing in it
is ever executed.

Bytes are read straight to where they are wanted. A memory map would cost a page fault every 4 KiB
(measured: 20 times the time in a virtual machine) and would kill the process if the file shrank.
"""

from __future__ import annotations

import json
import math
import os
import weakref
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from engine.errors import CheckpointError

__all__ = ["TensorFile"]

_DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}
_RAW_DTYPES = {
    **_DTYPES,
    "F8_E4M3": torch.float8_e4m3fn,
    "I8": torch.int8,
    "I32": torch.int32,
    "I64": torch.int64,
}
_ITEM_BYTES = {
    "BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1, "I16": 2, "U16": 2,
    "F16": 2, "BF16": 2, "I32": 4, "U32": 4, "F32": 4, "I64": 8, "U64": 8, "F64": 8,
}  # fmt: skip
_CHUNK = 1 << 18
"""Elements read at a time, few enough to be checked and converted in the processor's cache."""
_MAX_HEADER_BYTES = 100_000_000  # the format's own limit


class _Entry(NamedTuple):
    dtype: str
    shape: tuple[int, ...]
    begin: int
    """First byte, counted from the start of the file."""
    end: int


class TensorFile:
    """The tensors of one file, which stays open, and the same, while this object lives.

    Raises CheckpointError when the file is missing, damaged or truncated.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._fd = os.open(path, os.O_RDONLY)
            weakref.finalize(self, os.close, self._fd)
            size = os.fstat(self._fd).st_size
            data_start, header = _read_header(path, self._fd, size)
        except FileNotFoundError:
            raise CheckpointError(f"{path}, a part of the weights, does not exist") from None
        except OSError as error:
            raise CheckpointError(f"{path} cannot be read: {error.strerror}") from error
        stated = header.get("__metadata__")
        self.metadata: dict[str, Any] = stated if isinstance(stated, dict) else {}
        """What the writer noted; by the format, strings."""
        self._entries = {
            name: _read_entry(path, name, entry, data_start, size)
            for name, entry in header.items()
            if name != "__metadata__"
        }

    def __contains__(self, name: str) -> bool:
        return name in self._entries

    @property
    def names(self) -> list[str]:
        """Names of all tensors."""
        return list(self._entries)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor."""
        return self._entries[name].shape

    def nbytes(self, name: str) -> int:
        """Bytes of a tensor in the file."""
        return self._entries[name].end - self._entries[name].begin

    def dtype(self, name: str) -> torch.dtype:
        """Stored type of a tensor, one of bfloat16, float16, float32.

        Raises CheckpointError for any other.
        """
        stored = self._entries[name].dtype
        if stored not in _DTYPES:
            raise CheckpointError(
                f"{self.path}: tensor {name} is stored as {stored}; "
                f"supported are {', '.join(sorted(_DTYPES))}"
            )
        return _DTYPES[stored]

    def whole(self, name: str, stored: Sequence[str]) -> torch.Tensor:
        """A tensor as it is stored, in memory of its own.

        Args:
            name: of the tensor.
            stored: the types that are right, as the format names them: BF16, F16, F32, F8_E4M3, I8,
                I32 or I64.

        Raises CheckpointError when it has another one, or the file cannot be read any more.
        """
        entry = self._entries[name]
        if entry.dtype not in stored:
            raise CheckpointError(
                f"{self.path}: tensor {name} is stored as {entry.dtype}; "
                f"it must be {' or '.join(stored)}"
            )
        tensor = torch.empty(entry.shape, dtype=_RAW_DTYPES[entry.dtype])
        if tensor.numel():
            self._read(tensor.view(-1), entry.begin)
        return tensor

    def chunks(self, name: str, into: torch.Tensor | None = None) -> Iterator[torch.Tensor]:
        """The tensor's elements in order, a piece at a time, one-dimensional, in its stored type.

        Args:
            name: of the tensor.
            into: memory for all of it, contiguous, on the CPU and of the stored type, which the
                pieces are then parts of; None: all pieces lie in one buffer, one after the other.

        Raises CheckpointError when the file cannot be read any more.
        """
        entry, dtype = self._entries[name], self.dtype(name)
        count = math.prod(entry.shape)
        buffer = torch.empty(min(count, _CHUNK), dtype=dtype) if into is None else into.view(-1)
        for start in range(0, count, _CHUNK):
            length = min(_CHUNK, count - start)
            first = 0 if into is None else start
            piece = buffer[first : first + length]
            self._read(piece, entry.begin + start * dtype.itemsize)
            yield piece

    def _read(self, piece: torch.Tensor, offset: int) -> None:
        view = piece.view(torch.uint8).numpy().data
        while view:
            try:
                count = os.preadv(self._fd, [view], offset)
            except OSError as error:
                raise CheckpointError(f"{self.path} cannot be read: {error.strerror}") from error
            if count == 0:
                raise CheckpointError(f"{self.path} became shorter while it was read")
            view, offset = view[count:], offset + count


def _read_header(path: Path, fd: int, size: int) -> tuple[int, dict[str, Any]]:
    """Where the data starts, and the header."""
    prefix = os.pread(fd, 8, 0)
    length = int.from_bytes(prefix, "little")
    if len(prefix) < 8 or length > min(size - 8, _MAX_HEADER_BYTES):
        raise CheckpointError(
            f"{path} is not a safetensors file or is truncated: its header would be {length} "
            f"bytes long and the file has {size}"
        )
    try:
        header = json.loads(os.pread(fd, length, 8))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: the header is not valid JSON: {error}") from error
    if not isinstance(header, dict):
        raise CheckpointError(f"{path}: the header must be a JSON object")
    return 8 + length, header


def _read_entry(path: Path, name: str, entry: Any, data_start: int, size: int) -> _Entry:
    """Check one tensor's description."""
    try:
        dtype, shape = str(entry["dtype"]), tuple(entry["shape"])
        begin, end = entry["data_offsets"]
        valid = all(type(n) is int and n >= 0 for n in (*shape, begin, end))
    except (KeyError, TypeError, ValueError):
        valid = False
    if not valid or dtype not in _ITEM_BYTES:
        raise CheckpointError(f"{path}: the header's entry for {name} is malformed: {entry!r:.200}")
    if end - begin != math.prod(shape) * _ITEM_BYTES[dtype]:
        raise CheckpointError(
            f"{path}: tensor {name} is {dtype} {list(shape)} but has {end - begin} bytes"
        )
    if data_start + end > size:
        raise CheckpointError(
            f"{path} is truncated: tensor {name} ends at byte {data_start + end} "
            f"and the file has {size}"
        )
    return _Entry(dtype, shape, data_start + begin, data_start + end)
