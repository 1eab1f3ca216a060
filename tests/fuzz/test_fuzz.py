"""Mutated requests and frames against a real server: nothing but refusals and answers."""

from __future__ import annotations

import pytest

from tests.e2e.live import LiveServer
from tests.fuzz.fuzzing import fuzz, throw_frames, throw_request

NUM_REQUESTS = 250
NUM_FRAMES = 200
SEED = 20_261_124


@pytest.mark.timeout(300)
async def test_mutated_requests(server: LiveServer) -> None:
    outcome = await fuzz(server, throw_request, seed=SEED, count=NUM_REQUESTS)
    assert not outcome.bad
    # Some are still right, and most are not: neither a wall nor an open door.
    assert outcome.statuses[200] > NUM_REQUESTS // 50
    assert outcome.statuses[400] > NUM_REQUESTS // 5


@pytest.mark.timeout(300)
async def test_mutated_frames(server: LiveServer) -> None:
    outcome = await fuzz(server, throw_frames, seed=SEED, count=NUM_FRAMES)
    assert not outcome.bad
    assert outcome.statuses[101] == NUM_FRAMES
    assert len(outcome.kinds) > 10
