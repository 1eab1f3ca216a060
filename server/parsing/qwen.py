"""Text that a Qwen3 model generates, parted while it arrives: reasoning, content and tool calls.

The model writes ``<think>…</think>`` at the start of an answer, then content, and where it has
tools also ``<tool_call>\\n{"name": …, "arguments": {…}}\\n</tool_call>``, as the checkpoint's chat
template writes it back. Whatever the text is cut into, the pieces say the
same. Nothing that was generated is thrown away but the tags and the line breaks beside them, which
the chat template puts there again: a call that is not of this form is content, word for word. Once
a call's name is known its arguments are given out as they come; should they break off or stop being
JSON, the call ends incomplete and what follows is content.
"""

from __future__ import annotations

import re
from enum import Enum
from typing import NamedTuple

__all__ = ["CallArguments", "CallBegin", "CallEnd", "Content", "Piece", "QwenParser", "Reasoning"]

THINK, END_THINK = "<think>", "</think>"
CALL, END_CALL = "<tool_call>", "</tool_call>"
MAX_HEADER_CHARS = 512
"""Longest text from a call's tag to its arguments, and from these to its end."""

_HEADER = re.compile(
    r'\s*\{\s*"name"\s*:\s*"([A-Za-z0-9_.:-]{1,128})"\s*,\s*"arguments"\s*:\s*(?=\{)'
)
_TAIL = re.compile(rf"\s*\}}\s*{END_CALL}")
_INTERESTING = re.compile(r'["\\{}\[\]<\x00-\x1f]')


class Reasoning(NamedTuple):
    """More of the reasoning."""

    text: str


class Content(NamedTuple):
    """More of the answer itself."""

    text: str


class CallBegin(NamedTuple):
    """A call of the function ``name`` begins."""

    name: str


class CallArguments(NamedTuple):
    """More of the call's arguments: JSON text as the model wrote it."""

    text: str


class CallEnd(NamedTuple):
    """The call ends; ``complete``: its arguments are closed."""

    complete: bool


Piece = Reasoning | Content | CallBegin | CallArguments | CallEnd


class _State(Enum):
    START = "start"
    REASONING = "reasoning"
    CONTENT = "content"
    HEADER = "header"
    """Behind ``<tool_call>``, before the arguments."""
    ARGUMENTS = "arguments"
    TAIL = "tail"
    """Behind the arguments."""


