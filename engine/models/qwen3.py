"""Qwen3, the dense models (Qwen3 Technical Report, arXiv:2505.09388).

A pre-norm decoder: RMSNorm, grouped-query attention with a norm on every query and key head and
rotary positions, SwiGLU, no biases. Tensor names are those of the Hugging Face checkpoints.

Letters: T tokens of the step, W rows whose logits are wanted, E hidden width, Hq and Hkv query and
key-value heads, D head width, I feed-forward width, V vocabulary.
"""

from __future__ import annotations

import torch

from engine.batch import Batch
from engine.loader import WeightSource
from engine.model_config import ModelConfig
from engine.models.layers import (
    KVCache,
    Linear,
    StepBuffers,
    Workspace,
    load_linear,
    rope_table,
)
from kernels import E4M3, Fp8Ops, Ops

__all__ = ["Qwen3"]


class Attention:
    """Grouped-query attention (Ainslie et al. 2023) with normed, rotated queries and keys."""

    def __init__(
        self, config: ModelConfig, ops: Ops, source: WeightSource, prefix: str, rope: torch.Tensor
    ) -> None:
        dim, width = config.head_dim, config.hidden_size
        q_width, kv_width = config.num_heads * dim, config.num_kv_heads * dim
        self.ops = ops
        self.fp8_ops = ops if isinstance(ops, Fp8Ops) else None
        self.eps = config.rms_norm_eps
        self.scale = dim**-0.5
        self.rope = rope  # [max_model_len, D]
        names = [f"{prefix}.{part}_proj.weight" for part in "qkv"]
        self.qkv = load_linear(ops, source, names, [q_width, kv_width, kv_width], width)
        self.out = load_linear(ops, source, [f"{prefix}.o_proj.weight"], [width], q_width)
        self.q_norm = source.take(f"{prefix}.q_norm.weight", [dim])
        self.k_norm = source.take(f"{prefix}.k_norm.weight", [dim])
        # Of a cache in e4m3: as compressed-tensors names them, and as ModelOpt does.
        self.k_scale, self.v_scale = (
            source.take_scales(
                [f"{prefix}.{part}_scale", f"{prefix}.{part}_proj.{part}_scale"],
                config.num_kv_heads,
            )
            for part in "kv"
        )

    def __call__(
        self,
        buffers: StepBuffers,
        batch: Batch,
        keys: torch.Tensor,
        values: torch.Tensor,
        plan: object | None,
    ) -> torch.Tensor:
        """Attend from ``buffers.hidden [T, E]``; gives ``[T, Hq, D]``, not yet projected."""
        q, heads = buffers.q, buffers.heads  # [T, Hq, D] each
        new = (  # and where they go
            self.qkv(buffers.qkv, buffers.hidden),  # [T, (Hq + 2*Hkv)*D]
            self.q_norm,
            self.k_norm,
            self.rope,
            batch.positions,
            batch.slots,
        )
        seen = (batch.block_tables, batch.query_starts, batch.context_lens)
        if keys.dtype is E4M3:
            assert self.fp8_ops is not None, "no other ops get such a cache"
            cache = (keys, values, self.k_scale, self.v_scale)
            self.fp8_ops.qk_norm_rope_write_fp8(q, *new, *cache, self.eps)
            self.fp8_ops.paged_attention_fp8(heads, q, *cache, *seen, self.scale, plan)
        else:
            self.ops.qk_norm_rope_write(q, *new, keys, values, self.eps)
            self.ops.paged_attention(heads, q, keys, values, *seen, self.scale, plan)
        return heads


class FeedForward:
    """SwiGLU (Shazeer 2020): ``down(silu(gate(x)) * up(x))``."""

    def __init__(self, config: ModelConfig, ops: Ops, source: WeightSource, prefix: str) -> None:
        inner, width = config.intermediate_size, config.hidden_size
        self.ops = ops
        names = [f"{prefix}.{part}_proj.weight" for part in ("gate", "up")]
        self.gate_up = load_linear(ops, source, names, [inner, inner], width)
        self.down = load_linear(ops, source, [f"{prefix}.down_proj.weight"], [width], inner)

    def __call__(self, hidden: torch.Tensor, buffers: StepBuffers) -> None:
        """Replace ``hidden [rows, E]``."""
        rows = len(hidden)
        gate_up = self.gate_up(buffers.gate_up[:rows], hidden)  # [rows, 2*I]
        gated = buffers.gated[:rows]  # [rows, I]
        self.ops.swiglu(gated, gate_up)
        self.down(hidden, gated)


