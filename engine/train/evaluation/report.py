"""The report of an evaluation: JSON for programs, Markdown for the model card."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from engine.train.evaluation.leaks import GRAM_UNITS, SourceLeaks
from engine.train.evaluation.perplexity import HeldOut, joined
from engine.train.evaluation.prompts import Transcript
from engine.train.evaluation.sums import SumTally
from engine.train.evaluation.tool_calls import CallTally

__all__ = ["BEGIN_MARK", "END_MARK", "CardError", "Report", "markdown", "replace_block"]

BEGIN_MARK = "<!-- evaluation:begin -->"
END_MARK = "<!-- evaluation:end -->"


class CardError(ValueError):
    """A model card without a place for the tables."""


@dataclass(frozen=True, slots=True)
class Report:
    """All that one evaluation found."""

    num_parameters: int
    context: int
    """Tokens of prompt and answer together."""
    leaks: dict[str, SourceLeaks]
    known_dialogues: list[dict[str, Any]]
    """Held-out dialogues that are in the training text, and so took no part in the rest."""
    losses: dict[str, HeldOut]
    calls: dict[str, CallTally]
    sums: dict[str, SumTally]
    """By form of the questions."""
    transcripts: list[Transcript]

    def document(self) -> dict[str, Any]:
        """As plain values for JSON; totals beside the parts."""
        document = asdict(self)
        for source, loss in self.losses.items():
            document["losses"][source]["perplexity"] = loss.perplexity
        if self.losses:
            total = joined(self.losses.values())
            document["total_loss"] = {**asdict(total), "perplexity": total.perplexity}
        document["total_calls"] = asdict(_total(self.calls.values()))
        return document


def _total(tallies: Iterable[CallTally]) -> CallTally:
    total = CallTally()
    for tally in tallies:
        total.merge(tally)
    return total


def markdown(report: Report) -> str:
    """The block of the model card: a heading with its tables and answers."""
    parts = [
        "## Evaluation",
        "Made by `make evaluate` with greedy decoding; nothing is edited. Held-out dialogues took "
        "no part in training. Sources marked * are written by programs from templates that "
        "training saw with other values: their figures look better than the model is.",
        *_loss_part(report),
        *_call_part(report),
        *_sum_part(report),
        *_leak_part(report),
        *_answer_part(report),
    ]
    return "\n\n".join(parts)


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _share(part: int, whole: int) -> str:
    """A percentage, rounded down, so that 100 % means all."""
    return "–" if not whole else f"{math.floor(1000 * part / whole) / 10:g} %"


def _named(source: str, leaks: Mapping[str, SourceLeaks]) -> str:
    return source + ("*" if source in leaks and leaks[source].templated else "")


def _loss_part(report: Report) -> list[str]:
    if not report.losses:
        return []
    total = joined(report.losses.values())
    rows = [(_named(source, report.leaks), loss) for source, loss in report.losses.items()]
    num_layers = len(total.exit_losses)
    earlier = [f"layer {index}" for index in range(1, num_layers)]
    table = _table(
        ["source", "tokens", "loss", "perplexity", *earlier],
        (
            [
                name,
                f"{loss.num_targets:,}",
                f"{loss.loss:.3f}",
                f"{loss.perplexity:,.2f}",
                *(f"{math.exp(x):,.1f}" for x in loss.exit_losses[:-1]),
            ]
            for name, loss in [*rows, ("**all tokens**", total)]
        ),
    )
    return [
        "### Held-out perplexity, and by exit layer",
        "Tokens of the assistant's turns only; loss in nats a token. The columns on the right are "
        "the perplexity where the model is left after an earlier layer, through the same output "
        "head.",
        table,
    ]


_CALL_HEAD = [
    "source", "turns (call + other)", "call or not", "precision", "recall", "valid JSON",
    "right function", "exact arguments", "relaxed",
]  # fmt: skip


def _call_row(name: str, tally: CallTally) -> list[str]:
    turns = tally.num_call_turns + tally.num_other_turns
    return [
        name,
        f"{tally.num_call_turns} + {tally.num_other_turns}",
        _share(tally.num_decided_rightly, turns),
        _share(tally.num_called_rightly, tally.num_called),
        _share(tally.num_called_rightly, tally.num_call_turns),
        _share(tally.num_valid, tally.num_called),
        _share(tally.num_right_function, tally.num_call_turns),
        _share(tally.num_exact, tally.num_call_turns),
        _share(tally.num_relaxed, tally.num_call_turns),
    ]


def _call_part(report: Report) -> list[str]:
    if not report.calls:
        return []
    total = _total(report.calls.values())
    own = _total(
        tally
        for source, tally in report.calls.items()
        if not (source in report.leaks and report.leaks[source].templated)
    )
    rows = [
        _call_row(_named(source, report.leaks), tally) for source, tally in report.calls.items()
    ]
    rows += [_call_row("**all**", total), _call_row("**all without ***", own)]
    called = total.num_called_rightly
    return [
        "### Tool calls on held-out dialogues",
        "Each assistant turn is predicted after its true history, with all tools of the dialogue; "
        "a bounded, seeded sample of the turns that call and of those that do not. Precision and "
        "recall are those of calling at all, in this sample. Valid JSON: of all turns in which "
        "the model calls. Function and arguments: of all turns in which the reference calls, so "
        "that a call not made counts as wrong; exact is equality of JSON, relaxed passes over "
        "case and outer spaces of strings.",
        _table(_CALL_HEAD, rows),
        f"Where model and reference both call ({called:,} turns): right function "
        f"{_share(total.num_right_function, called)}, exact arguments "
        f"{_share(total.num_exact, called)}, relaxed {_share(total.num_relaxed, called)}. Left "
        f"out because prompt and answer exceed the context of {report.context:,} tokens: "
        f"{total.num_left_out:,} turns.",
    ]


def _sum_part(report: Report) -> list[str]:
    rows = (
        [
            form,
            f"{tally.num_questions}",
            _share(tally.num_called, tally.num_questions),
            _share(tally.num_right_expression, tally.num_questions),
            _share(tally.num_right_answer, tally.num_questions),
        ]
        for form, tally in report.sums.items()
    )
    return [
        "### Arithmetic with a calculator tool",
        "Random questions (percentages, + - × ÷) with a calculator and another tool; the tool "
        "returns up to 15 digits. The expression must have the value asked for, and the last "
        "number of the answer must be it, exactly or rounded to two decimals.",
        _table(["questions", "number", "called", "right expression", "right answer"], rows),
    ]


def _leak_part(report: Report) -> list[str]:
    rows = (
        [
            _named(source, report.leaks),
            f"{leaks.num_dialogues}",
            f"{leaks.num_known_dialogues}",
            f"{leaks.num_turns}",
            _share(leaks.num_known_turns, leaks.num_turns),
            f"{leaks.num_long_texts}",
            _share(leaks.num_overlapping, leaks.num_long_texts),
        ]
        for source, leaks in report.leaks.items()
    )
    head = [
        "source", "dialogues", "also in training", "assistant turns", "said in training",
        f"texts of {GRAM_UNITS}+", f"with a common {GRAM_UNITS}-gram",
    ]  # fmt: skip
    count = len(report.known_dialogues)
    return [
        "### Held-out text in the training text",
        "Dialogues are compared whole, whatever their system turn, tools, case and white space; "
        f"turns word for word (most are short: \"You're welcome!\"); {GRAM_UNITS}-grams of words, "
        "in Chinese of characters, of the assistant's texts with everything the training text "
        "says. Templated sources (*) share turns and word sequences by their nature; there, this "
        "check cannot tell a leak from a template.",
        _table(head, rows),
        f"{count} held-out dialogues are also in the training text, and were left out of all "
        "figures above." if count else "No held-out dialogue is in the training text.",
    ]  # fmt: skip


def _answer_part(report: Report) -> list[str]:
    parts = ["### Answers to fixed prompts", "Without a system prompt, mistakes included."]
    for transcript in report.transcripts:
        text = "\n".join(f"{role}: {said}" for role, said in transcript.turns)
        fence = "~~~"
        while fence in text:
            fence += "~"
        tools = ", ".join(f"`{name}`" for name in transcript.tools)
        title = f"**{transcript.title}**" + (f" (tools: {tools})" if tools else "")
        parts.append(f"{title}\n\n{fence}text\n{text}\n{fence}")
    return parts


def replace_block(card: str, block: str) -> str:
    """The card with `block` between its two marks.

    Raises CardError where the marks are missing, doubled or in the wrong order.
    """
    before, begin, rest = card.partition(BEGIN_MARK)
    _, end, after = rest.partition(END_MARK)
    if not begin or not end or BEGIN_MARK in rest or END_MARK in after:
        raise CardError(
            f"the card must hold {BEGIN_MARK} and, after it, {END_MARK}, each once; "
            "the tables go between them"
        )
    return f"{before}{BEGIN_MARK}\n\n{block}\n\n{END_MARK}{after}"
