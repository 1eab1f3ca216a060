"""Qwen3 for training: plain torch, packed documents, no cache.

Reference: Qwen3 Technical Report (arXiv:2505.09388): pre-norm decoder with RMSNorm, grouped-query
attention with a norm on each query and key head, rotary positions and a SwiGLU feed-forward part.
Parameter names are those of the Hugging Face checkpoint.

Parameters and the residual stream are float32; products run in a compute type. What lies between
two attentions is two pure functions of tensors, so that `compile_blocks` compiles each once for all
layers.

Shapes: N tokens, E hidden size, H query heads, K key/value heads, D head size.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engine.model_config import Rope, Yarn
from engine.models.layers import rope_table
from engine.train.attention import Segments, attend

__all__ = ["ModelConfig", "Qwen3", "compute_dtype_of"]


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
    tie_word_embeddings: bool = True
    yarn: Yarn | None = None

    def __post_init__(self) -> None:
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_attention_heads={self.num_attention_heads} must be a multiple of "
                f"num_key_value_heads={self.num_key_value_heads}"
            )
        if self.head_dim % 2:
            raise ValueError(f"head_dim={self.head_dim} must be even for rotary positions")


def compute_dtype_of(device: torch.device) -> torch.dtype:
    """bfloat16 where the device multiplies it natively, otherwise float32."""
    if device.type == "cpu":
        native = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    else:
        native = torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.bfloat16 if native else torch.float32


class RMSNorm(nn.Module):
    """The learned gain of a root-mean-square norm over the last dimension."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))


class Attention(nn.Module):
    """The parameters of grouped-query attention with normed queries and keys."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        query_size = config.num_attention_heads * config.head_dim
        value_size = config.num_key_value_heads * config.head_dim
        self.q_proj = nn.Linear(config.hidden_size, query_size, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, value_size, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, value_size, bias=False)
        self.o_proj = nn.Linear(query_size, config.hidden_size, bias=False)
        self.q_norm = RMSNorm(config.head_dim)
        self.k_norm = RMSNorm(config.head_dim)


class FeedForward(nn.Module):
    """The parameters of SwiGLU (arXiv:2002.05202)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)


def _normed(x: Tensor, gain: Tensor, eps: float) -> Tensor:
    return F.rms_norm(x, gain.shape, gain, eps)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotates each pair (i, i + D/2) of `x` [N, H, D] by its position's angle [N, 1, D/2]."""
    low, high = x.chunk(2, dim=-1)
    return torch.cat((low * cos - high * sin, high * cos + low * sin), dim=-1)


