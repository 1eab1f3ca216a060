"""Frames: however a stream is cut, the same messages come out; the engine never blocks."""

from __future__ import annotations

import socket

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.link import (
    Abort,
    FrameError,
    Link,
    LinkClosed,
    Loading,
    Step,
    Submit,
    ToEngine,
    encode_frame,
    pop_frames,
)
from engine.types import Delta, EngineStats, Request, SamplingParams


@given(st.lists(st.text(max_size=40), max_size=12), st.randoms(use_true_random=False))
def test_frames_survive_any_cut(ids: list[str], random: object) -> None:
    messages: list[ToEngine] = [Abort(text, 1.5) for text in ids]
    stream = b"".join(encode_frame(message) for message in messages)
    decoder = msgspec.msgpack.Decoder(ToEngine)
    buffer = bytearray()
    got: list[ToEngine] = []
    position = 0
    while position < len(stream):
        step = random.randint(1, 9)  # type: ignore[attr-defined]
        buffer += stream[position : position + step]
        position += step
        got += [decoder.decode(body) for body in pop_frames(buffer)]
    assert got == messages
    assert not buffer


def test_a_request_keeps_all_its_fields() -> None:
    request = Request(
        request_id="r",
        prompt_ids=[1, 2, 3],
        sampling=SamplingParams(
            max_tokens=4, logit_bias={7: -1.5}, stop_token_ids=(9,), seed=2**62, logprobs=0
        ),
        priority=-3,
        cache_salt="tenant",
    )
    (body,) = pop_frames(bytearray(encode_frame(Submit(request))))
    assert msgspec.msgpack.decode(body, type=ToEngine) == Submit(request)


def test_an_impossible_length_is_refused() -> None:
    with pytest.raises(FrameError, match="4294967295 bytes"):
        pop_frames(bytearray(b"\xff\xff\xff\xff"))


def test_a_reader_that_stalls_does_not_block_the_engine() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        link = Link(ours)
        sent = [
            Step([Delta(request_id="r", token_ids=list(range(1000)))], EngineStats(steps=i))
            for i in range(2000)
        ]
        for message in sent:
            link.send(message)
        theirs.settimeout(5)
        buffer = bytearray()
        got: list[bytes] = []
        while len(got) < len(sent):
            buffer += theirs.recv(1 << 20)
            got += pop_frames(buffer)
            link.receive(0.0)
        assert [msgspec.msgpack.decode(body, type=Step).stats.steps for body in got] == list(
            range(2000)
        )


def test_the_other_end_gone_is_told() -> None:
    ours, theirs = socket.socketpair()
    with ours:
        link = Link(ours)
        theirs.close()
        with pytest.raises(LinkClosed):
            link.receive(1.0)
        with pytest.raises(LinkClosed):
            link.send(Loading("x", 0.0))
