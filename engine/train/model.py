"""Qwen3 for training: plain torch, whole sequences, no cache.

Reference: Qwen3 Technical Report (arXiv:2505.09388): pre-norm decoder with RMSNorm, grouped-query
attention with a norm on each query and key head, rotary positions and a SwiGLU feed-forward part.
Parameter names are those of the Hugging Face checkpoint.

Shapes: B sequences, T tokens, E hidden size, H query heads, K key/value heads, D head size.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["ModelConfig", "Qwen3", "document_mask"]


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """Sizes of the model, named as in `config.json`."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    max_position_embeddings: int
    rope_theta: float = 10000.0
    rms_norm_eps: float = 1e-6

    def __post_init__(self) -> None:
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_attention_heads={self.num_attention_heads} must be a multiple of "
                f"num_key_value_heads={self.num_key_value_heads}"
            )
        if self.head_dim % 2:
            raise ValueError(f"head_dim={self.head_dim} must be even for rotary positions")


class RMSNorm(nn.Module):
    """Root-mean-square norm over the last dimension, with a learned gain."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """Normalises `x` [..., size]."""
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)


def rotary_table(config: ModelConfig, seq_len: int) -> tuple[Tensor, Tensor]:
    """Cosines and sines [T, D], the two halves of D rotating with the same frequencies."""
    half = torch.arange(0, config.head_dim, 2, dtype=torch.float32) / config.head_dim
    angles = torch.arange(seq_len)[:, None] * config.rope_theta**-half
    angles = torch.cat((angles, angles), dim=-1)
    return angles.cos(), angles.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotates each pair (i, i + D/2) of `x` [B, H, T, D] by its position's angle."""
    low, high = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-high, low), dim=-1) * sin


def document_mask(document_ids: Tensor) -> Tensor:
    """Additive mask [B, 1, T, T] that keeps attention causal and inside one document.

    Args:
        document_ids: int [B, T], equal for the tokens of one document.
    """
    same = document_ids[:, :, None] == document_ids[:, None, :]
    allowed = same.tril()[:, None]
    return torch.zeros(allowed.shape).masked_fill_(~allowed, float("-inf"))


class Attention(nn.Module):
    """Grouped-query attention with normed queries and keys."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        self.num_groups = config.num_attention_heads // config.num_key_value_heads
        query_size = config.num_attention_heads * config.head_dim
        value_size = config.num_key_value_heads * config.head_dim
        self.q_proj = nn.Linear(config.hidden_size, query_size, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, value_size, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, value_size, bias=False)
        self.o_proj = nn.Linear(query_size, config.hidden_size, bias=False)
        self.q_norm = RMSNorm(config.head_dim, config.rms_norm_eps)
        self.k_norm = RMSNorm(config.head_dim, config.rms_norm_eps)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor | None) -> Tensor:
        """Mixes `x` [B, T, E] over positions; causal where no mask is given."""
        heads = (*x.shape[:2], -1, self.head_dim)
        q = self.q_norm(self.q_proj(x).view(heads)).transpose(1, 2)  # [B, H, T, D]
        k = self.k_norm(self.k_proj(x).view(heads)).transpose(1, 2)  # [B, K, T, D]
        v = self.v_proj(x).view(heads).transpose(1, 2)  # [B, K, T, D]
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        k, v = (y.repeat_interleave(self.num_groups, dim=1) for y in (k, v))
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None)
        output: Tensor = self.o_proj(mixed.transpose(1, 2).flatten(2))
        return output


class FeedForward(nn.Module):
    """SwiGLU (arXiv:2002.05202)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Maps `x` [B, T, E] position by position."""
        output: Tensor = self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))
        return output


class Layer(nn.Module):
    """Attention, then feed-forward, each on a normed input and added to the residual stream."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = FeedForward(config)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor | None) -> Tensor:
        """Adds both parts' outputs to `x` [B, T, E]."""
        mixed: Tensor = x + self.self_attn(self.input_layernorm(x), cos, sin, mask)
        output: Tensor = mixed + self.mlp(self.post_attention_layernorm(mixed))
        return output


class Backbone(nn.Module):
    """Embeddings, layers and final norm: the `model.` part of the checkpoint."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)


class Qwen3(nn.Module):
    """The language model, its output head tied to the embeddings.

    Args:
        config: sizes.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.model = Backbone(config)
        # Every matrix that writes into the residual stream starts small, so that the stream's
        # variance does not grow with depth (GPT-2 report, section 2.3).
        deep_std = 0.02 / (2 * config.num_hidden_layers) ** 0.5
        for name, parameter in self.named_parameters():
            if parameter.dim() == 2:
                deep = name.endswith(("o_proj.weight", "down_proj.weight"))
                nn.init.normal_(parameter, std=deep_std if deep else 0.02)

    def hidden_states(
        self, token_ids: Tensor, mask: Tensor | None = None, *, skip: frozenset[int] = frozenset()
    ) -> list[Tensor]:
        """The outputs [B, T, E] of all layers, first to last; `logits` takes any of them.

        Args:
            token_ids: int [B, T].
            mask: additive [B, 1, T, T], or None for causal attention over the whole row.
            skip: layers that pass their input through (layer dropout).
        """
        cos, sin = rotary_table(self.config, token_ids.shape[1])
        x = self.model.embed_tokens(token_ids)
        outputs = []
        for index, layer in enumerate(self.model.layers):
            if index not in skip:
                x = layer(x, cos, sin, mask)
            outputs.append(x)
        return outputs

    def logits(self, hidden: Tensor) -> Tensor:
        """Scores [..., vocabulary] of a layer's output [..., E]: final norm and tied head."""
        return F.linear(self.model.norm(hidden), self.model.embed_tokens.weight)

    def forward(self, token_ids: Tensor, mask: Tensor | None = None) -> Tensor:
        """Logits [B, T, vocabulary] of `token_ids` [B, T]."""
        return self.logits(self.hidden_states(token_ids, mask)[-1])
