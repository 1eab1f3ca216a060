"""/health, /ready and /metrics: what they say, and who may ask."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from engine import EngineState, EngineStats
from server.routes import health
from server.routes.health import STALL_S
from server.settings import ServerSettings
from server.state import TURNS
from tests.server.edge import NO_PAGE, Edge, serving
from tests.server.scripted import ScriptedEngine, say


class StuckEngine(ScriptedEngine):
    """An engine whose last frame came some time ago."""

    silent_s = 0.0

    @property
    def last_progress_s(self) -> float:
        return time.monotonic() - self.silent_s


@pytest.fixture
async def edge() -> AsyncIterator[Edge]:
    async with serving(StuckEngine(say("x"))) as edge:
        yield edge


async def test_ready_exactly_while_requests_are_served(edge: Edge) -> None:
    engine = edge.engine
    assert isinstance(engine, StuckEngine)

    async def state() -> tuple[int, str]:
        answer = await edge.get("/ready")
        assert (await edge.get("/health")).status == 200
        return answer.status, answer.body.get("error", {}).get("message", "")

    assert await state() == (200, "")
    for wrong in (EngineState.STARTING, EngineState.RESTARTING, EngineState.CLOSED):
        engine.state = wrong
        status, message = await state()
        assert status == 503
        assert wrong.value in message
    engine.state = EngineState.READY
    assert await state() == (200, "")
    engine.silent_s = STALL_S + 1
    status, message = await state()
    assert status == 503
    assert "no progress" in message
    engine.silent_s = 0.0
    edge.app[TURNS].draining = True
    status, message = await state()
    assert status == 503
    assert "shutting down" in message


async def test_metrics_show_the_engine(edge: Edge) -> None:
    edge.engine.stats = EngineStats(
        num_blocks=10, free_blocks=4, running=2, waiting=1, generation_tokens=7
    )
    samples = await edge.metrics()
    assert samples["millrace_kv_blocks_free"] == 4
    assert samples["millrace_requests_running"] == 2
    assert samples["millrace_requests_waiting"] == 1
    assert samples["millrace_generation_tokens_total"] == 7
    async with edge.client.get("/metrics") as response:
        assert response.headers["Content-Type"].startswith("text/plain; version=0.0.4")


async def test_which_addresses_need_a_key(tmp_path: Path) -> None:
    path = tmp_path / "keys"
    path.write_text("sk-one\n")
    path.chmod(0o600)
    settings = ServerSettings(page_dir=NO_PAGE, api_key_file=path)
    body = {"model": "scripted", "messages": [{"role": "user", "content": "Hi"}]}
    async with serving(ScriptedEngine(say("ok")), settings) as edge:
        for address in ("/health", "/ready", "/metrics", "/openapi.json", "/"):
            assert (await edge.get(address)).status == 200
        for address in ("/v1/models", "/v1/models/scripted", "/v1/responses/x"):
            assert (await edge.get(address)).status == 401
        for address in ("/v1/chat/completions", "/v1/completions", "/v1/responses", "/tokenize"):
            answer = await edge.post(address, body)
            assert answer.status == 401
            assert answer.error["code"] == "invalid_api_key"
            assert answer.headers["WWW-Authenticate"] == "Bearer"
        wrong = {"Authorization": "Bearer sk-two"}
        assert (await edge.post("/v1/chat/completions", body, headers=wrong)).status == 401
        assert not edge.engine.requests
        for right in ({"Authorization": "Bearer sk-one"}, {"api-key": "sk-one"}):
            answer = await edge.post("/v1/chat/completions", body, headers=right)
            assert answer.status == 200
        assert edge.engine.requests[0].cache_salt


async def test_a_handler_that_waits_in_the_event_loop_is_found(
    edge: Edge, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The guard around all these tests works."""
    monkeypatch.setattr(health, "_not_ready", lambda _: time.sleep(0.001))
    assert (await edge.get("/ready")).status == 500
