"""GET /health, /ready and /metrics."""

from __future__ import annotations

import asyncio
import time

from aiohttp import web

from engine import EngineState
from server.errors import ApiError
from server.routes.bodies import json_response
from server.state import ENGINE, JOURNALS, METRICS, SOCKETS, TURNS

__all__ = ["STALL_S", "routes"]

STALL_S = 60.0
"""An engine that sent nothing for so long is stuck. One step with a large model and a full batch
may take tens of seconds on a CPU; an idle engine sends a heartbeat twice a second."""

_METRICS_TYPE = "text/plain; version=0.0.4; charset=utf-8"


async def health(_: web.Request) -> web.Response:
    """Say that the process lives."""
    return json_response({"status": "ok"})


async def ready(http: web.Request) -> web.Response:
    """Say whether requests are served: 200, or 503 with the reason."""
    reason = _not_ready(http.app)
    if reason is not None:
        raise ApiError(503, reason, kind="server_error", code="not_ready", retry_after_s=1)
    return json_response({"status": "ready", "model": http.app[ENGINE].info.name})


def _not_ready(app: web.Application) -> str | None:
    engine = app[ENGINE]
    if app[TURNS].draining:
        return "The server is shutting down."
    if engine.state is not EngineState.READY:
        return f"The engine is {engine.state.value}."
    silent_s = time.monotonic() - engine.last_progress_s
    if silent_s > STALL_S:
        return f"The engine has made no progress for {silent_s:.0f} seconds."
    return None


async def metrics(http: web.Request) -> web.Response:
    """Return the metrics in Prometheus' text format."""
    app = http.app
    app[METRICS].engine_stats(app[ENGINE].stats)
    app[METRICS].engine_recoveries(app[ENGINE].recoveries)
    app[METRICS].held(
        tasks=len(asyncio.all_tasks()),
        journals=app[JOURNALS].num_live,
        websockets=len(app[SOCKETS]),
    )
    return web.Response(body=app[METRICS].render(), headers={"Content-Type": _METRICS_TYPE})


def routes() -> list[web.RouteDef]:
    """Return this module's routes."""
    return [
        web.get("/health", health),
        web.get("/ready", ready),
        web.get("/metrics", metrics),
    ]
