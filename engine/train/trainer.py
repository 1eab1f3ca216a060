"""The training loop: batch, loss, backward, step; checkpoints and exports on the way."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from engine.train.checkpoint import load_checkpoint, save_checkpoint
from engine.train.data import Batch, Packer
from engine.train.model import Qwen3, document_mask
from engine.train.optim import AdamW, Muon, learning_rate_factor, split_parameters
from engine.train.recipe import TrainRecipe

__all__ = ["Budget", "StepReport", "Trainer", "weighted_loss"]

_LONGEST_COUNTED_STEP_S = 30.0  # a longer one means that the process was stopped meanwhile


@dataclass(frozen=True, slots=True)
class Budget:
    """When a run ends; the learning rate follows the part of it that is used up.

    Give `num_steps`, which makes runs repeatable, or `train_s`, which makes them end in time.
    """

    num_steps: int | None = None
    """Optimiser steps."""
    train_s: float | None = None
    """Seconds of computing; time in which the process was stopped does not count."""
    deadline: float | None = None
    """Unix time at which the run ends even if `train_s` is not used up."""

    def __post_init__(self) -> None:
        if (self.num_steps is None) == (self.train_s is None):
            raise ValueError("a budget has either num_steps or train_s")


@dataclass(frozen=True, slots=True)
class StepReport:
    """What one step did."""

    step: int
    """Steps so far."""
    loss: float
    """Mean weighted cross-entropy in nats."""
    grad_norm: float
    """Before clipping."""
    num_tokens: int
    """Tokens so far, padding not counted."""
    train_s: float
    """Seconds of computing so far."""
    progress: float
    """Used part of the budget, 0 to 1."""


def weighted_loss(model: Qwen3, batch: Batch, recipe: TrainRecipe, skip: frozenset[int]) -> Tensor:
    """Weighted mean cross-entropy in nats; earlier exits added if the recipe asks for them.

    The vocabulary product runs over positions with weight alone, which saves most of it.
    """
    mask = document_mask(torch.from_numpy(batch.document_ids))
    outputs = model.hidden_states(torch.from_numpy(batch.token_ids), mask, skip=skip)
    all_weights = torch.from_numpy(batch.weights)
    chosen = all_weights > 0
    weights = all_weights[chosen]
    targets = torch.from_numpy(batch.targets)[chosen]

    def loss_of(hidden: Tensor) -> Tensor:
        nats = F.cross_entropy(model.logits(hidden[chosen]), targets, reduction="none")
        return (nats * weights).sum() / weights.sum()

    loss = loss_of(outputs[-1])
    if recipe.early_exit_weight > 0:
        scales = [index + 1 for index in range(len(outputs) - 1)]  # later exits count for more
        for scale, hidden in zip(scales, outputs[:-1], strict=True):
            loss = loss + recipe.early_exit_weight * scale / sum(scales) * loss_of(hidden)
    return loss


class Trainer:
    """One training run.

    Args:
        model: trained in place.
        packer: gives the batches.
        recipe: learning rates and schedule.
        budget: when to end.
        seed: of layer dropout.
        clock: seconds, for the durations of steps.
        wall_clock: Unix seconds, for the deadline.
    """

    def __init__(
        self,
        model: Qwen3,
        packer: Packer,
        recipe: TrainRecipe,
        budget: Budget,
        *,
        seed: int,
        clock: Callable[[], float] = time.monotonic,
        wall_clock: Callable[[], float] = time.time,
    ) -> None:
        self.model = model
        self._packer = packer
        self._recipe = recipe
        self._budget = budget
        self._clock = clock
        self._wall_clock = wall_clock
        self._dropout_rng = torch.Generator().manual_seed(seed)
        matrices, others = split_parameters(model)
        self._muon = Muon(matrices, peak_lr=recipe.muon_lr, weight_decay=recipe.weight_decay)
        self._adam = AdamW(others, peak_lr=recipe.adam_lr)
        self._started = wall_clock()
        self.num_steps = 0
        self.num_tokens = 0
        self.train_s = 0.0
        self.history: list[tuple[int, float]] = []

    @property
    def progress(self) -> float:
        """Used part of the budget, 0 to 1."""
        budget = self._budget
        if budget.num_steps is not None:
            return min(1.0, self.num_steps / budget.num_steps)
        used = self.train_s / (budget.train_s or math.inf)
        if budget.deadline is not None:
            # What is left of the budget may not fit before the deadline: measure the rest of the
            # run by the shorter of the two, so that the decay still reaches zero.
            left_s = budget.deadline - self._wall_clock()
            used = max(used, self.train_s / max(self.train_s + left_s, 1e-9))
        return min(1.0, used)

    def step(self) -> StepReport:
        """Trains on one batch."""
        began = self._clock()
        recipe = self._recipe
        batch = self._packer.batch(recipe.batch_sequences)
        factor = learning_rate_factor(
            self.progress, warmup=recipe.warmup_fraction, decay=recipe.decay_fraction
        )
        loss = weighted_loss(self.model, batch, recipe, self._skipped_layers())
        loss.backward()  # type: ignore[no-untyped-call]
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), recipe.max_grad_norm)
        self._muon.step(factor)
        self._adam.step(factor)
        self.model.zero_grad(set_to_none=True)
        self.num_steps += 1
        self.num_tokens += int((batch.document_ids > 0).sum())
        duration_s = self._clock() - began
        if duration_s < _LONGEST_COUNTED_STEP_S:
            self.train_s += duration_s
        self.history.append((self.num_tokens, loss.item()))
        return StepReport(
            step=self.num_steps,
            loss=loss.item(),
            grad_norm=norm.item(),
            num_tokens=self.num_tokens,
            train_s=self.train_s,
            progress=self.progress,
        )

    def _skipped_layers(self) -> frozenset[int]:
        """A draw of layer dropout: exponential in depth, as in LayerSkip (arXiv:2404.16710)."""
        last = self.model.config.num_hidden_layers - 1
        if self._recipe.layer_dropout <= 0 or last < 1:
            return frozenset()
        draws = torch.rand(last + 1, generator=self._dropout_rng).tolist()
        rates = [self._recipe.layer_dropout * (2 ** (i / last) - 1) for i in range(last + 1)]
        return frozenset(i for i, rate in enumerate(rates) if draws[i] < rate)

    def save(self, directory: Path) -> None:
        """Writes a checkpoint from which `resume` continues exactly."""
        tensors = {f"model.{name}": p.detach() for name, p in self.model.named_parameters()}
        for part, own in self._optimizer_tensors().items():
            tensors |= {f"{part}.{name}": tensor for name, tensor in own.items()}
        tensors["dropout_rng"] = self._dropout_rng.get_state()
        state: dict[str, Any] = {
            "step": self.num_steps,
            "num_tokens": self.num_tokens,
            "train_s": self.train_s,
            "adam_steps": self._adam.num_steps,
            "packer": self._packer.state,
            "recipe": asdict(self._recipe),
            "history": self.history,
        }
        save_checkpoint(directory, tensors, state)

    def resume(self, directory: Path) -> bool:
        """Takes up the latest checkpoint of `directory`; False if there is none."""
        loaded = load_checkpoint(directory)
        if loaded is None:
            return False
        tensors, state = loaded
        with torch.no_grad():
            for name, parameter in self.model.named_parameters():
                parameter.copy_(tensors[f"model.{name}"])
            for part, own in self._optimizer_tensors().items():
                for name, tensor in own.items():
                    tensor.copy_(tensors[f"{part}.{name}"])
        self._dropout_rng.set_state(tensors["dropout_rng"])
        self._packer.restore(state["packer"])
        self._adam.num_steps = state["adam_steps"]
        self.num_steps = state["step"]
        self.num_tokens = state["num_tokens"]
        self.train_s = state["train_s"]
        self.history = [(int(tokens), float(loss)) for tokens, loss in state["history"]]
        return True

    def _optimizer_tensors(self) -> dict[str, dict[str, Tensor]]:
        return {
            "muon": self._muon.state,
            "adam_first": self._adam.first,
            "adam_second": self._adam.second,
        }
