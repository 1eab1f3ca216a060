"""Branches, forks, the list of conversations and the search in it, on the page."""

from __future__ import annotations

import json
import urllib.request
from typing import Any

import pytest
from playwright.sync_api import Locator, Page, expect

from tests.web.conftest import OpenPage
from tests.web.page_server import PageServer
from tests.web.steps import answers, ask, composer, last_answer, send, wait_for_end

pytestmark = pytest.mark.browser

HELD = "Tell me slowly"
WORDS = "one two three four five six"
NARROW = {"width": 375, "height": 740}


def call(server: PageServer, method: str, path: str, body: Any = None) -> Any:
    """Ask the API, beside the page."""
    request = urllib.request.Request(
        server.url + path,
        None if body is None else json.dumps(body).encode(),
        {"Content-Type": "application/json"},
        method=method,
    )
    with urllib.request.urlopen(request, timeout=20) as answer:
        return json.load(answer)


def questions(page: Page) -> Locator:
    return page.get_by_role("article", name="You")


def bubbles(page: Page) -> Locator:
    return questions(page).locator(".bubble")


def prose(page: Page) -> Locator:
    return answers(page).locator(".prose")


def rows(page: Page) -> Locator:
    return page.get_by_role("navigation", name="Conversations").get_by_role("listitem")


def edit(page: Page, number: int, text: str) -> None:
    """Ask ``text`` in place of a question."""
    questions(page).nth(number).hover()
    questions(page).nth(number).get_by_role("button", name="Edit question").click()
    field = page.get_by_role("textbox", name="Question")
    expect(field).to_be_focused()
    field.fill(text)
    field.press("Enter")
    expect(field).to_have_count(0)
    wait_for_end(page)


def versions(message: Locator) -> Locator:
    return message.get_by_role("group", name="Versions of this")


def prompt(server: PageServer) -> str:
    ids = server.engine.requests[-1].prompt_ids
    return bytes(token for token in ids if token < 256).decode()


def test_regenerate_keeps_the_other_answer(page: Page, server: PageServer) -> None:
    ask(page, "Earlier")
    ask(page, "Again please")
    server.answers["Again please"] = "Another answer"
    last_answer(page).get_by_role("button", name="Regenerate answer").click()
    expect(last_answer(page).locator(".prose")).to_have_text("Another answer")
    wait_for_end(page)
    expect(bubbles(page)).to_have_text(["Earlier", "Again please"])
    expect(versions(last_answer(page)).locator(".count")).to_have_text("2/2")
    # What is answered again is not asked again.
    assert prompt(server).count("Again please") == 1
    last_answer(page).get_by_role("button", name="Previous version").click()
    expect(last_answer(page).locator(".prose")).to_have_text("You said: Again please")
    page.reload()
    expect(prose(page)).to_have_text(["You said: Earlier", "You said: Again please"])
    last_answer(page).get_by_role("button", name="Next version").click()
    expect(prose(page)).to_have_text(["You said: Earlier", "Another answer"])


def test_edited_question_is_a_branch_of_its_own(page: Page, server: PageServer) -> None:
    ask(page, "First")
    ask(page, "Second")
    ask(page, "Third")
    edit(page, 1, "Second, but better")
    expect(bubbles(page)).to_have_text(["First", "Second, but better"])
    expect(prose(page)).to_have_text(["You said: First", "You said: Second, but better"])
    assert "Third" not in prompt(server)
    assert "assistant: You said: First" in prompt(server)
    ask(page, "Fourth")
    switch = questions(page).nth(1)
    switch.get_by_role("button", name="Previous version").click()
    expect(bubbles(page)).to_have_text(["First", "Second", "Third"])
    page.reload()
    expect(bubbles(page)).to_have_text(["First", "Second", "Third"])
    switch.get_by_role("button", name="Next version").click()
    expect(bubbles(page)).to_have_text(["First", "Second, but better", "Fourth"])


