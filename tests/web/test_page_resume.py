"""A page that loses its server in the middle of an answer goes on by itself, and says that it did.

Each test ends with the same check: what the page shows is what the server has stored.
"""

from __future__ import annotations

import json
import re
import shutil
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser, Locator, Page, WebSocketRoute, expect
from redis import Redis

from tests.web.conftest import WAIT_MS, OpenPage
from tests.web.page_process import PageProcess, RedisProcess, free_port
from tests.web.page_server import PageServer
from tests.web.steps import answers, last_answer, send, wait_for_end

pytestmark = pytest.mark.browser

HELD = "Tell me slowly"
WORDS = " ".join(f"word{number}" for number in range(40))
BACK = re.compile("Reconnected; (continuing…|the answer is complete.)")
# Ten seconds of silence make the page suspicious, ten more without an answer make it sure.
SUSPICION_MS = 45_000
TAKEOVER_S = 60.0


@pytest.fixture
def page(open_page: OpenPage) -> Page:
    """The page; what the browser says about broken connections is part of these tests."""
    return open_page(noisy=True)


@pytest.fixture
def held(server: PageServer) -> PageServer:
    server.answers[HELD] = WORDS
    server.hold(HELD)
    return server


def notice(page: Page) -> Locator:
    """What the page says about its connection."""
    return page.locator(".connection").get_by_role("status")


def begin(page: Page, let: Callable[[int], None]) -> str:
    """Ask, wait for the first words and return the answer's id."""
    send(page, HELD)
    let(3)
    expect(last_answer(page).locator(".prose")).to_have_text("word0 word1 word")
    return str(
        page.evaluate(
            "Object.values(JSON.parse(localStorage.getItem('millrace.pending')))[0].responseId"
        )
    )


def silent_for_a_second(page: Page) -> None:
    """Let the page's clock go on: what was heard just now, the page trusts."""
    now_ms = page.evaluate("performance.now()")
    page.wait_for_function("start => performance.now() > start + 1200", arg=now_ms)


def assert_unfinished(page: Page) -> None:
    """Nothing says that the answer is over."""
    expect(last_answer(page)).to_have_attribute("aria-busy", "true")
    expect(last_answer(page).locator("footer")).to_have_count(0)
    expect(page.get_by_role("button", name="Stop")).to_be_visible()


def stored_response(url: str, response_id: str) -> dict[str, Any]:
    """What a server has of an answer."""
    with urllib.request.urlopen(f"{url}v1/responses/{response_id}", timeout=20) as answer:
        stored: dict[str, Any] = json.load(answer)
    return stored


def wait_for_completion(url: str, response_id: str) -> None:
    """Wait until a server has gone on with a dead one's answer to its end."""
    give_up_s = time.monotonic() + TAKEOVER_S
    while stored_response(url, response_id)["status"] != "completed":
        assert time.monotonic() < give_up_s, "nobody went on with the answer"
        time.sleep(0.1)


def assert_whole(page: Page, url: str, response_id: str) -> None:
    """The answer has ended as a whole one, and is the stored one."""
    expect(last_answer(page)).to_have_attribute("aria-busy", "false", timeout=SUSPICION_MS)
    stored = stored_response(url, response_id)
    text = "".join(part["text"] for item in stored["output"] for part in item["content"])
    assert (stored["status"], text) == ("completed", WORDS)
    expect(last_answer(page).locator(".prose")).to_have_text(text)
    expect(last_answer(page).locator(".cut")).to_have_count(0)
    expect(answers(page)).to_have_count(1)
    expect(page.get_by_role("article", name="You")).to_have_text([HELD])
    page.reload()
    expect(answers(page).locator(".prose")).to_have_text([text])
    expect(last_answer(page).locator(".cut")).to_have_count(0)


def held_let(server: PageServer) -> Callable[[int], None]:
    return lambda steps: server.let(HELD, steps)


def test_reload_goes_on_after_the_last_event_it_had(page: Page, held: PageServer) -> None:
    response_id = begin(page, held_let(held))
    asked: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
    page.reload()
    expect(notice(page)).to_have_text("Reconnected; continuing…")
    expect(last_answer(page).locator(".prose")).to_have_text("word0 word1 word")
    assert_unfinished(page)
    (resumed,) = [url for url in asked if "stream=true" in url]
    assert int(resumed.partition("starting_after=")[2]) >= 4
    held.release(HELD)
    assert_whole(page, held.url, response_id)


def test_offline_and_online_again(page: Page, held: PageServer) -> None:
    response_id = begin(page, held_let(held))
    page.context.set_offline(True)
    # Whether a browser cuts what is open when it goes offline, is its own matter.
    held.cut()
    expect(notice(page)).to_have_text("Connection lost. Trying again…")
    held.release(HELD)
    expect(last_answer(page).locator(".prose")).to_have_text("word0 word1 word")
    assert_unfinished(page)
    page.context.set_offline(False)
    expect(notice(page)).to_have_text(BACK)
    assert_whole(page, held.url, response_id)


