"""Fixtures of the page's tests: a real server, a real Chromium."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser, BrowserContext, Page, sync_playwright

from tests.web.chromium import FLAGS, find_chromium
from tests.web.page_server import PageServer

PAGE = Path(__file__).resolve().parents[2] / "web" / "dist" / "index.html"
WAIT_MS = 20_000

OpenPage = Callable[..., Page]


# Once a module, not once a session: Playwright's loop must not run beside other tests' own.
@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """A Chromium with fresh user data."""
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=find_chromium(), headless=True, args=list(FLAGS)
        )
        yield browser
        browser.close()


@pytest.fixture
def server() -> Iterator[PageServer]:
    """The server on a scripted engine."""
    if not PAGE.exists():
        pytest.fail("the page is not built: run 'make page'")
    with PageServer() as server:
        yield server


@pytest.fixture
def open_page(browser: Browser, server: PageServer) -> Iterator[OpenPage]:
    """Open the page as a new visitor; ``options`` as for a browser context.

    Fails the test for whatever the page wrote to the console as an error, unless ``noisy``.
    """
    contexts: list[BrowserContext] = []
    complaints: list[str] = []

    def open_page(*, noisy: bool = False, ready: bool = True, **options: Any) -> Page:
        options.setdefault("viewport", {"width": 1280, "height": 800})
        context = browser.new_context(reduced_motion="reduce", **options)
        contexts.append(context)
        context.set_default_timeout(WAIT_MS)
        page = context.new_page()
        if not noisy:
            page.on("pageerror", lambda error: complaints.append(str(error)))
            page.on(
                "console",
                lambda line: complaints.append(line.text) if line.type == "error" else None,
            )
        page.goto(server.url)
        if ready:
            page.get_by_text("Connected").wait_for(state="attached")
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert complaints == []


@pytest.fixture
def page(open_page: OpenPage) -> Page:
    """The page as a first visitor with a wide window sees it."""
    return open_page()
