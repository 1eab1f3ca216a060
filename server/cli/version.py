"""This installation's version."""

from __future__ import annotations

from importlib import metadata

__all__ = ["version"]


def version() -> str:
    """Return this installation's version."""
    try:
        return metadata.version("millrace")
    except metadata.PackageNotFoundError:
        return "(not installed)"
