"""A kernel module with one thing changed in its source, loaded beside the real one."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType


def planted(module: ModuleType, old: str, new: str, directory: Path) -> ModuleType:
    """The module with ``old``, which is there exactly once, replaced by ``new``.

    Triton reads a kernel's source from its file, so the changed one is written to ``directory``.
    """
    source = Path(str(module.__file__)).read_text(encoding="utf-8")
    assert source.count(old) == 1, f"{old!r} is {source.count(old)} times in {module.__name__}"
    path = directory / f"{module.__name__.rpartition('.')[2]}.py"
    path.write_text(source.replace(old, new), encoding="utf-8")
    spec = importlib.util.spec_from_file_location(f"planted_{abs(hash((old, new)))}", path)
    assert spec is not None
    assert spec.loader is not None
    loaded = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = loaded  # where dataclasses and triton look for it
    spec.loader.exec_module(loaded)
    return loaded
