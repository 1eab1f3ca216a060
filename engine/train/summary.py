"""What a training run used and what came out, as JSON."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from engine.train.checkpoint import write_atomically
from engine.train.evaluation.perplexity import HeldOut
from engine.train.trainer import Trainer

__all__ = ["write_summary"]


def write_summary(
    path: Path, trainer: Trainer, losses: dict[str, HeldOut], *, utilisation: float
) -> None:
    """Writes size, length, `utilisation` (a share of the device's peak) and losses of a run."""
    document: dict[str, Any] = {
        "num_parameters": sum(p.numel() for p in trainer.model.parameters()),
        "num_steps": trainer.num_steps,
        "num_tokens": trainer.num_tokens,
        "train_s": round(trainer.train_s),
        "utilisation": round(utilisation, 3),
        "heldout": {
            source: {
                "num_targets": result.num_targets,
                "loss": round(result.loss, 4),
                "perplexity": round(result.perplexity, 3),
                "exit_losses": [round(loss, 4) for loss in result.exit_losses],
            }
            for source, result in losses.items()
        },
    }
    write_atomically(path, json.dumps(document, ensure_ascii=False, indent=2).encode())
