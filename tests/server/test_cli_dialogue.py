"""The terminal chat's own logic: events to an answer, lines to commands, Markdown to blocks."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.cli.dialogue import (
    Answer,
    Command,
    Dialogue,
    EventLines,
    Phase,
    parse_line,
    split_finished,
)
from server.cli.screen import without_controls
from tests.server.chat_server import answer, calculation, created, delta, ended


class TestAnswer:
    def feed(self, events: list[dict[str, Any]], answer: Answer) -> str:
        return "".join(answer.feed(event, 10.0 + i) for i, event in enumerate(events))

    def test_an_answer_and_its_figures(self) -> None:
        one = Answer(asked_s=9.5)
        assert self.feed(answer("He", "llo", "!"), one) == "Hello!" == one.text
        assert one.phase is Phase.COMPLETED
        assert one.first_token_s == 1.5  # created at 10, first text at 11
        assert one.tokens_per_s == 1.0  # two tokens after the first, in two seconds
        assert one.summary() == "3 tokens · 1.0 tokens/s · first after 1.5 s"

    def test_events_seen_twice_count_once(self) -> None:
        one = Answer(0.0)
        events = answer("a", "b", "c")
        assert self.feed(events[:3] + events[1:], one) == "abc"

    @pytest.mark.parametrize(
        ("how", "phase", "told"),
        [
            ("incomplete", Phase.INCOMPLETE, "cut off"),
            ("cancelled", Phase.CANCELLED, "stopped"),
        ],
    )
    def test_other_ends(self, how: str, phase: Phase, told: str) -> None:
        one = Answer(0.0)
        self.feed([created(), delta(1, "a"), ended(2, how), delta(3, "late")], one)
        assert one.phase is phase
        assert one.text == "a"
        assert told in one.summary()

    def test_calls_become_lines(self) -> None:
        one = Answer(0.0)
        self.feed([created(), delta(1, "Hm. "), *calculation(2), delta(4, "2")], one)
        assert one.text == "Hm. 2"
        assert one.take_lines() == ["calculator: 1 + 1 → 2"]
        assert one.take_lines() == []

    @pytest.mark.parametrize("text", ["not json", "[" * 9999, '{"a": "\n\n' + "x" * 500 + '"}'])
    def test_odd_calls_become_short_lines(self, text: str) -> None:
        one = Answer(0.0)
        events = calculation(1)
        events[1]["item"]["output"] = text
        self.feed([created(), *events], one)
        [line] = one.take_lines()
        assert "\n" not in line
        assert len(line) < 120

    def test_failure(self) -> None:
        one = Answer(0.0)
        failed = ended(1, "failed")
        failed["response"]["error"] = {"code": "engine_died", "message": "the engine died"}
        self.feed([created(), failed], one)
        assert (one.phase, one.problem) == (Phase.FAILED, "the engine died")

    @pytest.mark.parametrize(
        "event",
        [
            {"type": "error", "status": 400, "error": {"message": "no", "code": "c"}},
            {"type": "error", "message": "no", "code": "c"},
        ],
    )
    def test_refusal(self, event: dict[str, Any]) -> None:
        one = Answer(0.0)
        self.feed([event], one)
        assert (one.phase, one.problem, one.problem_code) == (Phase.REFUSED, "no", "c")

    def test_lost_history_is_told(self) -> None:
        one = Answer(0.0)
        self.feed([created(), {"type": "response.millrace.discontinuity"}, ended(1)], one)
        assert "lost" in one.summary()

    @given(
        st.lists(
            st.fixed_dictionaries(
                {
                    "type": st.sampled_from(
                        ["error", "response.created", "response.failed", "response.completed", ""]
                    )
                },
                optional={
                    "response": st.one_of(st.none(), st.text(), st.just({"usage": 3, "error": 1})),
                    "error": st.one_of(st.none(), st.integers()),
                    "sequence_number": st.one_of(st.none(), st.integers(), st.text()),
                },
            )
        )
    )
    def test_nothing_a_server_sends_breaks_it(self, events: list[dict[str, Any]]) -> None:
        one = Answer(0.0)
        self.feed(events, one)
        one.summary()


class TestDialogue:
    def test_only_what_is_set_is_sent(self) -> None:
        assert Dialogue().request("hi") == {
            "type": "response.create",
            "input": "hi",
            "store": True,
        }

    def test_settings(self) -> None:
        dialogue = Dialogue("m", "be kind", 0.0, "conv_1")
        request = dialogue.request("hi")
        assert request["model"] == "m"
        assert request["instructions"] == "be kind"
        assert request["temperature"] == 0.0
        assert request["conversation"] == "conv_1"
        assert "tools" not in request
        dialogue.tools = True
        kinds = [tool["type"] for tool in dialogue.request("hi")["tools"]]
        assert kinds == ["millrace:calculator", "millrace:current_time"]


class TestLines:
    @pytest.mark.parametrize(
        ("line", "expected"),
        [
            ("", None),
            ("   ", None),
            (" hi there ", "hi there"),
            ("/new", Command("new", "")),
            ("/System  be kind ", Command("system", "be kind")),
            ("//etc/passwd", "/etc/passwd"),
            ("/", Command("", "")),
        ],
    )
    def test_parse(self, line: str, expected: object) -> None:
        assert parse_line(line) == expected


class TestEventLines:
    @given(
        events=st.lists(st.dictionaries(st.text(), st.one_of(st.text(), st.integers()))),
        data=st.data(),
        end=st.sampled_from(["\n", "\r\n"]),
    )
    def test_any_chunks(self, events: list[dict[str, Any]], data: st.DataObject, end: str) -> None:
        wire = "".join(
            f": ping{end}{end}id: 3{end}data:{json.dumps(one)}{end}{end}" for one in events
        ).encode()
        lines = EventLines()
        seen: list[dict[str, Any]] = []
        while wire:
            cut = data.draw(st.integers(1, len(wire)))
            seen += lines.feed(wire[:cut])
            wire = wire[cut:]
        assert seen == events

    def test_other_data_is_passed_over(self) -> None:
        assert list(EventLines().feed(b'data: [DONE]\n\ndata: 3\n\ndata: {"a": 1}\n\n')) == [
            {"a": 1}
        ]


class TestSplitting:
    @pytest.mark.parametrize(
        ("text", "finished"),
        [
            ("one\n\ntwo", ""),  # "two" may still become a heading by its underline, or "2."
            ("one\n\ntwo\n", "one\n\n"),
            ("one\n\n- a\n\n- b\n", ""),
            ("one\n\n- a\n\ntwo\n", "one\n\n- a\n\n"),
            ("1. a\n\n2. b\n", ""),
            ("- a\n\n  more of a\n", ""),
            ("```\na\n\nb\n", ""),
            ("```py\na\n\nb\n```\n\nend\n", "```py\na\n\nb\n```\n\n"),
            ("````\n```\n\nx\n", ""),
            ("```\na\n``` not the end\n\nb\n", ""),
            ("a\n\nb\n\nc\n", "a\n\nb\n\n"),
        ],
    )
    def test_blocks(self, text: str, finished: str) -> None:
        assert split_finished(text) == (finished, text.removeprefix(finished))

    @given(st.text(alphabet="ab \n`~-1.>", max_size=60), st.text(alphabet="ab \n`~-1.>"))
    def test_what_is_finished_stays_finished(self, text: str, more: str) -> None:
        finished, rest = split_finished(text)
        assert finished + rest == text
        assert split_finished(text + more)[0].startswith(finished)


def test_control_characters_do_not_reach_the_terminal() -> None:
    text = "a\x1b[2Jb\x07\r\x9bc\td\ne"
    shown = without_controls(text)
    assert shown == "a\ufffd[2Jb\ufffd\ufffd\ufffdc\td\ne"
