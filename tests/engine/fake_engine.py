"""An engine process without a model: ``python -m tests.engine.fake_engine FD``.

It speaks the real link through the real core and counts upward: after token t comes t + 1. What
else it does, the model's name says ("refuse", "die-at-start"), or a magic prompt token.
"""

from __future__ import annotations

import os
import signal
import socket
import sys
import time
from collections.abc import Iterator

from engine.link import (
    HEARTBEAT_S,
    Abort,
    Configure,
    Failed,
    Link,
    LinkClosed,
    Loading,
    Ready,
    Step,
    Submit,
)
from engine.types import Delta, EngineStats, FinishReason, ModelInfo, Request, Usage

DIE = 1_000_000
"""A prompt that begins with this kills the process with SIGKILL in the middle of the answer."""
HANG = 1_000_001
"""A prompt that begins with this stops the process for good, as a wedged device would."""

INFO = ModelInfo(
    name="fake",
    max_model_len=4096,
    vocab_size=2_000_000,
    eos_token_ids=(0,),
    num_parameters=0,
    dtype="float32",
    device="cpu",
    block_size=16,
    num_blocks=64,
)


def answer(request: Request) -> Iterator[Delta]:
    """Yield one delta a token, the last one with usage."""
    token = request.prompt_ids[-1]
    total = request.sampling.max_tokens
    for count in range(1, total + 1):
        token += 1
        last = count == total
        yield Delta(
            request_id=request.request_id,
            token_ids=[token],
            finish_reason=FinishReason.LENGTH if last else None,
            usage=Usage(len(request.prompt_ids), 0, total, 0) if last else None,
        )


def serve(link: Link) -> None:
    """Answer every request, one token of each in turn."""
    running: dict[str, Iterator[Delta]] = {}
    while True:
        deltas = []
        for message in link.receive(0.001 if running else HEARTBEAT_S):
            match message:
                case Submit(request):
                    running[request.request_id] = answer(request)
                    if request.prompt_ids[0] == HANG:
                        time.sleep(3600)
                    if request.prompt_ids[0] == DIE:
                        link.send(Step([next(running[request.request_id])], EngineStats()))
                        os.kill(os.getpid(), signal.SIGKILL)
                case Abort(request_id):
                    if running.pop(request_id, None):
                        deltas.append(
                            Delta(
                                request_id=request_id,
                                token_ids=[],
                                finish_reason=FinishReason.ABORT,
                                usage=Usage(1, 0, 0, 0),
                            )
                        )
                case Configure():
                    raise AssertionError("configured twice")
        for request_id, tokens in list(running.items()):
            delta = next(tokens)
            deltas.append(delta)
            if delta.finish_reason:
                del running[request_id]
        link.send(Step(deltas, EngineStats(running=len(running))))


def main() -> int:
    """Start as the real engine does, or fail as the configured model says."""
    link = Link(socket.socket(fileno=int(sys.argv[1])))
    try:
        while not (messages := link.receive(10.0)):
            continue
        (first,) = messages
        assert isinstance(first, Configure)
        link.send(Loading("counting", 0.5))
        if first.config.model == "refuse":
            link.send(
                Failed("CheckpointError", "config.json: hidden_size is 0; it must be positive")
            )
            return 1
        if first.config.model == "die-at-start":
            os.kill(os.getpid(), signal.SIGKILL)
        link.send(Ready(INFO))
        serve(link)
    except LinkClosed:
        pass
    return 0


if __name__ == "__main__":
    sys.exit(main())
