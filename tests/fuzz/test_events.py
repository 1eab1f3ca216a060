"""Whatever is asked, an answer and each event of its stream is as the document says.

Schemathesis is the judge here, too, but asks in the test's own process and names the model that is
served: over the wire it guesses it so rarely that hardly a case in a thousand is ever streamed.
"""

from __future__ import annotations

import asyncio
import contextlib
import copy
import random
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from requests import Request
from schemathesis.openapi.checks import JsonSchemaError

from engine import Request as EngineRequest
from server.openapi.document import document
from server.settings import ServerSettings
from tests.fuzz.mutations import ROUTES, mutated
from tests.server.edge import NO_PAGE, Edge, serving
from tests.server.scripted import Script, ScriptedEngine, call_text, say

SCHEMA = schemathesis.openapi.from_dict(document("0.1.0"))
EXAMPLES = 300
PATHS = ("/v1/responses", "/v1/chat/completions", "/v1/completions")
NEEDED = {"model", "input", "messages", "prompt"}


def play(request: EngineRequest) -> Script:
    """Think, speak and call; or only speak, if the prompt's length is odd."""
    text = "Wörld \u2028\x00\U0001f600 says hello."
    if len(request.prompt_ids) % 2 == 0:
        call = call_text("calculator", '{"expression": "1 + 1"}') + call_text("f", "{}")
        text = f"<think>\nHm.\n</think>\n\n{text}\n{call}"
    return say(text, per_step=5)


class Asker:
    """A server of the test's own, asked from outside of its event loop."""

    def __init__(self, runner: asyncio.Runner, edge: Edge) -> None:
        self._runner = runner
        self._edge = edge
        self.statuses: Counter[int] = Counter()

    def ask(self, path: str, body: Mapping[str, Any]) -> tuple[str, schemathesis.Response]:
        """Return the answer's media type, and the answer as schemathesis reads it."""
        return self._runner.run(self._ask(path, body))

    async def _ask(self, path: str, body: Mapping[str, Any]) -> tuple[str, schemathesis.Response]:
        async with self._edge.client.post(path, json=body) as answer:
            data = await answer.read()
            self.statuses[answer.status] += 1
            headers = {name.lower(): [value] for name, value in answer.headers.items()}
            response = schemathesis.Response(
                status_code=answer.status,
                headers=headers,
                content=data,
                request=Request("POST", str(answer.url)).prepare(),
                elapsed=0.0,
                verify=False,
            )
            return answer.content_type, response


@pytest.fixture
def asker() -> Iterator[Asker]:
    settings = ServerSettings(page_dir=NO_PAGE)
    with asyncio.Runner() as runner:
        stack = contextlib.AsyncExitStack()
        edge = runner.run(stack.enter_async_context(serving(ScriptedEngine(play), settings)))
        try:
            yield Asker(runner, edge)
        finally:
            runner.run(stack.aclose())


def bodies(path: str) -> st.SearchStrategy[dict[str, Any]]:
    """Bodies that the document allows, and valid ones with one or two things changed."""
    known = [route.body for route in ROUTES if route.path == path and route.method == "POST"]
    seeds = st.integers(0, 2**32)
    changed = st.builds(
        lambda body, seed: mutated(random.Random(seed), copy.deepcopy(body))[1],
        st.sampled_from(known),
        seeds,
    )
    drawn = st.builds(
        lambda case, body, seed: _tamed(random.Random(seed), case.body, body),
        SCHEMA[path]["POST"].as_strategy(),
        st.sampled_from(known),
        seeds,
    )
    return st.one_of(drawn, changed).filter(lambda body: isinstance(body, dict))


def _tamed(rng: random.Random, body: dict[str, Any], known: dict[str, Any]) -> dict[str, Any]:
    """A few of its fields, and mostly a known question.

    With all fields at once hardly a body is without one that names what does not exist.
    """
    fewer = {name: body[name] for name in rng.sample(list(body), min(len(body), rng.randint(0, 6)))}
    question = known if rng.random() < 0.7 else body
    return fewer | {name: question[name] for name in NEEDED & question.keys()}


@pytest.mark.timeout(300)
@pytest.mark.parametrize("path", PATHS)
def test_answers_and_events_are_as_the_document_says(asker: Asker, path: str) -> None:
    operation = SCHEMA[path]["POST"]
    streams = 0

    @settings(
        max_examples=EXAMPLES,
        phases=(Phase.explicit, Phase.generate, Phase.shrink),
        suppress_health_check=list(HealthCheck),
        database=None,
        derandomize=True,
    )
    @given(bodies(path), st.booleans())
    def run(body: dict[str, Any], streamed: bool) -> None:
        nonlocal streams
        media_type, response = asker.ask(path, {**body, "model": "scripted", "stream": streamed})
        operation.validate_response(response)
        streams += media_type == "text/event-stream"

    run()
    # Neither a wall nor an open door.
    assert streams > EXAMPLES // 10, (streams, asker.statuses)
    assert set(asker.statuses) <= {200, 400, 404}, asker.statuses
    assert asker.statuses[400] > EXAMPLES // 20, asker.statuses


@pytest.mark.parametrize(("right", "wrong"), [(b'"store":true', b'"store":7'), (b"item_id", b"i")])
def test_the_check_can_fail(asker: Asker, right: bytes, wrong: bytes) -> None:
    _, response = asker.ask("/v1/responses", {"model": "scripted", "input": "x", "stream": True})
    assert right in response.content
    response.content = response.content.replace(right, wrong, 1)
    with pytest.raises(JsonSchemaError):
        SCHEMA["/v1/responses"]["POST"].validate_response(response)
