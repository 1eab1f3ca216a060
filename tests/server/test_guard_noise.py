"""The log says what is our fault, and nothing of what strangers send."""

from __future__ import annotations

import logging

import pytest
from aiohttp.http_exceptions import BadStatusLine
from aiohttp.web import RequestPayloadError

from server.guard.noise import http_logger


def test_broken_http_is_not_logged(caplog: pytest.LogCaptureFixture) -> None:
    logger = http_logger()
    assert http_logger() is logger
    with caplog.at_level(logging.DEBUG):
        for error in (BadStatusLine("secret"), RequestPayloadError("secret"), ValueError("ours")):
            try:
                raise error
            except Exception:
                logger.exception("Error handling request")
    assert "secret" not in caplog.text
    assert "ours" in caplog.text
