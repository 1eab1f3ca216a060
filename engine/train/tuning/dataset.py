"""Examples -> tokens with the part to learn marked, split into training and held-out documents."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

import numpy as np
import numpy.typing as npt

from engine.errors import TemplateError
from engine.tokenizer import Tokenizer
from engine.train.tuning.examples import DataError, Example, Examples, Problem

__all__ = [
    "MIN_EXAMPLES",
    "Dataset",
    "Document",
    "Summary",
    "build_dataset",
    "encode_examples",
]

MIN_EXAMPLES = 10
"""Fewer teach nothing but themselves, and leave none to measure by."""

_HELD_OUT_SHARE = 0.1
_MIN_HELD_OUT, _MAX_HELD_OUT = 4, 500
_Part = tuple[str, bool]  # rendered text, and whether it is learned


@dataclass(frozen=True, slots=True)
class Document:
    """Tokens that see each other.

    Args:
        token_ids: int64 [L].
        learned: bool [L], the tokens that are targets.
    """

    token_ids: npt.NDArray[np.int64]
    learned: npt.NDArray[np.bool_]

    def __len__(self) -> int:
        return len(self.token_ids)


@dataclass(frozen=True, slots=True)
class Summary:
    """What the data is like."""

    num_lines: int
    num_duplicates: int
    num_skipped: int
    """Lines with a problem, left out as asked."""
    num_train: int
    """Examples to learn from."""
    num_heldout: int
    """Examples kept to measure by."""
    num_tokens: int
    """Of the examples to learn from."""
    num_learned: int
    """Of those, tokens that are targets."""
    longest: int
    """Tokens of the longest example, before cutting."""
    num_cut: int
    """Examples longer than the limit."""
    max_len: int
    """The limit, in tokens."""


@dataclass(frozen=True, slots=True)
class Dataset:
    """Documents to learn from and documents to measure by."""

    train: tuple[Document, ...]
    heldout: tuple[Document, ...]
    summary: Summary


def build_dataset(
    examples: Examples,
    tokenizer: Tokenizer,
    *,
    max_len: int,
    seed: int,
    skip_bad: bool = False,
    on_progress: Callable[[float], None] = lambda fraction: None,
) -> Dataset:
    """Encodes the examples and holds some of them out.

    Args:
        examples: as read.
        tokenizer: of the model to tune.
        max_len: tokens after which an example is cut off.
        seed: decides which examples are held out.
        skip_bad: leave out lines with a problem instead of refusing all.
        on_progress: called with the finished fraction.

    Raises `DataError` when lines have problems, or too few examples are left.
    """
    problems = list(examples.problems)
    encoded: list[list[Document]] = []
    for index, example in enumerate(examples.examples):
        on_progress(index / len(examples.examples))
        try:
            encoded.append(_encode(example, tokenizer, _spelt_control(example, tokenizer)))
        except (TemplateError, ValueError) as error:
            problems.append(Problem(example.line, str(error)))
    longest = max((len(one) for documents in encoded for one in documents), default=0)
    num_cut = sum(any(len(one) > max_len for one in documents) for documents in encoded)
    usable = [kept for documents in encoded if (kept := _cut(documents, max_len))]
    problems.sort(key=lambda problem: problem.line)
    if problems and not skip_bad:
        raise DataError(
            f"{len(problems)} of {examples.num_lines} lines cannot be used; mend them, or leave "
            "them out with --skip-bad",
            tuple(problems),
        )
    if len(usable) < MIN_EXAMPLES:
        raise DataError(
            f"{len(usable)} different usable examples; at least {MIN_EXAMPLES} are needed "
            "(200 and more work well)",
            tuple(problems),
        )
    random.Random(seed).shuffle(usable)
    num_heldout = min(max(_MIN_HELD_OUT, round(_HELD_OUT_SHARE * len(usable))), _MAX_HELD_OUT)
    heldout, train = (
        tuple(document for documents in part for document in documents)
        for part in (usable[:num_heldout], usable[num_heldout:])
    )
    summary = Summary(
        num_lines=examples.num_lines,
        num_duplicates=examples.num_duplicates,
        num_skipped=len(problems),
        num_train=len(usable) - num_heldout,
        num_heldout=num_heldout,
        num_tokens=sum(len(one) for one in train),
        num_learned=sum(int(one.learned.sum()) for one in train),
        longest=longest,
        num_cut=num_cut,
        max_len=max_len,
    )
    return Dataset(train, heldout, summary)


def encode_examples(examples: Examples, tokenizer: Tokenizer, *, max_tokens: int) -> list[Document]:
    """The examples' documents in order, until they have so many tokens; the last one is cut.

    Raises `DataError` when a line has a problem or there is nothing to predict.
    """
    problems = list(examples.problems)
    documents: list[Document] = []
    for example in examples.examples:
        room = max_tokens - sum(len(one) for one in documents)
        if room <= 1:
            break
        try:
            encoded = _encode(example, tokenizer, _spelt_control(example, tokenizer))
        except (TemplateError, ValueError) as error:
            problems.append(Problem(example.line, str(error)))
            continue
        for document in encoded:
            kept = _cut([document], max_tokens - sum(len(one) for one in documents))
            documents.extend(kept)
    if problems:
        raise DataError(
            f"{len(problems)} of {examples.num_lines} lines cannot be used", tuple(problems)
        )
    if not documents:
        raise DataError("the examples hold no text to predict")
    return documents


def _cut(documents: list[Document], max_len: int) -> list[Document]:
    """The documents up to the limit; those that have nothing to learn before it go."""
    short = [Document(one.token_ids[:max_len], one.learned[:max_len]) for one in documents]
    return [one for one in short if one.learned[1:].any()]


def _spelt_control(example: Example, tokenizer: Tokenizer) -> str | None:
    """A control token that is spelt in the example's text, if any."""
    contents = [message["content"] for message in example.messages] or [example.text]
    for token_id in tokenizer.special_ids:
        spelling = tokenizer.token_bytes(token_id).decode("utf-8", "replace")
        if len(spelling) > 3 and any(spelling in content for content in contents):
            return spelling
    return None


