"""What is kept of the client libraries, and what the table makes of it."""

from __future__ import annotations

from pathlib import Path

from tests.clients.libraries import APIS, CASES, LIBRARIES
from tests.clients.matrix import HEADINGS, WORDS, Row, keep, kept, short_table, table


def row(library: str, case: str, verdict: str, api: str = "chat", version: str = "1") -> Row:
    stamp = {"date": "2026-01-01", "commit": "abc", "note": ""}
    return {
        **stamp,
        "library": library,
        "version": version,
        "api": api,
        "case": case,
        "verdict": verdict,
    }


def test_a_column_says_the_worst_of_its_cases() -> None:
    rows = [
        row("PydanticAI", "tools", "ok"),
        row("PydanticAI", "tools_stream", "fail"),
        row("PydanticAI", "json", "refused"),
        row("PydanticAI", "bad_key", "ok"),
        row("PydanticAI", "stream", "ok", api="responses"),
    ]
    chat, responses = (dict(zip(HEADINGS, line[2:], strict=True)) for line in table(rows))
    assert (chat["tools"], chat["JSON Schema"], chat["errors"]) == ("FAILS", "refused", "yes")
    assert chat["stream"] == responses["tools"] == ""
    assert responses["stream"] == "yes"
    [[library, apis, *cells]] = short_table(rows)
    assert (library, apis) == ("PydanticAI 1", "Chat Completions, Responses")
    together = dict(zip(HEADINGS, cells, strict=True))
    assert (together["stream"], together["tools"], together["answer"]) == ("yes", "FAILS", "")


def test_a_librarys_rows_replace_its_old_ones_only(tmp_path: Path) -> None:
    path = tmp_path / "results" / "clients.csv"
    keep([row("LiteLLM", "chat", "ok"), row("LiteLLM", "json", "fail")], path)
    keep([row("openai (Python)", "stream", "ok"), row("openai (Python)", "chat", "ok")], path)
    keep([row("LiteLLM", "chat", "ok", version="2")], path)
    assert [(one["library"], one["case"], one["version"]) for one in kept(path)] == [
        ("openai (Python)", "chat", "1"),
        ("openai (Python)", "stream", "1"),
        ("LiteLLM", "chat", "2"),
    ]


def test_what_is_kept_is_of_these_libraries_and_cases() -> None:
    rows = kept()
    assert {(one["library"], one["api"]) for one in rows} == {
        (library.name, api) for library in LIBRARIES for api in library.apis
    }
    assert {one["verdict"] for one in rows} <= WORDS.keys()
    assert {one["case"] for one in rows} <= CASES.keys()
    assert {api for library in LIBRARIES for api in library.apis} <= APIS.keys()
    assert sorted(case for cases in HEADINGS.values() for case in cases) == sorted(CASES)
