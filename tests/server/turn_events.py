"""The events of made-up turns, in the order that server.events states."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import msgspec

from engine import ModelInfo
from server.events import (
    ContentPartAdded,
    ContentPartDone,
    Event,
    OutputItemAdded,
    OutputItemDone,
    OutputTextDelta,
    OutputTextDone,
    ResponseCompleted,
    ResponseCreated,
    ResponseFailed,
    ResponseIncomplete,
    ResponseInProgress,
    ResponsePrompt,
    TokenLogprob,
    TopLogprob,
)
from server.response_object import failed_event, message_item, response_object, usage_object

MODEL = ModelInfo(
    name="pebble",
    max_model_len=64,
    vocab_size=100,
    eos_token_ids=(0,),
    num_parameters=1000,
    dtype="float32",
    device="cpu",
    block_size=16,
    num_blocks=8,
)

TURN_ID = "resp_" + "0123456789abcdef" * 2
HEX = TURN_ID.removeprefix("resp_")
CREATED = 1_700_000_000


class Step(NamedTuple):
    """What one delta brings."""

    text: str
    token_ids: list[int] | None = None
    logprobs: Sequence[TokenLogprob] = ()


class Answer(NamedTuple):
    """One choice."""

    steps: Sequence[Step]
    finish_reason: str | None = "stop"
    """None: broken off."""
    stop_reason: str | int | None = None


def logprob(token: str, value: float, *others: tuple[str, float]) -> TokenLogprob:
    return TokenLogprob(
        token=token,
        bytes=list(token.encode()),
        logprob=value,
        top_logprobs=[
            TopLogprob(token=other, bytes=list(other.encode()), logprob=number)
            for other, number in others
        ],
    )


def response(**fields: Any) -> dict[str, Any]:
    return response_object(TURN_ID, CREATED, "pebble", fields)


def _begin(prompts: Sequence[ResponsePrompt]) -> Iterator[Event]:
    yield ResponseCreated(response=response())
    yield ResponseInProgress(response=response())
    yield from prompts


def _deltas(index: int, answer: Answer) -> Iterator[Event]:
    item_id = f"msg_{index}"
    yield OutputItemAdded(output_index=index, item=message_item(item_id, "in_progress", []))
    part = {"type": "output_text", "text": "", "annotations": []}
    yield ContentPartAdded(item_id=item_id, output_index=index, content_index=0, part=part)
    for step in answer.steps:
        yield OutputTextDelta(
            item_id=item_id,
            output_index=index,
            content_index=0,
            delta=step.text,
            logprobs=list(step.logprobs),
            token_ids=step.token_ids,
        )
    text = "".join(step.text for step in answer.steps)
    yield OutputTextDone(item_id=item_id, output_index=index, content_index=0, text=text)
    part = {"type": "output_text", "text": text, "annotations": []}
    yield ContentPartDone(item_id=item_id, output_index=index, content_index=0, part=part)
    yield OutputItemDone(
        output_index=index,
        item=message_item(item_id, "completed", [part]),
        finish_reason=answer.finish_reason,
        stop_reason=answer.stop_reason,
    )


def turn_events(
    answers: Sequence[Answer],
    prompts: Sequence[ResponsePrompt] = (),
    usage: tuple[int, int, int] = (5, 2, 3),
) -> list[Event]:
    """A whole turn; the events of several answers are interleaved."""
    events = list(_begin(prompts))
    lanes = [list(_deltas(index, answer)) for index, answer in enumerate(answers)]
    while any(lanes):
        events += [lane.pop(0) for lane in lanes if lane]
    final = response(status="completed", usage=usage_object(*usage))
    cut = any(answer.finish_reason == "length" for answer in answers)
    events.append(ResponseIncomplete(response=final) if cut else ResponseCompleted(response=final))
    for number, event in enumerate(events):
        msgspec.structs.force_setattr(event, "sequence_number", number)
    return events


def failed_turn(code: str = "server_error", message: str = "It broke.") -> list[Event]:
    """A turn that ends with an error after its first words."""
    failed: ResponseFailed = failed_event(response(), code, message)
    return [*_begin(()), *_deltas(0, Answer([Step("Hal")], None)), failed]
