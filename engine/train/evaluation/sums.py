"""Arithmetic with a calculator tool: question, expression, exact result, answer.

Half of the questions have the form that training saw (with other numbers), half are phrased as no
training question is.
"""

from __future__ import annotations

import ast
import json
import operator
import random
import re
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from itertools import pairwise

from engine.train.dialogue import Record
from engine.train.evaluation.conversations import Conversation, converse
from engine.train.evaluation.generation import Generator
from engine.train.evaluation.replies import Call
from engine.train.synthesis import make_records

__all__ = [
    "CALCULATOR", "Question", "SumTally", "calculate", "evaluate_sums", "familiar_questions",
    "last_number", "run_calculator", "score_sum", "unfamiliar_questions",
]  # fmt: skip

CALCULATOR: Record = {
    "name": "calculator",
    "description": "Evaluate an arithmetic expression",
    "parameters": {
        "type": "object",
        "properties": {"expression": {"type": "string"}},
        "required": ["expression"],
    },
}
_DISTRACTOR: Record = {
    "name": "get_weather",
    "description": "Get the weather forecast for a city",
    "parameters": {
        "type": "object",
        "properties": {"city": {"type": "string"}, "date": {"type": "string"}},
        "required": ["city"],
    },
}
_OPERATORS: dict[type[ast.operator], Callable[[Fraction, Fraction], Fraction]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
}
_MAX_EXPRESSION_CHARS = 200
_SHOWN_DIGITS = 15
_TOLERANCE = Fraction(1, 200)  # an answer may be rounded to two decimals
_NUMBER = re.compile(r"(?<![\w.,])[-−]?\d[\d,]*(?:\.\d+)?")
_PERCENT = re.compile(r"(\d+(?:\.\d+)?)\s*%(?!\s*[\d(])")


@dataclass(frozen=True, slots=True)
class Question:
    """A sum in words, and its value."""

    text: str
    value: Fraction


def calculate(expression: str) -> Fraction | None:
    """The exact value of `+ - * /` over decimal numbers; None where the text is no such thing.

    `17%` is a hundredth of 17; commas between digits are passed over.
    """
    if len(expression) > _MAX_EXPRESSION_CHARS:
        return None
    text = re.sub(r"(?<=\d),(?=\d{3})", "", expression).replace("×", "*").replace("÷", "/")
    try:
        return _value(ast.parse(_PERCENT.sub(r"(\1/100)", text).strip(), mode="eval").body)
    except (SyntaxError, ValueError, ZeroDivisionError, RecursionError, MemoryError):
        return None


def _value(node: ast.expr) -> Fraction:
    match node:
        case ast.Constant(value=int() | float() as number) if not isinstance(number, bool):
            return Fraction(repr(number))
        case ast.UnaryOp(op=ast.USub(), operand=operand):
            return -_value(operand)
        case ast.BinOp(left=left, op=op, right=right) if type(op) in _OPERATORS:
            return _OPERATORS[type(op)](_value(left), _value(right))
    raise ValueError(f"{ast.dump(node)} is no arithmetic")


def run_calculator(call: Call) -> str:
    """What the calculator tool returns: a number of at most 15 digits, or an error."""
    value = calculate(_expression(call) or "") if call.name == CALCULATOR["name"] else None
    if value is None:
        return json.dumps({"error": "this is not an arithmetic expression"})
    shown = float(f"{float(value):.{_SHOWN_DIGITS}g}")
    return json.dumps({"result": int(value) if value.denominator == 1 else shown})


def _expression(call: Call) -> str | None:
    expression = call.arguments.get("expression")
    return expression if isinstance(expression, str) else None


def last_number(text: str) -> Fraction | None:
    """The last number of a text, where an answer to a sum states its result."""
    found = _NUMBER.findall(text)
    return Fraction(found[-1].replace(",", "").replace("−", "-")) if found else None


