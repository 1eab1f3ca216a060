"""The page by keyboard alone, and for screen readers."""

from __future__ import annotations

from pathlib import Path

import pytest
from playwright.sync_api import Page, expect

from tests.web.conftest import OpenPage
from tests.web.page_server import PageServer
from tests.web.steps import answers, ask, composer, last_answer, send, wait_for_end

pytestmark = pytest.mark.browser

CODE = "```python\nprint('hi')\n```\n\n| a |\n|---|\n| 1 |\n\n[link](https://example.org)"

CHECKS = (Path(__file__).parent / "access_checks.js").read_text()


def check(page: Page) -> None:
    """Assert what holds for every state of the page."""
    found = page.evaluate(CHECKS)
    assert {name: elements for name, elements in found.items() if elements} == {}


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_every_state_has_names_and_contrast(
    open_page: OpenPage, server: PageServer, scheme: str
) -> None:
    page = open_page(color_scheme=scheme)
    check(page)
    server.answers["Code"] = CODE
    ask(page, "Code")
    expect(last_answer(page).locator(".hljs-built_in")).to_be_visible()
    check(page)
    server.hold("Slow")
    send(page, "Slow")
    expect(last_answer(page).locator(".prose")).to_be_visible()
    check(page)
    server.release("Slow")
    wait_for_end(page)
    last_answer(page).get_by_role("button", name="Regenerate answer").click()
    expect(page.get_by_role("group", name="Versions of this answer")).to_be_visible()
    wait_for_end(page)
    check(page)
    page.get_by_role("article", name="You").last.hover()
    page.get_by_role("button", name="Edit question").last.click()
    check(page)
    page.keyboard.press("Escape")
    page.get_by_role("searchbox").fill("slow")
    expect(page.locator("nav mark").first).to_be_visible()
    check(page)
    page.get_by_role("searchbox").fill("")
    page.get_by_role("button", name="Settings").click()
    page.get_by_label("Seed").fill("nothing")
    check(page)
    page.keyboard.press("Escape")
    page.get_by_role("button", name="Delete").first.click()
    check(page)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_every_state_of_the_connection_has_names_and_contrast(
    open_page: OpenPage, server: PageServer, scheme: str
) -> None:
    page = open_page(color_scheme=scheme, noisy=True)
    server.hold("Slow")
    send(page, "Slow")
    expect(last_answer(page).locator(".prose")).to_be_visible()
    server.away()
    retry = page.get_by_role("button", name="Try now")
    expect(retry).to_be_visible()
    check(page)
    retry.focus()
    page.keyboard.press("Enter")
    expect(page.get_by_role("status").filter(has_text="Connection lost")).to_be_visible()
    server.back()
    expect(page.get_by_role("status").filter(has_text="Reconnected; continuing…")).to_be_visible()
    check(page)
    server.away()
    page.keyboard.press("Escape")
    page.keyboard.press("Escape")
    expect(last_answer(page).get_by_role("alert")).to_be_visible()
    check(page)


def test_landmarks_and_headings(page: Page) -> None:
    expect(page.get_by_role("main")).to_have_count(1)
    expect(page.get_by_role("complementary", name="Sidebar")).to_have_count(1)
    expect(page.get_by_role("navigation", name="Conversations")).to_have_count(1)
    expect(page.get_by_role("log", name="Conversation")).to_have_count(1)
    expect(page.get_by_role("heading", level=1)).to_have_count(1)


def test_keyboard_alone_is_enough(page: Page, server: PageServer) -> None:
    server.hold("Stop me")
    page.keyboard.type("First")
    page.keyboard.press("Shift+Enter")
    page.keyboard.type("line two")
    page.keyboard.press("Enter")
    wait_for_end(page)
    expect(last_answer(page)).to_contain_text("line two")
    expect(composer(page)).to_be_focused()
    page.keyboard.type("Stop me")
    page.keyboard.press("Enter")
    expect(last_answer(page).locator(".prose")).to_be_visible()
    page.keyboard.press("Escape")
    expect(last_answer(page).locator(".cut")).to_have_text("Stopped")
    page.keyboard.press("Control+k")
    expect(answers(page)).to_have_count(0)
    expect(composer(page)).to_be_focused()
    page.keyboard.press("Tab")
    page.keyboard.press("?")
    expect(page.get_by_role("dialog", name="Keyboard")).to_be_visible()
    page.keyboard.press("Escape")
    expect(page.get_by_role("dialog")).to_have_count(0)
    # The page hears of a dialog's end in a task of its own, after the dialog is gone.
    page.evaluate("new Promise((done) => requestAnimationFrame(() => setTimeout(done)))")
    page.keyboard.press("/")
    expect(composer(page)).to_be_focused()
    expect(composer(page)).to_have_value("")


def test_conversations_can_be_reached_and_renamed_by_keyboard(page: Page) -> None:
    ask(page, "Old")
    page.keyboard.press("Control+k")
    ask(page, "New")
    page.get_by_role("button", name="New chat").focus()
    names = []
    for _ in range(7):
        page.keyboard.press("Tab")
        names.append(
            page.evaluate("document.activeElement.ariaLabel ?? document.activeElement.innerText")
        )
    rows = ["New", "Rename “New”", "Delete “New”", "Old", "Rename “Old”", "Delete “Old”"]
    assert names == ["Search conversations", *rows]
    page.keyboard.press("Shift+Tab")
    page.keyboard.press("Enter")
    page.keyboard.type("Renamed")
    page.keyboard.press("Enter")
    expect(page.get_by_role("button", name="Renamed", exact=True)).to_be_focused()
    page.keyboard.press("Enter")
    expect(page.get_by_role("heading", level=1)).to_have_text("Renamed")


def test_enter_that_confirms_a_composition_does_not_send(page: Page) -> None:
    composer(page).fill("你")
    composer(page).dispatch_event("keydown", {"key": "Enter", "isComposing": True})
    composer(page).dispatch_event("keydown", {"key": "Enter", "keyCode": 229})
    expect(composer(page)).to_have_value("你")
    expect(answers(page)).to_have_count(0)


def test_empty_message_is_not_sent(page: Page, server: PageServer) -> None:
    composer(page).fill("  \n ")
    composer(page).press("Enter")
    expect(answers(page)).to_have_count(0)
    assert server.engine.requests == []


def test_screen_reader_hears_sentences_once(page: Page, server: PageServer) -> None:
    text = "The first sentence. The second one. And the end"
    server.answers["Read"] = text
    page.evaluate(
        """() => {
          const heard = (window.heard = []);
          const region = document.querySelector('main .sr-only[role=status][aria-live=polite]');
          new MutationObserver(() => heard.push(region.textContent)).observe(
            region, { childList: true, characterData: true, subtree: true });
        }"""
    )
    ask(page, "Read")
    page.wait_for_function("() => window.heard.join(' ').includes('End of the answer.')")
    heard = " ".join(page.evaluate("window.heard"))
    assert " ".join(heard.split()) == f"{text} End of the answer."
    expect(page.get_by_role("log")).to_have_attribute("aria-live", "off")


def test_composer_grows_with_its_text_to_a_limit(page: Page) -> None:
    def height() -> float:
        box = composer(page).bounding_box()
        assert box is not None
        return box["height"]

    one = height()
    composer(page).fill("a\nb\nc")
    three = height()
    composer(page).fill("\n".join(map(str, range(100))))
    assert one < three < height() < 400
