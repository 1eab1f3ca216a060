"""What every dialect's request becomes: one ``TurnRequest``, validated and free of wire formats."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import msgspec

__all__ = ["OnDisconnect", "SamplingOptions", "Shape", "ToolOptions", "TurnRequest"]

UNHURRIED_S = 60.0
"""A request without a deadline has its turn among its key's as if it had this one, so that hurried
ones that come and come do not keep it waiting for ever; nothing happens to it when it is over."""

OnDisconnect = Literal["cancel", "finish", "linger"]


class Shape(NamedTuple):
    """What the caller wants to see beyond the answer; it changes nothing about the turn."""

    include_usage: bool = False
    """End the stream with a chunk that holds the usage."""
    continuous_usage: bool = False
    """Put the usage so far into every chunk."""
    token_ids: bool = False


class SamplingOptions(msgspec.Struct, frozen=True, kw_only=True):
    """Sampling as the client asked for it, in range; None means the model's default."""

    max_tokens: int | None = None
    min_tokens: int = 0
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: dict[int, float] = {}
    seed: int | None = None
    stop: tuple[str, ...] = ()
    """Stop strings; the text before the first of them is the answer."""
    include_stop_str_in_output: bool = False
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    deadline_s: float | None = None
    """Seconds from the request's arrival within which the answer must begin; None: any time."""


class ToolOptions(msgspec.Struct, frozen=True, kw_only=True):
    """Which tools the model has, and how it is to use them."""

    functions: list[dict[str, Any]] = []
    """What the model is told of them, in Chat Completions' shape, in the request's order."""
    builtin: dict[str, str] = {}
    """Those that this server runs: function name to the tool's kind."""
    choice: Literal["auto", "none", "required"] = "auto"
    name: str | None = None
    """With "required": the only function that may be called first."""
    parallel: bool = True
    """Whether one answer may hold several calls."""
    max_calls: int | None = None
    """Most calls of the server's own tools in one turn; None: only the server's own limit."""

    @property
    def active(self) -> bool:
        """Whether the model may call anything."""
        return bool(self.functions) and self.choice != "none"

    @property
    def opening(self) -> str:
        """What the answer is made to begin with, so that it is a call."""
        if not self.active or self.choice != "required":
            return ""
        name = self.name
        if name is None and len(self.functions) == 1:
            name = self.functions[0]["function"]["name"]
        if name is None:
            return "<tool_call>"
        return f'<tool_call>\n{{"name": "{name}", "arguments":'


class TurnRequest(msgspec.Struct, frozen=True, kw_only=True):
    """One turn: one or more prompts, each answered ``n`` times.

    Exactly one of ``messages`` (rendered through the chat template) and ``prompts`` is given.
    Choice ``i`` of prompt ``p`` has ``output_index`` p * n + i and, where a seed is given, the
    seed seed + i.
    """

    dialect: str
    """"responses", "chat" or "completions"."""
    model: str
    messages: list[dict[str, Any]] | None = None
    """Chat messages in Chat Completions' shape, text only; instructions and history in place."""
    tools: ToolOptions = ToolOptions()
    prompts: list[str | list[int]] | None = None
    template_kwargs: dict[str, Any] = {}
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    n: int = 1
    sampling: SamplingOptions = SamplingOptions()
    priority: int = 0
    weight: float = 1.0
    """The share of the caller's key; set when the turn is let in."""
    stream: bool = False
    return_token_ids: bool = False
    echo: bool = False
    skip_special_tokens: bool = True
    store: bool = False
    on_disconnect: OnDisconnect = "cancel"
    """What happens when the last client that follows the turn leaves before its end."""
    linger_s: float = 0.0
    """With "linger": how long the turn goes on without anybody, in seconds."""
    shape: Shape = Shape()
    system_fingerprint: str = ""
    """Of the server that was asked: a stream shows the same one to its end, wherever it is read."""
    owner: str = ""
    """Digest of the caller's API key, or "" where none is needed; what is stored belongs to it."""
    response_fields: dict[str, Any] = {}
    """Fields of the Responses object that only echo the request, such as metadata."""
    turn_id: str | None = None
    """Set where something was claimed in the turn's name before it starts; None: a fresh one."""
    conversation_id: str | None = None
    """The conversation that gets this turn's items; claimed for ``turn_id``."""
    conversation_after: str | msgspec.UnsetType | None = msgspec.UNSET
    """The conversation's item that they go after, None: at the root. Set once it is claimed."""
    previous_ids: list[str] = []
    """The responses this one follows on, first to last."""
    input_items: list[dict[str, Any]] = []
    """The turn's new input as Responses items, for storage."""

    def due_s(self, arrived_s: float) -> float:
        """When its answer is to begin, on the clock on which it arrived at ``arrived_s``."""
        deadline_s = self.sampling.deadline_s
        return arrived_s + (UNHURRIED_S if deadline_s is None else deadline_s)
