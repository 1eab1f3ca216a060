"""The OpenAPI document is true: it has exactly the routes, and what is sent fits its schemas."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Iterator
from typing import Any

import jsonschema
import pytest
from referencing import Registry
from referencing.jsonschema import DRAFT202012

from engine import EngineState
from server.dialects import chat, completions, responses
from server.openapi.document import document
from server.settings import ServerSettings
from tests.server.edge import NO_PAGE, Edge, datas, serving
from tests.server.scripted import ScriptedEngine, call_text, say

DOCUMENT = document("0.1.0")
REGISTRY: Registry[Any] = Registry().with_resource(
    "urn:document", DRAFT202012.create_resource(DOCUMENT)
)


def check(value: Any, schema: dict[str, Any]) -> None:
    """Raise ValidationError when a value does not fit a schema of the document."""
    text = json.dumps(schema).replace('"#/', '"urn:document#/')
    validator = jsonschema.Draft202012Validator(json.loads(text), registry=REGISTRY)
    validator.validate(value)


def component(name: str) -> dict[str, Any]:
    schema: dict[str, Any] = DOCUMENT["components"]["schemas"][name]
    return schema


@pytest.fixture
async def edge() -> AsyncIterator[Edge]:
    settings = ServerSettings(page_dir=NO_PAGE, max_body_bytes=1 << 16)
    async with serving(ScriptedEngine(say("Hello, wörld")), settings) as edge:
        yield edge


def refs(node: Any) -> Iterator[str]:
    if isinstance(node, dict):
        if "$ref" in node:
            yield node["$ref"]
        for value in node.values():
            yield from refs(value)
    elif isinstance(node, list):
        for value in node:
            yield from refs(value)


def test_every_schema_is_one_and_every_reference_leads_somewhere() -> None:
    names = {f"#/components/schemas/{name}" for name in DOCUMENT["components"]["schemas"]}
    used = set(refs(DOCUMENT))
    assert used <= names
    for name, schema in DOCUMENT["components"]["schemas"].items():
        jsonschema.Draft202012Validator.check_schema(schema)
        assert f"#/components/schemas/{name}" in used, f"{name} is used nowhere"


def test_path_parameters_are_declared() -> None:
    for path, operations in DOCUMENT["paths"].items():
        for method, operation in operations.items():
            declared = {p["name"] for p in operation.get("parameters", []) if p["in"] == "path"}
            named = {part[1:-1] for part in path.split("/") if part.startswith("{")}
            assert declared == named, f"{method} {path}"


async def test_the_document_has_exactly_the_routes(edge: Edge) -> None:
    answer = await edge.get("/openapi.json")
    assert answer.status == 200
    documented = {
        (method.upper(), path)
        for path, operations in answer.body["paths"].items()
        for method in operations
    }
    served = {
        (route.method, route.resource.canonical)
        for route in edge.app.router.routes()
        if route.resource is not None and route.method != "HEAD"
    }
    # The page's files have all addresses that are left.
    assert served - documented == {("GET", "/{path}")}
    assert documented <= served


@pytest.mark.parametrize(
    ("name", "fields"),
    [
        ("ChatCompletionRequest", chat.KNOWN_FIELDS),
        ("CompletionRequest", completions.KNOWN_FIELDS),
        ("ResponseRequest", responses._KNOWN),
    ],
)
def test_request_schemas_name_what_is_accepted(name: str, fields: frozenset[str]) -> None:
    assert set(component(name)["properties"]) == fields


MESSAGES = [{"role": "user", "content": "Hi"}]

ASKED: list[tuple[str, dict[str, Any], str, str]] = [
    (
        "/v1/chat/completions",
        {"messages": MESSAGES},
        "ChatCompletionRequest",
        "ChatCompletion",
    ),
    (
        "/v1/chat/completions",
        {
            "messages": MESSAGES,
            "n": 2,
            "logprobs": True,
            "top_logprobs": 2,
            "return_token_ids": True,
            "prompt_logprobs": 1,
            "stop": ["w"],
            "max_tokens": 50,
            "seed": 4,
            "temperature": 0.5,
        },
        "ChatCompletionRequest",
        "ChatCompletion",
    ),
    ("/v1/completions", {"prompt": "Hi"}, "CompletionRequest", "Completion"),
    (
        "/v1/completions",
        {
            "prompt": [[1, 2], "Hi"],
            "n": 2,
            "echo": True,
            "logprobs": 1,
            "return_token_ids": True,
            "max_tokens": 3,
        },
        "CompletionRequest",
        "Completion",
    ),
    ("/v1/responses", {"input": "Hi"}, "ResponseRequest", "Response"),
    (
        "/v1/responses",
        {
            "input": [{"role": "user", "content": [{"type": "input_text", "text": "Hi"}]}],
            "instructions": "Be brief.",
            "metadata": {"a": "b"},
            "include": ["message.output_text.logprobs"],
            "top_logprobs": 1,
            "max_output_tokens": 2,
            "store": False,
        },
        "ResponseRequest",
        "Response",
    ),
    ("/tokenize", {"prompt": "Hi", "return_token_strs": True}, "TokenizeRequest", "Tokens"),
    ("/tokenize", {"messages": MESSAGES}, "TokenizeRequest", "Tokens"),
    ("/detokenize", {"tokens": [72, 105]}, "DetokenizeRequest", "Detokenized"),
]


FUNCTION = {"name": "f", "description": "d", "parameters": {"type": "object"}, "strict": True}
CALLED = [
    {"type": "reasoning", "content": [{"type": "reasoning_text", "text": "x"}]},
    {"type": "function_call", "call_id": "c", "name": "f", "arguments": "{}"},
    {"type": "function_call_output", "call_id": "c", "output": "y"},
]
WITH_TOOLS: list[tuple[str, dict[str, Any], str, str, str]] = [
    (
        "/v1/chat/completions",
        {
            "messages": MESSAGES,
            "tools": [{"type": "function", "function": FUNCTION}],
            "tool_choice": {"type": "function", "function": {"name": "f"}},
            "reasoning_effort": "low",
            "parallel_tool_calls": False,
        },
        "ChatCompletionRequest",
        "ChatCompletion",
        "ChatCompletionChunk",
    ),
    (
        "/v1/chat/completions",
        {"messages": MESSAGES, "tools": [{"type": "function", "function": FUNCTION}]},
        "ChatCompletionRequest",
        "ChatCompletion",
        "ChatCompletionChunk",
    ),
    (
        "/v1/responses",
        {
            "input": CALLED,
            "tools": [{"type": "function", **FUNCTION}, {"type": "millrace:calculator"}],
            "tool_choice": "auto",
            "max_tool_calls": 1,
            "reasoning": {"effort": "high"},
        },
        "ResponseRequest",
        "Response",
        "ResponseEvent",
    ),
]


@pytest.mark.parametrize(("path", "body", "request_schema", "whole", "part"), WITH_TOOLS)
async def test_tools_fit_their_schemas(
    path: str, body: dict[str, Any], request_schema: str, whole: str, part: str
) -> None:
    called = call_text("calculator", '{"expression": "1"}') + call_text("f", "{}")
    engine = ScriptedEngine(say(f"<think>\nHm.\n</think>\n\nOk.\n{called}", per_step=9))
    settings = ServerSettings(page_dir=NO_PAGE)
    async with serving(engine, settings) as edge:
        body = {"model": "scripted", **body}
        check(body, component(request_schema))
        answer = await edge.post(path, body)
        assert answer.status == 200, answer.body
        check(answer.body, component(whole))
        if whole == "Response":
            kinds = [item["type"] for item in answer.body["output"]]
            assert {"reasoning", "message", "function_call", "function_call_output"} == set(kinds)
            listed = await edge.get(f"/v1/responses/{answer.body['id']}/input_items")
            check(listed.body, component("ItemList"))
        for data in datas(await edge.stream(path, {**body, "stream": True})):
            if data != "[DONE]":
                check(json.loads(data), component(part))


@pytest.mark.parametrize(("path", "body", "request_schema", "schema"), ASKED)
async def test_answers_fit_their_schemas(
    edge: Edge, path: str, body: dict[str, Any], request_schema: str, schema: str
) -> None:
    if path.startswith("/v1"):
        body = {"model": "scripted", **body}
    check(body, component(request_schema))
    answer = await edge.post(path, body)
    assert answer.status == 200, answer.body
    check(answer.body, component(schema))


STREAMED = [
    (path, body, {"Response": "ResponseEvent"}.get(schema, schema + "Chunk"))
    for path, body, _, schema in ASKED
    if path.startswith("/v1")
]


@pytest.mark.parametrize(("path", "body", "schema"), STREAMED)
async def test_streams_fit_their_schemas(
    edge: Edge, path: str, body: dict[str, Any], schema: str
) -> None:
    body = {"model": "scripted", "stream": True, **body}
    if path != "/v1/responses":
        body["stream_options"] = {"include_usage": True, "continuous_usage_stats": True}
    frames = datas(await edge.stream(path, body))
    if path != "/v1/responses":
        assert frames.pop() == "[DONE]"
    assert len(frames) > 3
    for frame in frames:
        check(json.loads(frame), component(schema))


async def test_plain_answers_fit_their_schemas(edge: Edge) -> None:
    for path, schema in [
        ("/v1/models", "ModelList"),
        ("/v1/models/scripted", "Model"),
        ("/health", "Health"),
        ("/ready", "Ready"),
    ]:
        answer = await edge.get(path)
        assert answer.status == 200
        check(answer.body, component(schema))


async def test_a_tree_of_items_fits_its_schema(edge: Edge) -> None:
    call = {"type": "function_call", "call_id": "c", "name": "f", "arguments": "{}"}
    output = {"type": "function_call_output", "call_id": "c", "output": "4"}
    thought = {"type": "reasoning", "content": [{"type": "reasoning_text", "text": "hm"}]}
    items = [{"role": "user", "content": "Hi"}, thought, call, output]
    conversation = (await edge.post("/v1/conversations", {"items": items})).body
    path = f"/v1/conversations/{conversation['id']}"
    for after in (conversation["head"], None):
        body = {
            "model": "scripted",
            "input": "Hi" if after is None else [],
            "conversation": {"id": conversation["id"], "after": after},
        }
        check(body, component("ResponseRequest"))
        assert (await edge.post("/v1/responses", body)).status == 200
    listed = (await edge.get(f"{path}/items?tree=true")).body
    check(listed, component("TreeItemList"))
    assert len(listed["data"]) == 7
    with pytest.raises(jsonschema.ValidationError):
        check(listed, component("ItemList"))
    update = {"head": conversation["head"], "descend": True}
    check(update, component("ConversationUpdate"))
    assert (await edge.post(path, update)).status == 200
    for wrong in ({}, {"descend": True}, {"title": ""}, {"title": "x", "descend": True}):
        with pytest.raises(jsonschema.ValidationError):
            check(wrong, component("ConversationUpdate"))
        assert (await edge.post(path, wrong)).status == 400


async def test_a_conversation_fits_its_schemas(edge: Edge) -> None:
    items = [{"role": "user", "content": "Hi"}]
    conversation = (await edge.post("/v1/conversations", {"items": items})).body
    check(conversation, component("Conversation"))
    path = f"/v1/conversations/{conversation['id']}"
    body = {"model": "scripted", "input": "Hi", "conversation": conversation["id"]}
    response = (await edge.post("/v1/responses", body)).body
    check(response, component("Response"))
    listed = (await edge.get(f"{path}/items")).body
    check(listed, component("ItemList"))
    assert len(listed["data"]) == 3
    check((await edge.post(f"{path}/items", {"items": items})).body, component("ItemList"))
    item = f"{path}/items/{listed['data'][0]['id']}"
    check((await edge.get(item)).body, component("Message"))
    check((await edge.send("DELETE", item)).body, component("Conversation"))
    check((await edge.post(path, {"metadata": {"a": "b"}})).body, component("Conversation"))
    check((await edge.post(f"{path}/fork", {"title": "x"})).body, component("Conversation"))
    check((await edge.get("/v1/conversations")).body, component("ConversationList"))
    for query in ("x", "hello", "hi"):
        found = (await edge.get(f"/v1/conversations?query={query}")).body
        check(found, component("FoundConversationList"))
    check((await edge.send("DELETE", path)).body, component("DeletedConversation"))
    stored = f"/v1/responses/{response['id']}"
    check((await edge.get(stored)).body, component("Response"))
    check((await edge.get(f"{stored}/input_items")).body, component("ItemList"))
    check((await edge.post(f"{stored}/cancel")).body, component("Response"))
    check((await edge.send("DELETE", stored)).body, component("DeletedResponse"))


def answers_of(path: str, method: str) -> set[str]:
    return set(DOCUMENT["paths"][path][method]["responses"])


@pytest.mark.parametrize(
    ("method", "path", "options", "status"),
    [
        ("post", "/v1/chat/completions", {"data": b"{"}, 400),
        ("post", "/v1/chat/completions", {"json": {"model": "none"}}, 404),
        ("post", "/v1/chat/completions", {"data": b"x" * (1 << 17)}, 413),
        ("post", "/v1/completions", {"json": {"model": "scripted", "prompt": ""}}, 400),
        ("post", "/v1/completions", {"data": b"{}", "headers": {"Content-Type": "a/b"}}, 415),
        ("post", "/v1/responses", {"json": {"model": "scripted", "input": 3}}, 400),
        ("post", "/tokenize", {"json": {}}, 400),
        ("post", "/detokenize", {"json": {"tokens": [-1]}}, 400),
        ("get", "/v1/models/{model}", {}, 404),
        ("get", "/v1/responses/{id}", {}, 404),
        ("get", "/v1/responses", {}, 405),
        ("get", "/v1/conversations/{id}", {}, 404),
        ("post", "/v1/conversations", {"json": {"metadata": 4}}, 400),
        ("get", "/v1/conversations", {"params": {"query": ""}}, 400),
        ("post", "/v1/conversations/{id}/fork", {"json": {}}, 404),
        ("delete", "/v1/conversations/{id}/items/{item}", {"params": {"subtree": "x"}}, 400),
    ],
)
async def test_errors_are_documented_and_fit_their_schema(
    edge: Edge, method: str, path: str, options: dict[str, Any], status: int
) -> None:
    if "data" in options:
        options = {"headers": {"Content-Type": "application/json"}, **options}
    # The router takes no braces in an address.
    answer = await edge.send(method, path.replace("{", "").replace("}", ""), **options)
    assert answer.status == status, answer.body
    assert answer.body["error"]["code"] != "unknown_url"
    assert str(status) in answers_of(path, method)
    check(answer.body, component("Error"))


async def test_unready_is_documented(edge: Edge) -> None:
    edge.engine.state = EngineState.RESTARTING
    for path, method in [("/ready", "get"), ("/v1/chat/completions", "post")]:
        body = {"model": "scripted", "messages": MESSAGES}
        answer = await edge.send(method, path, **({"json": body} if method == "post" else {}))
        assert answer.status == 503
        assert "503" in answers_of(path, method)
        check(answer.body, component("Error"))
        assert int(answer.headers["Retry-After"]) > 0


def test_the_check_can_fail() -> None:
    with pytest.raises(jsonschema.ValidationError):
        check({"status": "ok", "extra": 1}, component("Health"))
    with pytest.raises(jsonschema.ValidationError):
        check({"object": "list", "data": [{"id": "x"}]}, component("ModelList"))
