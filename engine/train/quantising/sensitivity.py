"""What quantising costs: the loss on some text, with any of the matrices quantised."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from engine.quantisation import quantise
from engine.tensor_file import TensorFile
from engine.train.load import load_model
from engine.train.quantising.plan import Unit
from engine.train.quantising.writer import read_matrix
from engine.train.tuning.dataset import Document
from engine.train.tuning.loop import heldout_loss
from kernels import Scheme, dequantise

__all__ = ["Choice", "Meter", "choose"]


class Meter:
    """Measures the loss of a model some of whose units are quantised; activations are not rounded.

    Args:
        base: the checkpoint.
        files: the file of each of its tensors.
        scheme: what units become.
        documents: the text; its targets count.

    Raises CheckpointError when the model cannot be loaded.
    """

    def __init__(
        self,
        base: Path,
        files: Mapping[str, TensorFile],
        scheme: Scheme,
        documents: Sequence[Document],
    ) -> None:
        self._files = files
        self._scheme = scheme
        self._documents = documents
        self._model = load_model(base, torch.float32)
        self._parameters = dict(self._model.named_parameters())
        self._quantised: dict[str, Unit] = {}

    def loss(self, units: Sequence[Unit]) -> float:
        """Mean cross-entropy in nats per target with exactly these units quantised."""
        wanted = {unit.name: unit for unit in units}
        for name in self._quantised.keys() - wanted.keys():
            self._set(self._quantised.pop(name), quantised=False)
        for name in wanted.keys() - self._quantised.keys():
            self._quantised[name] = wanted[name]
            self._set(wanted[name], quantised=True)
        return heldout_loss(self._model, self._documents)

    @torch.no_grad()
    def _set(self, unit: Unit, *, quantised: bool) -> None:
        # Read anew: to keep the originals would double the memory.
        for name, shape in unit.shapes.items():
            weight = read_matrix(self._files, name, shape)
            if quantised:
                weight = dequantise(quantise(weight, self._scheme), torch.float32)
            self._parameters[name].copy_(weight)


@dataclass(frozen=True, slots=True)
class Choice:
    """Which units to quantise."""

    units: tuple[Unit, ...]
    kept: tuple[Unit, ...]
    """Left as they are to keep the budget, the most sensitive first."""
    before: float
    """Loss of the base, in nats per target."""
    after_all: float
    """Loss with all units quantised."""
    after: float
    """Loss with the chosen ones quantised."""
    rises: dict[str, float]
    """By how much each unit alone raises the loss, where that was measured."""


def choose(
    loss: Callable[[Sequence[Unit]], float],
    units: Sequence[Unit],
    max_rise: float | None,
    on_progress: Callable[[float], None] = lambda fraction: None,
) -> Choice:
    """The most units whose quantisation raises the loss by at most `max_rise`.

    Where all of them are too much, each is measured alone, and so many of the most sensitive are
    kept as are needed; the number is found by bisection, which takes it that to keep more never
    costs.

    Args:
        loss: of the model with these units quantised, in nats per target.
        units: what may be quantised.
        max_rise: in nats per target; None: no limit.
        on_progress: told the finished fraction.
    """
    total = len(units) + 2 + len(units).bit_length()
    done = 0

    def measured(wanted: Sequence[Unit]) -> float:
        nonlocal done
        result = loss(wanted)
        done += 1
        on_progress(min(1.0, done / total))
        return result

    before = measured([])
    after_all = measured(units)
    if max_rise is None or after_all - before <= max_rise:
        return Choice(tuple(units), (), before, after_all, after_all, {})
    rises = {unit.name: measured([unit]) - before for unit in units}
    ordered = sorted(units, key=lambda unit: -rises[unit.name])
    losses = {0: after_all, len(units): before}
    low, high = 0, len(units)  # to keep `low` is too few, `high` is enough
    while high - low > 1:
        middle = (low + high) // 2
        losses[middle] = measured(ordered[middle:])
        if losses[middle] - before <= max_rise:
            high = middle
        else:
            low = middle
    kept = {unit.name for unit in ordered[:high]}
    chosen = tuple(unit for unit in units if unit.name not in kept)
    return Choice(chosen, tuple(ordered[:high]), before, after_all, losses[high], rises)
