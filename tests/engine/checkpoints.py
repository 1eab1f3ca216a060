"""Random Hugging Face checkpoints, and what transformers says about them: the tests' oracle."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import Qwen3Config, Qwen3ForCausalLM


@dataclass(frozen=True)
class Shape:
    """One random Qwen3; the defaults are tiny."""

    vocab_size: int = 131
    hidden_size: int = 48
    intermediate_size: int = 80
    num_layers: int = 3
    num_heads: int = 4
    num_kv_heads: int = 2
    head_dim: int = 32
    tied: bool = True
    max_positions: int = 512
    rope: dict[str, Any] = field(default_factory=lambda: {"rope_type": "default"})
    eos: tuple[int, ...] = (7, 9)
    max_shard_size: str = "1GB"
    dtype: torch.dtype = torch.float32
    seed: int = 0


def new_model(shape: Shape) -> Any:
    """A model with weights large enough that its distributions are neither flat nor one-hot."""
    torch.manual_seed(shape.seed)
    config = Qwen3Config(
        vocab_size=shape.vocab_size,
        hidden_size=shape.hidden_size,
        intermediate_size=shape.intermediate_size,
        num_hidden_layers=shape.num_layers,
        num_attention_heads=shape.num_heads,
        num_key_value_heads=shape.num_kv_heads,
        head_dim=shape.head_dim,
        tie_word_embeddings=shape.tied,
        max_position_embeddings=shape.max_positions,
        rope_parameters={"rope_theta": 10000.0, **shape.rope},
        eos_token_id=list(shape.eos),
        pad_token_id=0,
        initializer_range=0.02,
    )
    model: Any = Qwen3ForCausalLM(config)
    model.eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "q_norm" in name or "k_norm" in name:
                parameter.uniform_(1, 3)  # sharp enough that what is attended to matters
            elif "norm" in name:
                parameter.uniform_(0.5, 1.5)
            elif "embed_tokens" in name or "lm_head" in name:
                parameter.normal_(0, 1.2 / shape.hidden_size**0.5)
            else:
                parameter.normal_(0, 1.0 / parameter.shape[1] ** 0.5)
    return model.to(shape.dtype)


def save(model: Any, directory: Path, max_shard_size: str = "1GB") -> Path:
    """Write a checkpoint with transformers' own writer."""
    model.save_pretrained(directory, max_shard_size=max_shard_size)
    return directory


def make(directory: Path, shape: Shape | None = None) -> tuple[Path, Any]:
    """A checkpoint of this shape in ``directory``, and the model that is in it."""
    shape = shape or Shape()
    model = new_model(shape)
    save(model, directory, shape.max_shard_size)
    model.generation_config.eos_token_id = None  # ``greedy`` never ends early
    return directory, model


def load_float32(directory: Path) -> Any:
    """The checkpoint's weights, whatever they are stored as, in a model that computes in float32.

    Not the same as ``model.float()``: a 16-bit model has rounded its rotary frequencies, too.
    """
    model: Any = Qwen3ForCausalLM.from_pretrained(directory, dtype=torch.float32)
    return model.eval()


def greedy(model: Any, prompt: list[int], num_tokens: int) -> list[int]:
    """What transformers generates without sampling and without ever ending."""
    with torch.inference_mode():
        out = model.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
            max_new_tokens=num_tokens,
            do_sample=False,
        )
    tokens: list[int] = out[0, len(prompt) :].tolist()
    return tokens


def all_logprobs(model: Any, ids: list[int]) -> torch.Tensor:
    """Row t: log-probabilities of the token after ``ids[: t + 1]``; float32 ``[len(ids), V]``."""
    with torch.inference_mode():
        logits: torch.Tensor = model(torch.tensor([ids])).logits[0]
    return logits.float().log_softmax(-1)
