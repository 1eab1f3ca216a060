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
from engine.transfer import Staging

__all__ = ["Batch", "BatchBuilder", "DecodeRows", "PromptRows"]

Ints = npt.NDArray[np.int64]

_ZERO = np.zeros(1, dtype=np.int64)


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

    The tensors lie in the builder's staging memory; a later ``build`` overwrites them.
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
    drawing: torch.Tensor | None = None  # [S] int64, ``sampler_slots``; None: nothing runs ahead
    unknown: tuple[torch.Tensor, torch.Tensor] | None = None
    """Places in ``ids`` whose tokens the step before drew, and their row slots: int64 ``[U]`` each.
    What stands there means nothing yet. None: there are none."""
    most_new: int | None = None
    """No request has more new tokens than this; None: nobody knows."""

    @property
    def num_samples(self) -> int:
        """S."""
        return len(self.samplers)


class DecodeRows(NamedTuple):
    """A step in which every request has one new token and draws the next: numbers a row."""

    row_slots: Ints  # [R]
    positions: Ints  # [R]
    slots: Ints  # [R] where each token's keys and values go
    known: list[tuple[int, int]]
    """Row slots whose token was not drawn in the latest step that they had, and that token."""
    table: tuple[Ints, npt.NDArray[np.int32]] | None
    """Places in the flat block table, ``[slots, max_blocks]``, and their new blocks; None: nothing
    changed since the last such step."""
    entered: list[tuple[int, RequestState]]
    """As in ``Batch``."""

    @classmethod
    def of(cls, row_slots: Ints, positions: Ints, slots: Ints) -> DecodeRows:
        """Rows of requests that were there in the step before."""
        return cls(row_slots, positions, slots, [], None, [])


class _Line:
    """The owner of a row slot, how much of its block list the table has, and what it drew."""

    __slots__ = ("blocks", "drawn_at", "groups", "num_blocks", "slot", "state")

    def __init__(self, slot: int, state: RequestState) -> None:
        self.slot = slot
        self.state = state
        self.groups = state.block_ids
        self.blocks: list[int] | None = None
        self.num_blocks = 0
        self.drawn_at: int | None = None
        """Index in the sequence of the token that was drawn last under this slot."""


class _Columns(NamedTuple):
    """The rows of a plan as arrays."""

    ids: Ints  # [T] new tokens
    starts: Ints  # [R] position of the first of them
    counts: Ints  # [R] how many there are
    row_slots: Ints  # [R]
    picked: Ints  # [S] rows that sample
    samplers: list[Row]  # S
    unknown: list[int]  # [U] places in ids of tokens that are not known yet
    unknown_slots: list[int]  # [U] their row slots


