"""/metrics shows what the process holds, and that it lets go of it."""

from __future__ import annotations

import asyncio

from prometheus_client.parser import text_string_to_metric_families

from tests.server.scripted import ScriptedEngine, say
from tests.server.serving import Served, serving

HELD = ("event_loop_tasks", "journals_open", "websockets_open")


async def held(server: Served) -> dict[str, float]:
    async with server.client.get("/metrics") as answer:
        families = text_string_to_metric_families(await answer.text())
        samples = {one.name: one.value for family in families for one in family.samples}
    return {name: samples[f"millrace_{name}"] for name in HELD}


async def test_what_a_turn_holds_is_let_go_at_its_end() -> None:
    hold = asyncio.Event()
    async with serving(ScriptedEngine(say("ab", hold=hold))) as server:
        before = await held(server)
        assert before["journals_open"] == before["websockets_open"] == 0
        async with server.client.ws_connect("/v1/responses") as socket:
            await socket.send_json({"type": "response.create", "model": "scripted", "input": "x"})
            await socket.receive_json()
            amid = await held(server)
            assert amid["journals_open"] == amid["websockets_open"] == 1
            assert amid["event_loop_tasks"] > before["event_loop_tasks"]
            hold.set()
            while (await socket.receive_json())["type"] != "response.completed":
                pass
        await server.idle()
        # The connections' own tasks end a few rounds of the event loop later.
        while (after := await held(server))["websockets_open"]:
            await asyncio.sleep(0)
        assert after["journals_open"] == 0
        assert after["event_loop_tasks"] <= amid["event_loop_tasks"] - 2
