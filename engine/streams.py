"""What a caller of the engine reads: the deltas of one request."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from engine.errors import EngineError, RequestError
from engine.types import Delta, FinishReason

__all__ = ["RequestStream"]


class RequestStream:
    """The deltas of one request, in order; iteration ends after the one with a finish reason.

    It is a mailbox of one slot: deltas that arrive before the reader comes are merged into one, so
    a slow reader costs no memory per step. Leaving early needs ``aclose``, which aborts the
    request. Iterating raises EngineDied, EngineClosed or RequestError when it cannot go on.
    """

    def __init__(self, request_id: str, on_leave: Callable[[str], None]) -> None:
        self.request_id = request_id
        self._on_leave = on_leave
        self._slot: Delta | None = None
        self._error: EngineError | None = None
        self._ended = False
        self._arrived = asyncio.Event()

    def __aiter__(self) -> RequestStream:
        return self

    async def __anext__(self) -> Delta:
        if self._ended:
            raise StopAsyncIteration
        await self._arrived.wait()
        delta, self._slot = self._slot, None
        if delta is None:
            self._ended = True
            assert self._error is not None
            raise self._error
        if self._error is None:
            self._arrived.clear()
        self._ended = delta.finish_reason is not None
        return delta

    async def aclose(self) -> None:
        """Abort the request if it has not ended."""
        if not self._ended:
            self._ended = True
            self._on_leave(self.request_id)

    def push(self, delta: Delta) -> None:
        """Hand in what a step brought."""
        if delta.finish_reason is FinishReason.ERROR:
            self.fail(RequestError(delta.error or "the engine refused the request"))
            return
        self._slot = delta if self._slot is None else _merge(self._slot, delta)
        self._arrived.set()

    def fail(self, error: EngineError) -> None:
        """End the stream with an error, after what has already arrived."""
        self._error = error
        self._arrived.set()


def _merge(first: Delta, second: Delta) -> Delta:
    logprobs = None
    if first.logprobs is not None or second.logprobs is not None:
        logprobs = (first.logprobs or []) + (second.logprobs or [])
    return Delta(
        request_id=first.request_id,
        token_ids=first.token_ids + second.token_ids,
        logprobs=logprobs,
        prompt_logprobs=first.prompt_logprobs or second.prompt_logprobs,
        finish_reason=second.finish_reason,
        usage=second.usage,
    )
