"""Sampling as the engine is asked for it: the request's word, else the checkpoint's, else plain."""

from __future__ import annotations

import msgspec

from engine import SamplingDefaults
from server.prompting import resolve_sampling
from server.request import SamplingOptions, TurnRequest
from tests.server.edge import serving
from tests.server.scripted import ScriptedEngine, say
from tests.server.turn_events import MODEL

ADVISED = SamplingDefaults(temperature=0.6, top_k=20, top_p=0.9, min_p=0.1, repetition_penalty=1.2)


def resolve(asked: SamplingOptions, advised: SamplingDefaults) -> tuple[float, ...]:
    request = TurnRequest(dialect="chat", model="pebble", messages=[], sampling=asked)
    info = msgspec.structs.replace(MODEL, defaults=advised)
    found = resolve_sampling(request, info, 3, 0, first_choice=True)
    return (
        found.temperature,
        found.top_k,
        found.top_p,
        found.min_p,
        found.repetition_penalty,
    )


def test_the_checkpoint_decides_what_the_request_leaves_open() -> None:
    assert resolve(SamplingOptions(), ADVISED) == (0.6, 20, 0.9, 0.1, 1.2)
    assert resolve(SamplingOptions(), SamplingDefaults()) == (1.0, 0, 1.0, 0.0, 1.0)


def test_the_request_decides_even_for_nothing() -> None:
    asked = SamplingOptions(temperature=0.0, top_k=0, top_p=1.0, min_p=0.0, repetition_penalty=1.0)
    assert resolve(asked, ADVISED) == (0.0, 0, 1.0, 0.0, 1.0)


async def test_a_response_says_what_was_used() -> None:
    engine = ScriptedEngine(say("Hi"))
    engine.info = msgspec.structs.replace(engine.info, defaults=ADVISED)
    async with serving(engine) as edge:
        body = (await edge.post("/v1/responses", {"model": "scripted", "input": "x"})).body
        assert (body["temperature"], body["top_p"]) == (0.6, 0.9)
        body = {"model": "scripted", "input": "x", "temperature": 0.3}
        assert (await edge.post("/v1/responses", body)).body["temperature"] == 0.3
        assert [request.sampling.temperature for request in engine.requests] == [0.6, 0.3]
