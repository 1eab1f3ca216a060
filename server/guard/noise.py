"""Keeps what strangers send to the port out of the log."""

from __future__ import annotations

import logging

from aiohttp.http_exceptions import HttpProcessingError
from aiohttp.web import RequestPayloadError

__all__ = ["http_logger"]


class _PeerFaults(logging.Filter):
    """Drops what aiohttp says of broken HTTP.

    It is the peer's fault and told to the peer. In the log it would be a traceback a request, and
    quote what was sent.
    """

    def filter(self, record: logging.LogRecord) -> bool:
        error = record.exc_info[1] if record.exc_info else None
        # The second is what is wrong with a body that nobody read, such as broken compression.
        return not isinstance(error, HttpProcessingError | RequestPayloadError)


def http_logger() -> logging.Logger:
    """Return the logger for aiohttp's side of connections."""
    logger = logging.getLogger("millrace.http")
    if not logger.filters:
        logger.addFilter(_PeerFaults())
    return logger
