"""Engine processes without a model: ``python -m tests.engine.fake_engine FD``.

It speaks the real link and counts upward: after token t comes t + 1. What else it does, the model's
name says ("refuse", "die-at-start", or "script:" and a file, see ``Script``), or a magic prompt
token.
"""

from __future__ import annotations

import os
import signal
import socket
import sys
import time
from collections.abc import Iterator
from pathlib import Path

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
    encode_frame,
)
from engine.types import Delta, EngineStats, FinishReason, ModelInfo, Request, Usage
from engine.zygote import Zygote

DIE = 1_000_000
"""A prompt that begins with this kills every process with SIGKILL after a token of its answer."""
POISON = 1_000_001
"""A prompt that begins with this kills every process before its answer's next token."""
HANG = 1_000_002
"""A prompt that begins with this stops the process for good, as a wedged device would."""
LOSE = 1_000_003
"""A prompt that begins with this is forgotten by the engine, which goes on."""

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


class Script:
    """Ways to die, one a line; each process takes the first line off and lives without one.

    ``kill N``: SIGKILL after N tokens, the last of them sent; ``lose N``: without sending them;
    ``half N``: with half their frame sent; ``stop N``: SIGSTOP; ``spin N``: goes on sending frames
    but computes nothing; ``sleep N``: sends nothing any more; ``garble N``: sends what is no frame.
    ``refuse 0`` and ``die 0`` happen at the start.
    """

    def __init__(self, model: str) -> None:
        self.way, self.tokens = "", -1
        path = Path(model.removeprefix("script:"))
        if model.startswith("script:") and (lines := path.read_text().splitlines()):
            path.write_text("\n".join(lines[1:]))
            way, tokens = lines[0].split()
            self.way, self.tokens = way, int(tokens)

    def act(self, link: Link, sock: socket.socket, step: Step) -> None:
        """Send the step of this moment, or die."""
        if self.way in ("kill", "stop"):
            link.send(step)
            link.drain(5.0)
            os.kill(os.getpid(), signal.SIGKILL if self.way == "kill" else signal.SIGSTOP)
        elif self.way == "half":
            frame = encode_frame(step)
            sock.send(frame[: len(frame) // 2])
            os.kill(os.getpid(), signal.SIGKILL)
        elif self.way == "lose":
            os.kill(os.getpid(), signal.SIGKILL)
        elif self.way == "garble":
            sock.send(b"\0\0\0\4what")
        while self.way == "spin":
            link.receive(0.01)
            link.send(Step([], step.stats))
        time.sleep(3600)


class FakeEngine:
    """Answers every request, one token of each in turn."""

    def __init__(self, link: Link, sock: socket.socket, script: Script) -> None:
        self._link = link
        self._sock = sock
        self._script = script
        self._running: dict[str, Iterator[Delta]] = {}
        self._steps = 0
        self._tokens = 0

    def serve(self) -> None:
        """Serve until the link closes or the script ends it."""
        while True:
            deltas = self._receive()
            self._steps += bool(self._running)
            for request_id, tokens in list(self._running.items()):
                delta = next(tokens)
                deltas.append(delta)
                self._tokens += 1
                if delta.finish_reason:
                    del self._running[request_id]
                if self._tokens == self._script.tokens:
                    self._script.act(self._link, self._sock, Step(deltas, self._stats()))
            self._link.send(Step(deltas, self._stats()))

    def _stats(self) -> EngineStats:
        return EngineStats(
            running=len(self._running), steps=self._steps, generation_tokens=self._tokens
        )

    def _receive(self) -> list[Delta]:
        ended = []
        for message in self._link.receive(0.001 if self._running else HEARTBEAT_S):
            match message:
                case Submit(request):
                    self._take(request)
                case Abort(request_id):
                    if self._running.pop(request_id, None):
                        ended.append(
                            Delta(
                                request_id=request_id,
                                token_ids=[],
                                finish_reason=FinishReason.ABORT,
                                usage=Usage(1, 0, 0, 0),
                            )
                        )
                case Configure():
                    raise AssertionError("configured twice")
        return ended

    def _take(self, request: Request) -> None:
        first = request.prompt_ids[0]
        if first == LOSE and not request.output_ids:
            return
        answer = self._running[request.request_id] = _answer(request)
        if first == HANG:
            time.sleep(3600)
        if first == DIE:
            self._link.send(Step([next(answer)], EngineStats(steps=1)))
        if first in (DIE, POISON):
            os.kill(os.getpid(), signal.SIGKILL)


def _answer(request: Request) -> Iterator[Delta]:
    """Yield one delta a token, the last one with usage."""
    known = len(request.output_ids)
    token = request.prompt_ids[-1] + known
    if known:
        assert request.output_ids == list(range(request.prompt_ids[-1] + 1, token + 1))
    total = request.sampling.max_tokens
    for count in range(known + 1, total + 1):
        token += 1
        last = count == total
        yield Delta(
            request_id=request.request_id,
            token_ids=[token],
            finish_reason=FinishReason.LENGTH if last else None,
            usage=Usage(len(request.prompt_ids), 0, total, 0) if last else None,
        )


def main() -> int:
    """Fork as the real zygote does; start as the real engine does, or fail as the model says."""
    sock = Zygote(socket.socket(fileno=int(sys.argv[1]))).serve(lambda: None)
    if sock is None:
        return 0
    link = Link(sock)
    try:
        while not (messages := link.receive(10.0)):
            continue
        (first,) = messages
        assert isinstance(first, Configure)
        link.send(Loading("counting", 0.5))
        script = Script(first.config.model)
        if "refuse" in (first.config.model, script.way):
            link.send(
                Failed("CheckpointError", "config.json: hidden_size is 0; it must be positive")
            )
            return 1
        if first.config.model == "die-at-start" or script.way == "die":
            os.kill(os.getpid(), signal.SIGKILL)
        link.send(Ready(INFO))
        FakeEngine(link, sock, script).serve()
    except LinkClosed:
        pass
    return 0


if __name__ == "__main__":
    sys.exit(main())
