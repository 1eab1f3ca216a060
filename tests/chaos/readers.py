"""Readers that stop reading while others read on."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import time
from urllib.parse import urlsplit

import orjson

from tests.chaos.campaign import Campaign
from tests.chaos.questions import Question

__all__ = ["stalled_readers"]

GROWTH_BYTES_EACH = 2 << 20
"""More than this for each stalled reader is not bounded by anything that is meant."""
SUBMITTED_S = 3.0
"""After this long all that was asked is at the engine."""


class StalledReader:
    """Asks over SSE, with a receive buffer as small as can be, and never reads the answer."""

    def __init__(self, url: str, question: Question) -> None:
        address = urlsplit(url)
        body = orjson.dumps(question.body(stream=True, max_output_tokens=600))
        head = (
            f"POST /v1/responses HTTP/1.1\r\nHost: {address.netloc}\r\n"
            f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
        )
        self._socket = socket.socket()
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
        self._socket.connect((address.hostname, address.port))
        self._socket.sendall(head.encode() + body)

    def close(self) -> None:
        """Leave."""
        self._socket.close()


async def stalled_readers(campaign: Campaign, count: int) -> None:
    """Let ``count`` readers stall, and see that others get their answers meanwhile."""
    replica = campaign.cluster.replicas[0]
    before = replica.rss_bytes()
    with contextlib.ExitStack() as stack:
        for _ in range(count):
            stack.enter_context(
                contextlib.closing(StalledReader(replica.url, campaign.client([]).history.question))
            )
            campaign.tally.struck["reader stalled"] += 1
        # Behind so many long answers the others would wait for their place, whoever reads or not.
        await asyncio.sleep(SUBMITTED_S)
        while (await asyncio.to_thread(replica.live.metrics))["millrace_requests_waiting"]:
            await asyncio.sleep(0.2)
        began_s = time.monotonic()
        clients = [campaign.client([replica.url]) for _ in range(4)]
        for history in await asyncio.gather(*(client.run() for client in clients)):
            campaign.tally.back(history.silence_after_s(began_s))
            await campaign.judge(history)
        # All answers have been made, though nobody read them.
        await asyncio.to_thread(replica.live.idle_metrics)
        grown = replica.rss_bytes() - before
        if grown > GROWTH_BYTES_EACH * count + (16 << 20):
            campaign.tally.notes.append(f"{count} stalled readers cost {grown >> 20} MiB")