def test_first_question_can_be_edited_too(page: Page, server: PageServer) -> None:
    ask(page, "Begin")
    edit(page, 0, "Begin otherwise")
    expect(bubbles(page)).to_have_text(["Begin otherwise"])
    assert "user: Begin\n" not in prompt(server)
    expect(versions(questions(page).first).locator(".count")).to_have_text("2/2")


def test_versions_by_keyboard_keep_the_focus(page: Page) -> None:
    ask(page, "One")
    edit(page, 0, "Two")
    edit(page, 0, "Three")
    before = page.get_by_role("button", name="Previous version")
    before.focus()
    for expected in ("Two", "One", "One"):
        page.keyboard.press("Enter")
        expect(bubbles(page)).to_have_text([expected])
        expect(before).to_be_focused()
    expect(before).to_have_attribute("aria-disabled", "true")


def test_edit_by_keyboard_and_cancel(page: Page, server: PageServer) -> None:
    ask(page, "Keep this")
    pencil = page.get_by_role("button", name="Edit question")
    pencil.focus()
    expect(pencil).to_be_visible()
    page.keyboard.press("Enter")
    page.get_by_role("textbox", name="Question").fill("Something else")
    page.keyboard.press("Escape")
    expect(bubbles(page)).to_have_text(["Keep this"])
    expect(pencil).to_be_focused()
    assert len(server.engine.requests) == 1


def test_edited_answer_in_the_making_survives_a_reload(page: Page, server: PageServer) -> None:
    ask(page, "Before")
    ask(page, "Old")
    server.answers[HELD] = WORDS
    server.hold(HELD)
    questions(page).nth(1).hover()
    questions(page).nth(1).get_by_role("button", name="Edit question").click()
    page.get_by_role("textbox", name="Question").fill(HELD)
    page.keyboard.press("Enter")
    expect(last_answer(page).locator(".prose")).to_have_text("one")
    page.reload()
    expect(bubbles(page)).to_have_text(["Before", HELD])
    expect(last_answer(page).locator(".prose")).to_have_text("one")
    server.release(HELD)
    wait_for_end(page)
    expect(prose(page)).to_have_text(["You said: Before", WORDS])
    page.reload()
    expect(prose(page)).to_have_text(["You said: Before", WORDS])
    expect(versions(questions(page).nth(1)).locator(".count")).to_have_text("2/2")


def test_stopped_before_the_first_word_can_be_answered_later(
    page: Page, server: PageServer
) -> None:
    ask(page, "Before")
    server.do(lambda: setattr(server.engine, "_step_s", 3600))
    send(page, "Wait")
    expect(last_answer(page)).to_contain_text("Waiting for the first word")
    page.wait_for_function(
        "Object.values(JSON.parse(localStorage.getItem('millrace.pending')))[0].responseId"
    )
    page.keyboard.press("Escape")
    expect(page.get_by_role("button", name="Get an answer")).to_be_visible()
    server.do(lambda: setattr(server.engine, "_step_s", 0))
    page.get_by_role("button", name="Get an answer").click()
    expect(prose(page)).to_have_text(["You said: Before", "You said: Wait"])
    expect(bubbles(page)).to_have_text(["Before", "Wait"])


def test_fork_goes_on_apart(page: Page, server: PageServer) -> None:
    ask(page, "Shared")
    ask(page, "Only in the first")
    answers(page).first.get_by_role("button", name="Fork").click()
    expect(page.get_by_role("heading", level=1)).to_have_text("Shared (fork)")
    expect(bubbles(page)).to_have_text(["Shared"])
    ask(page, "Only in the fork")
    assert "Only in the first" not in prompt(server)
    expect(rows(page)).to_have_count(2)
    rows(page).get_by_role("button", name="Shared", exact=True).click()
    expect(bubbles(page)).to_have_text(["Shared", "Only in the first"])


