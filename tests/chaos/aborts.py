"""Clients that give up at any moment; then nothing of them may be left.

More ask than fit (queued), with prompts longer than a step (between chunks), in a cache too small
for them all (preempted), and they go by closing, by resetting, or by a call to cancel.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Mapping
from typing import Any

import aiohttp
import orjson

from tests.chaos.campaign import Campaign
from tests.chaos.history import TERMINAL
from tests.chaos.processes import Replica

__all__ = ["aborts"]

CLIENTS = 24
NUM_TOKENS = 400
LONG_PROMPT = 420
"""Words: more than one step computes."""
SETTLE_S = 10.0


async def aborts(campaign: Campaign, count: int) -> None:
    """Abort ``count`` turns of one replica, and compare its books with those before."""
    replica = campaign.cluster.replicas[0]
    before = await asyncio.to_thread(_books, replica)
    counted = await asyncio.to_thread(replica.live.metrics)
    while campaign.tally.num_struck < count:
        async with aiohttp.ClientSession(replica.url) as session:
            await asyncio.gather(*(_abort(campaign, session) for _ in range(CLIENTS)))
    await asyncio.to_thread(replica.live.idle_metrics)
    _look_at_steps(campaign, counted, await asyncio.to_thread(replica.live.metrics))
    give_up_s = time.monotonic() + SETTLE_S
    while (after := await asyncio.to_thread(_books, replica)) != before:
        if time.monotonic() > give_up_s:
            left = {name: (before[name], after[name]) for name in before}
            campaign.tally.notes.append(f"left behind (before, after): {left}")
            break
    client = campaign.client([replica.url])
    await campaign.judge(await client.run())


def _look_at_steps(
    campaign: Campaign, before: Mapping[str, float], after: Mapping[str, float]
) -> None:
    """Of a hundred aborts, 99 have their blocks free within two steps of the engine."""
    aborts, steps, late = (
        after[f"millrace_{name}_total"] - before[f"millrace_{name}_total"]
        for name in ("aborted_sequences", "abort_steps", "late_aborts")
    )
    campaign.tally.measured = (
        f"blocks free after {steps / max(1, aborts):.2f} steps, "
        f"{late:.0f} in {aborts:,.0f} after more than two"
    )
    if late > aborts / 100:
        campaign.tally.notes.append(campaign.tally.measured)


def _books(replica: Replica) -> dict[str, float]:
    """What must be as before once nothing runs; asking needs no socket that stays."""
    samples = replica.live.metrics()
    names = (
        "millrace_turns_in_flight",
        "millrace_requests_running",
        "millrace_requests_waiting",
        "millrace_journals_open",
        "millrace_websockets_open",
        "millrace_event_loop_tasks",
    )
    books = {name: samples[name] for name in names if name in samples}
    books["blocks held"] = samples["millrace_kv_blocks"] - samples["millrace_kv_blocks_free"]
    books["sockets"] = replica.num_sockets()
    return books


async def _abort(campaign: Campaign, session: aiohttp.ClientSession) -> None:
    rng = campaign.rng
    words = rng.randint(1, LONG_PROMPT) if rng.random() < 0.4 else 4
    body = {
        "model": "pebble",
        "input": "river stone light " * words,
        "max_output_tokens": NUM_TOKENS,
        "ignore_eos": True,
        "store": True,
        "on_disconnect": "cancel",
        "return_token_ids": True,
        "seed": rng.randrange(2**31),
    }
    if words > LONG_PROMPT // 3:
        body["input"] = "river stone light " * (words // 3)
    how = rng.choice(("leaves", "leaves at once", "cancels", "cancels on the socket"))
    after = rng.choice((0, 1, 2, 3, rng.randint(4, 60)))
    pause_s = rng.uniform(0.0, 0.3)
    if how == "cancels on the socket":
        await _on_socket(campaign, session, body, after)
    elif how == "leaves at once":
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(pause_s):
                async with session.post("/v1/responses", json={**body, "stream": False}) as answer:
                    await answer.read()
    else:
        await _on_sse(campaign, session, body, after, cancels=how == "cancels")
    campaign.tally.struck[how] += 1


async def _on_sse(
    campaign: Campaign,
    session: aiohttp.ClientSession,
    body: dict[str, Any],
    after: int,
    *,
    cancels: bool,
) -> None:
    seen = 0
    async with session.post("/v1/responses", json={**body, "stream": True}) as answer:
        assert answer.status == 200, await answer.text()
        async for line in answer.content:
            if not line.startswith(b"data: "):
                continue
            event = orjson.loads(line[6:])
            campaign.tally.num_tokens += len(event.get("token_ids") or ())
            if seen == after:
                if not cancels:
                    return
                url = (
                    f"/v1/responses/{event['response']['id']}/cancel" if "response" in event else ""
                )
                if url:
                    async with session.post(url) as told:
                        assert told.status == 200, await told.text()
                        status = (await told.json())["status"]
                        if status not in ("cancelled", "incomplete"):
                            campaign.tally.notes.append(f"{status} after a cancel")
            seen += 1
            if event["type"] in TERMINAL:
                return
    campaign.tally.notes.append("an aborted stream ended without a terminal event")


async def _on_socket(
    campaign: Campaign, session: aiohttp.ClientSession, body: dict[str, Any], after: int
) -> None:
    seen = 0
    async with session.ws_connect("/v1/responses") as socket:
        await socket.send_json({"type": "response.create", **body})
        async for message in socket:
            event = orjson.loads(message.data)
            campaign.tally.num_tokens += len(event.get("token_ids") or ())
            if seen == after:
                await socket.send_json({"type": "response.cancel"})
            seen += 1
            if event["type"] in TERMINAL:
                return
    campaign.tally.notes.append("an aborted socket closed without a terminal event")
