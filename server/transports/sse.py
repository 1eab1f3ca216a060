"""Server-sent events: the text/event-stream format of the HTML standard, section 9.2."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Callable, Iterable
from typing import NamedTuple

from aiohttp import web

from server.events import Event, ResponseQueued
from server.journal import Entry, JournalLeft
from server.response_object import error_event
from server.state import SETTINGS
from server.store import StoreError
from server.turn import Turn

__all__ = [
    "Frame",
    "encode_frames",
    "event_frames",
    "project",
    "queue_comments",
    "respond",
    "stream",
]

log = logging.getLogger("millrace.sse")

HEADERS = {
    "Content-Type": "text/event-stream; charset=utf-8",
    "Cache-Control": "no-store",
    # nginx would collect the stream into buffers.
    "X-Accel-Buffering": "no",
}
# No empty line after a comment: one that follows an ``id`` makes the openai SDK dispatch an event
# without data, which it then fails to parse.
KEEPALIVE = b": keep-alive\n"


class Frame(NamedTuple):
    """One server-sent event. ``data`` has no line break: JSON never does."""

    data: bytes
    event: str | None = None
    id: str | None = None


def encode_frames(frames: Iterable[Frame]) -> bytes:
    """Return frames as they go over the wire."""
    parts: list[bytes] = []
    for data, event, number in frames:
        if event is not None:
            parts += (b"event: ", event.encode(), b"\n")
        if number is not None:
            parts += (b"id: ", number.encode(), b"\n")
        parts += (b"data: ", data, b"\n\n")
    return b"".join(parts)


def event_frames(batch: list[Entry]) -> bytes:
    """Return a turn's events as they are, each with its sequence number as ``id``."""
    return b"".join(
        b"event: %b\nid: %d\ndata: %b\n\n"
        % (type_name(entry.event).encode(), entry.event.sequence_number, entry.data)
        for entry in batch
    )


def queue_comments(batch: list[Entry]) -> bytes:
    """Return a waiting turn's places as comments, for dialects that have no event for them."""
    return b"".join(
        b": queued %b\n" % entry.data for entry in batch if isinstance(entry.event, ResponseQueued)
    )


def type_name(event: Event) -> str:
    """Return an event's ``type`` on the wire."""
    return str(event.__struct_config__.tag)


async def respond(
    http: web.Request,
    turn: Turn,
    project: Callable[[Event], Iterable[Frame]],
    tail: Iterable[Frame] = (),
) -> web.StreamResponse:
    """Stream a turn through a dialect's projection, then ``tail``.

    If the client leaves before the terminal event, ``turn.detach()`` is called.
    """

    return await stream(
        http, turn.batches(), _rendering(project), tail=encode_frames(tail), on_leave=turn.detach
    )


async def project(
    http: web.Request,
    batches: AsyncIterator[list[Entry]],
    feed: Callable[[Event], Iterable[Frame]],
    *,
    on_leave: Callable[[], None],
) -> web.StreamResponse:
    """Stream a turn that began earlier through a dialect's projection."""
    return await stream(http, batches, _rendering(feed), on_leave=on_leave)


def _rendering(
    feed: Callable[[Event], Iterable[Frame]],
) -> Callable[[list[Entry]], bytes]:
    def render(batch: list[Entry]) -> bytes:
        return queue_comments(batch) + encode_frames(
            frame for entry in batch for frame in feed(entry.event)
        )

    return render


async def stream(
    http: web.Request,
    batches: AsyncIterator[list[Entry]],
    render: Callable[[list[Entry]], bytes] = event_frames,
    *,
    tail: bytes = b"",
    on_leave: Callable[[], None] = lambda: None,
) -> web.StreamResponse:
    """Write batches as they come, several events in one write, until there are no more.

    ``on_leave`` is called if the client is gone before that.
    """
    response = web.StreamResponse(headers=HEADERS)
    complete = False
    try:
        await response.prepare(http)
        async with _keepalive(response, http.app[SETTINGS].keepalive_s) as wrote:
            try:
                async for batch in batches:
                    if data := render(batch):
                        await response.write(data)
                        wrote()
            except JournalLeft:
                # Without an end: the client comes back with the last id it has, elsewhere.
                tail = b""
                response.force_close()
            except StoreError as error:
                log.error("a stream ends early: %s", error)
                await response.write(b"event: error\ndata: %b\n\n" % error_event(str(error)))
        complete = True
        if tail:
            await response.write(tail)
        await response.write_eof()
    except ConnectionResetError:
        # The client left; where handlers are cancelled, that arrives as a cancellation instead.
        log.debug("the client of a stream left")
    finally:
        if not complete:
            on_leave()
    return response


@contextlib.asynccontextmanager
async def _keepalive(
    response: web.StreamResponse, interval_s: float
) -> AsyncIterator[Callable[[], None]]:
    """Write a comment into silences of ``interval_s``; yields what to call after each write."""
    loop = asyncio.get_running_loop()
    last_s = loop.time()

    def wrote() -> None:
        nonlocal last_s
        last_s = loop.time()

    async def beat() -> None:
        while True:
            silent_s = loop.time() - last_s
            if silent_s < interval_s:
                await asyncio.sleep(interval_s - silent_s)
                continue
            await response.write(KEEPALIVE)
            wrote()

    task = asyncio.create_task(beat(), name="sse-keepalive")
    try:
        yield wrote
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
