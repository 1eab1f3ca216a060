"""``millrace chat`` as a person meets it: on a terminal, and in a pipe."""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import AsyncIterator

import pytest

from tests.server.chat_server import KEY, ChatServer, answer, calculation, created, delta, ended
from tests.server.process import needs_model, serving
from tests.server.terminal import terminal

PROMPT = "you> "


@pytest.fixture
async def server() -> AsyncIterator[ChatServer]:
    async with ChatServer().run() as running:
        yield running


async def piped(text: str, *arguments: str) -> tuple[int, str, str]:
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "server", "chat", *arguments),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        env={**os.environ, "NO_COLOR": "1"},
    )
    out, err = await process.communicate(text.encode())
    assert process.returncode is not None
    return process.returncode, out.decode(), err.decode()


class TestOnATerminal:
    async def test_a_conversation(self, server: ChatServer) -> None:
        server.script = lambda request: answer("**You** said:\n\n", request["input"] + "\n")
        async with terminal("chat", "--url", server.url, "--temperature", "0.5") as screen:
            await screen.expect("small")
            await screen.expect(PROMPT)
            screen.type("first thing\r")
            await screen.expect("You said:")  # as Markdown: without the stars
            await screen.expect("3 tokens")
            await screen.expect(PROMPT)
            screen.type("/model large\r")
            await screen.expect("* large")
            await screen.expect(PROMPT)
            screen.type("/system be kind\r")
            await screen.expect(PROMPT)
            screen.type("second\r")
            await screen.expect("3 tokens")
            await screen.expect(PROMPT)
            screen.type("/new\r")
            await screen.expect("a new conversation")
            await screen.expect(PROMPT)
            screen.type("//third\\\rand more\r")
            await screen.expect("3 tokens")
            await screen.expect(PROMPT)
            screen.type("/nonsense\r")
            await screen.expect("no command /nonsense")
            await screen.expect(PROMPT)
            screen.type("/quit\r")
            assert await screen.process.wait() == 0
        first, second, third = server.asked
        assert (first["conversation"], second["conversation"]) == ("conv_1", "conv_1")
        assert third["conversation"] == "conv_2"
        assert (first["model"], second["model"]) == ("small", "large")
        assert "instructions" not in first
        assert second["instructions"] == "be kind"
        assert first["temperature"] == 0.5
        assert third["input"] == "/third\nand more"
        assert server.num_conversations == 2

    async def test_tools(self, server: ChatServer) -> None:
        server.script = lambda _: [
            created(), delta(1, "Let me see.\n"), *calculation(2), delta(4, "Two."), ended(5)
        ]  # fmt: skip
        async with terminal("chat", "--url", server.url) as screen:
            await screen.expect(PROMPT)
            screen.type("/tools on\r")
            await screen.expect("may use the server's tools")
            await screen.expect(PROMPT)
            screen.type("1 + 1?\r")
            await screen.expect("Let me see.")
            await screen.expect("calculator: 1 + 1 → 2")
            await screen.expect("Two.")
            await screen.expect(PROMPT)
            screen.type("/quit\r")
            assert await screen.process.wait() == 0
        assert len(server.asked[0]["tools"]) == 2

    async def test_ctrl_c_stops_the_answer_and_not_the_program(self, server: ChatServer) -> None:
        server.script = lambda _: [created(), delta(1, "endless"), "wait", ended(2, "cancelled")]
        async with terminal("chat", "--url", server.url) as screen:
            await screen.expect(PROMPT)
            screen.type("go\r")
            await screen.expect("endless")
            await screen.interrupt("stopped")
            await screen.expect(PROMPT)
            await screen.interrupt("Ctrl-D or /quit leaves")
            await screen.expect(PROMPT)
            screen.type("\x04")
            assert await screen.process.wait() == 0
        assert server.cancelled.is_set()

    async def test_a_broken_connection_is_mended(self, server: ChatServer) -> None:
        server.script = lambda _: [created(), delta(1, "one "), None]
        server.stored = answer("one ", "two ", "three")
        async with terminal("chat", "--url", server.url) as screen:
            await screen.expect(PROMPT)
            screen.type("count\r")
            await screen.expect("3 tokens")
            assert "one two three" in screen.text

    async def test_a_server_that_went_away_and_came_back(self, server: ChatServer) -> None:
        async with terminal("chat", "--url", server.url) as screen:
            await screen.expect(PROMPT)
            server.script = lambda _: [None]
            screen.type("hello\r")
            await screen.expect("before the server began to answer")
            await screen.expect(PROMPT)
            server.script = lambda _: answer("back")
            screen.type("hello\r")
            await screen.expect("back")

    async def test_an_answer_cannot_steer_the_terminal(self, server: ChatServer) -> None:
        server.script = lambda _: answer("a\x1b]0;owned\x07b\x1b[2J")
        async with terminal("chat", "--url", server.url) as screen:
            await screen.expect(PROMPT)
            screen.type("go\r")
            await screen.expect("3 tokens")
            assert b"\x1b]0;owned" not in screen.raw
            assert b"\x1b[2J" not in screen.raw

    async def test_a_long_answer_is_shown_once(self, server: ChatServer) -> None:
        lines = [f"line-{number:03}\n\n" for number in range(80)]
        server.script = lambda _: answer(*lines)
        async with terminal("chat", "--url", server.url) as screen:
            await screen.expect(PROMPT)
            screen.type("go\r")
            await screen.expect("3 tokens")
            places = [screen.text.rfind(line.strip()) for line in lines]
            assert places == sorted(places)
            assert screen.text.count("line-000") <= 2  # once live, once for good

    async def test_a_lost_conversation_is_left(self, server: ChatServer) -> None:
        error = {"message": "There is no conversation", "code": "conversation_not_found"}
        async with terminal("chat", "--url", server.url) as screen:
            await screen.expect(PROMPT)
            server.script = lambda _: [{"type": "error", "status": 404, "error": error}]
            screen.type("hello\r")
            await screen.expect("begins a new conversation")
            await screen.expect(PROMPT)
            server.script = lambda _: answer("fresh")
            screen.type("hello\r")
            await screen.expect("fresh")
        assert [one["conversation"] for one in server.asked] == ["conv_1", "conv_2"]


