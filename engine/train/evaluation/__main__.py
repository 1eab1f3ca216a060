"""Evaluates a model: `python -m engine.train.evaluation --model DIR --data DIR --out report.json`.

The sources are those of the recipe's mixture: what the model was trained on is what is compared
with the held-out text and what it is tested for.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
from rich.console import Console

from engine.errors import EngineError
from engine.train.checkpoint import write_atomically
from engine.train.data import DataError, write_documents
from engine.train.dialogue import ChatTemplate, LossWeights, Record, read_records
from engine.train.evaluation.generation import Generator
from engine.train.evaluation.leaks import HeldOutIndex
from engine.train.evaluation.perplexity import HeldOut, held_out_losses, load_model
from engine.train.evaluation.progress import stage
from engine.train.evaluation.prompts import PROMPTS, Transcript, answer_prompts
from engine.train.evaluation.report import CardError, Report, markdown, replace_block
from engine.train.evaluation.sums import (
    SumTally,
    evaluate_sums,
    familiar_questions,
    unfamiliar_questions,
)
from engine.train.evaluation.tool_calls import CallTally, evaluate_calls, sample_turns
from engine.train.prepare import data_files
from engine.train.recipe import Recipe, RecipeError, load_recipe
from engine.train.synthesis import make_records
from engine.train.tokenizer import Encoder

__all__ = ["main"]

_ASSETS = Path(__file__).resolve().parents[2] / "assets" / "pebble"
_SUMS_SEED = 20_000  # no recipe's: the same random numbers would give the sums of training


def _arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m engine.train.evaluation", description=__doc__)
    parser.add_argument("--model", type=Path, required=True, metavar="DIR",
                        help="exported checkpoint")  # fmt: skip
    parser.add_argument("--data", type=Path, required=True, metavar="DIR",
                        help="directory with train/*.jsonl.xz and heldout/*.jsonl.xz")  # fmt: skip
    parser.add_argument("--out", type=Path, required=True, metavar="FILE",
                        help="report to write, JSON; the tables go beside it as .md")  # fmt: skip
    parser.add_argument("--card", type=Path, metavar="FILE",
                        help="model card whose marked block the tables replace")  # fmt: skip
    parser.add_argument("--recipe", type=Path, default=_ASSETS / "recipe.toml", metavar="FILE",
                        help="how the model was trained (default: the bundled one)")  # fmt: skip
    parser.add_argument("--call-turns", type=int, default=60, metavar="N",
                        help="most turns of a source in which the reference calls")  # fmt: skip
    parser.add_argument("--other-turns", type=int, default=40, metavar="N",
                        help="most turns of a source in which it does not")  # fmt: skip
    parser.add_argument("--sums", type=int, default=100, metavar="N",
                        help="questions of each of the two forms")  # fmt: skip
    parser.add_argument("--max-tokens", type=int, default=256, metavar="N",
                        help="most tokens of an answer")  # fmt: skip
    parser.add_argument("--seed", type=int, default=0, help="of the samples")
    parser.add_argument("--threads", type=int, help="compute threads (default: all cores)")
    return parser.parse_args(argv)


def _held_out(recipe: Recipe, data_dir: Path) -> list[Record]:
    """The held-out records of the mixture's sources, found and made."""
    found = read_records(data_files(data_dir, "heldout"))
    sources = frozenset(recipe.mixture)
    made = make_records("heldout", recipe.seed, sources)
    return [*(record for record in found if record["source"] in sources), *made]


def _training(recipe: Recipe, path: Path | None) -> Iterator[Record]:
    """The training records of one file, or those that are made."""
    sources = frozenset(recipe.mixture)
    if path is None:
        yield from make_records("train", recipe.seed, sources)
    else:
        yield from (record for record in read_records([path]) if record["source"] in sources)


def _find_leaks(
    console: Console, recipe: Recipe, data_dir: Path, records: list[Record]
) -> HeldOutIndex:
    index = HeldOutIndex(records)
    paths: list[Path | None] = [*data_files(data_dir, "train"), None]
    with stage(console, "leak check, files", len(paths)) as step:
        for path in paths:
            for record in _training(recipe, path):
                index.show(record)
            step()
    return index


