"""Sums that a person asks for, written or told, for the made dialogues with a calculator."""

from __future__ import annotations

import random

__all__ = ["Sum", "make_sum"]

Sum = tuple[str, str, str, float]
"""Question, expression, the answer's form (with `{}`), value."""

_STORIES = {
    "%": (
        "A {a} percent fee on {b}: how much is that?",
        "Out of {b} people {a}% came. How many were they?",
        "If the tax is {a}% and the price is {b}, how much is the tax?",
        "{b} euros, {a} percent off. How much do I save?",
        "What do {a} percent of {b} grams weigh?",
        "I keep {a}% of my {b} points. How many points is that?",
    ),
    "+": (
        "The sum of {a} and {b}?",
        "I have {a} coins and find {b} more. How many do I have now?",
        "{a} people came by train and {b} by bus. How many came altogether?",
        "What is the total of {a} and {b}?",
        "A book of {a} pages and one of {b} pages: how many pages together?",
        "Take {a}, then another {b}. What does that make?",
    ),
    "-": (
        "There were {a} seats and {b} are taken. How many are free?",
        "{a} take away {b}?",
        "A rope of {a} metres loses {b} metres. How long is it now?",
        "By how much is {a} more than {b}?",
        "From {a} points I lose {b}. How many remain?",
        "We have driven {b} of {a} kilometres. How far is it still?",
    ),
    "*": (
        "{a} shelves with {b} books each: how many books?",
        "The product of {a} and {b}?",
        "A ticket is {b} euros and I need {a}. What do I pay?",
        "{a} rows of {b} trees, how many trees?",
        "Each of {a} bags weighs {b} grams. What do they weigh together?",
        "What is {a} times as much as {b}?",
    ),
    "/": (
        "{a} apples go into {b} baskets evenly. How many are in each?",
        "How many times does {b} fit into {a}?",
        "{b} friends pay {a} euros together, each the same. How much is it for one?",
        "{a} pages in {b} days, how many pages a day?",
        "A {b}th of {a}?",
        "What is the quotient of {a} and {b}?",
    ),
}  # none of them is a phrase of engine/train/evaluation/sums.py


def _grouped(number: int, rng: random.Random) -> str:
    return f"{number:,}" if rng.random() < 0.4 else str(number)


def make_sum(rng: random.Random) -> Sum:
    """A sum of two numbers, written or told."""
    a, b = rng.randint(2, 9999), rng.randint(2, 999)
    if rng.random() < 0.5:
        return _story(rng)
    if rng.random() < 0.5:
        percent = rng.randint(1, 99)
        sign = rng.choice(("%", " %", " percent"))
        number = _grouped(a, rng)
        question = rng.choice(("What is {p} of {n}?", "How much is {p} of {n}?",
                               "what's {p} of {n}", "Calculate {p} of {n}.",
                               "{p} of {n}?"))  # fmt: skip
        asked = question.format(p=f"{percent}{sign}", n=number)
        return (
            asked,
            f"{a} * {percent} / 100",
            f"{percent}% of {number} is {{}}.",
            a * percent / 100,
        )
    words = {"+": "plus", "-": "minus", "*": "times", "/": "divided by"}
    operator = rng.choice("+-*/")
    value = {"+": a + b, "-": a - b, "*": a * b, "/": a / b}[operator]
    written = rng.choice((words[operator], operator, "x" if operator == "*" else operator))
    text = f"{_grouped(a, rng)} {written} {b}"
    question = rng.choice(
        ("What is {}?", "Calculate {}.", "How much is {}?", "{} = ?", "Work out {}")
    )
    return question.format(text), f"{a} {operator} {b}", f"{text} is {{}}.", value


def _story(rng: random.Random) -> Sum:
    """The same of a sum that is told rather than written."""
    operator = rng.choice("%+-*/")
    a, b = rng.randint(2, 9999), rng.randint(2, 999)
    if operator == "%":
        a, b = rng.randint(1, 99), a
    elif operator == "-":
        a, b = max(a, b), min(a, b)
    value = {"%": a * b / 100, "+": a + b, "-": a - b, "*": a * b, "/": a / b}[operator]
    expression = f"{b} * {a} / 100" if operator == "%" else f"{a} {operator} {b}"
    question = rng.choice(_STORIES[operator]).format(a=a, b=b)
    return (
        question,
        expression,
        rng.choice(("That is {}.", "It is {}.", "The result is {}.")),
        value,
    )
