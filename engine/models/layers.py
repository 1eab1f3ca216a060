"""What model families share: linear layers, rotary tables, the KV cache and work buffers.

Letters: T tokens of the step, W rows whose logits are wanted, E hidden width, Hq and Hkv query and
key-value heads, D head width, I feed-forward width, V vocabulary, N cache blocks of B tokens.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

import torch

from engine.batch import Batch
from engine.loader import WeightSource
from engine.model_config import ModelConfig, Rope, Yarn
from kernels import Ops, QuantisedWeight

__all__ = [
    "KVCache",
    "Linear",
    "Model",
    "StepBuffers",
    "Workspace",
    "kv_block_bytes",
    "load_linear",
    "rope_table",
]


class Model(Protocol):
    """A loaded model."""

    num_parameters: int

    def hidden(self, batch: Batch, cache: KVCache, work: Workspace) -> torch.Tensor:
        """Final hidden states ``[W, E]`` of ``batch.output_rows``; writes the cache."""
        ...

    def logits(self, hidden: torch.Tensor, out: torch.Tensor) -> None:
        """``out [W, V]`` float32 from final hidden states ``[W, E]``."""
        ...


class Linear:
    """``out = x @ weight.T`` with a weight in the backend's own layout."""

    def __init__(self, ops: Ops, weight: torch.Tensor | QuantisedWeight) -> None:
        self._ops = ops
        if isinstance(weight, QuantisedWeight):
            self._packed = ops.pack_quantised(weight)
        else:
            self._packed = ops.pack_linear(weight)

    def __call__(self, out: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """Write ``x [T, in] @ weight.T`` to ``out [T, out]`` and return it."""
        self._ops.linear(out, x, self._packed)
        return out


def load_linear(
    ops: Ops, source: WeightSource, names: Sequence[str], outs: Sequence[int], in_features: int
) -> Linear:
    """One linear layer from weights that are multiplied by the same input, stacked in order."""
    return Linear(ops, source.take_linear(names, outs, in_features))


def rope_table(rope: Rope, head_dim: int, length: int) -> torch.Tensor:
    """Cosines and sines of positions ``0 .. length-1``: float32 ``[length, D]``, cosines first."""
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim
    frequencies = rope.theta**-exponents  # [D/2], radians a token
    scale = 1.0
    if rope.yarn is not None:
        frequencies = _yarn_frequencies(frequencies, rope.theta, rope.yarn)
        scale = rope.yarn.attention_factor
    table = torch.empty(length, head_dim)
    # In slices: float64 angles of a long context would be several times the table.
    for start in range(0, length, 4096):
        positions = torch.arange(start, min(start + 4096, length), dtype=torch.float64)
        angles = positions[:, None] * frequencies  # [slice, D/2]
        rows = torch.cat((angles.cos(), angles.sin()), dim=1) * scale
        table[start : start + len(rows)] = rows.to(torch.float32)
    return table


def _yarn_frequencies(frequencies: torch.Tensor, theta: float, yarn: Yarn) -> torch.Tensor:
    """NTK-by-parts (YaRN, section 3.2): keep fast dimensions, slow the slow ones by the factor."""
    head_dim = 2 * len(frequencies)

    def dimension_turning(turns: float) -> float:
        """The pair (as a real number) that turns so often over the original context."""
        wavelengths = yarn.original_max_position_embeddings / (turns * 2 * math.pi)
        return head_dim * math.log(wavelengths) / (2 * math.log(theta))

    low, high = dimension_turning(yarn.beta_fast), dimension_turning(yarn.beta_slow)
    if yarn.truncate:
        low, high = math.floor(low), math.ceil(high)
    # The upper clamp is the width, not the number of pairs, as in the authors' code.
    low, high = max(low, 0), min(high, head_dim - 1)
    if low == high:
        high += 0.001
    pairs = torch.arange(len(frequencies), dtype=torch.float64)
    slowed = ((pairs - low) / (high - low)).clamp(0, 1)  # 0: as it was, 1: divided by the factor
    return frequencies * (1 - slowed) + frequencies / yarn.factor * slowed


def kv_block_bytes(config: ModelConfig, block_size: int, dtype: torch.dtype) -> int:
    """Bytes of one block: keys and values of ``block_size`` tokens in all layers."""
    per_token = 2 * config.num_layers * config.num_kv_heads * config.head_dim * dtype.itemsize
    return per_token * block_size


class KVCache:
    """Keys and values of all layers, ``[N, Hkv, B, D]`` each, in one piece of memory.

    In float8_e4m3fn they are stored divided by scales, which are the model's.

    Args:
        memory: bytes on the model's device, zero so that no stale NaN is ever multiplied, at least
            ``num_blocks * kv_block_bytes``.
    """

    def __init__(
        self,
        config: ModelConfig,
        memory: torch.Tensor,
        num_blocks: int,
        block_size: int,
        dtype: torch.dtype,
    ) -> None:
        needed = num_blocks * kv_block_bytes(config, block_size, dtype)
        shape = (config.num_layers, 2, num_blocks, config.num_kv_heads, block_size, config.head_dim)
        layers = memory[:needed].view(dtype).view(shape)
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.layers = [(keys, values) for keys, values in layers]
        """For each layer, keys and values."""


class StepBuffers(NamedTuple):
    """Buffers of a step with T tokens, all contiguous."""

    residual: torch.Tensor  # [T, E]
    hidden: torch.Tensor  # [T, E]
    qkv: torch.Tensor  # [T, (Hq + 2*Hkv)*D]
    q: torch.Tensor  # [T, Hq, D]
    heads: torch.Tensor  # [T, Hq, D]
    gate_up: torch.Tensor  # [T, 2*I]
    gated: torch.Tensor  # [T, I]


class Workspace:
    """Memory for the activations of any step, allocated once and used by every step.

    Fixed addresses are what CUDA graphs need; on a CPU, pages that no step was large enough to
    touch cost nothing. A model calls ``beat`` after each half of a layer, which shows that it comes
    further.
    """

    def __init__(
        self,
        config: ModelConfig,
        max_num_tokens: int,
        max_num_logits: int,
        dtype: torch.dtype,
        device: torch.device,
        *,
        beat: Callable[[], None] = lambda: None,
    ) -> None:
        self.beat = beat

        def new(*shape: int, dtype: torch.dtype = dtype) -> torch.Tensor:
            return torch.empty(shape, dtype=dtype, device=device)

        tokens, width, heads = max_num_tokens, config.hidden_size, config.num_heads
        self._buffers = StepBuffers(
            residual=new(tokens, width),
            hidden=new(tokens, width),
            qkv=new(tokens, (heads + 2 * config.num_kv_heads) * config.head_dim),
            q=new(tokens, heads, config.head_dim),
            # Of padding's rows nobody writes this: it must not be a NaN that somebody multiplies.
            heads=torch.zeros(tokens, heads, config.head_dim, dtype=dtype, device=device),
            gate_up=new(tokens, 2 * config.intermediate_size),
            gated=new(tokens, config.intermediate_size),
        )
        self._output_residual = new(tokens, width)
        self._output_hidden = new(tokens, width)
        self.logits = new(max_num_logits, config.vocab_size, dtype=torch.float32)

    def step(self, num_tokens: int) -> StepBuffers:
        """The buffers, cut to the tokens of a step."""
        return StepBuffers(*(buffer[:num_tokens] for buffer in self._buffers))

    def outputs(self, num_rows: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Residual and hidden buffers ``[W, E]`` for the rows whose logits are wanted."""
        return self._output_residual[:num_rows], self._output_hidden[:num_rows]
