"""How much of the device a training step uses: operations that the model needs, over the peak."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import torch

from engine.train.data import Batch
from engine.train.model import ModelConfig

__all__ = ["measured_peak", "step_flops"]

_PRODUCT_SIZE = {"cpu": 2048, "cuda": 8192}
_MEASURE_S = 0.5


def step_flops(config: ModelConfig, batch: Batch, *, num_exits: int = 1) -> float:
    """Operations of one forward and backward pass, recomputation and optimiser not counted.

    Three times those of the forward pass (Kaplan et al. 2020, arXiv:2001.08361, appendix B);
    attention counts the visible pairs of its documents alone, the head the weighted positions.

    Args:
        config: sizes of the model.
        batch: all rows of the step.
        num_exits: vocabulary products of a weighted position.
    """
    ids = batch.document_ids
    heads = config.num_attention_heads + config.num_key_value_heads
    matrices = config.hidden_size * (
        2 * heads * config.head_dim + 3 * config.intermediate_size
    )  # of one layer: queries and output, keys and values, the three of SwiGLU
    rows = np.repeat(np.arange(len(ids)), ids.shape[1])
    _, lengths = np.unique(np.stack((rows, ids.reshape(-1))), axis=1, return_counts=True)
    pairs = float((lengths.astype(np.float64) ** 2).sum()) / 2
    layer = 2 * matrices * ids.size + 4 * pairs * config.num_attention_heads * config.head_dim
    head = 2 * config.vocab_size * config.hidden_size * float((batch.weights > 0).sum())
    return 3 * (config.num_hidden_layers * layer + num_exits * head)


def measured_peak(device: torch.device, dtype: torch.dtype) -> float:
    """Operations a second of a large square matrix product, the best of half a second."""
    size = _PRODUCT_SIZE.get(device.type, 4096)
    left, right = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    sync: Any = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    best_s, end_s = float("inf"), time.perf_counter() + _MEASURE_S
    while time.perf_counter() < end_s or best_s == float("inf"):
        sync()
        started = time.perf_counter()
        torch.mm(left, right)
        sync()
        best_s = min(best_s, time.perf_counter() - started)
    return 2 * float(size) ** 3 / best_s
