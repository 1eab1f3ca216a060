"""How the page shows answers, on wide and narrow screens, in light and dark."""

from __future__ import annotations

import pytest
from playwright.sync_api import Page, expect

from tests.web.conftest import OpenPage
from tests.web.page_server import PageServer
from tests.web.steps import ask, composer, last_answer, send, wait_for_end

pytestmark = pytest.mark.browser

CODE = "Here:\n\n```python\ndef double(x):\n    return x * 2  # twice\n```\n\nDone."
TABLE = "| a | b |\n|---|--:|\n| 1 | 2 |\n\n- **bold** and `code`\n\n# Title"
HOSTILE = "\n\n".join(
    [
        "<script>window.pwned = 1</script>",
        '<img src=x onerror="window.pwned = 2">',
        "[click](javascript:window.pwned=3)",
        '<svg onload="window.pwned = 4"></svg>',
        "<style>body { display: none }</style>",
        "![pixel](https://evil.example/pixel.png)",
        '<iframe srcdoc="<script>parent.pwned = 5</script>"></iframe>',
        "harmless end",
    ]
)
NARROW = {"width": 360, "height": 740}


def background(page: Page) -> str:
    return str(page.evaluate("getComputedStyle(document.documentElement).backgroundColor"))


def overflow(page: Page) -> int:
    """How many pixels the page is wider than its window."""
    return int(
        page.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth")
    )


def test_code_is_coloured_labelled_and_copied(open_page: OpenPage, server: PageServer) -> None:
    page = open_page(permissions=["clipboard-read", "clipboard-write"])
    server.answers["Code"] = CODE
    ask(page, "Code")
    block = last_answer(page).locator(".code")
    expect(block.locator(".code-lang")).to_have_text("python")
    expect(block.locator(".hljs-keyword").first).to_have_text("def")
    expect(block.locator(".hljs-comment")).to_have_text("# twice")
    block.get_by_role("button", name="Copy this python code").click()
    expect(block.get_by_role("button")).to_have_text("Copied")
    copied = page.evaluate("navigator.clipboard.readText()")
    assert copied == "def double(x):\n    return x * 2  # twice"
    last_answer(page).get_by_role("button", name="Copy answer").click()
    expect(last_answer(page).get_by_role("button", name="Copied")).to_be_visible()
    assert page.evaluate("navigator.clipboard.readText()") == CODE


def test_markdown_is_rendered(page: Page, server: PageServer) -> None:
    server.answers["Table"] = TABLE
    ask(page, "Table")
    answer = last_answer(page)
    expect(answer.get_by_role("table").get_by_role("columnheader")).to_have_text(["a", "b"])
    expect(answer.locator("strong")).to_have_text("bold")
    expect(answer.get_by_role("heading", name="Title")).to_be_visible()


def test_hostile_answer_and_question_stay_text(page: Page, server: PageServer) -> None:
    requests: list[str] = []
    page.on("request", lambda request: requests.append(request.url))
    question = "<img src=x onerror='window.pwned = 6'>"
    server.answers[question] = HOSTILE
    ask(page, question)
    expect(last_answer(page)).to_contain_text("harmless end")
    expect(last_answer(page)).to_contain_text("<script>window.pwned = 1</script>")
    assert page.evaluate("window.pwned") is None
    assert page.locator("article :is(script, img, iframe, style)").count() == 0
    assert page.locator('a[href^="javascript"]').count() == 0
    assert [url for url in requests if "evil" in url] == []
    page.reload()
    expect(last_answer(page)).to_contain_text("harmless end")
    assert page.evaluate("window.pwned") is None


def test_nothing_comes_from_elsewhere(browser_page: Page, server: PageServer) -> None:
    urls: list[str] = []
    browser_page.on("request", lambda request: urls.append(request.url))
    browser_page.reload()
    server.answers["Code"] = CODE
    ask(browser_page, "Code")
    assert urls
    own = (server.url, server.url.replace("http:", "ws:"), "data:")
    assert [url for url in urls if not url.startswith(own)] == []


@pytest.fixture
def browser_page(page: Page) -> Page:
    return page


