"""POSTs that may be sent again: with an ``Idempotency-Key`` the second gets what the first did."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable

from aiohttp import web

from server.errors import ApiError
from server.idempotency import HEADER, Operation
from server.response_object import new_id
from server.state import IDEMPOTENCY, JOURNALS, OWNER
from server.store import StoreError

__all__ = ["once"]

LOOK_S = 0.1
BEGIN_PATIENCE_S = 20.0
"""Longest wait for the turn of another request with the same key to begin."""


async def once(
    http: web.Request,
    run: Callable[[str | None], Awaitable[web.StreamResponse]],
    again: Callable[[str], Awaitable[web.StreamResponse]],
    *,
    prefix: str = "resp",
    begun: Callable[[str], Awaitable[bool]] | None = None,
) -> web.StreamResponse:
    """Answer with ``run(id)``, or with ``again(id)`` where a request with this key ran as ``id``.

    ``run`` is called with None where there is no key. An id begins with ``prefix``; ``begun`` tells
    whether something has come of it, by default a turn. Raises ApiError.
    """
    key = http.headers.get(HEADER)
    if key is None:
        return await run(None)
    operation = Operation.of(http[OWNER], key, http.path, await http.read())
    idempotency = http.app[IDEMPOTENCY]
    made = begun or _turn_begun(http)
    own_id = new_id(prefix)
    loop = asyncio.get_running_loop()
    give_up_s = loop.time() + BEGIN_PATIENCE_S
    while True:
        made_id = await idempotency.claim(operation, own_id)
        if made_id is None:
            return await _run(http, operation, own_id, run, made)
        if await made(made_id):
            return await again(made_id)
        if loop.time() > give_up_s:
            raise ApiError(
                409,
                f"A request with this {HEADER} was taken, but its answer is not there (any more).",
                param=HEADER,
                code="idempotent_answer_missing",
            )
        if await idempotency.inherit(operation, made_id, own_id):
            return await _run(http, operation, own_id, run, made)
        await asyncio.sleep(LOOK_S)


async def _run(
    http: web.Request,
    operation: Operation,
    own_id: str,
    run: Callable[[str | None], Awaitable[web.StreamResponse]],
    begun: Callable[[str], Awaitable[bool]],
) -> web.StreamResponse:
    try:
        return await run(own_id)
    except BaseException:
        # Refused, or left before it began; what has begun keeps its key, however it ends.
        with contextlib.suppress(StoreError):
            if not await begun(own_id):
                await http.app[IDEMPOTENCY].release(operation)
        raise


def _turn_begun(http: web.Request) -> Callable[[str], Awaitable[bool]]:
    journals = http.app[JOURNALS]

    async def begun(turn_id: str) -> bool:
        return journals.live(turn_id) is not None or await journals.view(turn_id) is not None

    return begun
