"""Packed training data: records -> token files by source -> fixed-length rows.

Tokens are made once and kept as flat arrays, memory-mapped, so that a run starts at once, any
number of epochs costs nothing more, and the place in the data is three integers a source.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from engine.train.dialogue import (
    ChatTemplate,
    LossWeights,
    Record,
    TextEncoder,
    encode_record,
    join_requests,
    trim_tools,
)

__all__ = ["Ahead", "Batch", "DataError", "Documents", "Packer", "write_documents"]

IntArray = npt.NDArray[np.integer[Any]]

PackerState = dict[str, dict[str, int]]

_WEIGHT_SCALE = 100  # loss weights are stored as hundredths in a byte


class DataError(ValueError):
    """Training data that cannot be used, with the reason."""


@dataclass(frozen=True, slots=True)
class Documents:
    """The tokens of one source.

    Args:
        token_ids: uint16 [N], all documents behind one another.
        weights: uint8 [N], hundredths of the loss weight of each token.
        starts: int64 [documents + 1], where each document begins, and N.
    """

    token_ids: IntArray
    weights: IntArray
    starts: IntArray

    def __len__(self) -> int:
        return len(self.starts) - 1

    def document(self, index: int) -> tuple[IntArray, IntArray]:
        """Token ids and weights of one document."""
        part = slice(int(self.starts[index]), int(self.starts[index + 1]))
        return self.token_ids[part], self.weights[part]

    @classmethod
    def load(cls, directory: Path, source: str) -> Documents:
        """Maps the files of one source. Raises `DataError` if they are missing."""
        path = directory / f"{source}.token_ids.npy"
        if not path.exists():
            known = sorted(p.name.split(".")[0] for p in directory.glob("*.token_ids.npy"))
            raise DataError(f"no source {source!r} in the training data; it has {known}")
        names = ("token_ids", "weights", "starts")
        return cls(*(np.load(directory / f"{source}.{n}.npy", mmap_mode="r") for n in names))


@dataclass(slots=True)
class _Growing:
    token_ids: list[IntArray] = field(default_factory=list)
    weights: list[IntArray] = field(default_factory=list)


def write_documents(
    records: Iterable[Record],
    directory: Path,
    *,
    sources: frozenset[str],
    template: ChatTemplate,
    encoder: TextEncoder,
    loss: LossWeights,
    max_len: int,
    max_tools: int,
    empty_think_fraction: float,
    seed: int,
    max_requests: int = 1,
    assistant_only: frozenset[str] = frozenset(),
) -> dict[str, int]:
    """Encodes the records of `sources` and writes three arrays for each.

    Text longer than `max_len` is cut into pieces, a dialogue is cut off. Up to `max_requests`
    dialogues of a single request become one (`join_requests`). Records that hold control
    tokens as text are left out, since they would forge turns. In sources of `assistant_only` no
    other turn counts, whatever `loss` says.

    Returns:
        Number of tokens by source.
    """
    rng = random.Random(seed)
    growing: dict[str, _Growing] = {}
    for record in join_requests(records, max_requests=max_requests, rng=rng):
        source = record["source"]
        if source not in sources or "<|" in json.dumps(record, ensure_ascii=False):
            continue
        if "messages" in record:
            record = trim_tools(record, max_tools=max_tools, rng=rng)
        empty_think = rng.random() < empty_think_fraction
        own = LossWeights() if source in assistant_only else loss
        ids, weights = encode_record(record, template, encoder, own, empty_think=empty_think)
        step = max_len if "text" in record else len(ids) or 1
        for begin in range(0, len(ids), step):
            part = slice(begin, begin + min(step, max_len))
            if sum(weights[part]) > 0:
                arrays = growing.setdefault(source, _Growing())
                arrays.token_ids.append(np.array(ids[part], dtype=np.uint16))
                hundredths = np.array(weights[part]) * _WEIGHT_SCALE
                arrays.weights.append(hundredths.round().astype(np.uint8))
    directory.mkdir(parents=True, exist_ok=True)
    sizes = {}
    for source, arrays in sorted(growing.items()):
        starts = np.cumsum([0, *(len(ids) for ids in arrays.token_ids)], dtype=np.int64)
        np.save(directory / f"{source}.starts.npy", starts)
        np.save(directory / f"{source}.weights.npy", np.concatenate(arrays.weights))
        np.save(directory / f"{source}.token_ids.npy", np.concatenate(arrays.token_ids))
        sizes[source] = int(starts[-1])
    return sizes


@dataclass(frozen=True, slots=True)
class Batch:
    """Rows of packed documents; the target of position t is token t + 1 of the same row.

    Args:
        token_ids: int64 [B, T].
        targets: int64 [B, T].
        weights: float32 [B, T], zero where nothing is to be learned.
        document_ids: int64 [B, T], numbered from 1 in each row; 0 is padding.
    """

    token_ids: npt.NDArray[np.int64]
    targets: npt.NDArray[np.int64]
    weights: npt.NDArray[np.float32]
    document_ids: npt.NDArray[np.int64]

    def part(self, first: int, last: int, step: int = 1) -> Batch:
        """The rows `first`, `first + step`, ... before `last`."""
        own = slice(first, last, step)
        return Batch(
            self.token_ids[own], self.targets[own], self.weights[own], self.document_ids[own]
        )

    def rows(self, rank: int, size: int) -> Batch:
        """The rows of one device out of `size`."""
        return self.part(rank, len(self.token_ids), size)


class Packer:
    """Fills rows with whole documents so that each source keeps its share of the tokens.

    The next document comes from the source that is furthest behind its share among those whose
    next document fits into what is left of the row; the row ends when none fits. Each epoch of a
    source has its own random order. Everything depends on the seed and on `state` alone.

    Args:
        documents: tokens by source.
        mixture: share of each source; sums to one.
        sequence_len: tokens of a row; documents may have one more, since the last is only a target.
        pad_id: token that fills a row.
        seed: of the orders.
    """

    def __init__(
        self,
        documents: dict[str, Documents],
        mixture: dict[str, float],
        *,
        sequence_len: int,
        pad_id: int,
        seed: int,
    ) -> None:
        self._documents = documents
        self._mixture = mixture
        self._sequence_len = sequence_len
        self._pad_id = pad_id
        self._seed = seed
        self._epoch = dict.fromkeys(mixture, 0)
        self._cursor = dict.fromkeys(mixture, 0)
        self._emitted = dict.fromkeys(mixture, 0)
        self._order = {source: self._shuffled(source) for source in mixture}

    @property
    def state(self) -> PackerState:
        """Epoch, cursor and tokens given so far, by source."""
        return {
            source: {
                "epoch": self._epoch[source],
                "cursor": self._cursor[source],
                "emitted": self._emitted[source],
            }
            for source in self._mixture
        }

    def restore(self, state: PackerState) -> None:
        """Goes to a place that `state` gave; raises `DataError` for that of another mixture."""
        if set(state) != set(self._mixture):
            raise DataError(
                f"the checkpoint has sources {sorted(state)}, the mixture {sorted(self._mixture)}"
            )
        for source, place in state.items():
            self._epoch[source] = place["epoch"]
            self._cursor[source] = place["cursor"]
            self._emitted[source] = place["emitted"]
            self._order[source] = self._shuffled(source)

    def batch(self, num_rows: int) -> Batch:
        """The next rows."""
        shape = (num_rows, self._sequence_len + 1)
        ids = np.full(shape, self._pad_id, dtype=np.int64)
        weights = np.zeros(shape, dtype=np.float32)
        document_ids = np.zeros(shape, dtype=np.int64)
        for row in range(num_rows):
            used, number = 0, 0
            while (source := self._neediest(shape[1] - used)) is not None:
                tokens, hundredths = self._take(source)
                number += 1
                part = slice(used, used + len(tokens))
                ids[row, part] = tokens
                weights[row, part] = hundredths / np.float32(_WEIGHT_SCALE)
                weights[row, used] = 0.0  # nothing of its own document precedes a first token
                document_ids[row, part] = number
                used += len(tokens)
        return Batch(ids[:, :-1], ids[:, 1:], weights[:, 1:], document_ids[:, :-1])

    def _neediest(self, room: int) -> str | None:
        total = sum(self._emitted.values())
        fitting = [source for source in self._mixture if self._next_len(source) <= room]
        if not fitting:
            return None
        return max(fitting, key=lambda s: (self._mixture[s] * (total + 1) - self._emitted[s], s))

    def _next_len(self, source: str) -> int:
        starts = self._documents[source].starts
        index = self._order[source][self._cursor[source]]
        return int(starts[index + 1] - starts[index])

    def _take(self, source: str) -> tuple[IntArray, IntArray]:
        tokens, weights = self._documents[source].document(
            int(self._order[source][self._cursor[source]])
        )
        self._emitted[source] += len(tokens)
        self._cursor[source] += 1
        if self._cursor[source] == len(self._documents[source]):
            self._cursor[source] = 0
            self._epoch[source] += 1
            self._order[source] = self._shuffled(source)
        return tokens, weights

    def _shuffled(self, source: str) -> IntArray:
        key = [self._seed, self._epoch[source], *source.encode()]
        order: IntArray = np.random.default_rng(key).permutation(len(self._documents[source]))
        return order


class Ahead:
    """A packer that fills the next batch in a thread while the device computes the present one.

    Args:
        packer: gives the batches; nobody else uses it.
        num_rows: rows of a batch.
    """

    def __init__(self, packer: Packer, num_rows: int) -> None:
        self._packer = packer
        self._num_rows = num_rows
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="packer")
        self._next: Future[tuple[Batch, PackerState]] | None = None
        self.state = packer.state
        """The place in the data behind the batch that was given last."""

    def batch(self) -> Batch:
        """The next rows."""
        waiting = self._next or self._pool.submit(self._fill)
        batch, self.state = waiting.result()
        self._next = self._pool.submit(self._fill)
        return batch

    def restore(self, state: PackerState) -> None:
        """Goes to a place that `state` gave; raises `DataError` for that of another mixture."""
        if self._next is not None:
            self._next.result()
            self._next = None
        self._packer.restore(state)
        self.state = state

    def _fill(self) -> tuple[Batch, PackerState]:
        batch = self._packer.batch(self._num_rows)
        return batch, self._packer.state
