"""Find a model's files."""

from __future__ import annotations

from pathlib import Path


def resolve_model(name: str) -> Path:
    """Stub until the real one lands."""
    raise NotImplementedError
