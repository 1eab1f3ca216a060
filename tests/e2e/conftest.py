"""One real server for all tests of this folder."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.e2e.live import LiveServer

TIMEOUT_S = 300
"""A test that comes first waits for the server's start, which on a busy machine takes a while."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if "e2e" in item.path.parts and item.get_closest_marker("timeout") is None:
            item.add_marker(pytest.mark.timeout(TIMEOUT_S))


@pytest.fixture(scope="session")
def server() -> Iterator[LiveServer]:
    live = LiveServer(["--kv-memory", "256MiB"])
    try:
        yield live
    finally:
        status = live.stop()
    assert status == 0, live.log
    assert "Traceback" not in live.log
