"""Control tokens in text: finding those that are meant, and disarming those that a person typed.

A chat template writes control tokens such as ``<|im_end|>`` around the messages, and the messages
may hold the same spelling as text. Before a template sees a message, every place where a control
token could begin gets a mark behind its first character. No join, trim or slice that the template
does can then make a control token of the message's characters. After rendering, what still spells
a control token is the template's own; the marks are taken out of the text between, and that text
is encoded as text.

The marks are pairs of noncharacters; a noncharacter of the message itself is escaped, so nothing
is lost.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from itertools import pairwise
from typing import Any

from engine.pieces import AddedToken

__all__ = ["END_MARK", "Spelling"]

_ESCAPE = "\ufdd0"
_LITERAL = _ESCAPE + "\ufdd1"
_BREAK = _ESCAPE + "\ufdd2"
END_MARK = _ESCAPE + "\ufdd3"
"""Put behind a message that is to be continued: what the template adds after it is cut off."""

_UNMARK = re.compile("\ufdd0[\ufdd1\ufdd2]")


class Spelling:
    """The spellings of a tokenizer's added tokens.

    Tokens of one character or of white space only are ordinary text that happens to have an id of
    its own; all others are control tokens.
    """

    def __init__(self, added: Iterable[AddedToken]) -> None:
        self._by_content = {
            token.content: token
            for token in added
            if len(token.content) > 1 and not token.content.isspace()
        }
        self.control_ids = frozenset(token.token_id for token in self._by_content.values())
        contents = sorted(self._by_content, key=len, reverse=True)
        soft = [one for one in contents if not self._by_content[one].special]
        hard = [one for one in contents if self._by_content[one].special]
        self._find = _alternatives(self._pattern(one) for one in contents)
        self._starts = _alternatives(f"{re.escape(c[0])}(?={re.escape(c[1:])})" for c in contents)
        self._risky = _alternatives(_risks(contents))
        # The model's own words hold tokens like <think> as text; as tokens they must come back.
        allowed = "|".join(re.escape(one) for one in soft)
        kept = f"(?!{allowed})" if allowed else ""
        self._risky_in_answers = _alternatives(f"{kept}(?:{risk})" for risk in _risks(hard))

    def split(self, text: str) -> Iterator[tuple[str, AddedToken | None]]:
        """Yield the text before each control token with that token, then the rest with None."""
        start = 0
        strip_left = False
        for match in self._find.finditer(text) if self._find else ():
            token = self._by_content[match[0]]
            before = text[start : match.start()]
            before = before.lstrip() if strip_left else before
            yield (before.rstrip() if token.lstrip else before), token
            start, strip_left = match.end(), token.rstrip
        yield (text[start:].lstrip() if strip_left else text[start:]), None

    def cut(self, text: str) -> list[str]:
        """Cut a plain text so that no part holds a control token's spelling."""
        if self._starts is None:
            return [text]
        edges = [0, *(match.end() for match in self._starts.finditer(text)), len(text)]
        return [text[left:right] for left, right in pairwise(edges)]

    def mark(self, value: Any, *, answer: bool = False) -> Any:
        """Return a copy of a JSON value with its strings and keys marked.

        Args:
            value: a message, a tool, or anything else that a template may print.
            answer: it is the model's own; tokens that are not special stay tokens.
        """
        if isinstance(value, str):
            if _ESCAPE in value:
                value = value.replace(_ESCAPE, _LITERAL)
            risky = self._risky_in_answers if answer else self._risky
            return value if risky is None else risky.sub(lambda found: found[0] + _BREAK, value)
        if isinstance(value, dict):
            return {
                self.mark(key, answer=answer): self.mark(inner, answer=answer)
                for key, inner in value.items()
            }
        if isinstance(value, list | tuple):
            return [self.mark(inner, answer=answer) for inner in value]
        return value

    @staticmethod
    def unmark(text: str) -> str:
        """Undo ``mark`` in rendered text."""
        if _ESCAPE not in text:
            return text
        return _UNMARK.sub(lambda found: _ESCAPE if found[0] == _LITERAL else "", text)

    def _pattern(self, content: str) -> str:
        escaped = re.escape(content)
        return rf"(?<!\w){escaped}(?!\w)" if self._by_content[content].single_word else escaped


def _risks(contents: list[str]) -> list[str]:
    """Patterns of the characters behind which a mark goes.

    A control token that begins with a sign is broken behind every such sign, whatever follows, for
    the template may put two texts together. Where it begins with a letter, that would mark every
    word, so there it is the whole spelling that counts.
    """
    signs = {one[0] for one in contents if not one[0].isalnum() and not one[0].isspace()}
    words = [one for one in contents if one[0] not in signs]
    return [re.escape(sign) for sign in sorted(signs)] + [
        f"{re.escape(one[0])}(?={re.escape(one[1:])})" for one in words
    ]


def _alternatives(patterns: Iterable[str]) -> re.Pattern[str] | None:
    joined = "|".join(patterns)
    return re.compile(joined) if joined else None