def _before_attention(
    x: Tensor,
    gain: Tensor,
    matrices: tuple[Tensor, Tensor, Tensor],
    head_gains: tuple[Tensor, Tensor],
    rotary: tuple[Tensor, Tensor],
    eps: float,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    """Normed and rotated queries [N, H, D] and keys [N, K, D], values [N, K, D], of x [N, E]."""
    cos, sin = rotary
    joined = F.linear(_normed(x, gain, eps).to(dtype), torch.cat(matrices).to(dtype))
    head_dim = head_gains[0].shape[0]
    num_heads = [len(matrix) // head_dim for matrix in matrices]
    q, k, v = torch.split(joined.view(len(x), -1, head_dim), num_heads, dim=1)
    q, k = (
        _rotate(_normed(y.float(), own, eps), cos, sin).to(dtype)
        for y, own in zip((q, k), head_gains, strict=True)
    )
    return q, k, v.contiguous()


def _after_attention(
    x: Tensor,
    mixed: Tensor,
    output: Tensor,
    gain: Tensor,
    matrices: tuple[Tensor, Tensor, Tensor],
    eps: float,
    dtype: torch.dtype,
) -> Tensor:
    """The layer's output [N, E] from its input and the mixed values [N, H, D]."""
    x = x + F.linear(mixed.flatten(1), output.to(dtype)).float()
    gate, up, down = matrices
    normed = _normed(x, gain, eps).to(dtype)
    gated, upper = F.linear(normed, torch.cat((gate, up)).to(dtype)).chunk(2, dim=-1)
    return x + F.linear(F.silu(gated) * upper, down.to(dtype)).float()


def _surprise(
    hidden: Tensor, gain: Tensor, head: Tensor, targets: Tensor, eps: float, dtype: torch.dtype
) -> Tensor:
    """Cross-entropy in nats [M] of `targets` [M] after `hidden` [M, E]; head [vocabulary, E]."""
    logits = F.linear(_normed(hidden, gain, eps).to(dtype), head.to(dtype)).float()
    return F.cross_entropy(logits, targets, reduction="none")


@dataclass(slots=True)
class _Blocks:
    """The code between attentions, plain or compiled, with the constants that it needs."""

    eps: float
    dtype: torch.dtype
    before: Callable[..., tuple[Tensor, Tensor, Tensor]] = _before_attention
    after: Callable[..., Tensor] = _after_attention
    surprise: Callable[..., Tensor] = _surprise


class Layer(nn.Module):
    """Attention, then feed-forward, each on a normed input and added to the residual stream."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = RMSNorm(config.hidden_size)
        self.mlp = FeedForward(config)

    def forward(
        self, x: Tensor, rotary: tuple[Tensor, Tensor], segments: Segments, blocks: _Blocks
    ) -> Tensor:
        """The layer's output of `x`, both [N, E]."""
        own, mlp = self.self_attn, self.mlp
        q, k, v = blocks.before(
            x,
            self.input_layernorm.weight,
            (own.q_proj.weight, own.k_proj.weight, own.v_proj.weight),
            (own.q_norm.weight, own.k_norm.weight),
            rotary,
            blocks.eps,
            blocks.dtype,
        )
        return blocks.after(
            x,
            attend(q, k, v, segments),
            own.o_proj.weight,
            self.post_attention_layernorm.weight,
            (mlp.gate_proj.weight, mlp.up_proj.weight, mlp.down_proj.weight),
            blocks.eps,
            blocks.dtype,
        )


class Backbone(nn.Module):
    """Embeddings, layers and final norm: the `model.` part of the checkpoint."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size)


class Qwen3(nn.Module):
    """The language model; its output head is the embeddings where they are tied, else its own.

    Args:
        config: sizes.
        compute_dtype: type of the products.
    """

    def __init__(self, config: ModelConfig, compute_dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.config = config
        self.compute_dtype = compute_dtype
        self.model = Backbone(config)
        self._blocks = _Blocks(config.rms_norm_eps, compute_dtype)
        self.lm_head: nn.Linear | None = None
        if not config.tie_word_embeddings:
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        # Every matrix that writes into the residual stream starts small, so that the stream's
        # variance does not grow with depth (GPT-2 report, section 2.3).
        deep_std = 0.02 / (2 * config.num_hidden_layers) ** 0.5
        for name, parameter in self.named_parameters():
            if parameter.dim() == 2:
                deep = name.endswith(("o_proj.weight", "down_proj.weight"))
                nn.init.normal_(parameter, std=deep_std if deep else 0.02)

    @property
    def device(self) -> torch.device:
        """Where the parameters are."""
        return self.model.embed_tokens.weight.device

    @property
    def head(self) -> Tensor:
        """The output head's matrix [vocabulary, E]."""
        return (self.lm_head or self.model.embed_tokens).weight

    def compile_blocks(self) -> None:
        """Compiles what lies between attentions: a fifth faster on a CPU, far more on a GPU."""
        self._blocks.before = torch.compile(_before_attention, dynamic=False)
        self._blocks.after = torch.compile(_after_attention, dynamic=False)
        # The number of weighted positions differs from step to step.
        self._blocks.surprise = torch.compile(_surprise, dynamic=True)

    def hidden_states(
        self, token_ids: Tensor, segments: Segments, *, skip: frozenset[int] = frozenset()
    ) -> list[Tensor]:
        """The outputs [N, E] of all layers, first to last; `logits` takes any of them.

        Args:
            token_ids: int [N].
            segments: the documents, which do not see each other.
            skip: layers that pass their input through (layer dropout).
        """
        rotary = self._rotary(segments.positions)
        x = self.model.embed_tokens(token_ids)
        outputs = []
        for index, layer in enumerate(self.model.layers):
            if index not in skip:
                x = layer(x, rotary, segments, self._blocks)
            outputs.append(x)
        return outputs

    def _rotary(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines and sines [N, 1, D/2]."""
        config = self.config
        if config.yarn is not None:
            rope = Rope(theta=config.rope_theta, yarn=config.yarn)
            table = rope_table(rope, config.head_dim, int(positions.max()) + 1)
            cos, sin = table.to(positions.device)[positions, None].chunk(2, dim=-1)
            return cos, sin
        steps = torch.arange(0, config.head_dim, 2, device=positions.device) / config.head_dim
        angles = positions[:, None, None] * config.rope_theta**-steps
        return angles.cos(), angles.sin()

    def logits(self, hidden: Tensor) -> Tensor:
        """Scores [..., vocabulary] of a layer's output [..., E]: final norm and head."""
        normed = _normed(hidden, self.model.norm.weight, self.config.rms_norm_eps)
        head = self.head.to(self.compute_dtype)
        return F.linear(normed.to(self.compute_dtype), head).float()

    def surprise(self, hidden: Tensor, targets: Tensor) -> Tensor:
        """Cross-entropy in nats [M] of `targets` [M] where a layer's output is `hidden` [M, E]."""
        blocks = self._blocks
        return blocks.surprise(
            hidden,
            self.model.norm.weight,
            self.head,
            targets,
            blocks.eps,
            blocks.dtype,
        )

    def forward(self, token_ids: Tensor) -> Tensor:
        """Logits [T, vocabulary] of one document `token_ids` [T]."""
        segments = Segments.single(len(token_ids), token_ids.device)
        return self.logits(self.hidden_states(token_ids, segments)[-1])