def _encode(example: Example, tokenizer: Tokenizer, control: str | None) -> list[Document]:
    if control is not None:
        raise ValueError(
            f"the text spells the control token {control}; leave it out, the chat template adds it"
        )
    if example.messages:
        if not tokenizer.has_chat_template:
            raise ValueError('the model has no chat template; write {"text": ...} instead')
        return [_document(tokenizer, parts) for parts in _dialogue(example, tokenizer)]
    ids = tokenizer.encode(example.text) + _end_of_text(tokenizer)
    return [Document(np.array(ids, dtype=np.int64), np.ones(len(ids), dtype=bool))]


def _end_of_text(tokenizer: Tokenizer) -> list[int]:
    ids = tokenizer.encode("<|endoftext|>", parse_special=True)
    return ids if len(ids) == 1 else list(tokenizer.eos_token_ids[:1])


def _dialogue(example: Example, tokenizer: Tokenizer) -> list[list[_Part]]:
    """The dialogue's rendered text in parts, as one document or one for each answer.

    Templates differ, so the learned part of a turn is found by rendering: it is what the dialogue
    up to the answer has more than the prompt for it. Where a template renders an earlier answer
    otherwise once the dialogue goes on (Qwen3's drops its reasoning), each answer needs a document
    of its own, for at that answer the model sees the other rendering.
    """
    tools = list(example.tools) or None
    messages = [{k: v for k, v in one.items() if k != "weight"} for one in example.messages]
    spans = []
    for index, message in enumerate(example.messages):
        if message["role"] != "assistant" or not message["weight"]:
            continue
        prompt = tokenizer.render_chat_text(messages[:index], tools=tools)
        answered = tokenizer.render_chat_text(
            messages[: index + 1], tools=tools, add_generation_prompt=False
        )
        start = _num_common(prompt, answered)
        end = len(answered.rstrip())
        if start < end:
            spans.append((answered, start, end))
    if not spans:
        raise ValueError("the chat template leaves the assistant's turns out")
    whole = spans[-1][0]
    if all(whole.startswith(answered) for answered, _, _ in spans):
        return [_parts(whole, [(start, end) for _, start, end in spans])]
    return [_parts(answered, [(start, end)]) for answered, start, end in spans]


def _num_common(one: str, other: str) -> int:
    """Length of what both begin with."""
    if other.startswith(one):
        return len(one)
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False)))


def _parts(text: str, spans: Sequence[tuple[int, int]]) -> list[_Part]:
    parts: list[_Part] = []
    done = 0
    for start, end in spans:
        parts += [(text[done:start], False), (text[start:end], True)]
        done = end
    return parts


def _document(tokenizer: Tokenizer, parts: list[_Part]) -> Document:
    """Encoded apart, as they are when a prompt ends and the model goes on."""
    ids: list[int] = []
    learned: list[bool] = []
    for index, (text, wanted) in enumerate(parts):
        own: list[Any] = tokenizer.encode_rendered(text, continues=index > 0)
        ids += own
        learned += [wanted] * len(own)
    return Document(np.array(ids, dtype=np.int64), np.array(learned, dtype=bool))
