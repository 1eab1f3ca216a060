"""More than a server can take: too many requests, and very many sockets that say nothing."""

from __future__ import annotations

import asyncio
import contextlib
import resource
import time
from collections import Counter

import aiohttp

from tests.chaos.campaign import Campaign
from tests.chaos.checker import Verdict
from tests.chaos.questions import Answer, Question

__all__ = ["idle_sockets", "overload"]

SATURATING = 16
"""Clients that keep the server busy: twice what it runs at once."""
LEAST_GOODPUT = 0.9
MOST_SOCKET_BYTES = 20 << 10
AT_ONCE = 100
"""Sockets opened at the same time."""


async def overload(campaign: Campaign, count: int) -> None:
    """Offer twice what a server answers when it is just busy; ``count`` requests.

    First clients ask in a closed loop, which gives the rate it can do. Then requests come at random
    moments at twice that rate, whoever is still waiting. Useful is an answer that is whole.
    """
    url = campaign.cluster.replicas[0].url
    tally = campaign.tally
    connector = aiohttp.TCPConnector(limit=0, force_close=True)
    async with aiohttp.ClientSession(url, connector=connector) as session:
        left = iter(range(count // 2))

        async def client() -> int:
            return sum([(await _ask(session, *campaign.draw())).num_tokens for _ in left])

        began_s = time.monotonic()
        served = sum(await asyncio.gather(*(client() for _ in range(SATURATING))))
        capacity = served / (time.monotonic() - began_s)
        requests_per_s = (count // 2) / (time.monotonic() - began_s)

        began_s = time.monotonic()
        asked = []
        for _ in range(count):
            asked.append(asyncio.create_task(_ask(session, *campaign.draw())))
            tally.struck["request"] += 1
            await asyncio.sleep(campaign.rng.expovariate(2 * requests_per_s))
        verdicts = await asyncio.gather(*asked)
        goodput = sum(v.num_tokens for v in verdicts) / (time.monotonic() - began_s)
    for verdict in verdicts:
        tally.add(verdict)
    share = goodput / capacity
    tally.measured = f"{100 * share:.0f} % goodput, {tally.endings['refused 429']} refused"
    if share < LEAST_GOODPUT:
        tally.notes.append(f"goodput fell to {100 * share:.0f} % of {capacity:.0f} tokens/s")
    if not tally.endings["refused 429"]:
        tally.notes.append("nothing was refused: this was no overload")


async def _ask(session: aiohttp.ClientSession, question: Question, answer: Answer) -> Verdict:
    faults: Counter[str] = Counter()
    async with session.post("/v1/responses", json=question.body()) as response:
        body = await response.json()
        if response.status != 200:
            if response.status == 429 and "Retry-After" not in response.headers:
                faults["no Retry-After"] += 1
            return Verdict(ending=f"refused {response.status}", faults=faults, num_tokens=0)
    text = "".join(part["text"] for item in body["output"] for part in item["content"])
    if text != answer.text:
        faults["other text"] += 1
        return Verdict(ending="other text", faults=faults, num_tokens=0)
    return Verdict(ending="whole", faults=faults, num_tokens=len(answer.token_ids))


async def idle_sockets(campaign: Campaign, count: int) -> None:
    """Open ``count`` WebSockets that say nothing; see what each costs, and ask beside them."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    replica = campaign.cluster.replicas[0]
    before = replica.rss_bytes()
    connector = aiohttp.TCPConnector(limit=0)
    async with contextlib.AsyncExitStack() as stack:
        session = await stack.enter_async_context(
            aiohttp.ClientSession(replica.url, connector=connector)
        )
        for _ in range(0, count, AT_ONCE):
            sockets = await asyncio.gather(
                *(session.ws_connect("/v1/responses") for _ in range(AT_ONCE))
            )
            campaign.tally.struck["socket"] += len(sockets)
        grown = replica.rss_bytes() - before
        campaign.tally.measured = f"{grown / count / 1024:.1f} KiB each"
        if grown / count > MOST_SOCKET_BYTES:
            campaign.tally.notes.append(f"a socket costs {grown / count / 1024:.1f} KiB")
        await campaign.judge(await campaign.client([replica.url]).run())
