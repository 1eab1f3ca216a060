"""Logging faults of ours without what a user wrote."""

from __future__ import annotations

import logging
import traceback

__all__ = ["log_crash"]


def log_crash(log: logging.Logger, what: str, error: Exception) -> None:
    """Log an unexpected error's type and place.

    Not its message: that may quote a prompt.
    """
    place = "".join(traceback.format_tb(error.__traceback__))
    log.error("%s failed by a fault of the server: %s\n%s", what, type(error).__name__, place)
