"""Tools on the page: turned on in the settings, shown in the conversation, there after a reload."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from playwright.sync_api import Page, expect

from tests.server.scripted import call_text, prompt_text
from tests.web.page_server import PageServer
from tests.web.steps import answers, ask, last_answer, send, wait_for_end

pytestmark = pytest.mark.browser

QUESTION = "What is 17 % of 2,340?"
ANSWER = "17 % of 2,340 is 397.8."
ARGUMENTS = '{"expression": "2340 * 17 / 100"}'
SHOTS = os.environ.get("MILLRACE_SHOTS")
"""Where to leave pictures to look at; nowhere unless it is set."""


@pytest.fixture
def calculating(server: PageServer) -> PageServer:
    """The server, with a model that calculates, and thinks before."""
    server.answers[QUESTION] = (
        f"<think>\nA percentage.\n</think>\n\n{call_text('calculator', ARGUMENTS)}"
    )
    server.answers['tool: {"result": 397.8}'] = ANSWER
    return server


def turn_on(page: Page, *labels: str) -> None:
    page.get_by_role("button", name="Settings").click()
    for label in labels:
        page.get_by_role("checkbox", name=label).check()
    picture(page, "settings")
    page.get_by_role("button", name="Done").click()


def picture(page: Page, name: str) -> None:
    if SHOTS is None:
        return
    for scheme in ("light", "dark"):
        page.emulate_media(color_scheme=scheme, reduced_motion="reduce")
        for width in (1280, 360):
            page.set_viewport_size({"width": width, "height": 780})
            page.screenshot(path=Path(SHOTS) / f"{name}-{scheme}-{width}.png")
    page.set_viewport_size({"width": 1280, "height": 800})


def test_a_calculation_is_shown_and_survives_a_reload(page: Page, calculating: PageServer) -> None:
    turn_on(page, "Calculator")
    assert ask(page, QUESTION) == ANSWER
    for _ in range(2):
        call = last_answer(page).locator("details.call")
        expect(call).to_have_count(1)
        expect(call.locator("summary")).to_have_accessible_name("Calculator 2340 * 17 / 100 397.8")
        expect(call.get_by_text("Arguments")).to_be_hidden()
        call.locator("summary").focus()
        page.keyboard.press("Enter")
        expect(call.get_by_text('"expression": "2340 * 17 / 100"')).to_be_visible()
        expect(call.get_by_text('"result": 397.8')).to_be_visible()
        picture(page, "calculation")
        expect(last_answer(page).get_by_text("Thought")).to_be_visible()
        page.reload()
        expect(last_answer(page).locator(".prose")).to_have_text(ANSWER)
        expect(answers(page)).to_have_count(1)
    # The setting is still on, and the next question has the whole history.
    ask(page, "Thanks")
    prompt = prompt_text(calculating.engine.requests[-1])
    assert prompt.startswith("tools: calculator\n")
    assert f'assistant:  [calculator {ARGUMENTS}]\ntool: {{"result": 397.8}}\n' in prompt


def test_without_tools_none_are_sent(page: Page, server: PageServer) -> None:
    ask(page, "Hello")
    assert "tools:" not in prompt_text(server.engine.requests[-1])


def test_both_tools_can_be_on(page: Page, server: PageServer) -> None:
    turn_on(page, "Calculator", "Current time")
    ask(page, "Hello")
    prompt = prompt_text(server.engine.requests[-1])
    assert prompt.startswith("tools: calculator, get_current_time\n")


def test_an_error_of_a_tool_is_seen(page: Page, server: PageServer) -> None:
    server.answers["What is 1/0?"] = call_text("calculator", '{"expression": "1/0"}')
    server.answers['tool: {"error": "division by zero"}'] = "That cannot be divided."
    turn_on(page, "Calculator")
    ask(page, "What is 1/0?")
    call = last_answer(page).locator("details.call")
    expect(call).to_contain_text("division by zero")
    call.locator("summary").click()
    expect(call.get_by_text("Error", exact=True)).to_be_visible()


def test_a_calculation_is_followed_across_a_reload(page: Page, calculating: PageServer) -> None:
    turn_on(page, "Calculator")
    second = 'tool: {"result": 397.8}'
    calculating.hold(second)
    send(page, QUESTION)
    call = last_answer(page).locator("details.call summary")
    expect(call).to_contain_text("→ 397.8")
    page.reload()
    expect(call).to_contain_text("→ 397.8")
    calculating.release(second)
    wait_for_end(page)
    expect(last_answer(page).locator(".prose")).to_have_text(ANSWER)
    expect(answers(page)).to_have_count(1)


def test_regenerating_takes_the_whole_answer_back(page: Page, calculating: PageServer) -> None:
    turn_on(page, "Calculator")
    ask(page, QUESTION)
    last_answer(page).get_by_role("button", name="Regenerate answer").click()
    wait_for_end(page)
    expect(last_answer(page).locator(".prose")).to_have_text(ANSWER)
    expect(answers(page)).to_have_count(1)
    page.reload()
    expect(answers(page)).to_have_count(1)
    expect(last_answer(page).locator("details.call")).to_have_count(1)
