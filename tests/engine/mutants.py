"""The modules of cache and scheduler, loaded again as they are or with a bug planted in them."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

from hypothesis import HealthCheck, settings

__all__ = ["MACHINE_TIMEOUT_S", "Mutation", "hypothesis_settings", "load_modules"]

_SOURCES = (
    "engine.blocks",
    "engine.cache",
    "engine.fairness",
    "engine.steps",
    "engine.seats",
    "engine.newcomers",
    "engine.ahead",
    "engine.scheduler",
)
_LONG = os.environ.get("MILLRACE_HYPOTHESIS") == "long"

MACHINE_TIMEOUT_S = 1800 if _LONG else 60
"""For the tests that run a state machine with these settings."""


@dataclass(frozen=True)
class Mutation:
    """A planted bug: ``old``, which occurs exactly once in the module, becomes ``new``."""

    name: str
    module: str
    old: str
    new: str


def load_modules(mutation: Mutation | None = None) -> Any:
    """Fresh copies of the modules under test, one of them mutated; attributes blocks, cache, ..."""
    saved = {name: sys.modules.get(name) for name in _SOURCES}
    loaded = SimpleNamespace()
    try:
        for name in _SOURCES:
            path = Path(__file__).parents[2] / (name.replace(".", "/") + ".py")
            source = path.read_text(encoding="utf-8")
            if mutation is not None and mutation.module == name:
                assert source.count(mutation.old) == 1, f"{mutation.name}: no single place for it"
                source = source.replace(mutation.old, mutation.new)
            module = ModuleType(name)
            module.__file__ = str(path)
            sys.modules[name] = module
            exec(compile(source, str(path), "exec"), module.__dict__)
            setattr(loaded, name.rpartition(".")[2], module)
    finally:
        for name, module_before in saved.items():
            if module_before is None:
                del sys.modules[name]
            else:
                sys.modules[name] = module_before
    return loaded


def hypothesis_settings(max_examples: int, stateful_step_count: int) -> settings:
    """The settings of a state machine; MILLRACE_HYPOTHESIS=long makes it run for minutes."""
    return settings(
        max_examples=max_examples * (8 if _LONG else 1),
        stateful_step_count=stateful_step_count * (2 if _LONG else 1),
        deadline=None,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
    )
