"""Read one safetensors file through a memory map.

Format: eight bytes with the header's length (little endian), the header in JSON with each tensor's
dtype, shape and byte range, then the data (https://huggingface.co/docs/safetensors). Nothing in it
is ever executed. The header is checked against the file's size before any tensor is touched, since
reading a map beyond the end of a truncated file kills the process.
"""

from __future__ import annotations

import json
import math
import mmap
from pathlib import Path
from typing import Any, NamedTuple

import torch

from engine.errors import CheckpointError

__all__ = ["TensorFile"]

_DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}
_ITEM_BYTES = {
    "BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1, "I16": 2, "U16": 2,
    "F16": 2, "BF16": 2, "I32": 4, "U32": 4, "F32": 4, "I64": 8, "U64": 8, "F64": 8,
}  # fmt: skip
_MAX_HEADER_BYTES = 100_000_000  # the format's own limit


class _Entry(NamedTuple):
    dtype: str
    shape: tuple[int, ...]
    begin: int
    """First byte, counted from the start of the file."""
    end: int


class TensorFile:
    """The tensors of one file, mapped and read only as they are asked for.

    Raises CheckpointError when the file is missing, damaged or truncated.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            with path.open("rb") as file:
                size = file.seek(0, 2)
                file.seek(0)
                data_start, header = _read_header(path, file.read(8), size, file)
                # A private map, so that torch gets a buffer that it may think is writable.
                self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        except FileNotFoundError:
            raise CheckpointError(f"{path}, a part of the weights, does not exist") from None
        except OSError as error:
            raise CheckpointError(f"{path} cannot be read: {error.strerror}") from error
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

    def view(self, name: str) -> torch.Tensor:
        """The tensor, on the map itself: read it, do not keep it."""
        entry, dtype = self._entries[name], self.dtype(name)
        count = math.prod(entry.shape)
        if count == 0:
            return torch.empty(entry.shape, dtype=dtype)
        return torch.frombuffer(self._map, dtype=dtype, count=count, offset=entry.begin).view(
            entry.shape
        )

    def release(self, name: str) -> None:
        """Give the tensor's pages back to the system; they are read again when touched again."""
        entry = self._entries[name]
        begin = entry.begin // mmap.PAGESIZE * mmap.PAGESIZE
        if hasattr(mmap, "MADV_DONTNEED") and entry.end > begin:
            self._map.madvise(mmap.MADV_DONTNEED, begin, entry.end - begin)


def _read_header(path: Path, prefix: bytes, size: int, file: Any) -> tuple[int, dict[str, Any]]:
    """Where the data starts, and the header."""
    length = int.from_bytes(prefix, "little")
    if len(prefix) < 8 or length > min(size - 8, _MAX_HEADER_BYTES):
        raise CheckpointError(
            f"{path} is not a safetensors file or is truncated: its header would be {length} "
            f"bytes long and the file has {size}"
        )
    try:
        header = json.loads(file.read(length))
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
