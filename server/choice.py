"""One answer as it grows: the engine's deltas in, events out. No I/O."""

from __future__ import annotations

from collections.abc import Sequence
from enum import Enum
from typing import Any

from engine import Delta, FinishReason, Tokenizer, TokenLogprobs, Usage
from server.events import (
    ContentPartAdded,
    ContentPartDone,
    Event,
    OutputItemAdded,
    OutputItemDone,
    OutputTextDelta,
    OutputTextDone,
    ResponsePrompt,
    TokenLogprob,
    TopLogprob,
)
from server.parsing.stop_strings import StopStrings
from server.request import TurnRequest
from server.response_object import message_item, new_id, output_text

__all__ = ["Choice", "Phase", "prompt_event"]


class Phase(Enum):
    """Life of a choice."""

    WAITING = "waiting"
    """Nothing generated yet."""
    OPEN = "open"
    CLOSED = "closed"
    """Its item is final."""


class Choice:
    """One sequence of a turn: decodes, looks for stop strings, makes the item's events."""

    def __init__(
        self, request: TurnRequest, tokenizer: Tokenizer, output_index: int, eos_ids: frozenset[int]
    ) -> None:
        sampling = request.sampling
        self.output_index = output_index
        self.item_id = new_id("msg")
        self.phase = Phase.WAITING
        self.num_tokens = 0
        """Generated tokens that belong to the answer."""
        self.finish_reason: str | None = None
        self.stop_reason: str | int | None = None
        self.usage: Usage | None = None
        self._tokenizer = tokenizer
        self._stream = tokenizer.stream(skip_special=request.skip_special_tokens)
        self._stops: StopStrings | None = None
        if sampling.stop:
            self._stops = StopStrings(sampling.stop, include=sampling.include_stop_str_in_output)
        self._min_tokens = sampling.min_tokens
        self._stop_ids = frozenset(sampling.stop_token_ids)
        # With ignore_eos the model's own end tokens end nothing: they are part of the answer.
        self._end_ids = self._stop_ids if sampling.ignore_eos else self._stop_ids | eos_ids
        self._include_stop = sampling.include_stop_str_in_output
        self._wants_ids = request.return_token_ids
        self._status = "in_progress"
        self._texts: list[str] = []
        self._logprobs: list[TokenLogprob] = []

    def feed(self, delta: Delta) -> list[Event]:
        """Take what the engine generated; the choice may be CLOSED after it."""
        self.usage = delta.usage or self.usage
        if self.phase is Phase.CLOSED:
            return []
        events = self._begin() if self.phase is Phase.WAITING else []
        text, count = self._read(delta)
        self.num_tokens += count
        ids = delta.token_ids[:count]
        logprobs: list[TokenLogprob] = []
        if delta.logprobs is not None:
            logprobs = [
                _logprob(self._tokenizer, token_id, entry)
                for token_id, entry in zip(ids, delta.logprobs, strict=False)
            ]
        self._add(events, text, ids, logprobs)
        if self.finish_reason is not None:
            events += self._close("completed" if self.finish_reason == "stop" else "incomplete")
        return events

    def break_off(self) -> list[Event]:
        """End the item where it is: the turn was cancelled or failed."""
        if self.phase is not Phase.OPEN:
            return []
        events: list[Event] = []
        self._add(events, self._rest(), [], [])
        return events + self._close("incomplete")

    def item(self, status: str) -> dict[str, Any]:
        """Return the item as it stands."""
        part = output_text("".join(self._texts), self._logprobs)
        return message_item(self.item_id, status, [part])

    def _read(self, delta: Delta) -> tuple[str, int]:
        """Decode a delta: its text, and how many of its tokens belong to the answer."""
        ids = delta.token_ids
        shown = ids
        if delta.finish_reason is FinishReason.STOP and ids and ids[-1] in self._end_ids:
            by_request = ids[-1] in self._stop_ids
            self.stop_reason = ids[-1] if by_request else None
            if not (by_request and self._include_stop):
                shown = ids[:-1]
        count = len(ids)
        if self._stops is None:
            text = self._stream.push(shown)
        else:
            text, used = self._read_by_token(self._stops, shown)
            if self._stops.matched is not None:
                self._stop_at(self._stops.matched)
                return text, used
        if delta.finish_reason in (FinishReason.STOP, FinishReason.LENGTH):
            text += self._rest()
            self.finish_reason = delta.finish_reason.value
            if self._stops is not None and self._stops.matched is not None:
                self._stop_at(self._stops.matched)
        return text, count

    def _read_by_token(self, stops: StopStrings, ids: Sequence[int]) -> tuple[str, int]:
        """Decode up to the token that completes a stop string, however the tokens were grouped."""
        text = ""
        for number, token_id in enumerate(ids, start=1):
            piece = self._stream.push((token_id,))
            if self.num_tokens + number <= self._min_tokens:
                text += piece
                continue
            text += stops.push(piece)
            if stops.matched is not None:
                return text, number
        return text, len(ids)

    def _stop_at(self, stop: str) -> None:
        self.finish_reason = "stop"
        self.stop_reason = stop

    def _rest(self) -> str:
        """Return what the decoder and the stop strings held back."""
        rest = self._stream.finish()
        if self._stops is None:
            return rest
        return self._stops.push(rest) + self._stops.finish()

    def _add(
        self, events: list[Event], text: str, ids: list[int], logprobs: list[TokenLogprob]
    ) -> None:
        wanted_ids = ids if self._wants_ids else None
        if not (text or logprobs or wanted_ids):
            return
        self._texts.append(text)
        self._logprobs += logprobs
        events.append(
            OutputTextDelta(
                item_id=self.item_id,
                output_index=self.output_index,
                content_index=0,
                delta=text,
                logprobs=logprobs,
                token_ids=wanted_ids,
            )
        )

    def _begin(self) -> list[Event]:
        self.phase = Phase.OPEN
        return [
            OutputItemAdded(
                output_index=self.output_index,
                item=message_item(self.item_id, "in_progress", []),
            ),
            ContentPartAdded(
                item_id=self.item_id,
                output_index=self.output_index,
                content_index=0,
                part=output_text(""),
            ),
        ]

    def _close(self, status: str) -> list[Event]:
        self.phase = Phase.CLOSED
        self._status = status
        item = self.item(status)
        part = item["content"][0]
        return [
            OutputTextDone(
                item_id=self.item_id,
                output_index=self.output_index,
                content_index=0,
                text=part["text"],
                logprobs=self._logprobs,
            ),
            ContentPartDone(
                item_id=self.item_id, output_index=self.output_index, content_index=0, part=part
            ),
            OutputItemDone(
                output_index=self.output_index,
                item=item,
                finish_reason=self.finish_reason,
                stop_reason=self.stop_reason,
            ),
        ]

    def final_item(self) -> dict[str, Any] | None:
        """Return the item as it ended, None if nothing was generated."""
        return self.item(self._status) if self.phase is Phase.CLOSED else None


