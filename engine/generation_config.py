"""``generation_config.json``: how a checkpoint's makers advise to sample."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from engine.errors import CheckpointError
from engine.json_file import read_json
from engine.types import SamplingDefaults

__all__ = ["read_sampling_defaults"]


def read_sampling_defaults(directory: Path) -> SamplingDefaults:
    """Return the advised sampling; nothing is advised where there is no file.

    ``do_sample: false`` advises the most likely token. Raises CheckpointError when a value is not
    one that a request could ask for.
    """
    path = directory / "generation_config.json"
    if not path.exists():
        return SamplingDefaults()
    document = read_json(path)
    top_k = _number(path, document, "top_k", 0, 2**31 - 1)
    defaults = SamplingDefaults(
        temperature=_number(path, document, "temperature", 0, 2),
        top_k=None if top_k is None else int(top_k),
        top_p=_number(path, document, "top_p", 0, 1, above=True),
        min_p=_number(path, document, "min_p", 0, 1),
        repetition_penalty=_number(path, document, "repetition_penalty", 0, 100, above=True),
    )
    if document.get("do_sample") is False:
        return SamplingDefaults(temperature=0.0, repetition_penalty=defaults.repetition_penalty)
    return defaults


def _number(
    path: Path, document: dict[str, Any], name: str, least: int, most: int, *, above: bool = False
) -> float | None:
    value = document.get(name)
    if value is None:
        return None
    fits = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    if fits and name == "top_k":
        fits = value == int(value)
    if not fits or not least <= value <= most or (above and value == least):
        wanted = "a whole number" if name == "top_k" else "a number"
        low = f"above {least}" if above else f"from {least}"
        raise CheckpointError(f"{path}: {name} is {value!r}; it must be {wanted} {low} to {most}")
    return float(value)
