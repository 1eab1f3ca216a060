"""Makes a model from data: `python -m engine.train --data DIR --out DIR --minutes N`.

The output directory keeps everything between the data and the model (tokenizer, token files,
checkpoint), so that a run that was cut off goes on where it was when started again.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import datetime
import os
import shutil
import signal
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import torch

from engine.errors import CheckpointError
from engine.train.data import DataError, Documents, Packer
from engine.train.dialogue import ChatTemplate
from engine.train.distributed import Group
from engine.train.evaluation.perplexity import held_out_losses
from engine.train.export import export
from engine.train.load import load_model
from engine.train.model import Qwen3, compute_dtype_of
from engine.train.prepare import prepare_tokenizer, prepare_tokens
from engine.train.progress import Progress, draw_loss
from engine.train.recipe import Recipe, RecipeError, load_recipe
from engine.train.summary import write_summary
from engine.train.tokenizer import Encoder
from engine.train.trainer import Budget, Trainer
from engine.train.utilisation import measured_peak

__all__ = ["main"]

_ASSETS = Path(__file__).resolve().parent.parent / "assets" / "pebble"


def _arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m engine.train", description=__doc__)
    parser.add_argument("--data", type=Path, required=True, metavar="DIR",
                        help="directory with train/*.jsonl.xz and heldout/*.jsonl.xz")  # fmt: skip
    parser.add_argument("--out", type=Path, required=True, metavar="DIR",
                        help="working directory: tokenizer, tokens, checkpoint")  # fmt: skip
    length = parser.add_mutually_exclusive_group(required=True)
    length.add_argument("--minutes", type=float, help="computing time of the run")
    length.add_argument("--steps", type=int, help="optimiser steps of the run (repeatable)")
    parser.add_argument("--deadline", type=_utc_time, metavar="HH:MM",
                        help="UTC time at which a run of --minutes ends anyway")  # fmt: skip
    parser.add_argument("--recipe", type=Path, default=_ASSETS / "recipe.toml", metavar="FILE",
                        help="model, mixture, schedule (default: the bundled one)")  # fmt: skip
    parser.add_argument("--init", type=Path, metavar="DIR",
                        help="checkpoint whose weights and tokenizer a new run starts from "
                        "(default: random weights, a tokenizer of its own)")  # fmt: skip
    parser.add_argument("--export", type=Path, metavar="DIR",
                        help="where the model goes (default: OUT/model)")  # fmt: skip
    parser.add_argument("--export-every", type=float, default=15.0, metavar="MINUTES",
                        help="computing time between exports on the way (default: 15)")  # fmt: skip
    parser.add_argument("--threads", type=int, help="compute threads (default: all cores)")
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
    parser.add_argument("--no-compile", action="store_true",
                        help="run as it is written: slower, but without a compiler")  # fmt: skip
    return parser.parse_args(argv)


def _utc_time(text: str) -> float:
    """The next moment at which UTC clocks show `text`, as Unix time."""
    now = datetime.datetime.now(datetime.UTC)
    clock = datetime.time.fromisoformat(text)
    moment = datetime.datetime.combine(now.date(), clock, tzinfo=datetime.UTC)
    return (moment if moment > now else moment + datetime.timedelta(days=1)).timestamp()


@contextlib.contextmanager
def _terminated() -> Iterator[threading.Event]:
    """An event that SIGTERM sets, so that a step and its checkpoint end before the process does."""
    event = threading.Event()
    previous = signal.signal(signal.SIGTERM, lambda *_: event.set())
    try:
        yield event
    finally:
        signal.signal(signal.SIGTERM, previous)


def _keep_freed_memory() -> None:
    """Tells glibc to keep freed blocks: fetching the large ones anew costs a fifth of the time."""
    with contextlib.suppress(OSError, AttributeError):
        libc = ctypes.CDLL("libc.so.6")
        trim_threshold, mmap_threshold = -1, -3  # names of mallopt(3)
        libc.mallopt(trim_threshold, 2**31 - 1)
        libc.mallopt(mmap_threshold, 2**31 - 1)


def _device(name: str) -> torch.device:
    """The named device; `auto` takes a GPU if there is one, each process of a group its own."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda":
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    return torch.device(name)


def _packer(recipe: Recipe, token_dir: Path, pad_id: int) -> Packer:
    documents = {source: Documents.load(token_dir, source) for source in recipe.mixture}
    return Packer(
        documents,
        recipe.mixture,
        sequence_len=recipe.train.sequence_len,
        pad_id=pad_id,
        seed=recipe.seed,
    )


