"""The output items of one answer as they grow: parsed text in, events out. No I/O."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from server.events import Event, OutputItemDone
from server.growing_items import CallItem, Chunk, GrowingItem, MessageItem, ReasoningItem
from server.parsing.qwen import (
    CallArguments,
    CallBegin,
    CallEnd,
    Content,
    Piece,
    QwenParser,
    Reasoning,
)

__all__ = ["OutputItems"]


class OutputItems:
    """All items of one choice.

    Args:
        turn_id: what the items' ids are made of.
        first_index: ``output_index`` of the first; each next one has ``stride`` more.
        parser: parts the text; None: all of it is one message.
        one_call: nothing follows the first call.
    """

    def __init__(
        self,
        turn_id: str,
        first_index: int,
        stride: int,
        parser: QwenParser | None,
        *,
        one_call: bool = False,
    ) -> None:
        self.num_calls = 0
        """Calls whose arguments are closed."""
        self.num_reasoning_tokens = 0
        self._turn_id = turn_id
        self._one_call = one_call
        self._next_index = first_index
        self._stride = stride
        self._parser = parser
        self._open: GrowingItem | None = None
        self._done: list[tuple[int, dict[str, Any]]] = []
        self._waiting = Chunk("")
        """Tokens whose text is held back, or was no text of an item."""

    @property
    def begun(self) -> bool:
        """Whether there is an item."""
        return self._open is not None or bool(self._done)

    @property
    def full(self) -> bool:
        """Whether no more text is wanted."""
        return self._one_call and self.num_calls > 0

    @property
    def by_token(self) -> bool:
        """Whether tokens must come one a chunk, for those of the reasoning are counted."""
        return self._parser is not None and (self._parser.reasoning or not self._parser.begun)

    def prime(self, opening: str) -> None:
        """Take what the prompt has begun the answer with: a call, before its arguments."""
        if self._parser is not None and opening:
            pieces = self._parser.push(opening)
            assert not pieces, "no more than a call's name can be given"

    def write(self, chunks: Iterable[Chunk]) -> list[Event]:
        """Take decoded text; return the events, with adjacent text of one item in one of them."""
        events: list[Event] = []
        run = _Run(events)
        for chunk in chunks:
            if self.full:
                break
            self._waiting = _joined(self._waiting, chunk._replace(text=""))
            pieces = self._pieces(chunk.text)
            for piece in pieces:
                self._take(piece, run)
            held = self._parser is not None and self._parser.holding
            if self._parser is not None and self._parser.reasoning:
                self.num_reasoning_tokens += chunk.num_tokens
            if not pieces and not held and self._open is not None:
                # Part of a character, or a token without text: it belongs to what is open.
                run.add(self._open, self._claim(""))
        run.flush()
        return events

    def finish(self) -> list[Event]:
        """End the text: write what is held back, and begin a message if there is no item."""
        events: list[Event] = []
        if self._parser is not None and not self.full:
            run = _Run(events)
            for piece in self._parser.finish():
                self._take(piece, run)
            run.flush()
        if not self.begun:
            events += self._begin(MessageItem(self._turn_id, self._take_index()))
        if self._open is not None and (self._waiting.token_ids or self._waiting.logprobs):
            events.append(self._open.add(self._claim("")))
        return events

    def close(
        self, status: str, finish_reason: str | None, stop_reason: str | int | None
    ) -> list[Event]:
        """End the last item."""
        if self._open is None:
            return []
        return self._end(status, finish_reason, stop_reason)

    def bodies(self) -> list[tuple[int, dict[str, Any]]]:
        """Return the final items with their ``output_index``."""
        return self._done

    @property
    def next_index(self) -> int:
        """The ``output_index`` that the next item would get."""
        return self._next_index

    def _pieces(self, text: str) -> list[Piece]:
        if not text:
            return []
        return [Content(text)] if self._parser is None else self._parser.push(text)

    def _take(self, piece: Piece, run: _Run) -> None:
        if self.full:
            return
        match piece:
            case Content(text):
                run.add(self._opened(MessageItem, run), self._claim(text))
            case Reasoning(text):
                run.add(self._opened(ReasoningItem, run), self._claim(text))
            case CallBegin(name):
                run.flush()
                run.events += self._begin(CallItem(self._turn_id, self._take_index(), name))
            case CallArguments(text):
                assert self._open is not None
                run.add(self._open, self._claim(text))
            case CallEnd(complete):
                assert isinstance(self._open, CallItem)
                self._open.complete = complete
                self.num_calls += complete

    def _opened(self, kind: type[MessageItem | ReasoningItem], run: _Run) -> GrowingItem:
        if not isinstance(self._open, kind):
            run.flush()
            run.events += self._begin(kind(self._turn_id, self._take_index()))
        assert self._open is not None
        return self._open

    def _begin(self, item: GrowingItem) -> list[Event]:
        events = [] if self._open is None else self._end("completed", None, None)
        self._open = item
        return events + item.begin()

    def _end(
        self, status: str, finish_reason: str | None, stop_reason: str | int | None
    ) -> list[Event]:
        item, self._open = self._open, None
        assert item is not None
        body = item.body(status)
        self._done.append((item.output_index, body))
        done = OutputItemDone(
            output_index=item.output_index,
            item=body,
            finish_reason=finish_reason,
            stop_reason=stop_reason,
        )
        return [*item.settle(), done]

    def _take_index(self) -> int:
        index = self._next_index
        self._next_index += self._stride
        return index

    def _claim(self, text: str) -> Chunk:
        chunk, self._waiting = self._waiting._replace(text=text), Chunk("")
        return chunk


class _Run:
    """Adjacent text of one item on its way into one event."""

    def __init__(self, events: list[Event]) -> None:
        self.events = events
        self._item: GrowingItem | None = None
        self._chunk = Chunk("")

    def add(self, item: GrowingItem, chunk: Chunk) -> None:
        if item is not self._item:
            self.flush()
            self._item, self._chunk = item, chunk
        else:
            self._chunk = _joined(self._chunk, chunk)

    def flush(self) -> None:
        chunk = self._chunk
        if self._item is not None and (chunk.text or chunk.token_ids or chunk.logprobs):
            self.events.append(self._item.add(self._chunk))
        self._item = None


def _joined(one: Chunk, other: Chunk) -> Chunk:
    ids = one.token_ids
    if other.token_ids is not None:
        ids = [*(ids or ()), *other.token_ids]
    return Chunk(
        one.text + other.text,
        one.num_tokens + other.num_tokens,
        ids,
        [*one.logprobs, *other.logprobs],
    )
