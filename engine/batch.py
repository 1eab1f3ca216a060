"""Plan -> flat tensors. The only home of slot arithmetic.

Every request in a plan has a row slot: a line of the persistent block table (and of the sampler's
parameter arrays), filled once and then only extended, so that a step costs about a microsecond a
request. A request keeps its slot as long as consecutive plans name it.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from engine.steps import Plan, RequestState, Row

__all__ = ["Batch", "BatchBuilder", "PromptRows"]

Ints = npt.NDArray[np.int64]


class PromptRows(NamedTuple):
    """Output rows that predict prompt tokens of one request."""

    plan_row: int
    state: RequestState
    first_output: int
    """Index into ``Batch.output_rows`` of the first of them."""
    first_token: int
    """Index in the sequence of the token the first of them predicts."""
    num_rows: int


class Batch(NamedTuple):
    """One step for the model. T tokens, R requests, W output rows of which S sample.

    The tensors lie in the builder's staging memory and are overwritten by its next ``build``.
    """

    ids: torch.Tensor  # [T] int64
    positions: torch.Tensor  # [T] int64
    slots: torch.Tensor  # [T] int64, where each token's keys and values go
    block_tables: torch.Tensor  # [R, blocks] int32
    query_starts: torch.Tensor  # [R+1] int32
    context_lens: torch.Tensor  # [R] int32
    output_rows: torch.Tensor  # [W] int64: the S sampling rows in plan order, then prompt rows
    samplers: list[Row]  # S rows of the plan
    sampler_slots: Ints  # [S] their row slots
    prompt_rows: list[PromptRows]
    entered: list[tuple[int, RequestState]]
    """Row slots that have a new owner, for whoever keeps something by slot."""

    @property
    def num_samples(self) -> int:
        """S."""
        return len(self.samplers)


class _Line:
    """The owner of a row slot and how much of its block list the table has."""

    __slots__ = ("blocks", "num_blocks", "slot", "state")

    def __init__(self, slot: int, state: RequestState) -> None:
        self.slot = slot
        self.state = state
        self.blocks: list[int] | None = None
        self.num_blocks = 0


class BatchBuilder:
    """Builds one batch after the other.

    Args:
        block_size: tokens in a cache block.
        max_num_tokens: most tokens of a step.
        max_num_seqs: most requests of a step.
        max_model_len: most tokens of a request.
        device: where the model runs; for a GPU the staging memory is pinned and copied from.
    """

    def __init__(
        self,
        block_size: int,
        max_num_tokens: int,
        max_num_seqs: int,
        max_model_len: int,
        device: torch.device,
    ) -> None:
        self._block_size = block_size
        self._device = device
        max_blocks = -(-max_model_len // block_size)
        self._table = np.zeros((max_num_seqs, max_blocks), dtype=np.int32)
        self._free_slots = list(range(max_num_seqs - 1, -1, -1))
        self._lines: dict[int, _Line] = {}  # by id() of the state, which the line keeps alive
        pinned = device.type == "cuda"
        self._tokens = torch.empty((4, max_num_tokens), dtype=torch.int64, pin_memory=pinned)
        self._rows = torch.empty((2, max_num_seqs + 1), dtype=torch.int32, pin_memory=pinned)
        self._tables = torch.empty(self._table.size, dtype=torch.int32, pin_memory=pinned)

    def build(self, plan: Plan) -> Batch:
        """The tensors of a plan with at least one row."""
        ids: list[int] = []
        starts, counts, slots, samplers, sampler_rows = [], [], [], [], []
        entered = self._assign(plan.rows)
        for index, row in enumerate(plan.rows):
            state, start, num_new = row.state, row.start, row.num_new
            line = self._lines[id(state)]
            blocks = state.block_ids[0]
            if blocks is not line.blocks or len(blocks) != line.num_blocks:
                self._extend(line, blocks)
            if num_new == 1:
                ids.append(state.token_ids[start])
            else:
                ids += state.token_ids[start : start + num_new]
            starts.append(start)
            counts.append(num_new)
            slots.append(line.slot)
            if row.samples:
                samplers.append(row)
                sampler_rows.append(index)
        starts_np, counts_np = np.array(starts), np.array(counts)
        slots_np = np.array(slots)
        ends = np.cumsum(counts_np)
        outputs, prompt_rows = _prompt_rows(plan.rows, ends - counts_np, len(samplers))
        picked = ends[sampler_rows] - 1 if sampler_rows else ends[:0]
        output_rows = self._stage(self._tokens[3], np.concatenate((picked, *outputs)))
        positions, token_slots = self._places(starts_np, counts_np, ends, slots_np)
        contexts = starts_np + counts_np
        return Batch(
            ids=self._stage(self._tokens[0], np.array(ids)),
            positions=self._stage(self._tokens[1], positions),
            slots=self._stage(self._tokens[2], token_slots),
            block_tables=self._block_tables(slots_np, int(contexts.max())),
            query_starts=self._stage(self._rows[0], np.concatenate(([0], ends))),
            context_lens=self._stage(self._rows[1], contexts),
            output_rows=output_rows,
            samplers=samplers,
            sampler_slots=slots_np[sampler_rows] if sampler_rows else slots_np[:0],
            prompt_rows=prompt_rows,
            entered=entered,
        )

    def _places(self, starts: Ints, counts: Ints, ends: Ints, row_slots: Ints) -> tuple[Ints, Ints]:
        """Position and cache slot of each new token, ``[T]`` both."""
        block_size = self._block_size
        positions = np.arange(ends[-1]) - np.repeat(ends - counts - starts, counts)
        row_slot_of_token = np.repeat(row_slots, counts)
        blocks = self._table[row_slot_of_token, positions // block_size].astype(np.int64)
        return positions, blocks * block_size + positions % block_size

    def _block_tables(self, row_slots: Ints, longest: int) -> torch.Tensor:
        """The blocks of each request, as many as the longest one needs."""
        width = -(-longest // self._block_size)
        tables = self._tables[: len(row_slots) * width].view(len(row_slots), width)
        np.take(self._table[:, :width], row_slots, axis=0, out=tables.numpy(), mode="clip")
        return self._send(tables)

    def _stage(self, memory: torch.Tensor, values: Ints) -> torch.Tensor:
        part = memory[: len(values)]
        part.numpy()[:] = values
        return self._send(part)

    def _send(self, tensor: torch.Tensor) -> torch.Tensor:
        if self._device.type == "cpu":
            return tensor
        return tensor.to(self._device, non_blocking=True)

    def _assign(self, rows: list[Row]) -> list[tuple[int, RequestState]]:
        """Give each row's request a slot; requests that are not in this plan lose theirs."""
        old, lines = self._lines, {}
        new = []
        for row in rows:
            key = id(row.state)
            line = old.pop(key, None)
            if line is None:
                new.append(row.state)
            else:
                lines[key] = line
        self._free_slots += [line.slot for line in old.values()]
        entered = []
        for state in new:
            slot = self._free_slots.pop()
            lines[id(state)] = _Line(slot, state)
            entered.append((slot, state))
        self._lines = lines
        return entered

    def _extend(self, line: _Line, blocks: list[int]) -> None:
        """Copy to the table what it does not have yet of a request's blocks.

        A list only grows; when a request is preempted it gets another list, so that identity tells
        whether the known part still holds.
        """
        known = line.num_blocks if blocks is line.blocks and len(blocks) > line.num_blocks else 0
        self._table[line.slot, known : len(blocks)] = blocks[known:]
        line.blocks, line.num_blocks = blocks, len(blocks)


def _prompt_rows(
    rows: list[Row], first_tokens: Ints, num_samples: int
) -> tuple[list[Ints], list[PromptRows]]:
    """Token rows, and what they are, of the positions that predict wanted prompt tokens."""
    outputs: list[Ints] = []
    found: list[PromptRows] = []
    output = num_samples
    for index, row in enumerate(rows):
        count = row.num_prompt_logprobs
        if count > 0:
            first = int(first_tokens[index])
            outputs.append(np.arange(first, first + count))
            found.append(PromptRows(index, row.state, output, row.start + 1, count))
            output += count
    return outputs, found
