"""``millrace quantize``: what a person sees of a quantisation."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from engine import EngineError
from engine.train.quantising.plan import QuantiseSettings
from engine.train.quantising.run import RECORD, Result, quantise_checkpoint
from engine.train.tuning.examples import DataError
from server.cli.progress import Progress

__all__ = ["QuantizeError", "parse_share", "quantize"]

_MAX_PROBLEMS = 10
_MAX_KEPT = 8
_INTERRUPTED = 130


class QuantizeError(Exception):
    """The run cannot be done; the text is for the person who asked for it."""


def parse_share(text: str) -> float:
    """``1%`` or ``0.01`` -> 0.01. Raises QuantizeError when the text is neither."""
    body = text.strip()
    try:
        return float(body.removesuffix("%")) / (100 if body.endswith("%") else 1)
    except ValueError:
        raise QuantizeError(f"{text!r} is no share; write for example 1% or 0.01") from None


def quantize(settings: QuantiseSettings) -> int:
    """Run it; return the exit status. Ctrl-C leaves nothing behind.

    Raises QuantizeError.
    """
    console = Console(soft_wrap=True)
    try:
        with Progress(console) as progress:
            result = quantise_checkpoint(settings, _Watcher(progress))
    except DataError as error:
        for problem in error.problems[:_MAX_PROBLEMS]:
            where = f"{settings.data}:{problem.line}"
            console.print(f"{where}: {problem.text}", markup=False, highlight=False)
        raise QuantizeError(str(error)) from error
    except (EngineError, OSError) as error:
        raise QuantizeError(str(error)) from error
    except KeyboardInterrupt:
        console.print("stopped; nothing was written")
        return _INTERRUPTED
    _show(console, settings, result)
    return 0


class _Watcher:
    def __init__(self, progress: Progress) -> None:
        self.stage = progress.update


def _show(console: Console, settings: QuantiseSettings, result: Result) -> None:
    rows = Table.grid(padding=(0, 2))
    total = result.num_quantised + result.num_kept
    rows.add_row("matrices", f"{result.num_quantised} of {total} in {settings.scheme.value}")
    rows.add_row(
        "weights",
        f"{_mib(result.bytes_before)} before, {_mib(result.bytes_after)} after",
    )
    rows.add_row("largest error", f"{result.worst_rms:.2%} of a matrix's own size (rms)")
    console.print(rows)
    if result.perplexity_before is not None:
        console.print(_perplexities(result))
    _list(console, "kept to stay within the budget", result.kept_for_budget)
    _list(console, "kept, too narrow for groups of 128", result.too_narrow)
    console.print(
        f"written: {settings.out}, figures in {RECORD}; try it: millrace serve {settings.out}",
        markup=False,
        highlight=False,
    )


def _perplexities(result: Result) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0))
    table.add_column(f"perplexity over {result.num_targets:,} tokens")
    table.add_column("", justify="right")
    table.add_column("rise", justify="right")
    before = result.perplexity_before
    for name, value in (
        ("before", before),
        ("all quantised", result.perplexity_all),
        ("as written", result.perplexity_after),
    ):
        if value is not None and before is not None:
            table.add_row(name, f"{value:.4f}", f"{value / before - 1:+.2%}")
    return table


def _list(console: Console, title: str, names: tuple[str, ...]) -> None:
    if names:
        more = f" and {len(names) - _MAX_KEPT} more" if len(names) > _MAX_KEPT else ""
        text = f"{title}: {', '.join(names[:_MAX_KEPT])}{more}"
        console.print(text, markup=False, highlight=False)


def _mib(size: int) -> str:
    return f"{size / 2**20:,.1f} MiB"
