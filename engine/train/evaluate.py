"""Held-out loss by source, and answers to fixed prompts."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from engine.train.attention import Segments
from engine.train.checkpoint import write_atomically
from engine.train.data import DataError, Documents, Packer
from engine.train.dialogue import ChatTemplate
from engine.train.model import Qwen3
from engine.train.tokenizer import Encoder
from engine.train.trainer import Trainer

__all__ = ["PROMPTS", "Answer", "HeldOut", "evaluate", "sample_answers", "write_report"]

PROMPTS = (
    "Hello! How are you?",
    "My name is Anna.",
    "Tell me something interesting.",
    "What is the capital of France?",
    "What is 7 + 5?",
    "Write a function called get_evens that returns the even numbers of a list.",
    "What is a good gift for my brother? He likes painting.",
    "What should I do this weekend?",
    "Why is the sky blue?",
    "你好！你是谁？",
    "Thank you, goodbye!",
)
"""The prompts whose answers the model card shows."""


@dataclass(frozen=True, slots=True)
class HeldOut:
    """Loss on the held-out part of one source."""

    num_targets: int
    """Tokens of assistant turns that were predicted."""
    exit_losses: tuple[float, ...]
    """Mean cross-entropy in nats per token, read off after each layer; the last is the model's."""

    @property
    def loss(self) -> float:
        """Of the whole model."""
        return self.exit_losses[-1]

    @property
    def perplexity(self) -> float:
        """Its exponential."""
        return math.exp(self.loss)


@dataclass(frozen=True, slots=True)
class Answer:
    """A prompt and what the model said to it."""

    prompt: str
    text: str


@torch.inference_mode()
def evaluate(
    model: Qwen3,
    token_dir: Path,
    sources: list[str],
    *,
    sequence_len: int,
    pad_id: int,
    max_rows: int = 16,
) -> dict[str, HeldOut]:
    """Held-out loss of each source, over about `max_rows` rows of tokens and at most one epoch.

    Sources without held-out text are left out.
    """
    results = {}
    for source in sources:
        try:
            documents = Documents.load(token_dir, source)
        except DataError:
            continue
        packer = Packer(
            {source: documents}, {source: 1.0}, sequence_len=sequence_len, pad_id=pad_id, seed=0
        )
        nats = torch.zeros(model.config.num_hidden_layers, dtype=torch.float64)
        count, rows = 0, 0
        while packer.state[source]["epoch"] == 0 and rows < max_rows:
            batch = packer.batch(1)
            rows += 1
            segments = Segments.of(batch.document_ids, model.device)
            ids, targets, weights = (
                torch.from_numpy(part[0]).to(model.device)
                for part in (batch.token_ids, batch.targets, batch.weights)
            )
            chosen = weights > 0
            for index, hidden in enumerate(model.hidden_states(ids, segments)):
                logits = model.logits(hidden[chosen])
                nats[index] += F.cross_entropy(logits, targets[chosen], reduction="sum").item()
            count += int(chosen.sum())
        results[source] = HeldOut(count, tuple((nats / count).tolist()))
    return results


@torch.inference_mode()
def generate(
    model: Qwen3, token_ids: list[int], stop_ids: set[int], *, max_tokens: int
) -> list[int]:
    """Greedy continuation, recomputing the whole sequence for each token; for short answers."""
    ids = list(token_ids)
    for _ in range(max_tokens):
        token_id = int(model(torch.tensor(ids, device=model.device))[-1].argmax())
        if token_id in stop_ids:
            break
        ids.append(token_id)
    return ids[len(token_ids) :]


def sample_answers(
    model: Qwen3, encoder: Encoder, template: ChatTemplate, *, max_tokens: int = 80
) -> list[Answer]:
    """Greedy answers to the fixed prompts."""
    stop_ids = {encoder.id_of("<|im_end|>"), encoder.id_of("<|endoftext|>")}
    answers = []
    for prompt in PROMPTS:
        text = template.render([{"role": "user", "content": prompt}], add_generation_prompt=True)
        ids = generate(model, encoder.encode(text), stop_ids, max_tokens=max_tokens)
        answers.append(Answer(prompt, encoder.decode(ids)))
    return answers


def write_report(
    path: Path,
    trainer: Trainer,
    losses: dict[str, HeldOut],
    answers: list[Answer],
    *,
    utilisation: float,
) -> None:
    """Writes what the run used and what came out as JSON, the source of the model card."""
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
        "answers": [{"prompt": answer.prompt, "answer": answer.text} for answer in answers],
    }
    write_atomically(path, json.dumps(document, ensure_ascii=False, indent=2).encode())
