"""EngineClient: the asyncio side of the link to the engine process."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from enum import Enum

from engine.config import EngineConfig
from engine.types import Delta, EngineStats, ModelInfo, Request

__all__ = ["EngineClient", "EngineState"]


class EngineState(Enum):
    """Life of the engine process as the client sees it."""

    STARTING = "starting"
    READY = "ready"
    RESTARTING = "restarting"
    CLOSED = "closed"


class EngineClient:
    """Starts the engine process, feeds it requests and hands out what comes back."""

    @classmethod
    async def start(cls, config: EngineConfig, *, on_progress: Callable[[str, float], None] | None = None) -> EngineClient:
        raise NotImplementedError

    @property
    def state(self) -> EngineState:
        raise NotImplementedError

    @property
    def info(self) -> ModelInfo:
        raise NotImplementedError

    @property
    def stats(self) -> EngineStats:
        """The engine's figures after its latest step."""
        raise NotImplementedError

    @property
    def last_progress_s(self) -> float:
        """``time.monotonic()`` of the last frame (deltas, or the heartbeat of an idle engine)."""
        raise NotImplementedError

    def generate(self, request: Request) -> AsyncIterator[Delta]:
        """Submit a request at once and yield its deltas; the last one has a finish_reason.

        Leaving the iterator early (``aclose``, cancellation) aborts the request.
        Raises EngineDied, EngineClosed, RequestError.
        """
        raise NotImplementedError

    def abort(self, request_id: str) -> None:
        """Ask for a request's end; unknown ids are ignored."""
        raise NotImplementedError

    async def close(self) -> None:
        """End the engine process; requests in flight get EngineClosed."""
        raise NotImplementedError
