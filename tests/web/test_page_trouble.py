"""What the page does when something is wrong: broken connections, a server that refuses."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Page, WebSocketRoute, expect

from engine import EngineState
from tests.web.conftest import OpenPage
from tests.web.page_server import PageServer
from tests.web.steps import answers, ask, composer, last_answer, send, wait_for_end

pytestmark = pytest.mark.browser

HELD = "Tell me slowly"
WORDS = "one two three four five six"
KEY = "key-of-this-test-0123456789"
OTHER_KEY = "another-key-of-this-test-0123456789"


@pytest.fixture
def page(open_page: OpenPage) -> Page:
    """The page; what the browser says about broken connections is part of these tests."""
    return open_page(noisy=True)


@pytest.fixture
def held(server: PageServer) -> PageServer:
    server.answers[HELD] = WORDS
    server.hold(HELD)
    return server


def test_broken_socket_is_picked_up_without_a_gap_or_a_double(page: Page, held: PageServer) -> None:
    send(page, HELD)
    expect(last_answer(page).locator(".prose")).to_have_text("one")
    for steps in range(1, 4):
        held.cut()
        held.let(HELD, 1)
        expect(last_answer(page).locator(".prose")).to_contain_text(
            WORDS[: 4 * (steps + 1)].strip()
        )
    held.cut()
    held.release(HELD)
    wait_for_end(page)
    expect(last_answer(page).locator(".prose")).to_have_text(WORDS)
    expect(last_answer(page).locator(".facts")).to_contain_text("Resumed after a break")
    assert len(held.engine.requests) == 1


def test_server_away_in_the_middle_and_back(page: Page, held: PageServer) -> None:
    send(page, HELD)
    expect(last_answer(page).locator(".prose")).to_have_text("one")
    held.away()
    expect(last_answer(page)).to_contain_text("Reconnecting…")
    expect(page.get_by_text("No server")).to_be_visible()
    held.release(HELD)
    held.back()
    wait_for_end(page)
    expect(last_answer(page).locator(".prose")).to_have_text(WORDS)


def test_server_away_before_the_question(page: Page, server: PageServer) -> None:
    server.away()
    page.evaluate("window.dispatchEvent(new Event('online'))")
    expect(page.get_by_text("No server")).to_be_visible()
    composer(page).fill("Are you there?")
    page.keyboard.press("Enter")
    expect(page.get_by_text("The server does not answer. Your text stays here.")).to_be_visible()
    expect(composer(page)).to_have_value("Are you there?")
    expect(page.get_by_role("button", name="Send")).to_be_disabled()
    server.back()
    expect(page.get_by_text("Connected")).to_be_attached()
    page.get_by_role("button", name="Send").click()
    wait_for_end(page)
    expect(last_answer(page).locator(".prose")).to_have_text("You said: Are you there?")


def test_question_that_cannot_be_sent_can_be_tried_again_or_edited(
    page: Page, server: PageServer
) -> None:
    ask(page, "Before")
    server.away()
    # The page has not noticed yet that the server is away.
    send(page, "Into the void")
    alert = last_answer(page).get_by_role("alert")
    expect(alert).to_be_visible()
    server.back()
    expect(page.get_by_text("Connected")).to_be_attached()
    alert.get_by_role("button", name="Edit the question").click()
    field = page.get_by_role("textbox", name="Question")
    expect(field).to_have_value("Into the void")
    field.fill("Into the open")
    field.press("Enter")
    wait_for_end(page)
    expect(answers(page).locator(".prose")).to_have_text(
        ["You said: Before", "You said: Into the open"]
    )
    page.reload()
    expect(page.get_by_role("article", name="You")).to_have_text(["Before", "Into the open"])


def test_question_that_arrived_though_nobody_said_so(page: Page, server: PageServer) -> None:
    def deaf(route: WebSocketRoute) -> None:
        there = route.connect_to_server()
        route.on_message(there.send)
        there.on_message(lambda _: route.close())

    page.route_web_socket(re.compile("/v1/responses"), deaf)
    send(page, "Did you hear?")
    expect(
        last_answer(page).get_by_role("alert").or_(last_answer(page).locator(".prose"))
    ).to_be_visible()
    server.call(server.engine.settle())
    page.evaluate("document.dispatchEvent(new Event('visibilitychange'))")
    expect(answers(page).locator(".prose")).to_have_text(["You said: Did you hear?"])
    expect(page.get_by_role("alert")).to_have_count(0)
    expect(page.get_by_role("article", name="You")).to_have_text(["Did you hear?"])
    assert len(server.engine.requests) == 1


def test_stop_while_the_server_is_away(page: Page, held: PageServer) -> None:
    send(page, HELD)
    expect(last_answer(page).locator(".prose")).to_have_text("one")
    held.away()
    page.keyboard.press("Escape")
    expect(page.get_by_role("button", name="Stop without waiting")).to_be_visible()
    page.keyboard.press("Escape")
    wait_for_end(page)
    expect(last_answer(page).get_by_role("alert")).to_contain_text("Stopped on this page only")


def test_engine_that_restarts_is_shown(page: Page, server: PageServer) -> None:
    server.do(lambda: setattr(server.engine, "state", EngineState.RESTARTING))
    page.evaluate("window.dispatchEvent(new Event('online'))")
    expect(page.get_by_text("Engine starting…", exact=True)).to_be_visible()
    server.do(lambda: setattr(server.engine, "state", EngineState.READY))
    expect(page.get_by_text("Connected")).to_be_attached()


class TestSmallContext:
    @pytest.fixture
    def server(self) -> Iterator[PageServer]:
        with PageServer(max_model_len=64) as server:
            yield server

    def test_full_context_says_what_to_do(self, page: Page) -> None:
        send(page, "word " * 40)
        alert = last_answer(page).get_by_role("alert")
        expect(alert).to_contain_text("no longer fits the model’s context")
        alert.get_by_role("button", name="New chat").click()
        expect(answers(page)).to_have_count(0)
        assert ask(page, "Hi") == "You said: Hi"


class TestApiKey:
    @pytest.fixture
    def server(self, tmp_path: Path) -> Iterator[PageServer]:
        keys = tmp_path / "keys"
        keys.write_text(f"{KEY}\n{OTHER_KEY}\n")
        keys.chmod(0o600)
        with PageServer(api_key_file=keys) as server:
            yield server

    def test_page_asks_for_the_key_and_keeps_it(self, page: Page) -> None:
        expect(page.get_by_text("The server needs an API key: open the settings.")).to_be_visible()
        page.get_by_role("button", name="Settings").click()
        page.get_by_label("API key").fill(KEY)
        page.get_by_role("button", name="Done").click()
        assert ask(page, "Open") == "You said: Open"
        page.reload()
        expect(last_answer(page).locator(".prose")).to_have_text("You said: Open")
        assert KEY not in page.content()

    def test_only_who_has_the_key_sees_the_conversations(self, open_page: OpenPage) -> None:
        mine, again, theirs = (open_page(noisy=True) for _ in range(3))
        for page, key in ((mine, KEY), (again, KEY), (theirs, OTHER_KEY)):
            page.get_by_role("button", name="Settings").click()
            page.get_by_label("API key").fill(key)
            page.get_by_role("button", name="Done").click()
        ask(mine, "Only mine")
        # Another browser with the same key.
        again.reload()
        again.get_by_role("button", name="Only mine", exact=True).click()
        expect(last_answer(again).locator(".prose")).to_have_text("You said: Only mine")
        theirs.reload()
        expect(theirs.get_by_text("Your conversations will be listed here")).to_be_visible()
        expect(theirs.get_by_text("Only mine")).to_have_count(0)

    def test_wrong_key_is_asked_for_again(self, page: Page) -> None:
        page.get_by_role("button", name="Settings").click()
        page.get_by_label("API key").fill("wrong")
        page.get_by_role("button", name="Done").click()
        expect(page.get_by_text("The server needs an API key: open the settings.")).to_be_visible()
        expect(page.get_by_role("button", name="Send")).to_be_disabled()


def test_storage_that_is_broken_or_foreign_does_no_harm(page: Page, server: PageServer) -> None:
    page.evaluate(
        """() => {
          localStorage.setItem('millrace.conversations', '[{"id": "conv_gone", "title": "Gone", '
            + '"createdAt": 1, "updatedAt": 2}, 7]');
          localStorage.setItem('millrace.settings', '{"temperature": "hot"}');
          localStorage.setItem('millrace.open', '"conv_gone"');
          localStorage.setItem('millrace.pending', '[]');
        }"""
    )
    page.reload()
    expect(page.get_by_role("alert")).to_contain_text("The server no longer has this")
    page.get_by_role("button", name="Dismiss").click()
    expect(page.get_by_role("heading", name="What is on your mind?")).to_be_visible()
    assert ask(page, "Still here") == "You said: Still here"