def _prepared(args: argparse.Namespace, recipe: Recipe, group: Group) -> Encoder:
    """Tokenizer and token files, made by the first process while the others wait."""
    template = ChatTemplate(_template_source())
    for own_turn in (group.rank == 0, group.rank != 0):
        if own_turn:
            tokenizer = args.out / "tokenizer.model"
            if args.init is not None and not tokenizer.exists():
                tokenizer.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(args.init / tokenizer.name, tokenizer)
            encoder = prepare_tokenizer(recipe, args.data, tokenizer)
            for split in ("train", "heldout"):
                prepare_tokens(
                    recipe,
                    args.data,
                    args.out / "tokens" / split,
                    split,
                    encoder=encoder,
                    template=template,
                )
        group.agreed(0.0)
    return encoder


def _template_source() -> str:
    return (_ASSETS / "chat_template.jinja").read_text(encoding="utf-8")


def _model(recipe: Recipe, dtype: torch.dtype, device: torch.device, init: Path | None) -> Qwen3:
    """A model of random weights, or that of the checkpoint `init`, in the recipe's shape."""
    if init is None:
        torch.manual_seed(recipe.seed)
        return Qwen3(recipe.model, dtype).to(device)
    model = load_model(init, dtype, device)
    if model.config != recipe.model:
        raise RecipeError(f"{init} holds {model.config}, but the recipe is for {recipe.model}")
    return model


def _train(
    args: argparse.Namespace, recipe: Recipe, device: torch.device, group: Group
) -> tuple[Trainer, Encoder, float]:
    """The trained model, its encoder, and the share of the devices' peak that was used."""
    out = args.out
    encoder = _prepared(args, recipe, group)
    dtype = compute_dtype_of(device)
    peak = measured_peak(device, dtype) * group.size
    model = _model(recipe, dtype, device, args.init)
    if not args.no_compile:
        model.compile_blocks()
    trainer = Trainer(
        model,
        _packer(recipe, out / "tokens" / "train", encoder.id_of("<|endoftext|>")),
        recipe.train,
        Budget(
            num_steps=args.steps,
            train_s=None if args.minutes is None else args.minutes * 60,
            deadline=args.deadline,
        ),
        seed=recipe.seed,
        group=group,
    )
    trainer.resume(out / "checkpoint")

    def keep() -> None:
        trainer.save(out / "checkpoint")
        export_dir = args.export or out / "model"
        export(model, encoder, out / "tokenizer.model", _template_source(), export_dir)
        draw_loss(trainer.history, out / "loss.png")

    utilisation = 0.0
    next_export_s = trainer.train_s + args.export_every * 60
    with contextlib.ExitStack() as stack:
        stopping = stack.enter_context(_terminated())
        progress = stack.enter_context(Progress(peak)) if group.rank == 0 else None
        while trainer.progress < 1.0:
            if group.agreed(float(stopping.is_set())):
                if group.rank == 0:
                    trainer.save(out / "checkpoint")
                raise SystemExit("stopped: the next run with this --out goes on from here")
            report = trainer.step()
            utilisation = report.flops / max(report.active_s, 1e-9) / peak
            if progress is not None:
                progress.show(report)
                if report.train_s >= next_export_s:
                    next_export_s = report.train_s + args.export_every * 60
                    keep()
        if group.rank == 0:
            keep()
    return trainer, encoder, utilisation


def main(argv: list[str] | None = None) -> int:
    """Runs the command; returns its exit status."""
    args = _arguments(argv)
    if args.threads:
        torch.set_num_threads(args.threads)
    _keep_freed_memory()
    try:
        recipe = load_recipe(args.recipe)
        device = _device(args.device)
        group = Group.join(device.type)
        try:
            trainer, encoder, utilisation = _train(args, recipe, device, group)
        finally:
            group.leave()
        if group.rank > 0:
            return 0
        losses = held_out_losses(
            trainer.model,
            args.out / "tokens" / "heldout",
            sorted(recipe.mixture),
            sequence_len=recipe.train.sequence_len,
            pad_id=encoder.id_of("<|endoftext|>"),
        )
    except (CheckpointError, DataError, RecipeError, FileNotFoundError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    write_summary(args.out / "report.json", trainer, losses, utilisation=utilisation)
    print(f"done: {trainer.num_steps} steps, {trainer.num_tokens} tokens; see {args.out}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
