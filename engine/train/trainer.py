"""The training loop: batch, loss, backward, step; checkpoints and exports on the way."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from engine.train.attention import Segments
from engine.train.checkpoint import load_checkpoint, save_checkpoint
from engine.train.data import Ahead, Batch, Packer
from engine.train.distributed import Group
from engine.train.model import Qwen3
from engine.train.optim import AdamW, Muon, learning_rate_factor, split_parameters
from engine.train.recipe import TrainRecipe
from engine.train.utilisation import step_flops

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
    flops: float
    """Operations that the steps since the start or the resumption needed."""
    active_s: float
    """Seconds that these steps took."""


def weighted_loss(
    model: Qwen3,
    batch: Batch,
    *,
    total_weight: float,
    skip: frozenset[int] = frozenset(),
    exit_layer: int | None = None,
    exit_weight: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """Weighted cross-entropy in nats over `total_weight`: of the last layer, and of all exits.

    The vocabulary product runs over positions with weight alone, which saves most of it.

    Args:
        model: the model.
        batch: rows; their documents do not see each other.
        total_weight: what the sum is divided by; more than the batch's own weight where the batch
            is a part of a step.
        skip: layers left out (layer dropout).
        exit_layer: an earlier layer whose output goes through the head, too, or None.
        exit_weight: weight of that exit's loss.

    Returns:
        The last layer's loss for the report, and the sum to differentiate.
    """
    device = model.device
    segments = Segments.of(batch.document_ids, device)
    ids, targets, weights = (
        torch.from_numpy(part.reshape(-1))
        for part in (batch.token_ids, batch.targets, batch.weights)
    )
    chosen = torch.nonzero(weights).squeeze(1)  # on the host: no synchronisation with a device
    targets, weights = (x[chosen].to(device) for x in (targets, weights))
    chosen = chosen.to(device)
    outputs = model.hidden_states(ids.to(device), segments, skip=skip)

    def loss_of(hidden: Tensor) -> Tensor:
        return (model.surprise(hidden[chosen], targets) * weights).sum() / total_weight

    loss = loss_of(outputs[-1])
    if exit_layer is None:
        return loss.detach(), loss
    return loss.detach(), loss + exit_weight * loss_of(outputs[exit_layer])


class Trainer:
    """One training run.

    Args:
        model: trained in place.
        packer: gives the batches.
        recipe: learning rates and schedule.
        budget: when to end.
        seed: of layer dropout and exits.
        group: the devices that train together; this one alone if None.
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
        group: Group | None = None,
        clock: Callable[[], float] = time.monotonic,
        wall_clock: Callable[[], float] = time.time,
    ) -> None:
        self.model = model
        self._packer = Ahead(packer, recipe.batch_sequences)
        self._recipe = recipe
        self._budget = budget
        self._group = group or Group()
        if recipe.batch_sequences % self._group.size:
            raise ValueError(
                f"batch_sequences={recipe.batch_sequences} must be a multiple of the number of "
                f"devices, {self._group.size}"
            )
        self._clock = clock
        self._wall_clock = wall_clock
        self._rng = torch.Generator().manual_seed(seed)
        matrices, others = split_parameters(model)
        self._muon = Muon(
            matrices,
            peak_lr=recipe.muon_lr,
            weight_decay=recipe.weight_decay,
            product_dtype=model.compute_dtype,
        )
        self._adam = AdamW(others, peak_lr=recipe.adam_lr)
        self.num_steps = 0
        self.num_tokens = 0
        self.train_s = 0.0
        self.history: list[tuple[int, float]] = []
        self._flops = 0.0
        self._active_s = 0.0

    @property
    def progress(self) -> float:
        """Used part of the budget, 0 to 1; the same on all devices, for clocks differ."""
        return self._group.agreed(self._own_progress())

    def _own_progress(self) -> float:
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
        """Trains on one batch, in parts of `micro_sequences` rows on each device."""
        began = self._clock()
        recipe = self._recipe
        batch = self._packer.batch()
        factor = learning_rate_factor(
            self.progress, warmup=recipe.warmup_fraction, decay=recipe.decay_fraction
        )
        loss = self._backward(batch)
        self._group.add_up([p.grad for p in self.model.parameters() if p.grad is not None])
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), recipe.max_grad_norm)
        self._muon.step(factor)
        self._adam.step(factor)
        self.model.zero_grad(set_to_none=True)
        self.num_steps += 1
        self.num_tokens += int((batch.document_ids > 0).sum())
        self.history.append((self.num_tokens, loss))
        duration_s = self._clock() - began
        if duration_s < _LONGEST_COUNTED_STEP_S:
            self.train_s += duration_s
            self._active_s += duration_s
            exits = 2 if recipe.early_exit_weight > 0 else 1
            self._flops += step_flops(self.model.config, batch, num_exits=exits)
        return StepReport(
            step=self.num_steps,
            loss=loss,
            grad_norm=norm.item(),
            num_tokens=self.num_tokens,
            train_s=self.train_s,
            progress=self.progress,
            flops=self._flops,
            active_s=self._active_s,
        )

    def _backward(self, batch: Batch) -> float:
        """Gradients of this device's rows; the loss over all of them."""
        recipe = self._recipe
        skip, exit_layer = self._skipped_layers(), self._exit_layer()
        total_weight = float(batch.weights.sum())
        own = batch.rows(self._group.rank, self._group.size)
        total = torch.zeros((), device=self.model.device)
        for first in range(0, len(own.token_ids), recipe.micro_sequences or len(own.token_ids)):
            shown, loss = weighted_loss(
                self.model,
                own.part(first, first + (recipe.micro_sequences or len(own.token_ids))),
                total_weight=total_weight,
                skip=skip,
                exit_layer=exit_layer,
                exit_weight=recipe.early_exit_weight,
            )
            loss.backward()  # type: ignore[no-untyped-call]
            total += shown
        self._group.add_up([total])
        return total.item()

    def _exit_layer(self) -> int | None:
        """The earlier layer that is trained as an exit in this step.

        One a step, drawn with a chance that rises with depth, costs one vocabulary product instead
        of one for each layer and has LayerSkip's weighted sum as its mean (arXiv:2404.16710).
        """
        num_exits = self.model.config.num_hidden_layers - 1
        if self._recipe.early_exit_weight <= 0 or num_exits < 1:
            return None
        chances = torch.arange(1.0, num_exits + 1)
        return int(torch.multinomial(chances, 1, generator=self._rng))

    def _skipped_layers(self) -> frozenset[int]:
        """A draw of layer dropout: exponential in depth, as in LayerSkip (arXiv:2404.16710)."""
        last = self.model.config.num_hidden_layers - 1
        if self._recipe.layer_dropout <= 0 or last < 1:
            return frozenset()
        draws = torch.rand(last + 1, generator=self._rng).tolist()
        rates = [self._recipe.layer_dropout * (2 ** (i / last) - 1) for i in range(last + 1)]
        return frozenset(i for i, rate in enumerate(rates) if draws[i] < rate)

    def save(self, directory: Path) -> None:
        """Writes a checkpoint from which `resume` continues exactly."""
        tensors = {f"model.{name}": p.detach() for name, p in self.model.named_parameters()}
        for part, own in self._optimizer_tensors().items():
            tensors |= {f"{part}.{name}": tensor for name, tensor in own.items()}
        tensors["rng"] = self._rng.get_state()
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
        self._rng.set_state(tensors["rng"])
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
