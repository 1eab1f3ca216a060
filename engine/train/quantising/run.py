"""One call from settings to a quantised checkpoint on disk."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from engine.errors import ConfigError
from engine.hub import resolve_model
from engine.model_config import read_model_config
from engine.tokenizer import Tokenizer
from engine.train.quantising.plan import QuantiseSettings, units_of
from engine.train.tuning.dataset import Document, encode_examples
from engine.train.tuning.examples import Example, Examples, read_examples
from engine.train.tuning.output import check_free, whole_directory

if TYPE_CHECKING:
    from engine.quantisation import QuantisationError
    from engine.train.quantising.sensitivity import Choice

__all__ = ["RECORD", "Result", "Watcher", "quantise_checkpoint"]

RECORD = "quantize.json"
"""Name of the file that says how the directory came about and what it cost."""


class Watcher(Protocol):
    """Who is told how a run goes."""

    def stage(self, text: str, fraction: float) -> None:
        """Something slow is going on, and this part of it is done, 0 to 1."""


@dataclass(frozen=True, slots=True)
class Result:
    """What a run did."""

    num_quantised: int
    """Matrices."""
    num_kept: int
    """Matrices left as they are."""
    kept_for_budget: tuple[str, ...]
    """Units left as they are to keep the budget, the most sensitive first."""
    too_narrow: tuple[str, ...]
    """Units whose width is no multiple of a group's."""
    bytes_before: int
    bytes_after: int
    """Of all weight files."""
    worst_rms: float
    """Largest relative root mean square error of a matrix."""
    num_targets: int
    """Tokens the perplexities were measured on; 0 where they were not."""
    perplexity_before: float | None
    perplexity_all: float | None
    """With every matrix quantised that may be."""
    perplexity_after: float | None


def quantise_checkpoint(settings: QuantiseSettings, watcher: Watcher) -> Result:
    """Measures, chooses and writes `settings.out`.

    Raises:
        DataError: the text cannot be used.
        ConfigError: a setting does not fit.
        CheckpointError, TokenizerError: the model is missing, damaged or not supported.
    """
    check_free(settings.out, overwrite=settings.overwrite, record=RECORD)
    base = resolve_model(settings.model, watcher.stage)
    if settings.out.resolve() == base.resolve():
        raise ConfigError(f"{settings.out} is the model itself; name another directory")
    config = read_model_config(base)
    if config.quantization is not None:
        raise ConfigError(
            f"the weights of {base} are quantised already ({config.quantization.layout.value})"
        )
    wanted = units_of(config, settings.keep)
    documents = _documents(settings, base) if settings.measure else []
    watcher.stage("loading the model", 0.0)
    # Imported here: torch takes seconds, and the settings had to be looked at first.
    import torch

    from engine.loader import open_checkpoint
    from engine.quantisation import SCHEMES, fits
    from engine.train.quantising.sensitivity import Meter, choose
    from engine.train.quantising.writer import write_quantised

    if settings.num_threads is not None:
        torch.set_num_threads(settings.num_threads)
    scheme = SCHEMES[settings.scheme]
    files = open_checkpoint(base)
    units = [one for one in wanted if all(fits(scheme, width) for _, width in one.shapes.values())]
    choice = None
    chosen = tuple(units)
    if settings.measure:
        meter = Meter(base, files, scheme, documents)
        max_rise = None if settings.budget is None else math.log1p(settings.budget)
        choice = choose(
            meter.loss, units, max_rise, lambda done: watcher.stage("measuring perplexity", done)
        )
        chosen = choice.units
        del meter
    matrices = {name: shape for unit in chosen for name, shape in unit.shapes.items()}
    everything = [name for unit in units_of(config, ()) for name in unit.shapes]
    with whole_directory(settings.out) as directory:
        errors = write_quantised(
            base,
            files,
            directory,
            scheme,
            matrices,
            [name.removesuffix(".weight") for name in everything if name not in matrices],
            max_shard_bytes=settings.max_shard_bytes,
            on_progress=lambda done: watcher.stage("quantising", done),
        )
        num_targets = sum(int(one.learned[1:].sum()) for one in documents)
        result = Result(
            num_quantised=len(matrices),
            num_kept=len(everything) - len(matrices),
            kept_for_budget=() if choice is None else tuple(unit.name for unit in choice.kept),
            too_narrow=tuple(unit.name for unit in wanted if unit not in units),
            bytes_before=sum(file.nbytes(name) for name, file in files.items()),
            bytes_after=sum(path.stat().st_size for path in directory.glob("*.safetensors")),
            worst_rms=max((error.relative_rms for error in errors.values()), default=0.0),
            num_targets=num_targets,
            perplexity_before=None if choice is None else math.exp(choice.before),
            perplexity_all=None if choice is None else math.exp(choice.after_all),
            perplexity_after=None if choice is None else math.exp(choice.after),
        )
        _write_record(directory, settings, result, errors, choice)
    return result


def _documents(settings: QuantiseSettings, base: Path) -> list[Document]:
    """The text to measure on, encoded, at most `max_tokens` of it.

    Raises DataError when lines cannot be used.
    """
    if settings.data is None:
        from engine.train.evaluation.prompts import PROMPTS

        texts = [Example(i, text="\n".join(one.questions)) for i, one in enumerate(PROMPTS, 1)]
        examples = Examples(tuple(texts), (), len(texts), 0)
    else:
        examples = read_examples(settings.data)
    tokenizer = Tokenizer.load(base)
    try:
        return encode_examples(examples, tokenizer, max_tokens=settings.max_tokens)
    finally:
        tokenizer.close()


def _write_record(
    directory: Path,
    settings: QuantiseSettings,
    result: Result,
    errors: dict[str, QuantisationError],
    choice: Choice | None,
) -> None:
    record: dict[str, Any] = {
        "model": settings.model,
        "scheme": settings.scheme.value,
        "keep": settings.keep,
        "budget": settings.budget,
        "data": None if settings.data is None else settings.data.name,
        "num_targets": result.num_targets,
        "perplexity": {
            "before": result.perplexity_before,
            "all_quantised": result.perplexity_all,
            "after": result.perplexity_after,
        },
        "kept_for_budget": result.kept_for_budget,
        "too_narrow": result.too_narrow,
        "rise_of_loss_by_unit": {} if choice is None else choice.rises,
        "relative_rms_error": {name: error.relative_rms for name, error in errors.items()},
    }
    text = json.dumps(record, indent=2, ensure_ascii=False) + "\n"
    (directory / RECORD).write_text(text, encoding="utf-8")
