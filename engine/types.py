"""The values that cross the engine's border: requests in, deltas and figures out.

Everything here is a frozen ``msgspec.Struct``: it is its own wire format on the link between the
server and the engine process, it validates on decoding, and it never holds a tensor.
"""

from __future__ import annotations

from enum import Enum
from typing import ClassVar

import msgspec

__all__ = [
    "Delta",
    "EngineStats",
    "FinishReason",
    "ModelInfo",
    "Recoveries",
    "Request",
    "SamplingDefaults",
    "SamplingParams",
    "StepCost",
    "TokenLogprobs",
    "Usage",
]


class FinishReason(Enum):
    """Why a request ended. Every request ends with exactly one of these."""

    STOP = "stop"
    """An end-of-sequence or stop token was sampled."""
    LENGTH = "length"
    """``max_tokens`` or the model's context was reached."""
    ABORT = "abort"
    """The caller asked for it."""
    ERROR = "error"
    """The engine could not go on with this request; ``Delta.error`` says why."""


class SamplingParams(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """How to choose tokens, validated and resolved: the engine checks nothing here twice."""

    max_tokens: int
    """Most tokens to generate, >= 1; already capped by the context length."""
    min_tokens: int = 0
    """End and stop tokens are masked until this many tokens were generated."""
    temperature: float = 1.0
    """0 is greedy."""
    top_k: int = 0
    """0 is off."""
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: dict[int, float] = {}
    """Token id to the amount added to its logit."""
    seed: int = 0
    """The draw at position p depends on (seed, p, logits) and nothing else. 0 <= seed < 2**63."""
    stop_token_ids: tuple[int, ...] = ()
    """Tokens that end the answer, in addition to the model's end-of-sequence tokens."""
    ignore_eos: bool = False
    logprobs: int | None = None
    """With n: the chosen token's log-probability and the n most likely; None: nothing."""
    prompt_logprobs: int | None = None
    """The same for each prompt token but the first."""

    @property
    def penalises(self) -> bool:
        """Whether logits change with the tokens that were seen before."""
        return (
            self.repetition_penalty != 1.0
            or self.presence_penalty != 0.0
            or self.frequency_penalty != 0.0
        )

    @property
    def modifies_logits(self) -> bool:
        """Whether logits change at all before a draw."""
        return bool(self.logit_bias or self.min_tokens) or self.penalises


class Request(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One sequence to continue."""

    request_id: str
    prompt_ids: list[int]
    """At least one token id of the model's vocabulary."""
    sampling: SamplingParams
    output_ids: list[int] = []
    """Tokens of the answer that are known already, from an engine that died for instance: this one
    goes on after them as if it had generated them itself. They count as completion tokens and
    towards ``max_tokens`` and penalties; deltas bring neither them nor their log-probabilities, and
    no ``prompt_logprobs``, which came with the first of them."""
    priority: int = 0
    """Lower goes first."""
    due_s: float = 0.0
    """When the answer is to begin, in seconds of any one clock. Within a tenant and a priority the
    lesser goes first, and equals go in order of arrival. Where every request has one that grows
    with time, those in no hurry too, none of them waits for ever."""
    cache_salt: str = ""
    """Prefixes are shared only under the same salt: no tenant can time another's prompts."""
    tenant: str = ""
    """Who is charged: among equal priorities, tenants share the engine by ``weight``."""
    weight: float = 1.0
    """Share of the tenant, > 0 and finite; 2 is due twice the tokens of 1."""


class TokenLogprobs(msgspec.Struct, frozen=True, array_like=True):
    """Log-probabilities at one position, of the model's unmodified distribution."""

    logprob: float
    """Of the token that is there."""
    rank: int
    """1 is the most likely token."""
    top_ids: list[int]
    top_logprobs: list[float]


class Usage(msgspec.Struct, frozen=True, array_like=True):
    """What a request cost, in tokens."""

    prompt_tokens: int
    cached_tokens: int
    """Prompt tokens whose state came from the prefix cache."""
    completion_tokens: int
    preemptions: int


class Delta(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, array_like=True):
    """What one step added to one request; the last one carries finish_reason and usage."""

    request_id: str
    token_ids: list[int]
    logprobs: list[TokenLogprobs] | None = None
    prompt_logprobs: list[TokenLogprobs] | None = None
    """Once, with the first delta: one entry for each prompt token but the first."""
    finish_reason: FinishReason | None = None
    usage: Usage | None = None
    error: str | None = None


class SamplingDefaults(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """How the checkpoint's makers advise to sample; None: they say nothing."""

    temperature: float | None = None
    """0 is greedy."""
    top_k: int | None = None
    """0 is off."""
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None


class StepCost(msgspec.Struct, frozen=True, array_like=True):
    """What a step of a kind was measured to take on this device."""

    num_rows: int
    """Requests in it."""
    num_tokens: int
    """New tokens of all of them."""
    duration_s: float


class ModelInfo(msgspec.Struct, frozen=True, kw_only=True):
    """What the server must know of the loaded model."""

    name: str
    max_model_len: int
    """Most tokens of prompt and answer together."""
    vocab_size: int
    eos_token_ids: tuple[int, ...]
    num_parameters: int
    dtype: str
    device: str
    block_size: int
    num_blocks: int
    defaults: SamplingDefaults = SamplingDefaults()
    """From ``generation_config.json``; for requests that do not say."""
    quantization: str | None = None
    """How the weights are quantised, by the checkpoint or at loading; None: they are not."""
    step_costs: tuple[StepCost, ...] = ()
    """Measured at the start, with short contexts; on a CPU nothing is."""
    kv_cache_dtype: str | None = None
    """What keys and values are stored as where that is not ``dtype``: ``fp8``."""


class EngineStats(msgspec.Struct, frozen=True, kw_only=True):
    """State of the engine after a step; counters only grow while the engine process lives."""

    COUNTERS: ClassVar = (
        "steps",
        "dropped_steps",
        "prompt_tokens",
        "cached_tokens",
        "queried_tokens",
        "generation_tokens",
        "preemptions",
        "aborts",
        "abort_steps",
        "late_aborts",
        "busy_s",
    )

    waiting: int = 0
    running: int = 0
    num_blocks: int = 0
    """Blocks a request may hold (the scratch block not counted)."""
    free_blocks: int = 0
    """Blocks no request holds: empty ones and those the prefix cache could give back."""
    cached_blocks: int = 0
    """Of the free ones, those that hold a reusable prefix."""
    steps: int = 0
    dropped_steps: int = 0
    """Steps that were begun and left for a newcomer's first token."""
    prompt_tokens: int = 0
    """Prompt tokens computed (not those taken from the cache)."""
    cached_tokens: int = 0
    """Prompt tokens taken from the prefix cache."""
    queried_tokens: int = 0
    """Prompt tokens looked up in the prefix cache."""
    generation_tokens: int = 0
    preemptions: int = 0
    aborts: int = 0
    """Requests that were in flight when their end was asked for."""
    abort_steps: int = 0
    """Steps that ended between the server's asking and these requests' blocks being free."""
    late_aborts: int = 0
    """Of the aborts, those that took more than two steps."""
    step_s: float = 0.0
    """Duration of the last step, seconds."""
    busy_s: float = 0.0
    """Seconds spent in steps."""

    def on_top_of(self, past: EngineStats) -> EngineStats:
        """Return these figures with the counters of engines before this one added."""
        totals = {name: getattr(past, name) + getattr(self, name) for name in self.COUNTERS}
        return msgspec.structs.replace(self, **totals)


class Recoveries(msgspec.Struct, frozen=True, kw_only=True):
    """What became of engine processes that died while they served; all of it only grows."""

    restarts: int = 0
    """Engine processes started after the first, those included whose start failed."""
    hangs: int = 0
    """Processes that were killed because they made no progress."""
    replayed: int = 0
    """Requests in flight at a death that were handed to the next process; once for each death."""
    given_up: int = 0
    """Requests that ended with EngineDied."""
    recovered: int = 0
    """Deaths after which a process computed again."""
    recovery_s: float = 0.0
    """Seconds these took together, from the last sign of life to the next token; where no request
    was in flight, to a process that serves."""

    def plus(self, **added: float) -> Recoveries:
        """Return these figures with some increased."""
        return msgspec.structs.replace(
            self, **{name: getattr(self, name) + value for name, value in added.items()}
        )
