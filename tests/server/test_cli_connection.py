"""The chat client's connection against a server that plays scripts, hangs up and refuses."""

from __future__ import annotations

import socket
from collections.abc import AsyncIterator
from contextlib import aclosing

import pytest

from server.cli import connection as module
from server.cli.connection import Connection, ServerAway, ServerRefused, check_url
from server.cli.dialogue import Answer, Dialogue, Phase
from tests.server.chat_server import KEY, ChatServer, answer, created, delta, ended


@pytest.fixture
async def server() -> AsyncIterator[ChatServer]:
    async with ChatServer().run() as running:
        yield running


@pytest.fixture
async def connection(server: ChatServer) -> AsyncIterator[Connection]:
    one = Connection(server.url, None)
    yield one
    await one.close()


async def ask(connection: Connection, text: str = "hi") -> tuple[Answer, str]:
    async with aclosing(connection.ask(Dialogue("small"), text)) as steps:
        seen = [step async for step in steps]
    one = seen[-1][0]
    shown = "".join(added for _, added in seen)
    assert shown == one.text
    return one, shown


async def test_questions_share_a_socket(server: ChatServer, connection: Connection) -> None:
    server.script = lambda request: answer("You said ", request["input"])
    assert (await ask(connection, "one"))[1] == "You said one"
    first = connection._socket
    assert (await ask(connection, "two"))[1] == "You said two"
    assert connection._socket is first
    assert [one["input"] for one in server.asked] == ["one", "two"]


async def test_models_and_conversations(server: ChatServer, connection: Connection) -> None:
    assert await connection.models() == ["small", "large"]
    assert await connection.new_conversation() == "conv_1"
    assert await connection.new_conversation() == "conv_2"


async def test_cancel(server: ChatServer, connection: Connection) -> None:
    server.script = lambda _: [created(), delta(1, "a"), "wait", ended(2, "cancelled")]
    async with aclosing(connection.ask(Dialogue(), "hi")) as steps:
        async for one, added in steps:
            if added:
                assert one.response_id is not None
                await connection.cancel(one.response_id)
    assert one.phase is Phase.CANCELLED


async def test_a_broken_answer_is_picked_up(server: ChatServer, connection: Connection) -> None:
    server.script = lambda _: [created(), delta(1, "He"), None]
    server.stored = answer("He", "l", "lo")
    one, shown = await ask(connection)
    assert shown == "Hello"
    assert one.phase is Phase.COMPLETED
    assert server.resumed_after == ["1"]
    server.script = lambda _: answer("again")
    assert (await ask(connection))[1] == "again"


async def test_a_broken_answer_that_is_gone(server: ChatServer, connection: Connection) -> None:
    server.script = lambda _: [created(), delta(1, "He"), None]
    one, shown = await ask(connection)
    assert shown == "He"
    assert one.phase is Phase.FAILED
    assert "no such response" in str(one.problem)


async def test_a_server_that_does_not_come_back(
    server: ChatServer, connection: Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_RESUME_DELAYS_S", (0.0, 0.001))
    notes: list[str] = []
    connection.on_broken = notes.append
    server.script = lambda _: [created(), delta(1, "He"), None]
    server.stored = answer("He")[:2]  # the stream ends without an end each time
    one, _ = await ask(connection)
    assert one.phase is Phase.FAILED
    assert "does not come back" in str(one.problem)
    assert len(notes) == 1


async def test_hung_up_before_anything(server: ChatServer, connection: Connection) -> None:
    server.script = lambda _: [None]
    one, _ = await ask(connection)
    assert "before the server began" in str(one.problem)


async def test_refused(server: ChatServer, connection: Connection) -> None:
    error = {"message": "too hot", "code": "bad"}
    server.script = lambda _: [{"type": "error", "status": 400, "error": error}]
    one, _ = await ask(connection)
    assert (one.phase, one.problem) == (Phase.REFUSED, "too hot")
    server.script = lambda _: answer("fine")
    assert (await ask(connection))[1] == "fine"


async def test_nobody_there() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # does not listen
        one = Connection(f"http://127.0.0.1:{taken.getsockname()[1]}", None)
        with pytest.raises(ServerAway, match=r"cannot reach .*Connection refused.*millrace serve"):
            await one.models()
        with pytest.raises(ServerAway, match="Connection refused"):
            await ask(one)
        await one.close()


async def test_keys(server: ChatServer, connection: Connection) -> None:
    server.key = KEY
    with pytest.raises(ServerRefused, match="--api-key"):
        await connection.models()
    with pytest.raises(ServerRefused, match="--api-key"):
        await ask(connection)
    one = Connection(server.url, KEY)
    assert await one.models()
    assert (await ask(one))[1] == "Hi there"
    await one.close()


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("http://h:1", "http://h:1"),
        ("http://h:1/", "http://h:1"),
        ("http://h:1/v1", "http://h:1"),
        ("https://h/base/v1/", "https://h/base"),
    ],
)
def test_addresses(url: str, expected: str) -> None:
    assert check_url(url) == expected


@pytest.mark.parametrize("url", ["", "localhost:8000", "ftp://h", "http://", "ws://h"])
def test_no_addresses(url: str) -> None:
    with pytest.raises(ValueError, match="not a server's address"):
        check_url(url)
