"""One answer as it grows: the engine's deltas in, events out. No I/O."""

from __future__ import annotations

from collections.abc import Sequence
from enum import Enum

from engine import Delta, FinishReason, Tokenizer, TokenLogprobs, Usage
from server.events import Event, ResponsePrompt, TokenLogprob, TopLogprob
from server.growing_items import Chunk
from server.output_items import OutputItems
from server.parsing.stop_strings import StopStrings
from server.request import TurnRequest

__all__ = ["Choice", "Phase", "prompt_event"]


class Phase(Enum):
    """Life of a choice."""

    WAITING = "waiting"
    """Nothing generated yet."""
    OPEN = "open"
    CLOSED = "closed"
    """Its item is final."""


class Choice:
    """One sequence of a turn: decodes, looks for stop strings, makes its items' events.

    Args:
        index: which of the turn's answers it is.
        items: where its text goes.
        eos_ids: the model's end tokens.
    """

    def __init__(
        self,
        request: TurnRequest,
        tokenizer: Tokenizer,
        index: int,
        items: OutputItems,
        eos_ids: frozenset[int],
    ) -> None:
        sampling = request.sampling
        self.index = index
        self.items = items
        self.phase = Phase.WAITING
        self.num_tokens = 0
        """Generated tokens that belong to the answer."""
        self.finish_reason: str | None = None
        """"stop", "tool_calls" or "length"."""
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
        self._wants_tokens = request.return_token_ids or sampling.logprobs is not None

    def feed(self, delta: Delta) -> list[Event]:
        """Take what the engine generated; the choice may be CLOSED after it."""
        self.usage = delta.usage or self.usage
        if self.phase is Phase.CLOSED:
            return []
        self.phase = Phase.OPEN
        events = self.items.write(self._read(delta))
        if self.items.full:
            self.finish_reason = "stop"
        if self.finish_reason is not None:
            events += self._close()
        return events

    def break_off(self) -> list[Event]:
        """End the item where it is: the turn was cancelled or failed."""
        if self.phase is not Phase.OPEN:
            return []
        return [*self.items.write([Chunk(self._rest())]), *self._close()]

    def _read(self, delta: Delta) -> list[Chunk]:
        """Decode a delta up to the answer's end."""
        ids = delta.token_ids
        shown = len(ids)
        if delta.finish_reason is FinishReason.STOP and ids and ids[-1] in self._end_ids:
            by_request = ids[-1] in self._stop_ids
            self.stop_reason = ids[-1] if by_request else None
            if not (by_request and self._include_stop):
                shown -= 1
        if self._stops is not None or self._wants_tokens or self.items.by_token:
            chunks = self._read_by_token(delta, shown)
        else:
            self.num_tokens += len(ids)
            chunks = [Chunk(self._stream.push(ids[:shown]))]
        if self._stops is not None and self._stops.matched is not None:
            self._stop_at(self._stops.matched)
        elif delta.finish_reason in (FinishReason.STOP, FinishReason.LENGTH):
            chunks.append(Chunk(self._rest()))
            self.finish_reason = delta.finish_reason.value
            if self._stops is not None and self._stops.matched is not None:
                self._stop_at(self._stops.matched)
        return chunks

    def _read_by_token(self, delta: Delta, shown: int) -> list[Chunk]:
        """Decode up to the token that completes a stop string, however the tokens were grouped."""
        chunks: list[Chunk] = []
        for place, token_id in enumerate(delta.token_ids):
            text = self._stream.push((token_id,)) if place < shown else ""
            self.num_tokens += 1
            if self._stops is not None and self.num_tokens > self._min_tokens:
                text = self._stops.push(text)
            logprobs: list[TokenLogprob] = []
            if delta.logprobs is not None:
                logprobs = [_logprob(self._tokenizer, token_id, delta.logprobs[place])]
            chunks.append(Chunk(text, 1, [token_id] if self._wants_ids else None, logprobs))
            if self._stops is not None and self._stops.matched is not None:
                break
        return chunks

    def _stop_at(self, stop: str) -> None:
        self.finish_reason = "stop"
        self.stop_reason = stop

    def _rest(self) -> str:
        """Return what the decoder and the stop strings held back."""
        rest = self._stream.finish()
        if self._stops is None:
            return rest
        return self._stops.push(rest) + self._stops.finish()

    def _close(self) -> list[Event]:
        self.phase = Phase.CLOSED
        status = "completed" if self.finish_reason == "stop" else "incomplete"
        events = self.items.finish()
        if self.finish_reason == "stop" and self.items.num_calls:
            self.finish_reason = "tool_calls"
        return events + self.items.close(status, self.finish_reason, self.stop_reason)


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