class TestInAPipe:
    async def test_one_plain_answer(self, server: ChatServer) -> None:
        server.script = lambda request: answer("**", request["input"], "**\x1b[1m é")
        status, out, err = await piped("line one\nline two\n", "--url", server.url)
        assert (status, out, err) == (0, "**line one\nline two**\x1b[1m é\n", "")

    async def test_nothing_to_say(self, server: ChatServer) -> None:
        status, out, err = await piped(" \n", "--url", server.url)
        assert (status, out) == (2, "")
        assert "nothing to send" in err

    async def test_failure(self, server: ChatServer) -> None:
        error = {"message": "the context is full"}
        server.script = lambda _: [{"type": "error", "error": error}]
        status, out, err = await piped("hi", "--url", server.url)
        assert (status, out, err) == (1, "", "millrace: the context is full\n")

    async def test_no_server(self) -> None:
        status, _, err = await piped("hi", "--url", "http://127.0.0.1:1")
        assert status == 2
        assert err.count("\n") == 1
        assert "is `millrace serve` running?" in err

    async def test_key(self, server: ChatServer) -> None:
        server.key = KEY
        status, _, err = await piped("hi", "--url", server.url)
        assert status == 2
        assert "--api-key" in err
        status, out, _ = await piped("hi", "--url", server.url, "--api-key", KEY)
        assert (status, out) == (0, "Hi there\n")


@needs_model
class TestWithTheRealServer:
    async def test_a_conversation(self) -> None:
        async with serving() as (_, url):
            async with terminal("chat", "--url", url, "--temperature", "0") as screen:
                await screen.expect("pebble")
                for _ in range(2):
                    await screen.expect(PROMPT)
                    screen.type("Hello\r")
                    await screen.expect("first after")
                await screen.expect(PROMPT)
                screen.type("/quit\r")
                assert await screen.process.wait() == 0
            status, out, err = await piped("Hello", "--url", url)
            assert (status, err) == (0, "")
            assert out.strip()
