"""Held-out loss by source and by the layer at which the model is left."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F

from engine.loader import WeightSource
from engine.model_config import read_model_config
from engine.train.attention import Segments
from engine.train.data import DataError, Documents
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
    source = WeightSource(directory, torch.float32, device, stored=config.quantization)
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
    """Held-out loss of each source, each document once, over at most `max_rows` rows of tokens.

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
        nats = torch.zeros(model.config.num_hidden_layers, dtype=torch.float64)
        count = 0
        for chosen in itertools.islice(_rows(documents, sequence_len), max_rows):
            row = _packed(documents, chosen)
            row = row if skip_padding else _padded(row, sequence_len + 1, pad_id)
            segments = Segments.of(row.document_ids[None, :-1], model.device)
            ids, weights = (torch.from_numpy(x).to(model.device) for x in (row.ids, row.weights))
            counted = weights[1:] > 0
            targets = ids[1:][counted]
            for index, hidden in enumerate(model.hidden_states(ids[:-1], segments)):
                logits = model.logits(hidden[counted])
                nats[index] += F.cross_entropy(logits, targets, reduction="sum").item()
            count += len(targets)
        if count:
            results[source] = HeldOut(count, tuple((nats / count).tolist()))
        on_done()
    return results


def _rows(documents: Documents, sequence_len: int) -> Iterator[list[int]]:
    """Each document once, in random but fixed order, as many to a row as fit."""
    row: list[int] = []
    used = 0
    lengths = np.diff(documents.starts)
    for index in np.random.default_rng(0).permutation(len(documents)).tolist():
        if row and used + lengths[index] > sequence_len + 1:
            yield row
            row, used = [], 0
        row.append(index)
        used += lengths[index]
    if row:
        yield row


class _Row(NamedTuple):
    """Tokens, whether each counts as a target, and the document of each; all int64 [N]."""

    ids: npt.NDArray[np.int64]
    weights: npt.NDArray[np.int64]
    document_ids: npt.NDArray[np.int64]


def _packed(documents: Documents, chosen: list[int]) -> _Row:
    parts = [documents.document(index) for index in chosen]
    weights = [own.astype(np.int64) for _, own in parts]
    for own in weights:
        own[0] = 0  # nothing of its own document precedes a first token
    numbers = np.repeat(np.arange(len(parts)), [len(ids) for ids, _ in parts])
    ids = np.concatenate([ids for ids, _ in parts]).astype(np.int64)
    return _Row(ids, np.concatenate(weights), numbers)


def _padded(row: _Row, length: int, pad_id: int) -> _Row:
    more = (0, length - len(row.ids))
    return _Row(
        np.pad(row.ids, more, constant_values=pad_id),
        np.pad(row.weights, more),
        np.pad(row.document_ids, more, constant_values=-1),
    )


def joined(losses: Iterable[HeldOut]) -> HeldOut:
    """The loss over the tokens of several sources together."""
    parts = list(losses)
    count = sum(part.num_targets for part in parts)
    sums = zip(*([x * part.num_targets for x in part.exit_losses] for part in parts), strict=True)
    return HeldOut(count, tuple(math.fsum(column) / count for column in sums))
