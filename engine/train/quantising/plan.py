"""What a person may ask of a quantisation, and which matrices there are to quantise."""

from __future__ import annotations

import math
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

from engine.config import DEFAULT_MODEL, Quantization
from engine.errors import ConfigError
from engine.model_config import ModelConfig

__all__ = ["HEAD", "QuantiseSettings", "Unit", "units_of"]

HEAD = "lm_head"
"""The module that makes logits; its errors are those of every token."""


@dataclass(frozen=True, slots=True, kw_only=True)
class QuantiseSettings:
    """What a run is asked for.

    Raises ConfigError on a value that can never work.
    """

    out: Path
    """Directory to write; it must not exist, or `overwrite` must be set."""
    model: str = DEFAULT_MODEL
    """A checkpoint directory, a name on the Hugging Face hub, or the bundled model's name."""
    scheme: Quantization
    keep: tuple[str, ...] = (HEAD,)
    """Modules left as they are: whole names, last parts of names, or patterns with `*`."""
    budget: float | None = None
    """Largest rise of the perplexity, 0.01 for a hundredth; the matrices that cost most are left as
    they are until it is kept. None: no limit."""
    data: Path | None = None
    """JSON Lines to measure the perplexity on; None: the fixed prompts of the evaluation."""
    max_tokens: int = 16384
    """Tokens of `data` that are used."""
    measure: bool = True
    """Whether to measure the perplexity; a budget needs it."""
    max_shard_bytes: int = 4 << 30
    overwrite: bool = False
    num_threads: int | None = None
    """Compute threads; None: one for each core."""

    def __post_init__(self) -> None:
        if self.scheme is Quantization.NONE:
            raise ConfigError("scheme is none; it must be fp8, int8 or int4")
        if self.budget is not None:
            if not (math.isfinite(self.budget) and 0 < self.budget < 1):
                raise ConfigError(f"budget is {self.budget}; it must be above 0 and below 1")
            if not self.measure:
                raise ConfigError("a budget needs the perplexity measured")
        for name in ("max_tokens", "max_shard_bytes", "num_threads"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"{name} is {value}; it must be at least 1")


@dataclass(frozen=True, slots=True)
class Unit:
    """Matrices that are multiplied by the same input, and so quantised together or not at all."""

    name: str
    """Of the module they belong to, and what they are there."""
    shapes: dict[str, tuple[int, int]]
    """Tensor names and shapes."""


def units_of(config: ModelConfig, keep: tuple[str, ...]) -> list[Unit]:
    """All units of a model but those of which a module is to be kept.

    Raises ConfigError for a name that fits no module.
    """
    unused = set(keep) - {HEAD}
    units = []
    for unit in _all_units(config):
        modules = [name.removesuffix(".weight") for name in unit.shapes]
        fitting = {one for one in keep if any(_fits(one, module) for module in modules)}
        unused -= fitting
        if not fitting:
            units.append(unit)
    if unused:
        raise ConfigError(f"no module of this model is called {', '.join(sorted(unused))}")
    return units


def _fits(pattern: str, module: str) -> bool:
    return pattern == module.rpartition(".")[2] or fnmatchcase(module, pattern)


def _all_units(config: ModelConfig) -> list[Unit]:
    width, inner = config.hidden_size, config.intermediate_size
    q, kv = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    kinds: list[tuple[str, str, dict[str, tuple[int, int]]]] = [
        ("self_attn", "qkv", {"q_proj": (q, width), "k_proj": (kv, width), "v_proj": (kv, width)}),
        ("self_attn", "out", {"o_proj": (width, q)}),
        ("mlp", "gate_up", {"gate_proj": (inner, width), "up_proj": (inner, width)}),
        ("mlp", "down", {"down_proj": (width, inner)}),
    ]
    units = []
    for index in range(config.num_layers):
        for part, kind, shapes in kinds:
            prefix = f"model.layers.{index}.{part}"
            named = {f"{prefix}.{name}.weight": shape for name, shape in shapes.items()}
            units.append(Unit(f"{prefix}.{kind}", named))
    if not config.tie_word_embeddings:
        units.append(Unit(HEAD, {f"{HEAD}.weight": (config.vocab_size, width)}))
    return units
