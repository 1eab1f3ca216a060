"""From raw data to a tokenizer and token files, each step skipped where its output exists."""

from __future__ import annotations

import json
import random
from collections.abc import Iterable, Iterator
from pathlib import Path

from engine.train.data import DataError, write_documents
from engine.train.dialogue import ChatTemplate, LossWeights, Record, read_records
from engine.train.recipe import Recipe
from engine.train.synthesis import MADE_SOURCES, make_records
from engine.train.tokenizer import Encoder, train_tokenizer

__all__ = ["data_files", "prepare_tokenizer", "prepare_tokens"]


def data_files(data_dir: Path, split: str) -> list[Path]:
    """The `.jsonl.xz` files of a split (`train`, `heldout`). Raises `DataError` without any."""
    paths = sorted((data_dir / split).glob("*.jsonl.xz"))
    if not paths:
        raise DataError(f"no *.jsonl.xz files in {data_dir / split}")
    return paths


def prepare_tokenizer(recipe: Recipe, data_dir: Path, path: Path) -> Encoder:
    """Trains the tokenizer on a sample of the training split, unless `path` exists.

    Raises `DataError` where the text does not suffice.
    """
    if not path.exists():
        records = read_records(data_files(data_dir, "train"))
        try:
            train_tokenizer(
                _tokenizer_sample(recipe, records),
                path,
                vocab_size=recipe.tokenizer.vocab_size,
                character_coverage=recipe.tokenizer.character_coverage,
            )
        except RuntimeError as error:  # too little text for the vocabulary, for one
            raise DataError(f"sentencepiece cannot train a tokenizer: {error}") from error
    return Encoder(path)


def _records(recipe: Recipe, data_dir: Path, split: str) -> Iterator[Record]:
    """Found records, then made ones."""
    yield from read_records(data_files(data_dir, split))
    yield from make_records(split, recipe.seed, frozenset(recipe.mixture))


def _tokenizer_sample(recipe: Recipe, records: Iterable[Record]) -> list[str]:
    """Texts drawn by the mixture until the sample is full; short sources are repeated.

    Made records are left out: their invented words would waste pieces.
    """
    texts: dict[str, list[str]] = {source: [] for source in recipe.mixture.keys() - MADE_SOURCES}
    for record in records:
        if record["source"] in texts:
            texts[record["source"]].append(_plain_text(record))
    rng = random.Random(recipe.seed)
    sample: list[str] = []
    for source, own in sorted(texts.items()):
        if not own:
            raise DataError(f"the data has no records of source {source!r}")
        rng.shuffle(own)
        factor = recipe.tokenizer.chinese_factor if source.endswith("_zh") else 1.0
        wanted = recipe.mixture[source] * recipe.tokenizer.sample_chars * factor
        index, num_chars = 0, 0
        while num_chars < wanted:
            text = own[index % len(own)]
            sample.append(text)
            num_chars += len(text)
            index += 1
    return sample


def _plain_text(record: Record) -> str:
    if "text" in record:
        return str(record["text"])
    parts = [message["content"] for message in record["messages"] if message["content"]]
    for message in record["messages"]:
        parts += [json.dumps(c, ensure_ascii=False) for c in message.get("tool_calls") or []]
    parts += [json.dumps(tool, ensure_ascii=False) for tool in (record.get("tools") or [])[:2]]
    return "\n".join(parts)


def prepare_tokens(
    recipe: Recipe,
    data_dir: Path,
    token_dir: Path,
    split: str,
    *,
    encoder: Encoder,
    template: ChatTemplate,
) -> dict[str, int]:
    """Encodes a split of the data into `token_dir`, unless that was done; tokens by source.

    The held-out split counts only the assistant's part, so that its loss is comparable between
    recipes.
    """
    summary = token_dir / "summary.json"
    if not summary.exists():
        loss = LossWeights()
        if split == "train":
            loss = LossWeights(
                user=recipe.train.user_loss_weight, tool=recipe.train.tool_loss_weight
            )
        sizes = write_documents(
            _records(recipe, data_dir, split),
            token_dir,
            sources=frozenset(recipe.mixture),
            template=template,
            encoder=encoder,
            loss=loss,
            max_len=min(recipe.train.max_document_len, recipe.train.sequence_len + 1),
            max_tools=recipe.train.max_tools,
            empty_think_fraction=recipe.train.empty_think_fraction,
            seed=recipe.seed,
            max_requests=recipe.train.max_requests if split == "train" else 1,
            assistant_only=MADE_SOURCES,  # the words that are invented there cannot be foretold
        )
        summary.write_text(json.dumps(sizes, indent=2), encoding="utf-8")
    sizes = json.loads(summary.read_text(encoding="utf-8"))
    return {source: int(num_tokens) for source, num_tokens in sizes.items()}
