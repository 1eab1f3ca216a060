"""The recipe of a training run: a TOML file, read into frozen and checked dataclasses."""

from __future__ import annotations

import tomllib
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, TypeVar

from engine.train.model import ModelConfig

__all__ = ["Recipe", "RecipeError", "TokenizerRecipe", "TrainRecipe", "load_recipe"]

_Section = TypeVar("_Section")


class RecipeError(ValueError):
    """A recipe that cannot be used, with the reason."""


@dataclass(frozen=True, slots=True)
class TokenizerRecipe:
    """How the tokenizer is trained."""

    vocab_size: int
    """Number of token ids."""
    character_coverage: float
    """Share of characters that get a piece of their own; the others are spelt as bytes."""
    sample_chars: int
    """Characters of text to learn from."""
    chinese_factor: float
    """Weight of the Chinese sources in that text, relative to the mixture."""


@dataclass(frozen=True, slots=True)
class TrainRecipe:
    """How the model is trained."""

    sequence_len: int
    """Tokens of a packed sequence."""
    max_document_len: int
    """Tokens after which a dialogue is cut off; at most one more than `sequence_len`."""
    batch_sequences: int
    """Sequences of one optimiser step."""
    muon_lr: float
    """Peak learning rate of the weight matrices."""
    adam_lr: float
    """Peak learning rate of embeddings and norms."""
    weight_decay: float
    """Decoupled weight decay of the matrices, multiplied by the learning rate."""
    warmup_fraction: float
    """Part of the run in which the learning rate rises."""
    decay_fraction: float
    """Last part of the run, in which it falls linearly to zero."""
    max_grad_norm: float
    """Global gradient norm beyond which gradients are scaled down."""
    user_loss_weight: float
    """Loss weight of a person's turns; the assistant's turns have 1."""
    tool_loss_weight: float
    """Loss weight of what tools return."""
    max_tools: int
    """Each dialogue keeps a random number of tool schemas up to this one, and all that it calls."""
    empty_think_fraction: float
    """Part of the answers preceded by an empty thinking block, as when thinking is switched off."""
    max_requests: int = 1
    """Up to this many dialogues of a single request are joined, to share their tools' schemas."""
    micro_sequences: int = 0
    """Sequences that a device computes at once; 0 for all of its share."""
    early_exit_weight: float = 0.0
    """Weight of the loss of one earlier layer a step (LayerSkip, arXiv:2404.16710)."""
    layer_dropout: float = 0.0
    """Drop probability of the last layer; earlier layers have exponentially less."""


@dataclass(frozen=True, slots=True)
class Recipe:
    """All that decides a model besides the data."""

    seed: int
    tokenizer: TokenizerRecipe
    model: ModelConfig
    train: TrainRecipe
    mixture: dict[str, float]
    """Share of the tokens by source; sums to one."""


def load_recipe(path: Path) -> Recipe:
    """Reads a recipe. Raises `RecipeError` on unknown or missing keys and impossible values."""
    document = tomllib.loads(path.read_text(encoding="utf-8"))
    unknown = set(document) - {"seed", "tokenizer", "model", "train", "mixture"}
    if unknown:
        raise RecipeError(f"{path.name}: unknown keys {sorted(unknown)}")
    tokenizer = _section(TokenizerRecipe, document.get("tokenizer", {}), "tokenizer")
    model = document.get("model", {}) | {"vocab_size": tokenizer.vocab_size}
    mixture = {name: float(share) for name, share in document.get("mixture", {}).items()}
    if not mixture or min(mixture.values()) <= 0:
        raise RecipeError(f"{path.name}: [mixture] must give at least one source, all above zero")
    total = sum(mixture.values())
    return Recipe(
        seed=int(document.get("seed", 0)),
        tokenizer=tokenizer,
        model=_section(ModelConfig, model, "model"),
        train=_section(TrainRecipe, document.get("train", {}), "train"),
        mixture={name: share / total for name, share in mixture.items()},
    )


def _section(kind: type[_Section], values: dict[str, Any], name: str) -> _Section:
    known = {field.name for field in fields(kind)}  # type: ignore[arg-type]
    unknown = set(values) - known
    if unknown:
        raise RecipeError(f"[{name}]: unknown keys {sorted(unknown)}; known are {sorted(known)}")
    try:
        return kind(**values)
    except TypeError as error:
        raise RecipeError(f"[{name}]: {error}") from error