class BatchBuilder:
    """Builds one batch after the other.

    Args:
        block_size: tokens in a cache block.
        max_num_tokens: most tokens of a step.
        max_num_seqs: most requests of a step.
        max_model_len: most tokens of a request.
        device: where the model runs.
        steps_ahead: steps that are built before the tokens of the one before them are known.
        keeps_draws: name the row slots of drawn tokens, for whoever keeps them on the device; where
            steps run ahead somebody must.
    """

    def __init__(
        self,
        block_size: int,
        max_num_tokens: int,
        max_num_seqs: int,
        max_model_len: int,
        device: torch.device,
        steps_ahead: int = 0,
        keeps_draws: bool = False,
    ) -> None:
        self._keeps_draws = keeps_draws or steps_ahead > 0
        self._block_size = block_size
        max_blocks = -(-max_model_len // block_size)
        self._table = np.zeros((max_num_seqs, max_blocks), dtype=np.int32)
        self._free_slots = list(range(max_num_seqs - 1, -1, -1))
        self._lines: dict[int, _Line] = {}  # by id() of the state, which the line keeps alive
        self._changed: dict[int, tuple[int, int]] = {}
        """By row slot, the first and the end of the blocks that ``decode`` did not tell of yet."""
        longs, ints = 4 * max_num_tokens + 3 * max_num_seqs, self._table.size + 2 * max_num_seqs + 1
        self._longs = Staging(longs, torch.int64, device, turns=1 + steps_ahead)
        self._ints = Staging(ints, torch.int32, device, turns=1 + steps_ahead)

    def build(self, plan: Plan) -> Batch:
        """The tensors of a plan with at least one row."""
        entered = self._assign(plan.rows)
        columns = self._columns(plan.rows)
        ids, starts, counts, row_slots, picked, samplers, *_ = columns
        block_size = self._block_size
        ends, contexts = counts.cumsum(), starts + counts  # [R]
        firsts = ends - counts
        positions = np.arange(len(ids)) + (starts - firsts).repeat(counts)  # [T]
        blocks = self._table[row_slots.repeat(counts), positions // block_size].astype(np.int64)
        slots = blocks * block_size + positions % block_size  # [T]
        outputs, prompt_rows = _prompt_rows(plan.rows, firsts, ends[picked] - 1)
        width = -(-int(contexts.max()) // block_size)
        tables = self._table[row_slots, :width]  # [R, width]
        longs = self._longs.send(ids, positions, slots, outputs, *self._ahead(columns))
        block_tables, query_starts, context_lens = self._ints.send(
            tables.ravel(), np.concatenate((_ZERO, ends)), contexts
        )
        return Batch(
            ids=longs[0],
            positions=longs[1],
            slots=longs[2],
            output_rows=longs[3],
            block_tables=block_tables.view(tables.shape),
            query_starts=query_starts,
            context_lens=context_lens,
            samplers=samplers,
            sampler_slots=row_slots[picked],
            prompt_rows=prompt_rows,
            entered=entered,
            drawing=longs[4] if self._keeps_draws else None,
            unknown=(longs[5], longs[6]) if columns.unknown else None,
            most_new=int(counts.max()),
        )

    def decode(self, plan: Plan) -> DecodeRows:
        """A plan whose rows all have one new token and sample, for those who keep what they know.

        Their tokens must have been kept by row slot in every step before.
        """
        entered = self._assign(plan.rows)
        row_slots, starts, known = [], [], []
        for state, start, *_ in plan.rows:
            line = self._lines[id(state)]
            blocks = line.groups[0]
            if len(blocks) != line.num_blocks or blocks is not line.blocks:
                self._extend(line, blocks)
            if line.drawn_at != start:
                known.append((line.slot, state.token_ids[start]))
            line.drawn_at = start + 1
            row_slots.append(line.slot)
            starts.append(start)
        lines, positions = np.array(row_slots), np.array(starts)
        blocks_at = self._table[lines, positions // self._block_size].astype(np.int64)
        slots = blocks_at * self._block_size + positions % self._block_size
        return DecodeRows(lines, positions, slots, known, self._take_changes(), entered)

    def _take_changes(self) -> tuple[Ints, npt.NDArray[np.int32]] | None:
        if not self._changed:
            return None
        changes, width = self._changed.items(), self._table.shape[1]
        places = [np.arange(slot * width + a, slot * width + b) for slot, (a, b) in changes]
        blocks = [self._table[slot, a:b] for slot, (a, b) in changes]
        self._changed = {}
        return np.concatenate(places), np.concatenate(blocks)

    def _ahead(self, columns: _Columns) -> list[Ints]:
        """What a step needs besides, of which the next is built before its tokens are known."""
        if not self._keeps_draws:
            return []
        unknown = np.array([columns.unknown, columns.unknown_slots], dtype=np.int64)
        return [columns.row_slots[columns.picked], *unknown]

    def _columns(self, rows: list[Row]) -> _Columns:
        lines = self._lines
        ids: list[int] = []
        starts, counts, row_slots, picked, samplers = [], [], [], [], []
        unknown, unknown_slots = [], []
        for index, row in enumerate(rows):
            state, start, num_new, samples, _ = row
            line = lines[id(state)]
            blocks = line.groups[0]
            if len(blocks) != line.num_blocks or blocks is not line.blocks:
                self._extend(line, blocks)
            if start == len(state.token_ids):  # being drawn
                unknown.append(len(ids))
                unknown_slots.append(line.slot)
                ids.append(0)
            elif num_new == 1:
                ids.append(state.token_ids[start])
            else:
                ids += state.token_ids[start : start + num_new]
            starts.append(start)
            counts.append(num_new)
            row_slots.append(line.slot)
            if samples:
                line.drawn_at = start + num_new
                samplers.append(row)
                picked.append(index)
        return _Columns(
            np.array(ids),
            np.array(starts),
            np.array(counts),
            np.array(row_slots),
            np.array(picked, dtype=np.int64),
            samplers,
            unknown,
            unknown_slots,
        )

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
        first, _ = self._changed.get(line.slot, (known, 0))
        self._changed[line.slot] = min(first, known), len(blocks)
        line.blocks, line.num_blocks = blocks, len(blocks)


def _prompt_rows(
    rows: list[Row], first_tokens: Ints, sampling_tokens: Ints
) -> tuple[Ints, list[PromptRows]]:
    """Tokens with wanted logits: those that sample, then those that predict wanted prompt tokens.

    The second value says what the latter are.
    """
    outputs = [sampling_tokens]
    found: list[PromptRows] = []
    num_outputs = len(sampling_tokens)
    for index, row in enumerate(rows):
        if not row.prompt_logprobs:
            continue
        count, first = row.num_prompt_logprobs, int(first_tokens[index])
        outputs.append(np.arange(first, first + count))
        found.append(PromptRows(index, row.state, num_outputs, row.start + 1, count))
        num_outputs += count
    return np.concatenate(outputs), found
