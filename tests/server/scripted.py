"""A scripted engine and a small tokenizer: the server's tests need no model.

``ScriptedEngine`` has EngineClient's interface. Each request plays a ``Script``: by default the
prompt's own ids, one a step, then the end token. ``ByteTokenizer`` has one token a byte, so any
text can be scripted, and characters of several bytes come in several tokens.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable, Iterable, Mapping, Sequence
from typing import Any, cast

import msgspec

from engine import (
    Delta,
    EngineClosed,
    EngineDied,
    EngineState,
    EngineStats,
    FinishReason,
    ModelInfo,
    Recoveries,
    Request,
    RequestError,
    RequestStream,
    TextStream,
    Tokenizer,
    TokenLogprobs,
    Usage,
)
from engine.text_stream import LeadingSpace, Piece

__all__ = [
    "EOS",
    "ByteTokenizer",
    "Script",
    "ScriptedEngine",
    "byte_tokenizer",
    "call_text",
    "prompt_text",
    "say",
]

EOS = 256
START = 257
NUM_TOKENS = 258


class ByteTokenizer:
    """Token i is byte i; 256 ends an answer, 257 begins a message. Shaped like engine.Tokenizer."""

    vocab_size = NUM_TOKENS
    eos_token_ids = (EOS,)
    special_ids = frozenset({EOS, START})
    has_chat_template = True
    takes_tools = True

    def encode(self, text: str, *, parse_special: bool = False) -> list[int]:
        return list(text.encode("utf-8", "replace"))

    def decode(self, ids: Sequence[int], *, skip_special: bool = True) -> str:
        stream = self.stream(skip_special=skip_special)
        return stream.push(ids) + stream.finish()

    def token_bytes(self, token_id: int) -> bytes:
        return bytes([token_id]) if token_id < 256 else b""

    def stream(self, *, skip_special: bool = True) -> TextStream:
        hidden = self.special_ids if skip_special else frozenset[int]()
        return TextStream(
            lambda token_id: Piece(self.token_bytes(token_id), droppable=False),
            hidden,
            LeadingSpace.KEEP,
        )

    def render_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        **_: Any,
    ) -> list[int]:
        ids: list[int] = []
        if tools:
            names = ", ".join(tool["function"]["name"] for tool in tools)
            ids += [START, *self.encode(f"tools: {names}\n")]
        for message in messages:
            text = f"{message['role']}: {message['content']}"
            for call in message.get("tool_calls", ()):
                text += f" [{call['function']['name']} {call['function']['arguments']}]"
            ids += [START, *self.encode(f"{text}\n")]
        return [*ids, START] if add_generation_prompt else ids

    def close(self) -> None: ...


def byte_tokenizer() -> Tokenizer:
    """Return a ByteTokenizer where the type of the real one is asked for."""
    return cast(Tokenizer, ByteTokenizer())


class Script(msgspec.Struct, kw_only=True):
    """What the engine plays for one request."""

    steps: list[list[int]]
    """Token ids of each step."""
    end: FinishReason = FinishReason.STOP
    """With STOP the end token is added to the last step."""
    dies_after: int | None = None
    """The engine dies before this step."""
    hold: asyncio.Event | None = None
    """Waited for before each step after the first."""


def say(text: str, *, per_step: int = 1, **options: Any) -> Script:
    """Return a script that says ``text``, some bytes a step."""
    ids = list(text.encode())
    steps = [ids[start : start + per_step] for start in range(0, len(ids), per_step)]
    return Script(steps=steps or [[]], **options)


def call_text(name: str, arguments: str) -> str:
    """Return a call as a Qwen3 model writes it."""
    return f'<tool_call>\n{{"name": "{name}", "arguments": {arguments}}}\n</tool_call>'


def prompt_text(request: Request) -> str:
    """Return a prompt that ByteTokenizer rendered, a line a message."""
    return bytes(token_id for token_id in request.prompt_ids if token_id < EOS).decode()


class ScriptedEngine:
    """Plays scripts. ``script`` maps a request to what is played for it.

    ``requests`` are those that were submitted; ``aborted`` the ids of those that were aborted;
    ``running`` those in flight.
    """

    def __init__(
        self,
        script: Callable[[Request], Script] | Script | None = None,
        *,
        max_model_len: int = 4096,
        step_s: float = 0.0,
    ) -> None:
        self.info = ModelInfo(
            name="scripted",
            max_model_len=max_model_len,
            vocab_size=NUM_TOKENS,
            eos_token_ids=(EOS,),
            num_parameters=1,
            dtype="float32",
            device="cpu",
            block_size=16,
            num_blocks=1024,
        )
        self.state = EngineState.READY
        self.stats = EngineStats(num_blocks=1024, free_blocks=1024)
        self.recoveries = Recoveries()
        self.requests: list[Request] = []
        self.aborted: list[str] = []
        self.running: dict[str, RequestStream] = {}
        self._script = script
        self._step_s = step_s
        self._players: dict[str, asyncio.Task[None]] = {}

    @property
    def last_progress_s(self) -> float:
        return time.monotonic()

    @property
    def pid(self) -> int | None:
        return None

    def generate(self, request: Request) -> RequestStream:
        if self.state is not EngineState.READY:
            raise EngineClosed(f"the engine is {self.state.value}; try again in a few seconds")
        if request.request_id in self.running:
            raise RequestError(f"request id {request.request_id!r} is in use")
        self.requests.append(request)
        stream = RequestStream(request.request_id, self._leave)
        self.running[request.request_id] = stream
        player = asyncio.create_task(self._play(request, stream, self._choose(request)))
        self._players[request.request_id] = player
        # Not in the task itself: one that is cancelled before it begins never runs.
        player.add_done_callback(lambda _: self._players.pop(request.request_id, None))
        return stream

    def abort(self, request_id: str) -> None:
        stream = self.running.get(request_id)
        if stream is not None:
            self._leave(request_id)
            stream.push(
                Delta(
                    request_id=request_id,
                    token_ids=[],
                    finish_reason=FinishReason.ABORT,
                    usage=Usage(1, 0, 1, 0),
                )
            )

    async def close(self) -> None:
        self.state = EngineState.CLOSED
        self._fail_all(EngineClosed("the engine was shut down"))
        await self.settle()

    def die(self) -> None:
        """Fail everything in flight, as when the process is killed; the engine is back at once."""
        self._fail_all(EngineDied("the engine process ended"))

    async def settle(self) -> None:
        """Wait until no player runs."""
        while self._players:
            await asyncio.gather(*self._players.values(), return_exceptions=True)

    def _fail_all(self, error: EngineDied | EngineClosed) -> None:
        for request_id, stream in list(self.running.items()):
            self._end(request_id)
            stream.fail(error)

    def _choose(self, request: Request) -> Script:
        if callable(self._script):
            return self._script(request)
        if self._script is not None:
            return self._script
        return Script(steps=[[token_id] for token_id in request.prompt_ids])

    def _leave(self, request_id: str) -> None:
        self.aborted.append(request_id)
        self._end(request_id)

    def _end(self, request_id: str) -> None:
        self.running.pop(request_id, None)
        player = self._players.get(request_id)
        if player is not None and player is not asyncio.current_task():
            player.cancel()

    async def _play(self, request: Request, stream: RequestStream, script: Script) -> None:
        with contextlib.suppress(asyncio.CancelledError):
            async for delta in self._deltas(request, script):
                stream.push(delta)
                if delta.finish_reason is not None:
                    self.running.pop(request.request_id, None)

    async def _deltas(self, request: Request, script: Script) -> AsyncIterator[Delta]:
        sent = 0
        limit = request.sampling.max_tokens
        steps = _after(script.steps, request.output_ids)
        sent = len(request.output_ids)
        for number, step in enumerate(steps):
            await asyncio.sleep(self._step_s)
            if script.hold is not None and number > 0:
                await script.hold.wait()
            if script.dies_after == number:
                self.die()
                return
            ids = step[: limit - sent]
            last = number == len(steps) - 1
            reason = script.end if last else None
            if len(ids) < len(step) or (sent + len(ids) == limit and not last):
                reason = FinishReason.LENGTH
            elif reason is FinishReason.STOP and not request.sampling.ignore_eos:
                ids = [*ids, EOS]
            sent += len(ids)
            yield self._delta(request, ids, reason, sent, first=number == 0)
            if reason is not None:
                return

    def _delta(
        self,
        request: Request,
        ids: list[int],
        reason: FinishReason | None,
        sent: int,
        *,
        first: bool,
    ) -> Delta:
        sampling = request.sampling
        prompt_logprobs = None
        if first and sampling.prompt_logprobs is not None:
            prompt_logprobs = _logprobs(request.prompt_ids[1:], sampling.prompt_logprobs)
        return Delta(
            request_id=request.request_id,
            token_ids=ids,
            logprobs=None if sampling.logprobs is None else _logprobs(ids, sampling.logprobs),
            prompt_logprobs=prompt_logprobs,
            finish_reason=reason,
            usage=Usage(len(request.prompt_ids), 0, sent, 0) if reason else None,
            error="scripted failure" if reason is FinishReason.ERROR else None,
        )


def _after(steps: list[list[int]], known_ids: list[int]) -> list[list[int]]:
    """Return what is left of the steps behind tokens that are known already."""
    said = [token_id for step in steps for token_id in step]
    assert said[: len(known_ids)] == known_ids, "these tokens were never generated"
    left: list[list[int]] = []
    skip = len(known_ids)
    for step in steps:
        if len(step) > skip or not known_ids:
            left.append(step[skip:])
        skip = max(0, skip - len(step))
    return left or [[]]


def _logprobs(ids: Iterable[int], count: int) -> list[TokenLogprobs]:
    return [
        TokenLogprobs(
            logprob=-0.5,
            rank=1,
            top_ids=[token_id, *range(65, 65 + count)][:count],
            top_logprobs=[-0.5 - index for index in range(count)],
        )
        for token_id in ids
    ]
