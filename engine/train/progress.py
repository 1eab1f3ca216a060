"""What a training run shows: a progress bar, a log line now and then, the loss curve."""

from __future__ import annotations

from pathlib import Path
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, TaskProgressColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bar

from engine.train.trainer import StepReport

__all__ = ["Progress", "draw_loss"]

_LINE_EVERY_STEPS = 25


class Progress:
    """A bar on a terminal; in a log file, one line every 25 steps.

    Args:
        peak_flops: operations a second of the devices, for the utilisation; None: unknown.
        console: where to write; the terminal if None.
    """

    def __init__(self, peak_flops: float | None = None, console: Console | None = None) -> None:
        self._peak_flops = peak_flops
        self._console = console or Console()
        self._bar = Bar(
            TextColumn("training"),
            BarColumn(),
            TaskProgressColumn(),
            TextColumn("{task.fields[note]}"),
            TimeElapsedColumn(),
            console=self._console,
            disable=not self._console.is_terminal,
        )
        self._task = self._bar.add_task("training", total=1.0, note="")
        self._loss: float | None = None

    def __enter__(self) -> Progress:
        self._bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._bar.stop()

    def show(self, report: StepReport) -> None:
        """Shows one step; the loss is smoothed over about 20 steps."""
        previous = report.loss if self._loss is None else self._loss
        self._loss = 0.95 * previous + 0.05 * report.loss
        tokens_per_s = report.num_tokens / max(report.train_s, 1e-9)
        note = (
            f"step {report.step}  loss {self._loss:.3f}  norm {report.grad_norm:.2f}  "
            f"{report.num_tokens / 1e6:.2f}M tokens  {tokens_per_s:.0f}/s"
        )
        if self._peak_flops and report.active_s:
            note += f"  MFU {report.flops / report.active_s / self._peak_flops:.0%}"
        self._bar.update(self._task, completed=report.progress, note=note)
        if not self._console.is_terminal and report.step % _LINE_EVERY_STEPS == 1:
            self._console.print(f"{report.progress:6.1%}  {note}", soft_wrap=True, highlight=False)


def draw_loss(history: list[tuple[int, float]], path: Path) -> bool:
    """Draws the smoothed loss over tokens seen as a PNG.

    Returns:
        False where matplotlib is not installed, or there is nothing to draw.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return False
    if not history:
        return False
    smooth: list[float] = []
    for _, loss in history:
        smooth.append(loss if not smooth else 0.97 * smooth[-1] + 0.03 * loss)
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot(
        xlabel="million tokens seen", ylabel="training loss (nats per token)", yscale="log"
    )
    tokens = [num_tokens / 1e6 for num_tokens, _ in history]
    axes.plot(tokens, [loss for _, loss in history], color="0.85", linewidth=0.5)
    axes.plot(tokens, smooth, color="tab:blue")
    axes.grid(visible=True, which="both", alpha=0.3)
    figure.savefig(path, dpi=110)
    return True
