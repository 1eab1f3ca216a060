"""Conversations on the page, in a real Chromium against the real server."""

from __future__ import annotations

import pytest
from playwright.sync_api import Page, expect

from engine import FinishReason
from tests.server.scripted import say
from tests.web.page_server import PageServer
from tests.web.steps import answers, ask, composer, last_answer, send, wait_for_end

pytestmark = pytest.mark.browser

HELD = "Tell me slowly"
WORDS = "one two three four five six"


@pytest.fixture
def held(server: PageServer) -> PageServer:
    """The server, with a question whose answer waits to be let go."""
    server.answers[HELD] = WORDS
    server.hold(HELD)
    return server


def test_first_visit_offers_a_start(page: Page) -> None:
    expect(page).to_have_title("Millrace")
    expect(page.get_by_role("heading", name="What is on your mind?")).to_be_visible()
    expect(composer(page)).to_be_focused()
    expect(page.get_by_role("button", name="Send")).to_be_disabled()
    page.get_by_role("button", name="Hi! How are you today?").click()
    wait_for_end(page)
    expect(last_answer(page)).to_contain_text("You said: Hi! How are you today?")
    expect(page).to_have_title("Hi! How are you today? · Millrace")


def test_answer_appears_as_it_is_written(page: Page, held: PageServer) -> None:
    send(page, HELD)
    expect(last_answer(page)).to_have_text("one")
    held.let(HELD, 1)
    expect(last_answer(page)).to_have_text("one two")
    expect(last_answer(page)).to_have_attribute("aria-busy", "true")
    held.release(HELD)
    wait_for_end(page)
    expect(last_answer(page).locator(".prose")).to_have_text(WORDS)
    facts = last_answer(page).locator(".facts")
    expect(facts).to_contain_text("First token")
    expect(facts).to_contain_text("tokens/s")
    # The byte tokenizer: a token a byte, and the end token.
    expect(facts).to_contain_text(f"{len(WORDS) + 1} tokens")


def test_several_turns_share_their_history(page: Page, server: PageServer) -> None:
    ask(page, "My name is Ada")
    ask(page, "What is it?")
    prompt = bytes(token for token in server.engine.requests[-1].prompt_ids if token < 256).decode()
    assert "user: My name is Ada" in prompt
    assert "assistant: You said: My name is Ada" in prompt
    expect(answers(page)).to_have_count(2)


@pytest.mark.parametrize("how", ["button", "escape"])
def test_stop_keeps_what_was_said_and_says_so(page: Page, held: PageServer, how: str) -> None:
    send(page, HELD)
    expect(last_answer(page)).to_have_text("one")
    if how == "button":
        page.get_by_role("button", name="Stop").click()
    else:
        page.keyboard.press("Escape")
    wait_for_end(page)
    expect(last_answer(page).locator(".prose")).to_have_text("one")
    expect(last_answer(page).locator(".cut")).to_have_text("Stopped")
    assert held.engine.running == {}
    page.reload()
    expect(last_answer(page).locator(".prose")).to_have_text("one")
    expect(last_answer(page).locator(".cut")).to_have_text("Stopped")
    assert ask(page, "Go on") == "You said: Go on"


def test_reload_keeps_the_conversation(page: Page) -> None:
    ask(page, "Remember me")
    facts = last_answer(page).locator(".facts").inner_text()
    page.reload()
    expect(page.get_by_role("article", name="You")).to_have_text("Remember me")
    expect(last_answer(page).locator(".prose")).to_have_text("You said: Remember me")
    expect(last_answer(page).locator(".facts")).to_have_text(facts)
    expect(page.get_by_role("heading", level=1)).to_have_text("Remember me")


def test_reload_in_the_middle_continues_the_answer(page: Page, held: PageServer) -> None:
    ask(page, "Before")
    send(page, HELD)
    held.let(HELD, 1)
    expect(last_answer(page)).to_have_text("one two")
    page.reload()
    expect(answers(page)).to_have_count(2)
    expect(last_answer(page).locator(".prose")).to_have_text("one two")
    held.let(HELD, 1)
    expect(last_answer(page).locator(".prose")).to_contain_text("one two thr")
    held.release(HELD)
    wait_for_end(page)
    expect(last_answer(page).locator(".prose")).to_have_text(WORDS)
    expect(page.get_by_role("article", name="You")).to_have_text(["Before", HELD])
    page.reload()
    expect(page.get_by_role("article", name="You")).to_have_text(["Before", HELD])
    expect(answers(page).locator(".prose")).to_have_text(["You said: Before", WORDS])


def test_answer_that_ends_while_the_page_is_away_is_there_after(
    page: Page, held: PageServer
) -> None:
    send(page, HELD)
    expect(last_answer(page)).to_have_text("one")
    page.goto("about:blank")
    held.release(HELD)
    held.call(held.engine.settle())
    page.goto(held.url)
    expect(last_answer(page).locator(".prose")).to_have_text(WORDS)
    expect(page.get_by_role("article", name="You")).to_have_text([HELD])