def test_delete_from_here(page: Page) -> None:
    ask(page, "Stays")
    ask(page, "Goes")
    ask(page, "Goes too")
    questions(page).nth(1).hover()
    questions(page).nth(1).get_by_role("button", name="Delete from this question on").click()
    dialog = page.get_by_role("dialog", name="Delete from here on?")
    dialog.get_by_role("button", name="Cancel").click()
    expect(bubbles(page)).to_have_count(3)
    questions(page).nth(1).hover()
    questions(page).nth(1).get_by_role("button", name="Delete from this question on").click()
    dialog.get_by_role("button", name="Delete").click()
    expect(bubbles(page)).to_have_text(["Stays"])
    page.reload()
    expect(prose(page)).to_have_text(["You said: Stays"])


def test_nothing_is_changed_while_an_answer_is_made(page: Page, server: PageServer) -> None:
    ask(page, "Before")
    server.hold("Slow")
    send(page, "Slow")
    expect(last_answer(page).locator(".prose")).to_be_visible()
    for name in ("Edit question", "Regenerate answer", "Delete from this answer on"):
        expect(page.get_by_role("main").get_by_role("button", name=name)).to_have_count(0)
    expect(page.get_by_role("button", name="Copy answer")).to_have_count(1)
    server.release("Slow")
    wait_for_end(page)
    expect(page.get_by_role("button", name="Regenerate answer")).to_have_count(2)


def test_list_is_the_servers(open_page: OpenPage, server: PageServer) -> None:
    made = call(server, "POST", "v1/conversations", {"title": "Made elsewhere"})
    # A browser says in its console that a conversation is not found.
    page = open_page(noisy=True)
    rows(page).get_by_role("button", name="Made elsewhere", exact=True).click()
    assert ask(page, "Hello") == "You said: Hello"
    stored = call(server, "GET", f"v1/conversations/{made['id']}/items?order=asc")["data"]
    assert [item["role"] for item in stored] == ["user", "assistant"]
    page.get_by_role("button", name="Rename “Made elsewhere”").click()
    page.get_by_label("New title").fill("Renamed here")
    page.keyboard.press("Enter")
    expect(page.get_by_role("heading", level=1)).to_have_text("Renamed here")
    assert call(server, "GET", f"v1/conversations/{made['id']}")["title"] == "Renamed here"
    other = page.context.new_page()
    other.goto(server.url)
    rows(other).get_by_role("button", name="Delete “Renamed here”").click()
    other.get_by_role("dialog").get_by_role("button", name="Delete").click()
    expect(rows(other)).to_have_count(0)
    # Pages of one browser tell each other.
    expect(rows(page)).to_have_count(0)
    expect(page.get_by_role("alert")).to_contain_text("The server no longer has this")
    expect(page.get_by_role("heading", name="What is on your mind?")).to_be_visible()


def test_long_list_is_read_by_the_page(open_page: OpenPage, server: PageServer) -> None:
    for number in range(105):
        call(server, "POST", "v1/conversations", {"title": f"Number {number}"})
    page = open_page()
    expect(rows(page)).to_have_count(100)
    page.get_by_role("button", name="Show older").click()
    expect(rows(page)).to_have_count(105)
    expect(page.get_by_role("button", name="Show older")).to_have_count(0)
    assert ask(page, "New") == "You said: New"
    expect(rows(page)).to_have_count(106)
    expect(rows(page).first.locator(".title")).to_have_text("New")


def test_search_finds_marks_and_opens_the_place(page: Page, server: PageServer) -> None:
    server.answers["Tell me of rivers"] = "Water runs past the old mill at night."
    ask(page, "Tell me of rivers")
    edit(page, 0, "Tell me of hills")
    page.keyboard.press("Control+k")
    ask(page, "Something else")
    field = page.get_by_role("searchbox", name="Search conversations")
    field.fill("MILL water")
    expect(rows(page)).to_have_count(1)
    expect(rows(page).locator("mark")).to_have_text(["Water", "mill"])
    expect(page.get_by_text("1 conversation found")).to_be_attached()
    rows(page).get_by_role("button", name="Tell me of rivers").first.click()
    # It is on another branch than the one that was shown.
    expect(prose(page)).to_have_text(["Water runs past the old mill at night."])
    expect(last_answer(page)).to_be_in_viewport()
    field.fill("nowhere at all")
    expect(page.get_by_text("No conversation has all of these words.")).to_be_visible()
    field.press("Escape")
    expect(field).to_have_value("")
    expect(rows(page)).to_have_count(2)


