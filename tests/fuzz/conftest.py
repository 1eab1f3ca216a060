"""One server for all tests of this folder."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.e2e.live import LiveServer
from tests.fuzz.fuzzing import serve_fuzzed


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    live = serve_fuzzed(tmp_path_factory.mktemp("fuzz"))
    try:
        yield live
    finally:
        status = live.stop()
    assert status == 0, live.log
