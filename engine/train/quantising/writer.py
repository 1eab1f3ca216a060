"""Writes the quantised checkpoint: the layout of compressed-tensors in shards of safetensors."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file

from engine.errors import CheckpointError
from engine.json_file import read_json
from engine.quantisation import INT4_GROUP_SIZE, QuantisationError, error_of, quantise
from engine.quantised_tensors import layout_of, tensors_of
from engine.quantization_config import StoredQuantization, compressed_tensors_config
from engine.tensor_file import TensorFile
from engine.train.tuning.weights import copy_companions
from kernels import Scheme

__all__ = ["read_matrix", "write_quantised"]

_FLOATS = ("BF16", "F16", "F32")
_INDEX = "model.safetensors.index.json"


def read_matrix(files: Mapping[str, TensorFile], name: str, shape: tuple[int, int]) -> torch.Tensor:
    """A matrix of the base, as it is stored.

    Raises CheckpointError when it is missing, of another shape or type, or not finite.
    """
    file = files.get(name)
    if file is None:
        raise CheckpointError(f"tensor {name} {list(shape)} is missing")
    if file.shape(name) != shape:
        raise CheckpointError(
            f"{file.path}: tensor {name} has shape {list(file.shape(name))}; by config.json it "
            f"must be {list(shape)}"
        )
    weight = file.whole(name, _FLOATS)
    if not bool(torch.isfinite(weight).all()):
        raise CheckpointError(f"{file.path}: tensor {name} holds values that are not finite")
    return weight


def write_quantised(
    base: Path,
    files: Mapping[str, TensorFile],
    out: Path,
    scheme: Scheme,
    chosen: Mapping[str, tuple[int, int]],
    ignored: list[str],
    *,
    max_shard_bytes: int,
    on_progress: Callable[[float], None] = lambda fraction: None,
) -> dict[str, QuantisationError]:
    """Writes weights, configuration, tokenizer and templates to `out`, an empty directory.

    Args:
        base: the checkpoint to quantise.
        files: the file of each of its tensors.
        out: where to write.
        scheme: of the matrices in `chosen`.
        chosen: names and shapes of the matrices to quantise; all else is copied.
        ignored: names of the other linear modules, for the configuration.
        max_shard_bytes: most bytes of tensors in a file, unless one matrix has more.
        on_progress: told the finished fraction.

    Returns what each matrix lost. Raises CheckpointError as `read_matrix` does.
    """
    copy_companions(base, out)
    (out / _INDEX).unlink(missing_ok=True)
    shards = _Shards(out, base / "config.json", max_shard_bytes)
    errors = {}
    for done, (name, file) in enumerate(files.items()):
        if name in chosen:
            weight = read_matrix(files, name, chosen[name])
            quantised = quantise(weight, scheme)
            errors[name] = error_of(weight, quantised)
            shards.add(tensors_of(name, quantised))
        else:
            shards.add({name: file.whole(name, (*_FLOATS, "I8", "I32", "I64"))})
        on_progress((done + 1) / len(files))
    shards.finish()
    stored = StoredQuantization(
        layout=layout_of(scheme), group_size=INT4_GROUP_SIZE if scheme is Scheme.INT4_GROUP else 0
    )
    config = read_json(base / "config.json")
    config["quantization_config"] = compressed_tensors_config(stored, ignored)
    text = json.dumps(config, indent=2, ensure_ascii=False) + "\n"
    (out / "config.json").write_text(text, encoding="utf-8")
    return errors


class _Shards:
    """Tensors go in, files of bounded size come out, with an index where there is more than one."""

    def __init__(self, out: Path, model_file: Path, max_bytes: int) -> None:
        self._out = out
        self._model_file = model_file  # whose permissions the files get
        self._max_bytes = max_bytes
        self._pending: dict[str, torch.Tensor] = {}
        self._written: list[list[str]] = []
        self._total_bytes = 0

    def add(self, tensors: dict[str, torch.Tensor]) -> None:
        """Tensors that belong into one file."""
        size = sum(tensor.nbytes for tensor in self._pending.values())
        size += sum(tensor.nbytes for tensor in tensors.values())
        if self._pending and size > self._max_bytes:
            self._write()
        self._pending.update(tensors)

    def finish(self) -> None:
        """Write the rest and give the files their names."""
        self._write()
        count = len(self._written)
        names = ["model.safetensors"]
        if count > 1:
            names = [f"model-{i + 1:05}-of-{count:05}.safetensors" for i in range(count)]
        for index, name in enumerate(names):
            self._part(index).rename(self._out / name)
        if count > 1:
            places = {
                key: name for name, own in zip(names, self._written, strict=True) for key in own
            }
            document = {"metadata": {"total_size": self._total_bytes}, "weight_map": places}
            text = json.dumps(document, indent=2) + "\n"
            (self._out / _INDEX).write_text(text, encoding="utf-8")

    def _part(self, index: int) -> Path:
        return self._out / f"part-{index}.safetensors"

    def _write(self) -> None:
        path = self._part(len(self._written))
        save_file(self._pending, path, metadata={"format": "pt"})
        shutil.copymode(self._model_file, path)  # the writer makes a file for its owner alone
        self._total_bytes += sum(tensor.nbytes for tensor in self._pending.values())
        self._written.append(list(self._pending))
        self._pending = {}
