"""Qwen3's text, parted: the same in any split, and with nothing lost."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.parsing.qwen import (
    MAX_HEADER_CHARS,
    CallArguments,
    CallBegin,
    CallEnd,
    Content,
    Piece,
    QwenParser,
    Reasoning,
)

CALL = '<tool_call>\n{"name": "f", "arguments": {"a": 1}}\n</tool_call>'
ONE_CALL = [CallBegin("f"), CallArguments('{"a": 1}'), CallEnd(True)]


def parse(parts: Sequence[str], *, tools: bool = True, reasoning: bool = False) -> list[Piece]:
    parser = QwenParser(tools=tools, reasoning=reasoning)
    pieces = [piece for part in parts for piece in parser.push(part)]
    pieces += parser.finish()
    assert not parser.holding
    return merge(pieces)


def merge(pieces: Sequence[Piece]) -> list[Piece]:
    merged: list[Piece] = []
    for piece in pieces:
        last = merged[-1] if merged else None
        if isinstance(piece, Content) and isinstance(last, Content):
            merged[-1] = Content(last.text + piece.text)
        elif isinstance(piece, Reasoning) and isinstance(last, Reasoning):
            merged[-1] = Reasoning(last.text + piece.text)
        elif isinstance(piece, CallArguments) and isinstance(last, CallArguments):
            merged[-1] = CallArguments(last.text + piece.text)
        else:
            merged.append(piece)
    return merged


def written(pieces: Sequence[Piece]) -> str:
    """Write pieces as the chat template does, all white space left out."""
    text = ""
    for piece in pieces:
        match piece:
            case Reasoning():
                text += f"<think>{piece.text}</think>"
            case Content():
                text += piece.text
            case CallBegin():
                text += f'<tool_call>{{"name":"{piece.name}","arguments":'
            case CallArguments():
                text += piece.text
            case CallEnd() if piece.complete:
                text += "}</tool_call>"
            case CallEnd():
                pass
    return re.sub(r"\s", "", text)


@pytest.mark.parametrize(
    ("text", "pieces"),
    [
        ("Hello", [Content("Hello")]),
        (" \n", [Content(" \n")]),
        ("", []),
        ("<think>\nHm.\n</think>\n\nHello\n", [Reasoning("Hm."), Content("Hello\n")]),
        ("<think>\n\n</think>\n\nHello", [Content("Hello")]),
        ("\n<think>cut", [Reasoning("cut")]),
        ("<thin", [Content("<thin")]),
        ("a <think>b</think>", [Content("a <think>b</think>")]),
        (CALL, ONE_CALL),
        (f"Let me see.\n{CALL}", [Content("Let me see."), *ONE_CALL]),
        (f"{CALL}\n{CALL}", [*ONE_CALL, *ONE_CALL]),
        (f"<think>\nx\n</think>\n\n{CALL}\nDone", [Reasoning("x"), *ONE_CALL, Content("Done")]),
        (CALL.removesuffix("</tool_call>"), ONE_CALL),
        ("<tool_call>\nnonsense\n</tool_call>", [Content("<tool_call>\nnonsense\n</tool_call>")]),
        ("Hi\n<tool_call>\n{", [Content("Hi\n<tool_call>\n{")]),
        (f"<tool_call>{CALL}", [Content("<tool_call>"), *ONE_CALL]),
        ('<tool_call>{"name": "f"}</tool_call>', [Content('<tool_call>{"name": "f"}</tool_call>')]),
        (
            '<tool_call>{"name": "f", "arguments": {"a": "<tool_call>}\\""}}</tool_call>',
            [CallBegin("f"), CallArguments('{"a": "<tool_call>}\\""}'), CallEnd(True)],
        ),
        (
            '<tool_call>{"name": "f", "arguments": {"a": 1\n</tool_call>!',
            [
                CallBegin("f"),
                CallArguments('{"a": 1\n'),
                CallEnd(False),
                Content("</tool_call>!"),
            ],
        ),
        (
            '<tool_call>{"name": "f", "arguments": {"a": "b\nc',
            [CallBegin("f"), CallArguments('{"a": "b'), CallEnd(False), Content("\nc")],
        ),
        (
            '<tool_call>{"name": "f", "arguments": {"a": [1}',
            [CallBegin("f"), CallArguments('{"a": [1'), CallEnd(False), Content("}")],
        ),
        (
            '<tool_call>{"name": "f", "arguments": {}} and more',
            [CallBegin("f"), CallArguments("{}"), CallEnd(True), Content("} and more")],
        ),
    ],
)
def test_parts(text: str, pieces: list[Piece]) -> None:
    assert parse([text]) == pieces
    assert parse(list(text)) == pieces


def test_without_tools_a_call_is_text() -> None:
    assert parse([CALL], tools=False) == [Content(CALL)]


def test_reasoning_that_the_prompt_opened() -> None:
    assert parse(["\nHm.", "\n</think>\n\nHi"], reasoning=True) == [Reasoning("Hm."), Content("Hi")]


def test_arguments_are_given_out_as_they_come() -> None:
    parser = QwenParser(tools=True)
    assert parser.push('<tool_call>\n{"name": "f", "arguments": {') == [
        CallBegin("f"),
        CallArguments("{"),
    ]
    assert parser.push('"a"') == [CallArguments('"a"')]


def test_content_is_held_back_no_longer_than_it_must_be() -> None:
    parser = QwenParser(tools=True)
    assert parser.push("a < b") == [Content("a < b")]
    assert parser.push(" <tool") == [Content(" ")]
    assert parser.push("s>") == [Content("<tools>")]


def test_a_header_that_never_ends_is_not_held_for_ever() -> None:
    parser = QwenParser(tools=True)
    text = "x" * (MAX_HEADER_CHARS + 1)
    assert merge(parser.push(f"<tool_call>{text}")) == [Content(f"<tool_call>{text}")]


FRAGMENTS = st.sampled_from(
    [
        "<think>", "</think>", "<tool_call>", "</tool_call>", '{"name": "f", "arguments": ',
        '{"name": "g"', "{", "}", "}\n", '"', "\\", "\n", " ", "a", "<", "[", "]", ",", "</", CALL,
        '{"a": "b"}', "é", "\x00", "x" * (MAX_HEADER_CHARS // 2),
    ]
)  # fmt: skip
TEXTS = st.lists(FRAGMENTS, max_size=24).map("".join)


@given(TEXTS, st.data(), st.booleans(), st.booleans())
def test_any_split_says_the_same(
    text: str, data: st.DataObject, tools: bool, reasoning: bool
) -> None:
    cuts = data.draw(st.lists(st.integers(0, len(text)), max_size=12).map(sorted))
    edges = [0, *cuts, len(text)]
    parts = [text[start:end] for start, end in pairwise(edges)]
    whole = parse([text], tools=tools, reasoning=reasoning)
    assert parse(parts, tools=tools, reasoning=reasoning) == whole
    assert parse(list(text), tools=tools, reasoning=reasoning) == whole


@given(TEXTS)
def test_nothing_is_lost(text: str) -> None:
    def bare(value: str) -> str:
        # Closing tags are the ones that may be missing where the answer was cut.
        value = re.sub(r"\s|</?think>|</tool_call>", "", value)
        return value.replace("}", "")

    assert bare(written(parse([text]))) == bare(text)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=8,
)


@given(st.dictionaries(st.text(), JSON), st.booleans())
def test_any_arguments_come_back_verbatim(arguments: dict[str, object], plain: bool) -> None:
    text = json.dumps(arguments, ensure_ascii=plain)
    call = f'<tool_call>\n{{"name": "f", "arguments": {text}}}\n</tool_call>'
    assert parse(list(call)) == [CallBegin("f"), CallArguments(text), CallEnd(True)]