def familiar_questions(count: int, seed: int) -> list[Question]:
    """Questions of the form that `engine/train/synthesis.py` makes, from other random numbers."""
    questions: list[Question] = []
    while len(questions) < count:
        for record in make_records("heldout", seed, frozenset({"made_sums"})):
            messages = record["messages"]
            for asked, answered in pairwise(messages):
                if asked["role"] == "user":
                    (expression,) = answered["tool_calls"][0]["arguments"].values()
                    value = calculate(expression)
                    assert value is not None
                    questions.append(Question(asked["content"], value))
        seed += 1
    return questions[:count]


_PHRASES: dict[str, tuple[str, ...]] = {
    "%": (
        "A jacket costs ${b}. How many dollars is a discount of {a}%?",
        "I owe {a} percent of my {b} euros. How much is that?",
        "My bill is {b} dollars and I want to tip {a}%. What is the tip?",
    ),
    "+": (
        "I walked {a} steps in the morning and {b} in the evening. How many is that in all?",
        "Could you add {a} and {b} for me?",
        "If I put {b} on top of {a}, what do I get?",
    ),
    "-": (
        "I had {a} euros and spent {b}. What is left?",
        "Subtract {b} from {a}, please.",
        "What is the difference between {a} and {b}?",
    ),
    "*": (
        "One box holds {b} screws. How many screws are in {a} boxes?",
        "Multiply {a} by {b}, please.",
        "I earn {b} dollars a day. How much do I earn in {a} days?",
    ),
    "/": (
        "We are {b} people and share {a} dollars evenly. How much does each of us get?",
        "Please divide {a} by {b}.",
        "How much is one part if I split {a} into {b} equal parts?",
    ),
}


def unfamiliar_questions(count: int, seed: int) -> list[Question]:
    """Questions in phrases that no training question has."""
    rng = random.Random(f"{seed} sums")
    questions = []
    for index in range(count):
        kind = "%+-*/"[index % 5]
        a, b = rng.randint(11, 9999), rng.randint(2, 999)
        if kind == "%":
            a, b = rng.randint(2, 95), rng.randint(20, 9999)
        elif kind == "-":
            a, b = max(a, b), min(a, b)
        values = {"+": a + b, "-": a - b, "*": a * b}
        value = {"%": Fraction(a * b, 100), "/": Fraction(a, b)}.get(kind)
        text = rng.choice(_PHRASES[kind]).format(a=a, b=b)
        questions.append(Question(text, Fraction(values[kind]) if value is None else value))
    return questions


@dataclass(slots=True)
class SumTally:
    """Counts over questions."""

    num_questions: int = 0
    num_called: int = 0
    """The model called the calculator with a readable call."""
    num_right_expression: int = 0
    """The first expression has the value asked for."""
    num_right_answer: int = 0
    """The final answer's last number is that value, exactly or rounded to two decimals."""


def score_sum(tally: SumTally, question: Question, messages: list[Record]) -> None:
    """Counts one finished conversation about one question."""
    calls = [call for m in messages for call in m.get("tool_calls") or []]
    calls = [call for call in calls if call["name"] == CALCULATOR["name"]]
    tally.num_questions += 1
    tally.num_called += bool(calls)
    if calls:
        expression = calls[0]["arguments"].get("expression")
        value = calculate(expression) if isinstance(expression, str) else None
        tally.num_right_expression += value == question.value
    last = messages[-1]
    if last["role"] == "assistant" and not last.get("tool_calls"):
        number = last_number(last["content"])
        right = number is not None and abs(number - question.value) <= _TOLERANCE
        tally.num_right_answer += right


def evaluate_sums(
    generator: Generator, questions: list[Question], *, on_done: Callable[[], None] = lambda: None
) -> SumTally:
    """Asks each question in a conversation of its own, with the calculator and another tool."""
    conversations = [
        Conversation(
            [question.text],
            [CALCULATOR, _DISTRACTOR] if index % 2 else [_DISTRACTOR, CALCULATOR],
            run_calculator,
        )
        for index, question in enumerate(questions)
    ]
    converse(generator, conversations, on_done=on_done)
    tally = SumTally()
    for question, conversation in zip(questions, conversations, strict=True):
        score_sum(tally, question, conversation.messages)
    return tally
