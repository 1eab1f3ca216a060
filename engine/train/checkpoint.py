"""Checkpoints of a training run: one safetensors file and one JSON file, swapped in atomically."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

__all__ = ["load_checkpoint", "save_checkpoint", "write_atomically"]


def write_atomically(path: Path, data: bytes) -> None:
    """Replaces `path` by `data` so that a reader sees the old file or the new one, never a part."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".part")
    temporary.write_bytes(data)
    os.replace(temporary, path)


def save_checkpoint(directory: Path, tensors: dict[str, Tensor], state: dict[str, Any]) -> None:
    """Writes tensors and plain state.

    The JSON file goes last and names the tensor file it belongs to, so that a kill between the
    two leaves the previous pair in force.
    """
    directory.mkdir(parents=True, exist_ok=True)
    name = f"step-{state['step']:08d}.safetensors"
    save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, directory / name)
    document = json.dumps({**state, "tensors": name})
    write_atomically(directory / "state.json", document.encode())
    for other in directory.glob("step-*.safetensors"):
        if other.name != name:
            other.unlink()


def load_checkpoint(directory: Path) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
    """The latest checkpoint of `directory`, or None if it has none."""
    path = directory / "state.json"
    if not path.exists():
        return None
    state = json.loads(path.read_text(encoding="utf-8"))
    return load_file(directory / state.pop("tensors")), state
