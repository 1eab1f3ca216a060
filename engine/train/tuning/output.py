"""A tuned model -> a checkpoint directory laid out as its base: same files, shards and types."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import save_file

from engine.errors import ConfigError
from engine.train.model import Qwen3

__all__ = ["check_free", "whole_directory", "write_checkpoint", "write_record"]

_COPIED = ("*.json", "*.jinja", "tokenizer.model", "*.txt", "additional_chat_templates/*.jinja")
"""Configuration, tokenizer and templates; a base's own card and training record would mislead."""
_RECORD = "tune.json"


def check_free(out: Path, *, overwrite: bool) -> None:
    """Raises ConfigError where a run must not write."""
    if out.is_file():
        raise ConfigError(f"{out} is a file; --out names a directory")
    if out.exists() and any(out.iterdir()):
        if not overwrite:
            raise ConfigError(f"{out} is there already; give another --out, or --overwrite")
        if not (out / _RECORD).is_file():
            raise ConfigError(f"{out} was not made by tuning, so it is not overwritten")


@contextmanager
def whole_directory(out: Path) -> Iterator[Path]:
    """A directory beside `out` to write to, which becomes `out` when all of it is written."""
    part = out.with_name(out.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    try:
        yield part
        if out.exists():
            shutil.rmtree(out)
        part.rename(out)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def write_checkpoint(model: Qwen3, base: Path, out: Path) -> None:
    """Writes the model's weights in the files, names and types that the base has them in.

    What the model does not have (constants that old writers stored) is copied. One file is in
    memory at a time.
    """
    parameters = dict(model.named_parameters())
    if model.lm_head is None:
        parameters["lm_head.weight"] = model.model.embed_tokens.weight
    for path in sorted(base.glob("*.safetensors")):
        tensors = {}
        with safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118
                stored = file.get_tensor(name)
                if name in parameters:
                    tuned = parameters[name].detach().to(stored.dtype).cpu()
                    stored = tuned.clone() if name == "lm_head.weight" else tuned.contiguous()
                tensors[name] = stored
        save_file(tensors, out / path.name, metadata={"format": "pt"})
    for pattern in _COPIED:
        for path in base.glob(pattern):
            if path.name != _RECORD:
                target = out / path.relative_to(base)
                target.parent.mkdir(exist_ok=True)
                shutil.copyfile(path, target)


def write_record(out: Path, record: dict[str, Any]) -> None:
    """Writes `tune.json`: how the directory came about."""
    text = json.dumps(record, indent=2, ensure_ascii=False, default=str) + "\n"
    (out / _RECORD).write_text(text, encoding="utf-8")