def test_server_that_is_away_longer_than_a_few_tries(page: Page, held: PageServer) -> None:
    response_id = begin(page, held_let(held))
    held.away()
    expect(notice(page)).to_have_text("Connection lost. Trying again…")
    expect(page.locator(".connection .count")).to_have_text(re.compile(r"in [2-9] s"))
    assert_unfinished(page)
    page.get_by_role("button", name="Try now").click()
    expect(notice(page)).to_have_text("Connection lost. Trying again…")
    held.back()
    held.release(HELD)
    expect(notice(page)).to_have_text(BACK)
    assert_whole(page, held.url, response_id)


def test_socket_that_hangs_without_closing(page: Page, held: PageServer) -> None:
    response_id = begin(page, held_let(held))
    held.freeze()
    held.let(HELD, 3)
    expect(notice(page)).to_have_text("Reconnected; continuing…", timeout=SUSPICION_MS)
    expect(last_answer(page).locator(".prose")).to_contain_text("word0 word1 word2 word3")
    assert_unfinished(page)
    held.release(HELD)
    assert_whole(page, held.url, response_id)


def test_proxy_that_hangs_for_everybody(page: Page, held: PageServer) -> None:
    response_id = begin(page, held_let(held))
    held.hang(True)
    held.freeze()
    held.release(HELD)
    expect(notice(page)).to_have_text("Connection lost. Trying again…", timeout=SUSPICION_MS)
    assert_unfinished(page)
    expect(last_answer(page).locator(".prose")).to_have_text("word0 word1 word")
    held.hang(False)
    held.cut()
    expect(notice(page)).to_have_text(BACK, timeout=SUSPICION_MS)
    assert_whole(page, held.url, response_id)


def test_page_that_was_frozen_and_comes_back(page: Page, held: PageServer) -> None:
    response_id = begin(page, held_let(held))
    browser = page.context.new_cdp_session(page)
    browser.send("Page.setWebLifecycleState", {"state": "frozen"})
    held.freeze()
    held.let(HELD, 5)
    browser.send("Page.setWebLifecycleState", {"state": "active"})
    # The socket is dead, and so may be other open connections; nobody tells the page.
    with page.expect_request(re.compile("stream=true"), timeout=SUSPICION_MS):
        silent_for_a_second(page)
        page.evaluate("document.dispatchEvent(new Event('visibilitychange'))")
    expect(notice(page)).to_have_text("Reconnected; continuing…", timeout=SUSPICION_MS)
    assert_unfinished(page)
    held.release(HELD)
    assert_whole(page, held.url, response_id)


def test_quiet_wait_is_no_break(page: Page, held: PageServer) -> None:
    """A model that thinks for long is not a dead connection."""
    response_id = begin(page, held_let(held))
    with page.expect_response(re.compile("stream=true"), timeout=SUSPICION_MS):
        pass
    silent_for_a_second(page)
    expect(notice(page)).to_have_text("")
    held.release(HELD)
    expect(last_answer(page)).to_have_attribute("aria-busy", "false")
    expect(last_answer(page).locator(".facts")).not_to_contain_text("Resumed")
    assert_whole(page, held.url, response_id)


def test_lost_events_are_shown_as_a_hole_until_the_end_fills_it(
    page: Page, held: PageServer
) -> None:
    losing: list[bool] = []

    def lossy(route: WebSocketRoute) -> None:
        there = route.connect_to_server()
        route.on_message(there.send)

        def forward(message: str | bytes) -> None:
            number = json.loads(message)["sequence_number"]
            if losing and losing.pop():
                lost = {"type": "response.millrace.discontinuity", "sequence_number": number}
                route.send(json.dumps({**lost, "first_lost": number, "last_lost": number}))
            else:
                route.send(message)

        there.on_message(forward)

    page.route_web_socket(re.compile("/v1/responses"), lossy)
    response_id = begin(page, held_let(held))
    losing.append(True)
    held.let(HELD, 1)
    lost = last_answer(page).get_by_text("The server lost a part of this answer")
    expect(lost).to_be_visible()
    held.let(HELD, 1)
    expect(last_answer(page).locator(".prose")).to_have_text(re.compile("^word0 word1 word.+"))
    assert_unfinished(page)
    held.release(HELD)
    expect(lost).to_have_count(0)
    assert_whole(page, held.url, response_id)


