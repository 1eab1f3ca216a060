"""One call from settings to a tuned model on disk."""

from __future__ import annotations

import threading
import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from engine.errors import ConfigError
from engine.hub import resolve_model
from engine.model_config import read_model_config
from engine.tokenizer import Tokenizer
from engine.train.tuning.dataset import Dataset, Summary, build_dataset
from engine.train.tuning.examples import Examples, read_examples
from engine.train.tuning.output import check_free, whole_directory, write_record
from engine.train.tuning.plan import Method, Plan, TuneSettings, make_plan

if TYPE_CHECKING:
    import torch

    from engine.train.model import Qwen3
    from engine.train.tuning.loop import Outcome, StepReport

__all__ = ["Watcher", "tune"]

_DEFAULT_MAX_LEN = 2048
_STEP_FACTOR = 3.0
"""A step costs about this many forward passes over its tokens."""


class Watcher(Protocol):
    """Who is told how a run goes."""

    def stage(self, text: str, fraction: float) -> None:
        """Something slow is going on, and this part of it is done, 0 to 1."""

    def checked(self, summary: Summary) -> None:
        """The data is usable; no model is loaded yet."""

    def planned(self, plan: Plan, heldout: float, estimate_s: float, num_trained: int) -> None:
        """What is about to happen; `heldout` is the loss before it, in nats per token."""

    def stepped(self, report: StepReport) -> None:
        """A step is done."""


def tune(settings: TuneSettings, watcher: Watcher, stop: threading.Event | None = None) -> Outcome:
    """Checks the data, tunes, and writes `settings.out`.

    Args:
        settings: what is wanted.
        watcher: told about it.
        stop: set from another thread or a signal handler, it ends the run after the step under
            way; the best weights so far are written.

    Raises:
        DataError: the examples cannot be used.
        ConfigError: a setting does not fit.
        CheckpointError, TokenizerError: the model is missing, damaged or not supported.
    """
    check_free(settings.out, overwrite=settings.overwrite)
    examples = read_examples(settings.data)
    base = resolve_model(settings.model, watcher.stage)
    if settings.out.resolve() == base.resolve():
        raise ConfigError(f"{settings.out} is the model itself; --out must name another directory")
    dataset = _dataset(settings, examples, base, watcher)
    watcher.checked(dataset.summary)
    watcher.stage("loading the model", 0.0)
    # Imported here: torch takes seconds, and the data had to be looked at first.
    import torch

    from engine.train.load import load_model
    from engine.train.model import compute_dtype_of
    from engine.train.tuning.loop import Tuner
    from engine.train.tuning.lora import add_adapters

    torch.manual_seed(settings.seed)
    if settings.num_threads is not None:
        torch.set_num_threads(settings.num_threads)
    device = _device(settings.device)
    model = load_model(base, compute_dtype_of(device), device)
    plan = make_plan(
        settings,
        dataset.summary,
        num_parameters=sum(p.numel() for p in model.parameters()),
        hidden_size=model.config.hidden_size,
    )
    if plan.method is Method.LORA:
        add_adapters(
            model,
            rank=settings.rank,
            alpha=_alpha(settings),
            rslora=settings.rslora,
            target_modules=settings.target_modules,
        )
    before, forward_s = _measure(model, dataset)
    num_trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    watcher.planned(plan, before, _estimate_s(plan, dataset, forward_s), num_trained)
    tuner = Tuner(
        model, dataset.train, dataset.heldout, plan, patience=settings.patience, seed=settings.seed
    )
    outcome = tuner.run(before, watcher.stepped, stop)
    watcher.stage("writing", 0.0)
    _write(settings, plan, dataset.summary, outcome, model, base)
    return outcome


def _dataset(settings: TuneSettings, examples: Examples, base: Path, watcher: Watcher) -> Dataset:
    max_context = read_model_config(base).max_context
    max_len = settings.max_len or min(_DEFAULT_MAX_LEN, max_context)
    if max_len > max_context:
        raise ConfigError(f"max_len is {max_len}; the model's context has {max_context} tokens")
    tokenizer = Tokenizer.load(base)
    try:
        return build_dataset(
            examples,
            tokenizer,
            max_len=max_len,
            seed=settings.seed,
            skip_bad=settings.skip_bad,
            on_progress=lambda fraction: watcher.stage("checking the data", fraction),
        )
    finally:
        tokenizer.close()


def _measure(model: Qwen3, dataset: Dataset) -> tuple[float, float]:
    """Held-out loss, and the seconds that a forward pass takes for each token."""
    from engine.train.tuning.loop import heldout_loss

    heldout_loss(model, dataset.heldout[:1])  # the first pass sets things up
    began = time.monotonic()
    loss = heldout_loss(model, dataset.heldout)
    num_tokens = sum(len(one) for one in dataset.heldout)
    return loss, (time.monotonic() - began) / num_tokens


def _estimate_s(plan: Plan, dataset: Dataset, forward_s: float) -> float:
    """Seconds that all steps of the plan take."""
    num_heldout = sum(len(one) for one in dataset.heldout)
    trained = plan.epochs * dataset.summary.num_tokens * _STEP_FACTOR
    return forward_s * (trained + num_heldout * plan.num_steps / plan.eval_every)


def _write(
    settings: TuneSettings,
    plan: Plan,
    summary: Summary,
    outcome: Outcome,
    model: Qwen3,
    base: Path,
) -> None:
    from engine.train.tuning.lora import merge_adapters, write_adapter
    from engine.train.tuning.weights import write_checkpoint

    with whole_directory(settings.out) as out:
        if settings.keep_adapter:
            write_adapter(
                model,
                out,
                base=_base_name(settings.model),
                rank=settings.rank,
                alpha=_alpha(settings),
                rslora=settings.rslora,
                target_modules=settings.target_modules,
            )
        else:
            merge_adapters(model)
            write_checkpoint(model, base, out)
        record = {
            "base": _base_name(settings.model),
            "settings": asdict(settings) | {"method": plan.method.value},
            "plan": asdict(plan) | {"method": plan.method.value},
            "data": asdict(summary),
            "outcome": asdict(outcome),
        }
        write_record(out, record)


def _alpha(settings: TuneSettings) -> float:
    return 2.0 * settings.rank if settings.alpha is None else settings.alpha


def _base_name(model: str) -> str:
    """A directory's full path, since an adapter is looked for from elsewhere; else the name."""
    path = Path(model).expanduser()
    return str(path.resolve()) if path.is_dir() else model


def _device(name: str) -> torch.device:
    import torch

    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device is cuda; there is no GPU that torch can use")
    return torch.device(name)
