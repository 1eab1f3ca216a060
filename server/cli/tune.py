"""``millrace tune``: what a person sees of a fine-tuning run."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from rich import progress
from rich.console import Console
from rich.table import Table

from engine import EngineError
from engine.train.tuning.dataset import Summary
from engine.train.tuning.examples import DataError
from engine.train.tuning.plan import Method, Plan, TuneSettings
from engine.train.tuning.run import tune as run

if TYPE_CHECKING:
    from engine.train.tuning.loop import Outcome, StepReport

__all__ = ["TuneError", "default_out", "tune"]

_MAX_PROBLEMS = 10
_INTERRUPTED = 130


class TuneError(Exception):
    """The run cannot be done; the text is for the person who asked for it."""


def default_out(data: Path, model: str) -> Path:
    """A directory beside the data, named by data and model."""
    stem = data.name
    for suffix in (".gz", ".xz", ".jsonl", ".json"):
        stem = stem.removesuffix(suffix)
    name = Path(model).name.partition("@")[0]
    return data.with_name(f"{stem}-{name}")


def tune(settings: TuneSettings) -> int:
    """Run it; return the exit status. The first Ctrl-C ends it with the best weights so far.

    Raises TuneError.
    """
    console = Console(soft_wrap=True)
    with _Screen(console, settings) as screen, _interruptible(screen) as stop:
        try:
            outcome = run(settings, screen, stop)
        except DataError as error:
            screen.end()
            _show_problems(console, settings.data, error)
            raise TuneError(str(error)) from error
        except (EngineError, OSError) as error:
            raise TuneError(str(error)) from error
        except KeyboardInterrupt:
            console.print("stopped; nothing was written")
            return _INTERRUPTED
    _show_outcome(console, settings, outcome)
    return 0


@contextlib.contextmanager
def _interruptible(screen: _Screen) -> Iterator[threading.Event]:
    """An event that SIGINT and SIGTERM set.

    A second one, or one before there is anything to keep, raises KeyboardInterrupt.
    """
    event = threading.Event()

    def on_signal(number: int, frame: object) -> None:
        if event.is_set() or not screen.tuning:
            raise KeyboardInterrupt
        event.set()

    previous = {one: signal.signal(one, on_signal) for one in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield event
    finally:
        for one, handler in previous.items():
            signal.signal(one, handler)


class _Screen:
    """Tables and a bar on a terminal; elsewhere a line for each measurement."""

    def __init__(self, console: Console, settings: TuneSettings) -> None:
        self._console = console
        self._settings = settings
        self._bar = progress.Progress(
            progress.TextColumn("{task.description}", markup=False),
            progress.BarColumn(),
            progress.TaskProgressColumn(),
            progress.TextColumn("{task.fields[note]}", markup=False),
            progress.TimeRemainingColumn(),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )
        self._task = self._bar.add_task("starting", total=1.0, note="")
        self._num_steps = 1
        self.tuning = False
        """Whether there is something to keep."""
        self._loss: float | None = None

    def __enter__(self) -> _Screen:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.end()

    def end(self) -> None:
        """Take the bar away."""
        self._bar.stop()

    def stage(self, text: str, fraction: float) -> None:
        self._bar.update(self._task, description=text, completed=fraction, note="")

    def checked(self, summary: Summary) -> None:
        left_out = [
            (summary.num_duplicates, "repeated"),
            (summary.num_skipped, "unusable, left out"),
        ]
        notes = ", ".join(f"{count} {what}" for count, what in left_out if count)
        share = summary.num_learned / summary.num_tokens
        longest = f"{summary.longest:,} tokens"
        if summary.num_cut:
            longest += f"; {summary.num_cut} examples are cut to {summary.max_len:,}"
        rows = {
            "lines": f"{summary.num_lines:,}" + (f" ({notes})" if notes else ""),
            "examples": f"{summary.num_train:,} to learn from, {summary.num_heldout} held out",
            "tokens": f"{summary.num_tokens:,}, of which {share:.0%} are learned",
            "longest": longest,
        }
        self._console.print(_table(rows))

    def planned(self, plan: Plan, heldout: float, estimate_s: float, num_trained: int) -> None:
        method = "all weights"
        if plan.method is Method.LORA:
            method = f"LoRA of rank {self._settings.rank}"
        rows = {
            "method": f"{method} ({num_trained:,} parameters)",
            "steps": f"{plan.num_steps} of {plan.batch_tokens:,} tokens ({plan.epochs:g} epochs)",
            "learning rate": f"{plan.learning_rate:.1e} after {plan.warmup_steps} steps",
            "time": f"about {_duration(estimate_s)}, less if it stops improving",
            "held-out loss": f"{heldout:.3f} nats per token before",
        }
        self._console.print(_table(rows))
        self._num_steps = plan.num_steps

    def stepped(self, report: StepReport) -> None:
        previous = report.loss if self._loss is None else self._loss
        self.tuning = True
        self._loss = 0.8 * previous + 0.2 * report.loss
        speed = report.num_tokens / max(report.train_s, 1e-9)
        note = f"loss {self._loss:.3f}  {speed:,.0f} tokens/s"
        fraction = report.step / self._num_steps
        self._bar.update(self._task, description="tuning", completed=fraction, note=note)
        if report.heldout is not None:
            self._console.print(
                f"step {report.step:4}  {note}  held out {report.heldout:.3f}", highlight=False
            )


def _table(rows: dict[str, str]) -> Table:
    table = Table.grid(padding=(0, 2))
    for name, value in rows.items():
        table.add_row(name, value)
    return table


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{max(1, round(seconds))} s"
    return f"{round(seconds / 60)} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def _show_problems(console: Console, data: Path, error: DataError) -> None:
    for problem in error.problems[:_MAX_PROBLEMS]:
        console.print(f"{data}:{problem.line}: {problem.text}", markup=False, highlight=False)
    if len(error.problems) > _MAX_PROBLEMS:
        console.print(f"… and {len(error.problems) - _MAX_PROBLEMS} more lines")


def _show_outcome(console: Console, settings: TuneSettings, outcome: Outcome) -> None:
    ending = f"done after {outcome.steps} steps"
    if outcome.stopped:
        ending = f"stopped after {outcome.steps} steps"
    elif outcome.converged:
        ending += ", for the held-out loss fell no more"
    console.print(
        f"{ending} and {_duration(outcome.train_s)}; held-out loss {outcome.before:.3f} before, "
        f"{outcome.after:.3f} after (step {outcome.best_step})",
        highlight=False,
    )
    if outcome.after >= outcome.before:
        console.print("warning: the held-out loss did not fall; the model has learned nothing new")
    served = f"millrace serve {settings.out}"
    if settings.keep_adapter:
        served = f"millrace serve {settings.model} --adapter {settings.out}"
    console.print(f"written: {settings.out}; try it: {served}", markup=False, highlight=False)
