"""JSON files of a checkpoint, read with typed access to their fields."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from engine.errors import CheckpointError

__all__ = ["Fields", "read_json"]

_MAX_JSON_BYTES = 64 * 2**20


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object from a file of a checkpoint.

    Raises CheckpointError when the file is missing, unreadable, too large or not a JSON object.
    """
    try:
        if path.stat().st_size > _MAX_JSON_BYTES:
            raise CheckpointError(
                f"{path} has {path.stat().st_size} bytes; at most {_MAX_JSON_BYTES} are expected"
            )
        document = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise CheckpointError(f"{path} does not exist; a checkpoint needs it") from None
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(document, dict):
        raise CheckpointError(f"{path} holds a {type(document).__name__}; it must be an object")
    return document


class Fields:
    """Typed access to the fields of one JSON object; every complaint names file and field."""

    def __init__(self, path: Path, document: dict[str, Any], prefix: str = "") -> None:
        self.path = path
        self.document = document
        self.prefix = prefix

    def wrong(self, name: str, right: str) -> CheckpointError:
        """The error for this field."""
        where = f"{self.path}: {self.prefix}{name}"
        if name not in self.document:
            return CheckpointError(f"{where} is missing; it {right}")
        return CheckpointError(f"{where} is {self.document[name]!r}; it {right}")

    def get(self, name: str) -> Any:
        """The value; None if it is absent or null."""
        return self.document.get(name)

    def size(self, name: str) -> int:
        """A positive integer that must be there."""
        value = self.get(name)
        if type(value) is not int or value < 1:
            raise self.wrong(name, "must be a positive integer")
        return value

    def number(self, name: str, default: float, least: float) -> float:
        """A finite number of at least ``least`` (more than it where ``least`` is 0)."""
        value = self.get(name)
        if value is None:
            return default
        valid = isinstance(value, int | float) and not isinstance(value, bool)
        if not valid or not math.isfinite(value) or value < least or value == 0:
            raise self.wrong(
                name,
                f"must be a number of at least {least}" if least else "must be a number above 0",
            )
        return float(value)

    def flag(self, name: str, default: bool) -> bool:
        """A boolean."""
        value = self.get(name)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise self.wrong(name, "must be true or false")
        return value

    def object(self, name: str) -> Fields | None:
        """A nested object; None if it is absent or null."""
        value = self.get(name)
        if value is None:
            return None
        if not isinstance(value, dict):
            raise self.wrong(name, "must be an object")
        return Fields(self.path, value, f"{self.prefix}{name}.")