def test_search_of_hostile_text_stays_text(page: Page) -> None:
    hostile = "<img src=x onerror='window.pwned = 1'>"
    ask(page, f"Look {hostile}")
    page.get_by_role("searchbox").fill("onerror")
    expect(rows(page).locator("mark").first).to_have_text("onerror")
    expect(rows(page).first.locator(".snippet")).to_contain_text("<img src=x")
    assert page.locator("nav img").count() == 0
    assert page.evaluate("window.pwned") is None


def test_list_of_earlier_pages_is_taken_over(open_page: OpenPage, server: PageServer) -> None:
    page = open_page(noisy=True)
    known = [call(server, "POST", "v1/conversations", {}) for _ in range(2)]
    entries = [
        {"id": one["id"], "title": f"Old {number}", "createdAt": 1, "updatedAt": number}
        for number, one in enumerate(known)
    ]
    entries.append({"id": "conv_gone", "title": "Gone", "createdAt": 1, "updatedAt": 9})
    page.evaluate(
        "list => localStorage.setItem('millrace.conversations', JSON.stringify(list))", entries
    )
    page.reload()
    expect(rows(page).locator(".title")).to_have_text(["Old 1", "Old 0"])
    assert page.evaluate("localStorage.getItem('millrace.conversations')") is None
    page.reload()
    expect(rows(page).locator(".title")).to_have_text(["Old 1", "Old 0"])


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_narrow_screens_have_it_all(open_page: OpenPage, server: PageServer, scheme: str) -> None:
    page = open_page(viewport=NARROW, color_scheme=scheme, has_touch=True, is_mobile=True)
    ask(page, "A question that is long enough to fill more than one line of a small screen")
    edit(page, 0, "Shorter")
    questions(page).first.get_by_role("button", name="Previous version").click()
    expect(bubbles(page)).to_contain_text(["A question that is long"])
    width = page.evaluate("document.documentElement.scrollWidth")
    assert width == NARROW["width"]
    for control in page.get_by_role("button").all():
        box = control.bounding_box()
        if box is not None and control.is_visible():
            assert box["x"] >= 0
            assert box["x"] + box["width"] <= NARROW["width"]
    page.get_by_role("button", name="Open the sidebar").click()
    page.get_by_role("searchbox").fill("shorter")
    expect(rows(page).locator("mark")).to_have_text("Shorter")
    rows(page).get_by_role("button", name="A question").first.click()
    expect(bubbles(page)).to_have_text(["Shorter"])
    expect(page.get_by_role("complementary", name="Sidebar")).to_have_count(0)


def test_draft_stays_when_the_end_of_the_conversation_is_unknown(
    open_page: OpenPage, server: PageServer
) -> None:
    page = open_page(noisy=True)
    server.answers[HELD] = WORDS
    server.hold(HELD)
    send(page, HELD)
    expect(last_answer(page).locator(".prose")).to_have_text("one")
    page.route("**/items?tree=true*", lambda route: route.abort())
    server.release(HELD)
    wait_for_end(page)
    expect(last_answer(page).locator(".prose")).to_have_text(WORDS)
    send(page, "And then?")
    expect(page.get_by_role("alert")).to_contain_text("The question could not be sent")
    expect(composer(page)).to_have_value("And then?")
    expect(last_answer(page).locator(".prose")).to_have_text(WORDS)
    page.unroute("**/items?tree=true*")
    composer(page).press("Enter")
    expect(prose(page)).to_have_text([WORDS, "You said: And then?"])