class QwenParser:
    """One answer's parser.

    Args:
        tools: the model was given tools; without, ``<tool_call>`` is text like any other.
        reasoning: the prompt has opened the reasoning already.
    """

    __slots__ = ("_arguments", "_at_tag", "_gap", "_held", "_pieces", "_state", "_tools")

    def __init__(self, *, tools: bool, reasoning: bool = False) -> None:
        self._tools = tools
        self._state = _State.REASONING if reasoning else _State.START
        self._held = ""
        self._gap = ""
        self._at_tag = reasoning
        self._arguments = _Brackets()
        self._pieces: list[Piece] = []

    @property
    def holding(self) -> bool:
        """Whether text is held back that may become something else."""
        return bool(self._held)

    @property
    def reasoning(self) -> bool:
        """Whether what comes next is reasoning, until it says otherwise."""
        return self._state is _State.REASONING

    @property
    def begun(self) -> bool:
        """Whether enough came to say what the text begins with."""
        return self._state is not _State.START

    def push(self, text: str) -> list[Piece]:
        """Add text; return what it says for sure."""
        self._held += text
        return self._run(final=False)

    def finish(self) -> list[Piece]:
        """End the text: return what was held back."""
        return self._run(final=True)

    def _run(self, *, final: bool) -> list[Piece]:
        steps = {
            _State.START: self._start,
            _State.REASONING: self._reason,
            _State.CONTENT: self._content,
            _State.HEADER: self._header,
            _State.ARGUMENTS: self._argue,
            _State.TAIL: self._tail,
        }
        while steps[self._state](final):
            pass
        pieces, self._pieces = self._pieces, []
        return pieces

    # Each step returns whether the next one is to look at what is held.

    def _start(self, final: bool) -> bool:
        begun = self._held.lstrip()
        if begun.startswith(THINK):
            self._held = begun[len(THINK) :]
            self._state, self._at_tag = _State.REASONING, True
            return True
        if THINK.startswith(begun) and not final:
            return False
        self._state = _State.CONTENT
        return True

    def _reason(self, final: bool) -> bool:
        end = self._held.find(END_THINK)
        if end < 0:
            self._give(Reasoning, len(self._held) if final else _settled(self._held, END_THINK))
            return False
        self._give(Reasoning, len(self._held[:end].rstrip("\n")))
        self._held = self._held.lstrip("\n")[len(END_THINK) :]
        self._state, self._at_tag = _State.CONTENT, True
        return True

    def _content(self, final: bool) -> bool:
        start = self._held.find(CALL) if self._tools else -1
        if start < 0:
            whole = final or not self._tools
            self._give(Content, len(self._held) if whole else _settled(self._held, CALL))
            return False
        self._give(Content, len(self._held[:start].rstrip("\n")))
        self._gap, _, self._held = self._held.partition(CALL)
        self._state = _State.HEADER
        return True

    def _header(self, final: bool) -> bool:
        found = _HEADER.match(self._held)
        if found is not None and found.end() <= MAX_HEADER_CHARS:
            self._pieces.append(CallBegin(found[1]))
            self._held = self._held[found.end() :]
            self._arguments = _Brackets()
            self._state = _State.ARGUMENTS
            return True
        if END_CALL in self._held or len(self._held) > MAX_HEADER_CHARS or final:
            # No call after all: its tag was text, and what follows is looked at as such.
            self._pieces.append(Content(self._gap + CALL))
            self._state, self._at_tag = _State.CONTENT, False
            return True
        return False

    def _argue(self, final: bool) -> bool:
        length, closed = self._arguments.scan(self._held)
        if length:
            self._pieces.append(CallArguments(self._held[:length]))
        self._held = self._held[length:]
        if closed:
            self._pieces.append(CallEnd(True))
            self._state = _State.TAIL
            return True
        if self._held or final:
            self._pieces.append(CallEnd(False))
            self._state, self._at_tag = _State.CONTENT, False
            return True
        return False

    def _tail(self, final: bool) -> bool:
        found = _TAIL.match(self._held)
        if found is not None and found.end() <= MAX_HEADER_CHARS:
            self._held = self._held[found.end() :]
            self._state, self._at_tag = _State.CONTENT, True
            return True
        rest = self._held.strip()
        unfinished = not rest or (rest[0] == "}" and END_CALL.startswith(rest[1:].lstrip()))
        if unfinished and len(self._held) <= MAX_HEADER_CHARS:
            if final:
                # The call is whole; only its own closing is not.
                self._held = ""
            return False
        self._state, self._at_tag = _State.CONTENT, False
        return True

    def _give(self, kind: type[Reasoning | Content], length: int) -> None:
        """Give out the first ``length`` held characters, without line breaks right behind a tag."""
        text, self._held = self._held[:length], self._held[length:]
        if self._at_tag:
            text = text.lstrip("\n")
        if text:
            self._at_tag = False
            self._pieces.append(kind(text))


class _Brackets:
    """Finds where a JSON object ends, in text that arrives bit by bit."""

    def __init__(self) -> None:
        self._open: list[str] = []
        self._in_string = False
        self._escaped = False

    def scan(self, text: str) -> tuple[int, bool]:
        """Return how much of ``text`` is of the object, and whether it ends there.

        Less than all without an end means that the next character cannot stand in JSON.
        """
        at = 0
        if self._escaped and text:
            at, self._escaped = 1, False
        while (found := _INTERESTING.search(text, at)) is not None:
            at, char = found.end(), found[0]
            if self._in_string:
                if char < " ":
                    return at - 1, False
                if char == '"':
                    self._in_string = False
                elif char == "\\":
                    self._escaped = at == len(text)
                    at += 1
            elif char == '"':
                self._in_string = True
            elif char in "{[":
                self._open.append("}" if char == "{" else "]")
            elif char not in "}]":
                if char in "<\\":
                    return at - 1, False
            elif self._open.pop() != char:
                return at - 1, False
            elif not self._open:
                return at, True
        return len(text), False


def _settled(text: str, tag: str) -> int:
    """Return how much of ``text`` can no longer belong to ``tag`` or the line breaks before it."""
    for length in range(min(len(tag) - 1, len(text)), 0, -1):
        if tag.startswith(text[-length:]):
            text = text[:-length]
            break
    return len(text.rstrip("\n"))
