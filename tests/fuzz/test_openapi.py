"""A bounded run of schemathesis on the document that the server serves."""

from __future__ import annotations

import pytest

from tests.e2e.live import LiveServer
from tests.fuzz.openapi import run_schemathesis

SEED = 20_261_124
SECONDS = 15


@pytest.mark.timeout(300)
def test_schemathesis(server: LiveServer) -> None:
    printed = len(server.log)
    run = run_schemathesis(server, seed=SEED, seconds=SECONDS, max_examples=3, phases="fuzzing")
    assert run.passed, run.output[-8000:]
    assert "passed" in run.output, run.output[-2000:]
    server.assert_clean(printed)
