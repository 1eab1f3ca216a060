"""What a person may set, and what it becomes for this data and this model: the defaults."""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

from engine.config import DEFAULT_MODEL
from engine.errors import ConfigError
from engine.train.tuning.dataset import Summary

__all__ = ["LINEAR_MODULES", "Method", "Plan", "TuneSettings", "make_plan"]

LINEAR_MODULES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
"""The weight matrices of a layer."""

_SMALL_PARAMETERS = 150_000_000
_MUCH_TOKENS = 1_000_000
_STEPS_WANTED = 120
_MAX_EPOCHS = 15
_BATCHES_PER_EPOCH = 20
_MIN_BATCH_TOKENS, _MAX_BATCH_TOKENS = 512, 16384


class Method(Enum):
    """Which weights change. ``auto`` takes LoRA, but for a small model and much data."""

    AUTO = "auto"
    FULL = "full"
    LORA = "lora"


@dataclass(frozen=True, slots=True, kw_only=True)
class TuneSettings:
    """What a run is asked for; None stands for a default that fits data and model.

    Raises ConfigError on a value that can never work.
    """

    data: Path
    """JSON Lines, plain or packed with gzip or xz."""
    out: Path
    """Directory to write; it must not exist, or `overwrite` must be set."""
    model: str = DEFAULT_MODEL
    """A checkpoint directory, a name on the Hugging Face hub, or the bundled model's name."""
    method: Method = Method.AUTO
    keep_adapter: bool = False
    """Write the adapter alone instead of merged weights; makes `auto` LoRA."""
    epochs: float | None = None
    """Passes over the data."""
    learning_rate: float | None = None
    """At its peak."""
    batch_tokens: int | None = None
    """Tokens of one optimiser step."""
    max_len: int | None = None
    """Tokens after which an example is cut off."""
    rank: int = 16
    """Of the adapter."""
    alpha: float | None = None
    """The adapter's weight is alpha / rank, with `rslora` alpha / sqrt(rank); None: twice the
    rank."""
    rslora: bool = False
    """Rank-stabilised scaling (arXiv:2312.03732)."""
    target_modules: tuple[str, ...] = LINEAR_MODULES
    """Matrices that get an adapter."""
    patience: int = 3
    """Evaluations without a better held-out loss after which the run ends."""
    skip_bad: bool = False
    """Leave out lines that cannot be used."""
    overwrite: bool = False
    seed: int = 0
    device: str = "auto"
    num_threads: int | None = None
    """Compute threads on a CPU; None: one for each core."""

    def __post_init__(self) -> None:
        for name in ("epochs", "learning_rate", "alpha"):
            value = getattr(self, name)
            if value is not None and not (math.isfinite(value) and value > 0):
                raise ConfigError(f"{name} is {value}; it must be above 0")
        for name, least in (
            ("batch_tokens", 1),
            ("max_len", 8),
            ("rank", 1),
            ("patience", 1),
            ("num_threads", 1),
        ):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ConfigError(f"{name} is {value}; it must be at least {least}")
        unknown = sorted(set(self.target_modules) - set(LINEAR_MODULES))
        if unknown or not self.target_modules:
            raise ConfigError(
                f"target modules are {', '.join(unknown) or 'none'}; "
                f"there are {', '.join(LINEAR_MODULES)}"
            )
        if self.keep_adapter and self.method is Method.FULL:
            raise ConfigError("full fine-tuning makes no adapter to keep; use the method lora")


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """A run in numbers."""

    method: Method
    """FULL or LORA."""
    epochs: float
    num_steps: int
    """Optimiser steps at most."""
    warmup_steps: int
    learning_rate: float
    """At its peak; it falls as a cosine to a tenth."""
    batch_tokens: int
    eval_every: int
    """Steps between measurements of the held-out loss."""

    def lr_factor(self, step: int) -> float:
        """Learning rate of a step, counted from 0, relative to the peak."""
        if step < self.warmup_steps:
            return (step + 1) / self.warmup_steps
        part = (step - self.warmup_steps) / max(1, self.num_steps - self.warmup_steps)
        return 0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * min(1.0, part)))


def make_plan(
    settings: TuneSettings, summary: Summary, *, num_parameters: int, hidden_size: int
) -> Plan:
    """Fills in what the settings leave open.

    Little data needs several passes to be taken in and many small steps; the held-out loss ends
    the run before it is learned by heart. The learning rate falls with the model's width, as
    maximal-update scaling has it (arXiv:2203.03466), and is ten times higher for an adapter than
    for the weights themselves.
    """
    method = settings.method
    if method is Method.AUTO:
        # On 200 examples an adapter had the lower held-out loss and forgot less.
        room = num_parameters <= _SMALL_PARAMETERS and summary.num_tokens > _MUCH_TOKENS
        method = Method.FULL if room and not settings.keep_adapter else Method.LORA
    wanted = summary.num_tokens // _BATCHES_PER_EPOCH
    batch_tokens = settings.batch_tokens or min(max(wanted, _MIN_BATCH_TOKENS), _MAX_BATCH_TOKENS)
    steps_per_epoch = max(1, math.ceil(summary.num_tokens / batch_tokens))
    epochs = settings.epochs
    if epochs is None:
        epochs = float(min(max(math.ceil(_STEPS_WANTED / steps_per_epoch), 2), _MAX_EPOCHS))
    num_steps = max(1, round(epochs * steps_per_epoch))
    width_factor = 256 / hidden_size
    peak = 5e-4 * width_factor * (10 if method is Method.LORA else 1)
    return Plan(
        method=method,
        epochs=epochs,
        num_steps=num_steps,
        warmup_steps=max(1, num_steps // 20),
        learning_rate=settings.learning_rate or peak,
        batch_tokens=batch_tokens,
        eval_every=max(1, min(steps_per_epoch, math.ceil(num_steps / 4))),
    )