def prompt_event(
    tokenizer: Tokenizer,
    output_index: int,
    prompt_ids: list[int],
    logprobs: Sequence[TokenLogprobs] | None,
) -> ResponsePrompt:
    """Return the event that shows a prompt; ``logprobs`` has no entry for the first token."""
    entries: list[TokenLogprob | None] | None = None
    if logprobs is not None:
        entries = [None]
        entries += [
            _logprob(tokenizer, token_id, entry)
            for token_id, entry in zip(prompt_ids[1:], logprobs, strict=False)
        ]
    return ResponsePrompt(output_index=output_index, token_ids=prompt_ids, logprobs=entries)


def _logprob(tokenizer: Tokenizer, token_id: int, entry: TokenLogprobs) -> TokenLogprob:
    data = tokenizer.token_bytes(token_id)
    return TokenLogprob(
        token=data.decode("utf-8", "replace"),
        bytes=list(data),
        logprob=entry.logprob,
        top_logprobs=[
            _top(tokenizer, top_id, logprob)
            for top_id, logprob in zip(entry.top_ids, entry.top_logprobs, strict=True)
        ],
    )


def _top(tokenizer: Tokenizer, token_id: int, logprob: float) -> TopLogprob:
    data = tokenizer.token_bytes(token_id)
    return TopLogprob(token=data.decode("utf-8", "replace"), bytes=list(data), logprob=logprob)