class Layer:
    """One decoder layer: what its two parts see is the norm of the residual stream."""

    def __init__(
        self, config: ModelConfig, ops: Ops, source: WeightSource, prefix: str, rope: torch.Tensor
    ) -> None:
        width = [config.hidden_size]
        self.attention_norm = source.take(f"{prefix}.input_layernorm.weight", width)
        self.attention = Attention(config, ops, source, f"{prefix}.self_attn", rope)
        self.feed_forward_norm = source.take(f"{prefix}.post_attention_layernorm.weight", width)
        self.feed_forward = FeedForward(config, ops, source, f"{prefix}.mlp")


class Qwen3:
    """A Qwen3 model with its weights loaded.

    Args:
        config: of the checkpoint.
        ops: kernels of the device the source puts its tensors on.
        source: the checkpoint's weights; every one of them is taken.
        max_model_len: positions to make rotary tables for.

    Raises CheckpointError when weights are missing, left over or of another shape.
    """

    def __init__(
        self, config: ModelConfig, ops: Ops, source: WeightSource, *, max_model_len: int
    ) -> None:
        self.ops = ops
        self.eps = config.rms_norm_eps
        vocab = [config.vocab_size, config.hidden_size]
        self.embedding = source.take("model.embed_tokens.weight", vocab)
        rope = rope_table(config.rope, config.head_dim, max_model_len).to(self.embedding.device)
        self.layers = [
            Layer(config, ops, source, f"model.layers.{index}", rope)
            for index in range(config.num_layers)
        ]
        self.norm = source.take("model.norm.weight", [config.hidden_size])
        if config.tie_word_embeddings:
            self.head = Linear(ops, self.embedding)
            source.skip("lm_head.weight")  # some writers store it twice
        else:
            self.head = load_linear(ops, source, ["lm_head.weight"], vocab[:1], vocab[1])
        for index in range(config.num_layers):  # a constant that old writers stored
            source.skip(f"model.layers.{index}.self_attn.rotary_emb.inv_freq")
        source.finish()
        self.num_parameters = _count_parameters(config)

    def hidden(self, batch: Batch, cache: KVCache, work: Workspace) -> torch.Tensor:
        """Final hidden states ``[W, E]`` of ``batch.output_rows``; writes keys and values."""
        ops, buffers = self.ops, work.step(len(batch.ids))
        residual, hidden = buffers.residual, buffers.hidden  # [T, E] each
        ops.embed(residual, batch.ids, self.embedding)
        ops.rms_norm(hidden, residual, self.layers[0].attention_norm, self.eps)
        plan = ops.plan_attention(
            buffers.q,
            cache.layers[0][0],
            batch.block_tables,
            batch.query_starts,
            batch.context_lens,
            batch.most_new,
        )
        for layer, (keys, values) in zip(self.layers, cache.layers, strict=True):
            if layer is not self.layers[0]:
                ops.add_rms_norm(hidden, residual, hidden, layer.attention_norm, self.eps)
            heads = layer.attention(buffers, batch, keys, values, plan)  # [T, Hq, D]
            layer.attention.out(hidden, heads.flatten(1))
            work.beat()
            if layer is self.layers[-1]:
                # From here on a row looks at no other, so only the wanted rows go on.
                residual, hidden = self._narrow(batch, residual, hidden, work)  # [W, E] each
            ops.add_rms_norm(hidden, residual, hidden, layer.feed_forward_norm, self.eps)
            layer.feed_forward(hidden, buffers)
            work.beat()
        ops.add_rms_norm(hidden, residual, hidden, self.norm, self.eps)
        return hidden

    def logits(self, hidden: torch.Tensor, out: torch.Tensor) -> None:
        """``out [W, V]`` float32 from final hidden states ``[W, E]``."""
        self.head(out, hidden)

    def _narrow(
        self, batch: Batch, residual: torch.Tensor, hidden: torch.Tensor, work: Workspace
    ) -> tuple[torch.Tensor, torch.Tensor]:
        wanted_residual, wanted_hidden = work.outputs(len(batch.output_rows))
        self.ops.gather_rows(wanted_residual, residual, batch.output_rows)
        self.ops.gather_rows(wanted_hidden, hidden, batch.output_rows)
        return wanted_residual, wanted_hidden


def _count_parameters(config: ModelConfig) -> int:
    heads = config.num_heads + config.num_kv_heads
    attention = 2 * config.hidden_size * heads * config.head_dim + 2 * config.head_dim
    feed_forward = 3 * config.hidden_size * config.intermediate_size
    layer = attention + feed_forward + 2 * config.hidden_size
    tables = 1 if config.tie_word_embeddings else 2
    vocab = tables * config.vocab_size * config.hidden_size
    return config.num_layers * layer + vocab + config.hidden_size
