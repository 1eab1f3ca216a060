"""The directory that a run writes: checked before, whole or not there, never in place of others."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from engine.errors import ConfigError

__all__ = ["RECORD", "check_free", "whole_directory", "write_record"]

RECORD = "tune.json"
"""Name of the file that says how the directory came about."""


def check_free(out: Path, *, overwrite: bool, record: str = RECORD) -> None:
    """Raises ConfigError where a run must not write; `record` is in what such a run wrote."""
    if out.is_file():
        raise ConfigError(f"{out} is a file; the result is a directory")
    if out.exists() and any(out.iterdir()):
        if not overwrite:
            raise ConfigError(f"{out} is there already; name another directory, or --overwrite")
        if not (out / record).is_file():
            maker = "tuning" if record == RECORD else "quantising"
            raise ConfigError(f"{out} was not made by {maker}, so it is not overwritten")


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


def write_record(out: Path, record: dict[str, Any]) -> None:
    """Writes `tune.json`: how the directory came about."""
    text = json.dumps(record, indent=2, ensure_ascii=False, default=str) + "\n"
    (out / RECORD).write_text(text, encoding="utf-8")