def test_second_conversation_is_apart(page: Page, server: PageServer) -> None:
    ask(page, "First")
    page.get_by_role("button", name="New chat").click()
    expect(answers(page)).to_have_count(0)
    ask(page, "Second")
    prompt = bytes(token for token in server.engine.requests[-1].prompt_ids if token < 256).decode()
    assert "First" not in prompt
    rows = page.get_by_role("navigation", name="Conversations").get_by_role("listitem")
    expect(rows).to_have_count(2)
    rows.get_by_role("button", name="First", exact=True).click()
    expect(last_answer(page).locator(".prose")).to_have_text("You said: First")
    expect(rows.locator("[aria-current=page]")).to_have_text("First")


def test_answer_goes_on_while_another_conversation_is_open(page: Page, held: PageServer) -> None:
    send(page, HELD)
    expect(last_answer(page)).to_have_text("one")
    page.keyboard.press("Control+k")
    assert ask(page, "Meanwhile") == "You said: Meanwhile"
    held.release(HELD)
    page.get_by_role("button", name=HELD, exact=True).click()
    wait_for_end(page)
    expect(last_answer(page).locator(".prose")).to_have_text(WORDS)


def test_rename_and_delete(page: Page) -> None:
    ask(page, "Some title")
    page.get_by_role("button", name="Rename “Some title”").click()
    page.get_by_label("New title").fill("Another title")
    page.keyboard.press("Enter")
    expect(page.get_by_role("heading", level=1)).to_have_text("Another title")
    page.reload()
    expect(page.get_by_role("heading", level=1)).to_have_text("Another title")
    page.get_by_role("button", name="Delete “Another title”").click()
    dialog = page.get_by_role("dialog", name="Delete this conversation?")
    dialog.get_by_role("button", name="Cancel").click()
    expect(answers(page)).to_have_count(1)
    page.get_by_role("button", name="Delete “Another title”").click()
    dialog.get_by_role("button", name="Delete").click()
    expect(page.get_by_text("Your conversations will be listed here")).to_be_visible()
    expect(answers(page)).to_have_count(0)


def test_answer_cut_by_the_limit_is_labelled(page: Page) -> None:
    page.get_by_role("button", name="Settings").click()
    page.get_by_label("Longest answer").fill("8")
    page.get_by_role("button", name="Done").click()
    ask(page, "A longer question than that")
    expect(last_answer(page).locator(".cut")).to_have_text("Cut off at the longest answer allowed")
    page.reload()
    expect(last_answer(page).locator(".cut")).to_be_visible()


def test_settings_reach_the_engine_and_survive(page: Page, server: PageServer) -> None:
    page.get_by_role("button", name="Settings").click()
    page.get_by_label("System prompt").fill("Be brief.")
    page.get_by_label("Temperature").fill("0.25")
    page.get_by_label("Top-p").fill("0.9")
    page.get_by_label("Top-k").fill("12")
    page.get_by_label("Seed").fill("99")
    page.get_by_role("button", name="Done").click()
    page.reload()
    ask(page, "Hello")
    request = server.engine.requests[-1]
    sampling = request.sampling
    assert (sampling.temperature, sampling.top_p, sampling.top_k) == (0.25, 0.9, 12)
    assert sampling.seed == 99
    assert b"system: Be brief." in bytes(token for token in request.prompt_ids if token < 256)
    page.get_by_role("button", name="Settings").click()
    expect(page.get_by_label("Temperature")).to_have_value("0.25")
    page.get_by_label("Temperature").fill("9")
    expect(page.get_by_text("Temperature must be between 0 and 2.")).to_be_visible()
    page.get_by_role("button", name="Reset to defaults").click()
    expect(page.get_by_label("Temperature")).to_have_value("")
    expect(page.get_by_label("System prompt")).to_have_value("")


def test_engine_that_dies_in_the_middle_is_reported(page: Page, server: PageServer) -> None:
    script = say("half an answer", per_step=4, dies_after=2)
    server.answers["Die"] = script
    send(page, "Die")
    expect(last_answer(page).get_by_role("alert")).to_contain_text("The engine is restarting")
    expect(last_answer(page).locator(".prose")).to_have_text("half an")
    expect(last_answer(page).locator(".cut")).to_contain_text("Incomplete")
    server.answers["Die"] = "All of it"
    last_answer(page).get_by_role("button", name="Try again").click()
    wait_for_end(page)
    expect(answers(page).locator(".prose")).to_have_text(["All of it"])


def test_engine_error_is_reported(page: Page, server: PageServer) -> None:
    server.answers["Fail"] = say("x", end=FinishReason.ERROR)
    send(page, "Fail")
    expect(last_answer(page).get_by_role("alert")).to_be_visible()
