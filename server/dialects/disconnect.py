"""``on_disconnect``: what a request wants to happen when its client leaves, the same everywhere."""

from __future__ import annotations

import re
from typing import NamedTuple

from server.dialects.fields import Fields, show
from server.errors import ApiError, invalid
from server.request import OnDisconnect

__all__ = ["MAX_LINGER_S", "Disconnect", "read_disconnect"]

MAX_LINGER_S = 3600

_LINGER = re.compile(r"linger=(\d{1,9}(?:\.\d{1,6})?)", re.ASCII)


class Disconnect(NamedTuple):
    """``linger_s`` belongs to "linger"."""

    contract: OnDisconnect
    linger_s: float = 0.0


def read_disconnect(fields: Fields, default: OnDisconnect) -> Disconnect:
    """Read "finish", "cancel", "linger=SECONDS" or {"linger": SECONDS}. Raises ApiError 400."""
    path = fields.at("on_disconnect")
    value = fields.raw("on_disconnect")
    if value is None:
        return Disconnect(default)
    if isinstance(value, dict):
        inner = Fields(value, path)
        inner.required("linger")
        inner.refuse_unknown(("linger",))
        seconds = inner.number("linger", least=0, most=MAX_LINGER_S)
        assert seconds is not None
        return Disconnect("linger", seconds)
    if value == "finish":
        return Disconnect("finish")
    if value == "cancel":
        return Disconnect("cancel")
    found = _LINGER.fullmatch(value) if isinstance(value, str) else None
    if found is None or float(found[1]) > MAX_LINGER_S:
        raise _refused(path, value)
    return Disconnect("linger", float(found[1]))


def _refused(path: str, value: object) -> ApiError:
    return invalid(
        f"Invalid value for '{path}': {show(value)}; supported values are: 'finish', 'cancel', "
        f"'linger=SECONDS' and {{'linger': SECONDS}} with 0 to {MAX_LINGER_S} seconds.",
        param=path,
        code="invalid_value",
    )
