"""The tuning loop: batches of whole documents, AdamW, the weights with the best held-out loss."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from engine.errors import ConfigError
from engine.train.attention import Segments
from engine.train.model import Qwen3
from engine.train.optim import AdamW
from engine.train.tuning.dataset import Document
from engine.train.tuning.plan import Plan

__all__ = ["Outcome", "StepReport", "Tuner", "heldout_loss"]

_MICRO_TOKENS = 2048
"""Tokens computed at once; what a step has more goes into several backward passes."""
_HEAD_ROWS = 512
"""Rows whose scores over the vocabulary exist at once."""
_MAX_GRAD_NORM = 1.0
_GPU_MULTIPLE = 128  # FlexAttention's block; a row of any other length would compile anew


@dataclass(frozen=True, slots=True)
class StepReport:
    """What one step did."""

    step: int
    """Steps so far."""
    loss: float
    """Mean cross-entropy of the step's targets in nats."""
    heldout: float | None
    """The held-out loss, where it was measured."""
    num_tokens: int
    """Tokens so far."""
    train_s: float
    """Seconds so far, measuring included."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a run ended."""

    steps: int
    best_step: int
    """The step whose weights are kept."""
    before: float
    """Held-out loss in nats per target before the run."""
    after: float
    """Held-out loss of the weights kept."""
    stopped: bool
    """Whether it was stopped from outside."""
    converged: bool
    """Whether it ended early because the held-out loss did not fall any more."""
    train_s: float
    num_tokens: int


class Tuner:
    """One run.

    Args:
        model: trained in place; parameters without gradient stay as they are.
        train: documents to learn from.
        heldout: documents to measure by.
        plan: steps, rates, batches.
        patience: measurements without a better loss after which the run ends.
        seed: of the order.
    """

    def __init__(
        self,
        model: Qwen3,
        train: Sequence[Document],
        heldout: Sequence[Document],
        plan: Plan,
        *,
        patience: int,
        seed: int,
    ) -> None:
        self._model = model
        self._heldout = heldout
        self._plan = plan
        self._patience = patience
        self._trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
        self._adam = AdamW(self._trained, peak_lr=plan.learning_rate, eps=1e-8)
        self._batches = _batches(train, plan.batch_tokens, seed)
        self._best: dict[str, Tensor] = {}

    def run(
        self,
        before: float,
        on_step: Callable[[StepReport], None] = lambda report: None,
        stop: threading.Event | None = None,
    ) -> Outcome:
        """Trains until the plan is done, nothing gets better, or `stop` is set.

        Args:
            before: held-out loss of the model as it came.
            on_step: called after each step.
            stop: ends the run after the step; the best weights so far are kept.

        Raises ConfigError when the loss is no number before any weights were worth keeping.
        """
        began = time.monotonic()
        best, best_step, step, num_tokens = float("inf"), 0, 0, 0
        stopped = converged = False
        while step < self._plan.num_steps and not (stopped or converged):
            batch = next(self._batches)
            loss = self._step(batch, self._plan.lr_factor(step))
            step += 1
            if not math.isfinite(loss) and not self._best:
                raise ConfigError(
                    f"the loss is {loss} after {step} steps at a learning rate of "
                    f"{self._plan.learning_rate:g}; a lower one is needed"
                )
            num_tokens += sum(len(one) for one in batch)
            stopped = stop is not None and stop.is_set()
            heldout = None
            if stopped or step % self._plan.eval_every == 0 or step == self._plan.num_steps:
                heldout = heldout_loss(self._model, self._heldout)
                if heldout < best:
                    best, best_step = heldout, step
                    self._best = {n: p.detach().clone() for n, p in self._trained.items()}
                converged = step - best_step >= self._patience * self._plan.eval_every
            train_s = time.monotonic() - began
            on_step(StepReport(step, loss, heldout, num_tokens, train_s))
        with torch.no_grad():
            for name, parameter in self._trained.items():
                parameter.copy_(self._best[name])
        train_s = time.monotonic() - began
        return Outcome(
            steps=step,
            best_step=best_step,
            before=before,
            after=best,
            stopped=stopped,
            converged=converged and step < self._plan.num_steps,
            train_s=train_s,
            num_tokens=num_tokens,
        )

    def _step(self, batch: Sequence[Document], lr_factor: float) -> float:
        num_targets = sum(int(one.learned[1:].sum()) for one in batch)
        total = 0.0
        for part in _micro_batches(batch):
            loss = _summed_nats(self._model, part) / num_targets
            loss.backward()  # type: ignore[no-untyped-call]
            total += loss.item()
        torch.nn.utils.clip_grad_norm_(self._trained.values(), _MAX_GRAD_NORM)
        self._adam.step(lr_factor)
        self._model.zero_grad(set_to_none=True)
        return total


@torch.no_grad()
def heldout_loss(model: Qwen3, documents: Sequence[Document]) -> float:
    """Mean cross-entropy in nats over all targets of the documents."""
    num_targets = sum(int(one.learned[1:].sum()) for one in documents)
    parts = _micro_batches(documents)
    return sum(_summed_nats(model, part).item() for part in parts) / num_targets


def _summed_nats(model: Qwen3, documents: Sequence[Document]) -> Tensor:
    """Cross-entropy summed over the targets of documents packed behind one another."""
    device = model.device
    inputs = np.concatenate([one.token_ids[:-1] for one in documents])
    targets = np.concatenate([one.token_ids[1:] for one in documents])
    learned = np.concatenate([one.learned[1:] for one in documents])
    index = np.repeat(np.arange(1, len(documents) + 1), [len(one) - 1 for one in documents])
    padding = 0 if device.type == "cpu" else -len(inputs) % _GPU_MULTIPLE
    inputs, index = np.pad(inputs, (0, padding)), np.pad(index, (0, padding))
    segments = Segments.of(index[None], device)
    hidden = model.hidden_states(torch.from_numpy(inputs).to(device), segments)[-1]
    rows = torch.from_numpy(np.flatnonzero(learned)).to(device)
    wanted = torch.from_numpy(targets[learned]).to(device)

    def nats(hidden: Tensor, wanted: Tensor) -> Tensor:
        return F.cross_entropy(model.logits(hidden), wanted, reduction="sum")

    total = torch.zeros((), device=device)
    for own, goal in zip(
        torch.split(rows, _HEAD_ROWS), torch.split(wanted, _HEAD_ROWS), strict=True
    ):
        part = checkpoint(nats, hidden[own], goal, use_reentrant=False)
        assert isinstance(part, Tensor)
        total = total + part
    return total


def _micro_batches(documents: Sequence[Document]) -> Iterator[list[Document]]:
    """Groups of documents, in order, of at most `_MICRO_TOKENS` where a document allows it."""
    group: list[Document] = []
    for document in documents:
        if group and sum(map(len, group)) + len(document) > _MICRO_TOKENS:
            yield group
            group = []
        group.append(document)
    if group:
        yield group


def _batches(
    documents: Sequence[Document], batch_tokens: int, seed: int
) -> Iterator[list[Document]]:
    """Batches without end: each pass over the documents has its own order."""
    rng = np.random.default_rng(seed)
    batch: list[Document] = []
    while True:
        for place in rng.permutation(len(documents)):
            if batch and sum(map(len, batch)) + len(documents[place]) > batch_tokens:
                yield batch
                batch = []
            batch.append(documents[place])