def test_thinking_is_apart_from_the_answer(page: Page, server: PageServer) -> None:
    server.answers["Think"] = "<think>\nhm, well\n</think>\n\nYes."
    assert ask(page, "Think") == "Yes."
    expect(last_answer(page).locator("details")).not_to_have_attribute("open", "")
    last_answer(page).locator("summary").click()
    expect(last_answer(page).get_by_text("hm, well")).to_be_visible()
    server.answers["Empty"] = "<think>\n\n</think>\n\nNo."
    assert ask(page, "Empty") == "No."
    expect(last_answer(page).locator("details")).to_have_count(0)


def test_chinese_is_marked_as_such(page: Page, server: PageServer) -> None:
    server.answers["你好吗？"] = "我很好，谢谢你。"
    assert ask(page, "你好吗？") == "我很好，谢谢你。"
    expect(last_answer(page).locator(".body")).to_have_attribute("lang", "zh")
    expect(page.locator("html")).to_have_attribute("lang", "en")


def test_view_follows_until_the_reader_scrolls_up(page: Page, server: PageServer) -> None:
    question = "Long"
    server.answers[question] = (
        "\n\n".join(f"Paragraph {number}" for number in range(60)) + "\n\nEnd"
    )
    server.hold(question)
    send(page, question)
    log = page.get_by_role("log")
    far = "element => element.scrollHeight - element.scrollTop - element.clientHeight"
    server.let(question, 150)
    expect(last_answer(page)).to_contain_text("Paragraph 30")
    page.wait_for_function("() => document.querySelector('[role=log]').scrollTop > 0")
    assert log.evaluate(far) < 60
    log.hover()
    page.mouse.wheel(0, -500)
    jump = page.get_by_role("button", name="Jump to latest")
    expect(jump).to_be_visible()
    before = log.evaluate("element => element.scrollTop")
    server.release(question)
    wait_for_end(page)
    assert log.evaluate("element => element.scrollTop") == before
    jump.click()
    expect(jump).to_have_count(0)
    expect(last_answer(page).get_by_text("End", exact=True)).to_be_in_viewport()


def test_narrow_screen_has_a_drawer(open_page: OpenPage) -> None:
    page = open_page(viewport=NARROW)
    expect(page.get_by_role("complementary", name="Sidebar")).to_have_count(0)
    ask(page, "On a small screen")
    assert overflow(page) == 0
    page.get_by_role("button", name="Open the sidebar").click()
    drawer = page.get_by_role("complementary", name="Sidebar")
    expect(drawer).to_be_visible()
    # What lies under the drawer cannot be reached.
    expect(composer(page)).not_to_be_focused()
    assert page.locator("main").get_attribute("inert") is not None
    page.keyboard.press("Escape")
    expect(drawer).to_have_count(0)
    expect(page.get_by_role("button", name="Open the sidebar")).to_be_focused()
    page.get_by_role("button", name="Open the sidebar").click()
    drawer.get_by_role("button", name="New chat").click()
    expect(drawer).to_have_count(0)
    expect(page.get_by_role("heading", name="What is on your mind?")).to_be_visible()


@pytest.mark.parametrize("width", [320, 768])
def test_nothing_runs_off_the_side(open_page: OpenPage, server: PageServer, width: int) -> None:
    page = open_page(viewport={"width": width, "height": 700})
    server.answers["Wide"] = (
        f"{CODE}\n\n```\n{'x' * 300}\n```\n\n{'y' * 200}\n\n| {'z' * 90} | b |\n|-|-|\n| 1 | 2 |"
    )
    ask(page, "Wide")
    assert overflow(page) == 0
    for control in page.get_by_role("button").all():
        box = control.bounding_box()
        if box is not None and control.is_visible():
            assert box["x"] >= 0
            assert box["x"] + box["width"] <= width


def test_dark_mode_follows_the_system_and_the_button(open_page: OpenPage) -> None:
    light, dark = open_page(color_scheme="light"), open_page(color_scheme="dark")
    light_background, dark_background = background(light), background(dark)
    assert light_background != dark_background
    light.get_by_role("button", name="Use the dark theme").click()
    assert background(light) == dark_background
    light.reload()
    assert background(light) == dark_background
    light.get_by_role("button", name="Use the light theme").click()
    assert background(light) == light_background
    assert light.evaluate("localStorage.getItem('millrace.theme')") is None
