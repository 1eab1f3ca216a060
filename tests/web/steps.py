"""What people do on the page, in the words of its labels."""

from __future__ import annotations

from playwright.sync_api import Locator, Page, expect

__all__ = ["answers", "ask", "composer", "last_answer", "send", "wait_for_end"]


def composer(page: Page) -> Locator:
    """The message field."""
    return page.get_by_label("Message", exact=True)


def send(page: Page, question: str) -> None:
    """Type a question and send it."""
    composer(page).fill(question)
    expect(page.get_by_role("button", name="Send")).to_be_enabled()
    composer(page).press("Enter")


def answers(page: Page) -> Locator:
    """All answers of the open conversation."""
    return page.get_by_role("article", name="Answer")


def last_answer(page: Page) -> Locator:
    """The newest answer."""
    return answers(page).last


def wait_for_end(page: Page) -> None:
    """Wait until nothing streams."""
    expect(page.get_by_role("button", name="Stop")).to_have_count(0)
    expect(last_answer(page)).to_have_attribute("aria-busy", "false")


def ask(page: Page, question: str) -> str:
    """Send a question, wait for the whole answer and return its text."""
    send(page, question)
    expect(page.get_by_role("article", name="You").last).to_have_text(question)
    wait_for_end(page)
    return last_answer(page).locator(".prose").inner_text()
