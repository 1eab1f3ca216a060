"""Takes pictures of the page in front of a running server, to look at.

python tests/web/shots.py --url http://127.0.0.1:8000 --out DIR
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from playwright.sync_api import Page, Playwright, sync_playwright

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from tests.web.chromium import launch

WIDE = {"width": 1280, "height": 800}
NARROW = {"width": 360, "height": 740}
ANSWER_TIMEOUT_MS = 120_000
# The same pictures from the same model.
GREEDY = """localStorage.setItem("millrace.settings", '{"temperature": 0}')"""


@contextmanager
def opened(playwright: Playwright, url: str, **options: Any) -> Iterator[Page]:
    """Open the page in a fresh profile."""
    with tempfile.TemporaryDirectory() as profile:
        context = launch(playwright, Path(profile), reduced_motion="reduce", **options)
        context.add_init_script(GREEDY)
        page = context.pages[0]
        page.goto(url)
        page.get_by_text("Connected").wait_for(state="attached")
        yield page
        context.close()


def ask(page: Page, question: str, *, wait: bool = True) -> None:
    """Send a question and, unless told otherwise, wait for the end of its answer."""
    page.get_by_label("Message", exact=True).fill(question)
    page.get_by_role("button", name="Send").click()
    if wait:
        wait_for_answer(page, question)


def wait_for_answer(page: Page, question: str) -> None:
    """Wait for the end of the answer to the last question."""
    page.locator(".bubble").last.filter(has_text=question).wait_for()
    page.locator(".answer[aria-busy=true]").wait_for(state="detached", timeout=ANSWER_TIMEOUT_MS)


def talk(page: Page) -> None:
    """Hold the conversation that the pictures show."""
    ask(page, "Hi! How are you today?")
    ask(page, "Write a Python function that reverses a string.")


def empty(page: Page, shot: Callable[[str], None]) -> None:
    shot("empty")
    page.get_by_label("Settings").click()
    shot("settings")


def conversation(page: Page, shot: Callable[[str], None]) -> None:
    for question in ("What is 17 plus 25?", "Book a table for two tonight."):
        ask(page, question)
        page.keyboard.press("Control+k")
    talk(page)
    shot("chat")
    story = "Tell me a long story about a river."
    ask(page, story, wait=False)
    # A small model may be done before it can be caught writing.
    page.locator(".answer").last.locator(".body").wait_for(timeout=ANSWER_TIMEOUT_MS)
    shot("streaming")
    wait_for_answer(page, story)
    page.get_by_role("button", name="Regenerate answer").last.click()
    page.get_by_role("button", name="Previous version").wait_for(timeout=ANSWER_TIMEOUT_MS)
    wait_for_answer(page, story)
    shot("versions")
    page.get_by_role("searchbox").fill("river")
    page.locator("nav mark").first.wait_for()
    shot("search")
    page.get_by_role("searchbox").fill("")
    page.keyboard.press("Control+k")
    ask(page, "你好！你会说中文吗？")
    shot("chinese")
    page.get_by_role("button", name="Delete").first.click()
    shot("delete")


def with_tools(page: Page, *kinds: str) -> None:
    """Let the model use these of the server's tools."""
    settings = json.dumps({"temperature": 0, "tools": [f"millrace:{kind}" for kind in kinds]})
    page.add_init_script(f"localStorage.setItem('millrace.settings', '{settings}')")
    page.reload()
    page.get_by_text("Connected").wait_for(state="attached")


def booking(page: Page, shot: Callable[[str], None]) -> None:
    with_tools(page, "demo_find_restaurant", "demo_book_restaurant")
    ask(page, "Please find an Italian restaurant in Oslo.")
    ask(page, "Book a table for 4 people on Friday at 7 pm.")
    ask(page, "Thank you, that is all.")
    shot("booking")


def percentage(page: Page, shot: Callable[[str], None]) -> None:
    with_tools(page, "calculator")
    ask(page, "What is 17 % of 2,340?")
    ask(page, "And what is 12 times 35?")
    shot("percentage")


def recommendation(page: Page, shot: Callable[[str], None]) -> None:
    bags = (
        "1. Hama Lite, $25, rated 3.9, light",
        "2. Norda Slim, $45, rated 4.4, with a padded strap",
        "3. Cargo Mate, $79, rated 4.6, with many pockets",
    )
    ask(page, "\n".join(("Recommend a laptop bag for at most $60.", *bags)))
    ask(page, "Thanks!")
    shot("recommendation")


def narrow(page: Page, shot: Callable[[str], None]) -> None:
    shot("empty")
    talk(page)
    shot("chat")
    page.get_by_label("Open the sidebar").click()
    shot("drawer")
    page.keyboard.press("Escape")
    page.get_by_label("Settings").click()
    shot("settings")


SCENES = {
    "scripted": (WIDE, "light", (booking, percentage, recommendation)),
    "light": (WIDE, "light", (empty, conversation)),
    "dark": (WIDE, "dark", (empty, conversation)),
    "narrow": (NARROW, "light", (narrow,)),
    "narrow-dark": (NARROW, "dark", (narrow,)),
}


def main() -> None:
    """Take all pictures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--url", default="http://127.0.0.1:8000")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--scene", choices=list(SCENES), action="append")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    with sync_playwright() as playwright:
        for name in options.scene or SCENES:
            viewport, scheme, parts = SCENES[name]
            for part in parts:
                with opened(
                    playwright, options.url, viewport=viewport, color_scheme=scheme
                ) as page:

                    def shot(what: str, name: str = name, page: Page = page) -> None:
                        path = options.out / f"{name}-{what}.png"
                        page.screenshot(path=path)
                        print(path)

                    part(page, shot)


if __name__ == "__main__":
    main()