class TestGone:
    """The server is there again, and has neither the answer nor its conversation."""

    def lose(self, page: Page, server: PageServer, response_id: str) -> None:
        (conversation_id,) = page.evaluate(
            "Object.keys(JSON.parse(localStorage.getItem('millrace.pending')))"
        )
        server.release(HELD)
        wait_for_completion(server.direct_url, response_id)
        for path in (f"responses/{response_id}", f"conversations/{conversation_id}"):
            request = urllib.request.Request(f"{server.direct_url}v1/{path}", method="DELETE")
            urllib.request.urlopen(request, timeout=20).close()

    def test_text_is_kept_and_marked(self, page: Page, held: PageServer) -> None:
        response_id = begin(page, held_let(held))
        held.away()
        expect(notice(page)).to_have_text("Connection lost. Trying again…")
        self.lose(page, held, response_id)
        held.back()
        alert = last_answer(page).get_by_role("alert")
        expect(alert).to_contain_text("The server no longer has this answer")
        expect(last_answer(page).locator(".cut")).to_have_text("Cut off")
        expect(last_answer(page).locator(".prose")).to_have_text("word0 word1 word")
        expect(page.get_by_text("Connected")).to_be_attached()
        alert.get_by_role("button", name="Ask again in a new chat").click()
        wait_for_end(page)
        expect(last_answer(page).locator(".prose")).to_have_text(WORDS)

    def test_even_after_a_reload(self, page: Page, held: PageServer) -> None:
        response_id = begin(page, held_let(held))
        held.away()
        expect(notice(page)).to_have_text("Connection lost. Trying again…")
        self.lose(page, held, response_id)
        page.goto("about:blank")
        held.back()
        page.goto(held.url)
        expect(last_answer(page).locator(".prose")).to_have_text("word0 word1 word")
        expect(last_answer(page).locator(".cut")).to_have_text("Cut off")
        expect(page.get_by_role("article", name="You")).to_have_text([HELD])


@pytest.mark.skipif(shutil.which("redis-server") is None, reason="no redis-server")
class TestKilledServer:
    @pytest.fixture
    def redis(self, tmp_path: Path) -> Iterator[RedisProcess]:
        with RedisProcess(tmp_path) as redis:
            yield redis

    @pytest.fixture
    def process(self, tmp_path: Path, redis: RedisProcess) -> Iterator[PageProcess]:
        with PageProcess(tmp_path, redis.url, WORDS, free_port()) as process:
            yield process

    @pytest.fixture
    def page(self, browser: Browser, process: PageProcess) -> Iterator[Page]:
        context = browser.new_context(reduced_motion="reduce")
        context.set_default_timeout(WAIT_MS)
        page = context.new_page()
        page.goto(process.url)
        page.get_by_text("Connected").wait_for(state="attached")
        yield page
        context.close()

    def test_restart_on_the_same_port(self, page: Page, process: PageProcess) -> None:
        response_id = begin(page, process.let)
        process.kill()
        expect(notice(page)).to_have_text("Connection lost. Trying again…")
        expect(last_answer(page).locator(".prose")).to_have_text("word0 word1 word")
        assert_unfinished(page)
        process.release()
        process.restart()
        expect(notice(page)).to_have_text(BACK)
        assert_whole(page, process.url, response_id)

    def test_reload_after_the_restart(self, page: Page, process: PageProcess) -> None:
        response_id = begin(page, process.let)
        process.kill()
        process.restart()
        page.reload()
        expect(notice(page)).to_have_text(BACK)
        process.release()
        assert_whole(page, process.url, response_id)

    def test_restart_on_an_empty_store(
        self, page: Page, process: PageProcess, redis: RedisProcess
    ) -> None:
        begin(page, process.let)
        process.kill()
        expect(notice(page)).to_have_text("Connection lost. Trying again…")
        with Redis.from_url(redis.url) as store:
            store.flushall()
        process.restart()
        alert = last_answer(page).get_by_role("alert")
        expect(alert).to_contain_text("The server no longer has this answer", timeout=WAIT_MS)
        expect(last_answer(page).locator(".cut")).to_have_text("Cut off")
        expect(last_answer(page).locator(".prose")).to_have_text("word0 word1 word")
        page.reload()
        expect(last_answer(page).locator(".cut")).to_have_text("Cut off")
        expect(last_answer(page).locator(".prose")).to_have_text("word0 word1 word")

    def test_another_replica_takes_over(
        self, page: Page, process: PageProcess, redis: RedisProcess, tmp_path: Path
    ) -> None:
        folder = tmp_path / "other"
        folder.mkdir()
        with PageProcess(folder, redis.url, WORDS, free_port()) as other:
            other.release()
            response_id = begin(page, process.let)
            process.kill()
            expect(notice(page)).to_have_text("Connection lost. Trying again…")
            wait_for_completion(other.url, response_id)
            process.restart()
            expect(notice(page)).to_have_text(BACK)
            assert_whole(page, process.url, response_id)


def test_stop_while_the_connection_is_lost(page: Page, held: PageServer) -> None:
    begin(page, held_let(held))
    held.away()
    expect(notice(page)).to_have_text("Connection lost. Trying again…")
    page.keyboard.press("Escape")
    page.keyboard.press("Escape")
    wait_for_end(page)
    expect(last_answer(page).locator(".cut")).to_have_text("Cut off: the connection broke")
    held.back()
    held.release(HELD)
    last_answer(page).get_by_role("button", name="Pick it up again").click()
    expect(last_answer(page).locator(".prose")).to_have_text(WORDS)
    expect(last_answer(page).locator(".cut")).to_have_count(0)
