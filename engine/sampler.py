"""Logits -> tokens and log-probabilities.

Randomness is counter-based: the draw of the token at index p of a sequence depends on (seed, p,
logits) and nothing else, so neither batching nor chunking nor preemption changes an answer.
Log-probabilities are of the model's own distribution, before penalties, bias and temperature.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from engine.batch import Batch, DecodeRows, PromptRows
from engine.steps import RequestState
from engine.transfer import Arrivals, to_device
from engine.types import TokenLogprobs
from kernels import GREEDY, Draws, Ops

__all__ = ["Drawn", "Entries", "Sampler"]

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float32]

_NEUTRAL_FLOATS = (0.0, 1.0, 0.0, 1.0, 0.0, 0.0)
"""temperature, top_p, min_p, repetition, presence, frequency of a row that asks for nothing."""


class _Counts:
    """The distinct tokens of one sequence and how often each was generated, kept up to date."""

    def __init__(self, state: RequestState) -> None:
        repetition = state.request.sampling.repetition_penalty
        # Presence and frequency look at the answer only.
        prompt = state.token_ids[: state.num_prompt] if repetition != 1.0 else []
        distinct = np.unique(np.array(prompt, dtype=np.int64))
        self._index = {token: place for place, token in enumerate(distinct.tolist())}
        self._ids = distinct
        self._counts = np.zeros(len(distinct), dtype=np.int32)
        self._seen = state.num_prompt

    def update(self, token_ids: list[int]) -> tuple[Ints, npt.NDArray[np.int32]]:
        """Ids and counts after all of ``token_ids``, which only ever grow."""
        for token in token_ids[self._seen :]:
            place = self._index.setdefault(token, len(self._index))
            if place == len(self._ids):
                room = max(16, 2 * place)
                self._ids = np.resize(self._ids, room)
                self._counts = np.concatenate(
                    (self._counts, np.zeros(room - place, dtype=np.int32))
                )
            self._ids[place] = token
            self._counts[place] += 1
        self._seen = len(token_ids)
        used = len(self._index)
        return self._ids[:used], self._counts[:used]


class _Extras:
    """What a request wants beyond temperature and truncation, prepared once."""

    __slots__ = ("banned_until_min", "bias_ids", "bias_values", "counts", "logprobs", "sampling")

    def __init__(self, state: RequestState, eos_ids: tuple[int, ...], vocab_size: int) -> None:
        sampling = self.sampling = state.request.sampling
        self.logprobs = sampling.logprobs
        self.counts = _Counts(state) if sampling.penalises else None
        bias = {token: x for token, x in sampling.logit_bias.items() if 0 <= token < vocab_size}
        self.bias_ids = np.array(list(bias), dtype=np.int64)
        self.bias_values = np.array(list(bias.values()), dtype=np.float32)
        ends = (() if sampling.ignore_eos else eos_ids) + sampling.stop_token_ids
        banned = {token for token in ends if 0 <= token < vocab_size}
        self.banned_until_min = np.array(sorted(banned), dtype=np.int64)

    def bias(self, num_generated: int) -> tuple[Ints, npt.NDArray[np.float32]]:
        """Token ids and what to add to their logits now."""
        if num_generated >= self.sampling.min_tokens or not len(self.banned_until_min):
            return self.bias_ids, self.bias_values
        kept = ~np.isin(self.bias_ids, self.banned_until_min)
        ids = np.concatenate((self.bias_ids[kept], self.banned_until_min))
        values = np.full(len(ids), -np.inf, dtype=np.float32)
        values[: kept.sum()] = self.bias_values[kept]
        return ids, values


class Entries(NamedTuple):
    """Log-probabilities of some positions, on their way to the host."""

    values: torch.Tensor  # [rows, top + 1] float32
    ids: torch.Tensor  # [rows, top + 1] int64
    ranks: torch.Tensor  # [rows] int64
    top_counts: list[int]

    def read(self) -> list[TokenLogprobs]:
        """One for each row, once they have arrived."""
        lines = zip(
            self.values.tolist(), self.ids.tolist(), self.ranks.tolist(), self.top_counts,
            strict=True,
        )  # fmt: skip
        return [
            TokenLogprobs(value[0], rank, row_ids[1 : count + 1], value[1 : count + 1])
            for value, row_ids, rank, count in lines
        ]


class Drawn(NamedTuple):
    """The tokens of a step, on their way to the host."""

    ids: torch.Tensor  # [S] int64
    entries: Entries | None
    rows: list[int]
    """Of the S rows, those that ``entries`` are for."""

    def read(self) -> tuple[list[int], list[TokenLogprobs | None]]:
        """Tokens and the log-probabilities of those that want them, once they have arrived."""
        ids = self.ids.tolist()
        if self.entries is None:
            return ids, [None] * len(ids)
        by_row = dict(zip(self.rows, self.entries.read(), strict=True))
        return ids, [by_row.get(row) for row in range(len(ids))]


class Sampler:
    """Draws the tokens of a step.

    Args:
        ops: kernels of ``device``.
        vocab_size: V.
        eos_token_ids: masked, with a request's stop tokens, until its ``min_tokens``.
        max_num_seqs: number of row slots.
        device: where the logits are.
    """

    def __init__(
        self,
        ops: Ops,
        vocab_size: int,
        eos_token_ids: tuple[int, ...],
        max_num_seqs: int,
        device: torch.device,
    ) -> None:
        self._ops = ops
        self._vocab_size = vocab_size
        self._eos_ids = eos_token_ids
        self._device = device
        # By row slot.
        self._floats = np.zeros((len(_NEUTRAL_FLOATS), max_num_seqs), dtype=np.float32)
        self._top_k = np.zeros(max_num_seqs, dtype=np.int32)
        self._seeds = np.zeros(max_num_seqs, dtype=np.int64)
        self._extras: list[_Extras | None] = [None] * max_num_seqs
        # For steps in which every row is greedy.
        neutral = torch.tensor(_NEUTRAL_FLOATS)[:, None].expand(-1, max_num_seqs)
        self._greedy_floats = neutral.contiguous().to(device)
        self._zero_top_k = torch.zeros(max_num_seqs, dtype=torch.int32, device=device)
        self._zeros = torch.zeros(max_num_seqs, dtype=torch.int64, device=device)
        self._entered: set[int] = set()
        self.drawn = torch.zeros(max_num_seqs + 1, dtype=torch.int64, device=device)
        """The latest token of each row slot, kept for steps that are built before it is known, and
        one more that is nobody's."""

    def enter(self, batch: Batch | DecodeRows) -> None:
        """Take over the parameters of requests that got a row slot in this batch."""
        for slot, state in batch.entered:
            self._entered.add(slot)
            sampling = state.request.sampling
            self._floats[:, slot] = (
                sampling.temperature,
                sampling.top_p,
                sampling.min_p,
                sampling.repetition_penalty,
                sampling.presence_penalty,
                sampling.frequency_penalty,
            )
            self._top_k[slot] = min(sampling.top_k, self._vocab_size)
            self._seeds[slot] = sampling.seed
            wants_more = sampling.logprobs is not None or sampling.modifies_logits
            extras = _Extras(state, self._eos_ids, self._vocab_size) if wants_more else None
            self._extras[slot] = extras

    def take_entered(self) -> Ints | None:
        """Row slots whose parameters are others than when this was last asked; None: none are."""
        if not self._entered:
            return None
        slots = np.array(sorted(self._entered))
        self._entered.clear()
        return slots

    def parameters(self, slots: Ints) -> tuple[Floats, npt.NDArray[np.int32], Ints]:
        """Temperature, top_p and min_p ``[3, S]``, top_k and seed ``[S]`` of these row slots."""
        return self._floats[:3].take(slots, axis=1), self._top_k[slots], self._seeds[slots]

    def fill(self, batch: Batch) -> None:
        """Put the tokens that the step before drew where this batch has none yet."""
        if batch.unknown is not None:
            places, slots = batch.unknown
            batch.ids.index_copy_(0, places, self.drawn.index_select(0, slots))

    def sample(self, batch: Batch, logits: torch.Tensor, arrivals: Arrivals) -> Drawn:
        """Draw a token for each sampling row.

        Args:
            batch: entered before.
            logits: ``[S, V]`` float32; penalties and bias are applied in place.
            arrivals: of the step.
        """
        slots = batch.sampler_slots
        extras = [self._extras[slot] for slot in slots.tolist()]
        wanted = [row for row, e in enumerate(extras) if e is not None and e.logprobs is not None]
        raw = logits
        if any(extras):
            raw = self._keep_raw(extras, wanted, logits)
            self._modify(batch, extras, logits)
        ids = self._draw(batch, logits)
        if batch.drawing is not None:
            self.drawn.index_copy_(0, batch.drawing, ids)
        entries = None
        if wanted:
            counts = [e.logprobs or 0 for e in extras if e is not None and e.logprobs is not None]
            chosen = ids if len(wanted) == len(ids) else ids.index_select(0, self._rows(wanted))
            entries = self._logprobs(raw, chosen, counts, arrivals)
        return Drawn(arrivals.bring(ids), entries, wanted)

    def prompt_logprobs(
        self,
        batch: Batch,
        head: Callable[[int, int], torch.Tensor],
        max_rows: int,
        arrivals: Arrivals,
    ) -> dict[int, list[Entries]]:
        """Entries for the prompt tokens that this step's positions predict, by plan row.

        Args:
            batch: of the step.
            head: gives the logits ``[end - start, V]`` of output rows ``start .. end``; each call
                may overwrite what the one before gave.
            max_rows: most output rows to ask ``head`` for at once.
            arrivals: of the step.
        """
        found: dict[int, list[Entries]] = {}
        for rows in batch.prompt_rows:
            entries = found[rows.plan_row] = []
            for start in range(0, rows.num_rows, max_rows):
                count = min(max_rows, rows.num_rows - start)
                first = rows.first_output + start
                logits = head(first, first + count)
                entries.append(self._prompt_slice(rows, start, logits, arrivals))
        return found

    def _prompt_slice(
        self, rows: PromptRows, start: int, logits: torch.Tensor, arrivals: Arrivals
    ) -> Entries:
        first = rows.first_token + start
        chosen = rows.state.token_ids[first : first + len(logits)]
        top = rows.state.request.sampling.prompt_logprobs or 0
        return self._logprobs(logits, self._rows(chosen), [top] * len(chosen), arrivals)

    def _draw(self, batch: Batch, logits: torch.Tensor) -> torch.Tensor:
        slots, size = batch.sampler_slots, len(logits)
        floats = self._floats.take(slots, axis=1)  # [6, S]
        # New memory each time: the step before may not have been read yet.
        out = torch.empty(size, dtype=torch.int64, device=self._device)
        if not floats[0].any():
            temperature, top_p, min_p, *_ = self._greedy_floats
            zeros = self._zeros[:size]
            self._ops.sample(
                out, logits, temperature[:size], self._zero_top_k[:size], top_p[:size],
                min_p[:size], zeros, zeros, GREEDY,
            )  # fmt: skip
            return out
        counts = self._top_k[slots]
        asked = Draws(top_k=bool(counts.any()), top_p=bool((floats[1] < 1).any()))
        temperature, top_p, min_p, *_ = self._to_device(floats)
        top_k, seeds = self._to_device(counts), self._to_device(self._seeds[slots])
        positions = self._to_device(np.array([row.start + row.num_new for row in batch.samplers]))
        self._ops.sample(out, logits, temperature, top_k, top_p, min_p, seeds, positions, asked)
        return out

    def _keep_raw(
        self, extras: list[_Extras | None], wanted: list[int], logits: torch.Tensor
    ) -> torch.Tensor:
        """The logits of the rows that want log-probabilities, safe from modification."""
        modified = any(extra is not None and extra.sampling.modifies_logits for extra in extras)
        if not modified and len(wanted) == len(logits):
            return logits
        return logits.index_select(0, self._rows(wanted))

    def _modify(self, batch: Batch, extras: list[_Extras | None], logits: torch.Tensor) -> None:
        """Apply penalties, bias and minimum lengths in place."""
        penalty_rows, penalty_ids, penalty_counts = [], [], []
        bias_rows, bias_ids, bias_values = [], [], []
        for row, (extra, sampler) in enumerate(zip(extras, batch.samplers, strict=True)):
            if extra is None:
                continue
            state = sampler.state
            if extra.counts is not None:
                ids, counts = extra.counts.update(state.token_ids)
                penalty_rows.append(np.full(len(ids), row))
                penalty_ids.append(ids)
                penalty_counts.append(counts)
            ids, values = extra.bias(sampler.start + sampler.num_new - state.num_prompt)
            if len(ids):
                bias_rows.append(np.full(len(ids), row))
                bias_ids.append(ids)
                bias_values.append(values)
        if penalty_rows:
            floats = self._to_device(self._floats.take(batch.sampler_slots, axis=1))
            self._ops.apply_penalties(
                logits,
                self._to_device(np.concatenate(penalty_rows)),
                self._to_device(np.concatenate(penalty_ids)),
                self._to_device(np.concatenate(penalty_counts)),
                *floats[3:],
            )
        if bias_rows:
            self._ops.add_bias(
                logits,
                self._to_device(np.concatenate(bias_rows)),
                self._to_device(np.concatenate(bias_ids)),
                self._to_device(np.concatenate(bias_values)),
            )

    def _logprobs(
        self,
        logits: torch.Tensor,
        chosen: torch.Tensor,
        top_counts: list[int],
        arrivals: Arrivals,
    ) -> Entries:
        """One entry for each row of ``logits``, with so many top tokens each."""
        size, top = len(top_counts), min(max(top_counts), self._vocab_size)
        values = torch.empty((size, top + 1), dtype=torch.float32, device=self._device)
        ids = torch.empty((size, top + 1), dtype=torch.int64, device=self._device)
        ranks = torch.empty(size, dtype=torch.int64, device=self._device)
        self._ops.logprobs(values, ids, ranks, logits, chosen, top)
        values, ids, ranks = map(arrivals.bring, (values, ids, ranks))
        return Entries(values, ids, ranks, top_counts)

    def _rows(self, indices: list[int]) -> torch.Tensor:
        return self._to_device(np.array(indices, dtype=np.int64))

    def _to_device(self, array: npt.NDArray[np.generic]) -> torch.Tensor:
        return to_device(array, self._device)
