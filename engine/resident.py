"""What a GPU keeps of the requests that decode, so that a step is told only what is new.

By row slot, the same for as long as a request is planned: its latest token, its blocks, how to
sample. A step brings three numbers a row, and besides them new blocks, new requests and tokens
that were not drawn here, which most steps have none of. Everything lies at addresses that stay, and
all that is made of it is made by launches that can be recorded.

The line after the last row slot is padding's: its blocks are block 0, which holds no real data, and
whatever is drawn for it is a token like any other. Padding rows have no new token, so that nobody
attends for them (see ``kernels.interface``).
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch

from engine.batch import Batch, DecodeRows
from engine.sampler import Sampler
from engine.transfer import to_device
from kernels import Ops

__all__ = ["Resident"]


class _Inputs:
    """A step's numbers, one array a kind, that go to the device in one copy of fixed size."""

    def __init__(self, num_rows: int, device: torch.device, turns: int) -> None:
        self._num_rows = num_rows
        size = num_rows * (3 * 8 + 4) + (num_rows + 1) * 4
        pinned = device.type == "cuda"
        self._hosts = [
            torch.zeros(size, dtype=torch.uint8, pin_memory=pinned) for _ in range(turns)
        ]
        self._arrays = [[field.numpy() for field in self._fields(host)] for host in self._hosts]
        self._turn = 0
        self._device = torch.zeros(size, dtype=torch.uint8, device=device)
        (
            self.row_slots,  # [M] int64
            self.positions,  # [M] int64
            self.slots,  # [M] int64
            self.query_starts,  # [M+1] int32
            self.context_lens,  # [M] int32
        ) = self._fields(self._device)

    def _fields(self, memory: torch.Tensor) -> list[torch.Tensor]:
        rows = self._num_rows
        longs = torch.split(memory[: 24 * rows].view(torch.int64), rows)
        ints = torch.split(memory[24 * rows :].view(torch.int32), [rows + 1, rows])
        return [*longs, *ints]

    def send(self, rows: DecodeRows, padding: int) -> None:
        """Copy a step's rows; the others get the row slot ``padding``."""
        self._turn = (self._turn + 1) % len(self._hosts)
        row_slots, positions, slots, query_starts, context_lens = self._arrays[self._turn]
        num_rows = len(rows.row_slots)
        row_slots[:num_rows], row_slots[num_rows:] = rows.row_slots, padding
        positions[:num_rows], positions[num_rows:] = rows.positions, 0
        slots[:num_rows], slots[num_rows:] = rows.slots, 0
        np.minimum(np.arange(self._num_rows + 1), num_rows, out=query_starts, casting="unsafe")
        context_lens[:num_rows], context_lens[num_rows:] = rows.positions + 1, 0
        self._device.copy_(self._hosts[self._turn], non_blocking=True)


class Resident:
    """Lines of requests on the device, and the steps that decode them.

    Args:
        ops: kernels of ``device``.
        sampler: has the latest tokens and the parameters of each row slot.
        num_slots: row slots, M.
        max_blocks: most blocks of a request.
        device: where it lies.
        steps_ahead: steps that are sent before the one before them is done.
    """

    def __init__(
        self,
        ops: Ops,
        sampler: Sampler,
        num_slots: int,
        max_blocks: int,
        device: torch.device,
        steps_ahead: int,
    ) -> None:
        self._ops = ops
        self._sampler = sampler
        self._device = device
        self._padding = num_slots
        lines = num_slots + 1
        self._tables = torch.zeros((lines, max_blocks), dtype=torch.int32, device=device)
        self._floats = torch.zeros((3, lines), dtype=torch.float32, device=device)
        self._top_k = torch.zeros(lines, dtype=torch.int32, device=device)
        self._seeds = torch.zeros(lines, dtype=torch.int64, device=device)
        self._inputs = _Inputs(num_slots, device, 1 + steps_ahead)
        self._every = torch.arange(num_slots, device=device)
        self.drawn = torch.zeros(num_slots, dtype=torch.int64, device=device)
        """The latest step's tokens, in the order of its rows; overwritten by the next one."""
        nothing = np.zeros(0, dtype=np.int64)
        self._inputs.send(DecodeRows.of(nothing, nothing, nothing), self._padding)

    def update(self, rows: DecodeRows) -> None:
        """Tell the device what is new in this step."""
        if (slots := self._sampler.take_entered()) is not None:
            places = self._send(slots)
            floats, top_k, seeds = self._sampler.parameters(slots)
            self._floats.index_copy_(1, places, self._send(floats))
            self._top_k.index_copy_(0, places, self._send(top_k))
            self._seeds.index_copy_(0, places, self._send(seeds))
        if rows.known:
            known, tokens = np.array(rows.known, dtype=np.int64).T.copy()
            self._sampler.drawn.index_copy_(0, self._send(known), self._send(tokens))
        if rows.table is not None:
            at, blocks = rows.table
            self._tables.view(-1).index_copy_(0, self._send(at), self._send(blocks))
        self._inputs.send(rows, self._padding)

    def batch(self, size: int) -> Batch:
        """The step that was sent, padded to ``size`` rows; its tensors are made on the device."""
        inputs = self._inputs
        row_slots = inputs.row_slots[:size]
        return Batch(
            ids=self._sampler.drawn.index_select(0, row_slots),
            positions=inputs.positions[:size],
            slots=inputs.slots[:size],
            block_tables=self._tables.index_select(0, row_slots),
            query_starts=inputs.query_starts[: size + 1],
            context_lens=inputs.context_lens[:size],
            output_rows=self._every[:size],
            samplers=[],
            sampler_slots=np.zeros(0, dtype=np.int64),
            prompt_rows=[],
            entered=[],
            most_new=1,
        )

    def draw(self, logits: torch.Tensor) -> None:
        """Draw each row's token from ``logits [size, V]``, and keep it in its line."""
        size = len(logits)
        row_slots, drawn = self._inputs.row_slots[:size], self.drawn[:size]
        temperature, top_p, min_p = self._floats.index_select(1, row_slots)
        top_k = self._top_k.index_select(0, row_slots)
        seeds = self._seeds.index_select(0, row_slots)
        positions = self._inputs.positions[:size] + 1
        self._ops.sample(drawn, logits, temperature, top_k, top_p, min_p, seeds, positions)
        self._sampler.drawn.index_copy_(0, row_slots, drawn)

    def _send(self, array: npt.NDArray[np.generic]) -> torch.Tensor:
        return to_device(array, self._device)