def _losses(
    console: Console, recipe: Recipe, model_dir: Path, records: list[Record]
) -> dict[str, HeldOut]:
    encoder = Encoder(model_dir / "tokenizer.model")
    template = ChatTemplate((model_dir / "chat_template.jinja").read_text(encoding="utf-8"))
    model = load_model(model_dir, torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    with tempfile.TemporaryDirectory() as directory:
        sizes = write_documents(
            records,
            Path(directory),
            sources=frozenset(recipe.mixture),
            template=template,
            encoder=encoder,
            loss=LossWeights(),
            max_len=min(recipe.train.max_document_len, recipe.train.sequence_len + 1),
            max_tools=recipe.train.max_tools,
            empty_think_fraction=0.0,
            seed=recipe.seed,
        )
        with stage(console, "held-out loss, sources", len(sizes)) as step:
            return held_out_losses(
                model,
                Path(directory),
                sorted(sizes),
                sequence_len=recipe.train.sequence_len,
                pad_id=encoder.id_of("<|endoftext|>"),
                skip_padding=True,
                on_done=step,
            )


def _calls(
    console: Console, args: argparse.Namespace, generator: Generator, records: list[Record]
) -> dict[str, CallTally]:
    turns = sample_turns(
        records,
        max_call_turns=args.call_turns,
        max_other_turns=args.other_turns,
        seed=args.seed,
    )
    with stage(console, "tool calls, turns", sum(map(len, turns.values()))) as step:
        return evaluate_calls(generator, turns, on_done=step)


def _sums(console: Console, args: argparse.Namespace, generator: Generator) -> dict[str, SumTally]:
    forms = {
        "phrased as in training": familiar_questions(args.sums, _SUMS_SEED + args.seed),
        "phrased otherwise": unfamiliar_questions(args.sums, _SUMS_SEED + args.seed),
    }
    with stage(console, "arithmetic, questions", sum(map(len, forms.values()))) as step:
        return {
            form: evaluate_sums(generator, questions, on_done=step)
            for form, questions in forms.items()
        }


def _transcripts(console: Console, generator: Generator) -> list[Transcript]:
    with stage(console, "fixed prompts", len(PROMPTS)) as step:
        return answer_prompts(generator, on_done=step)


def _evaluate(console: Console, args: argparse.Namespace) -> Report:
    recipe = load_recipe(args.recipe)
    records = _held_out(recipe, args.data)
    generator = Generator(args.model, max_tokens=args.max_tokens, num_threads=args.threads)
    try:
        index = _find_leaks(console, recipe, args.data, records)
        clean = [record for record in records if not index.knows(record)]
        return Report(
            num_parameters=generator.num_parameters,
            context=generator.context,
            leaks=index.by_source(),
            known_dialogues=index.known_dialogues(),
            losses=_losses(console, recipe, args.model, clean),
            calls=_calls(console, args, generator, clean),
            sums=_sums(console, args, generator),
            transcripts=_transcripts(console, generator),
        )
    finally:
        generator.close()


def main(argv: list[str] | None = None) -> int:
    """Runs the command; returns its exit status."""
    args = _arguments(argv)
    try:
        card = None if args.card is None else args.card.read_text(encoding="utf-8")
        if card is not None:
            replace_block(card, "")  # a wrong card is found before minutes of work
        report = _evaluate(Console(), args)
    except (CardError, DataError, EngineError, RecipeError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    text = json.dumps(report.document(), ensure_ascii=False, indent=2)
    write_atomically(args.out, f"{text}\n".encode())
    block = markdown(report)
    write_atomically(args.out.with_suffix(".md"), f"{block}\n".encode())
    if card is not None:
        write_atomically(args.card, replace_block(card, block).encode())
    print(f"done: {args.out}, {args.out.with_suffix('.md')}" + (f", {args.card}" if card else ""))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
