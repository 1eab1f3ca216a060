"""Held-out loss by source and by the layer at which the model is left."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from engine.loader import WeightSource
from engine.model_config import read_model_config
from engine.train.attention import Segments
from engine.train.data import DataError, Documents, Packer
from engine.train.model import ModelConfig, Qwen3, compute_dtype_of

__all__ = ["HeldOut", "held_out_losses", "joined", "load_model"]


@dataclass(frozen=True, slots=True)
class HeldOut:
    """Loss on the held-out part of one source."""

    num_targets: int
    """Tokens of assistant turns that were predicted."""
    exit_losses: tuple[float, ...]
    """Mean cross-entropy in nats per token, read off after each layer; the last is the model's."""

    @property
    def loss(self) -> float:
        """Of the whole model."""
        return self.exit_losses[-1]

    @property
    def perplexity(self) -> float:
        """Its exponential."""
        return math.exp(self.loss)


def load_model(directory: Path, device: torch.device) -> Qwen3:
    """The training model with the weights of an exported checkpoint.

    Raises CheckpointError where the directory holds none that `engine/train/export.py` could write.
    """
    config = read_model_config(directory)
    sizes = ModelConfig(
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_hidden_layers=config.num_layers,
        num_attention_heads=config.num_heads,
        num_key_value_heads=config.num_kv_heads,
        head_dim=config.head_dim,
        max_position_embeddings=config.max_position_embeddings,
        rope_theta=config.rope.theta,
        rms_norm_eps=config.rms_norm_eps,
    )
    model = Qwen3(sizes, compute_dtype_of(device)).to(device)
    source = WeightSource(directory, torch.float32, device)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(source.take(name, parameter.shape))
    source.finish()
    return model


@torch.inference_mode()
def held_out_losses(
    model: Qwen3,
    token_dir: Path,
    sources: Iterable[str],
    *,
    sequence_len: int,
    pad_id: int,
    max_rows: int = 16,
    skip_padding: bool = False,
    on_done: Callable[[], None] = lambda: None,
) -> dict[str, HeldOut]:
    """Held-out loss of each source, over about `max_rows` rows of tokens and at most one epoch.

    Args:
        model: in whatever state of training.
        token_dir: where `write_documents` has put the held-out tokens.
        sources: which; those without held-out text are left out.
        sequence_len: tokens of a row.
        pad_id: fills rows.
        max_rows: bounds the time a large source takes.
        skip_padding: do not compute what fills the last row, which saves much for small sources; a
            compiled model would be compiled anew for each length.
        on_done: called after each source.
    """
    results = {}
    for source in sources:
        try:
            documents = Documents.load(token_dir, source)
        except DataError:
            on_done()
            continue
        packer = Packer(
            {source: documents}, {source: 1.0}, sequence_len=sequence_len, pad_id=pad_id, seed=0
        )
        nats = torch.zeros(model.config.num_hidden_layers, dtype=torch.float64)
        count, rows = 0, 0
        while packer.state[source]["epoch"] == 0 and rows < max_rows:
            batch = packer.batch(1)
            rows += 1
            used = np.count_nonzero(batch.document_ids) if skip_padding else sequence_len
            segments = Segments.of(batch.document_ids[:, :used], model.device)
            ids, targets, weights = (
                torch.from_numpy(part[0, :used]).to(model.device)
                for part in (batch.token_ids, batch.targets, batch.weights)
            )
            chosen = weights > 0
            for index, hidden in enumerate(model.hidden_states(ids, segments)):
                logits = model.logits(hidden[chosen])
                nats[index] += F.cross_entropy(logits, targets[chosen], reduction="sum").item()
            count += int(chosen.sum())
        if count:
            results[source] = HeldOut(count, tuple((nats / count).tolist()))
        on_done()
    return results


def joined(losses: Iterable[HeldOut]) -> HeldOut:
    """The loss over the tokens of several sources together."""
    parts = list(losses)
    count = sum(part.num_targets for part in parts)
    sums = zip(*([x * part.num_targets for x in part.exit_losses] for part in parts), strict=True)
    return HeldOut(count, tuple(math.fsum(column) / count for column in sums))
