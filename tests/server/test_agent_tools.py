"""The server's own tools."""

from __future__ import annotations

import json
import time
from datetime import UTC, datetime
from fractions import Fraction
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.agent.calculator import MAX_CHARS, CalculatorError, calculate
from server.agent.clock import UnknownPlace, time_in
from server.agent.tools import BUILTIN_TOOLS, USEFUL_TOOLS, run_tool


@pytest.mark.parametrize(
    ("expression", "value"),
    [
        ("2340 * 17 / 100", 397.8),
        ("17% * 2,340", 397.8),
        ("17 % * 2340", 397.8),
        ("7 % 3", 1),
        ("7 mod 3", 1),
        ("(7) % (3)", 1),
        ("7%", 0.07),
        ("50% - 0.1", 0.4),
        ("7 // 2", 3),
        ("0.1 + 0.2", 0.3),
        ("10 / 4", 2.5),
        ("1 / 3", 0.333333333333333),
        ("-2 ** 2", -4),
        ("2 ** -1", 0.5),
        ("2 ^ 3 ^ 2", 512),
        ("9 ** 0.5", 3),
        ("2 ** 0.5", 1.4142135623731),
        ("--5", 5),
        ("105 x 3", 315),
        ("6 × 7 ÷ 2", 21),
        ("$65 * 20%", 13),
        ("8420 - 672 =", 7748),
        ("1.5e3", 1500),
        (".5", 0.5),
        ("1_000", 1000),
        ("10 ** 20", "1" + "0" * 20),
    ],
)
def test_values(expression: str, value: float | str) -> None:
    result = calculate(expression)
    assert result == value
    assert type(result) is type(value)


@pytest.mark.parametrize(
    ("expression", "reason"),
    [
        ("", "empty"),
        ("2 +", "ends"),
        ("* 2", "'*' stands"),
        ("(1", "not closed"),
        ("1)", "')' cannot"),
        ("1 2", "cannot stand"),
        ("1 / 0", "division by zero"),
        ("0 ** -1", "division by zero"),
        ("1 % 0 + 1", "division by zero"),
        ("(-8) ** (1/3)", "root"),
        ("9 ** 9 ** 9", "too large"),
        ("1e9999", "too large"),
        ("(10 ** 1000) * (10 ** 1000)", "too large"),
        ("__import__('os')", "no meaning"),
        ("sqrt(2)", "no meaning"),
        ("1" * (MAX_CHARS + 1), "characters"),
        ("(" * 100 + "1" + ")" * 100, "nested"),
        ("2" + "**2" * 100, "nested"),
    ],
)
def test_what_has_no_value_says_why(expression: str, reason: str) -> None:
    with pytest.raises(CalculatorError, match=reason.replace("*", r"\*").replace(")", r"\)")):
        calculate(expression)


TREES = st.recursive(
    st.integers(0, 10**6).map(lambda n: (str(n), Fraction(n))),
    lambda inner: st.tuples(inner, st.sampled_from("+-*"), inner).map(
        lambda t: (
            f"({t[0][0]} {t[1]} {t[2][0]})",
            {
                "+": t[0][1] + t[2][1],
                "-": t[0][1] - t[2][1],
                "*": t[0][1] * t[2][1],
            }[t[1]],
        )
    ),
    max_leaves=12,
)


@given(TREES)
def test_it_agrees_with_fractions(tree: tuple[str, Fraction]) -> None:
    text, value = tree
    assert int(calculate(text)) == value


@given(st.text(alphabet="0123456789.,%+-*/()^ex ", max_size=MAX_CHARS))
def test_any_text_has_a_bounded_answer(text: str) -> None:
    begun_s = time.process_time()
    try:
        result = calculate(text)
    except CalculatorError:
        result = 0
    assert len(str(result)) < 1300
    # Far above what the bounds allow, far below what an unbounded power takes.
    assert time.process_time() - begun_s < 5


NOON = datetime(2026, 7, 1, 12, 0, tzinfo=UTC)


@pytest.mark.parametrize(
    ("place", "time_of_day"),
    [
        ("", "12:00"),
        ("UTC", "12:00"),
        ("Budapest", "14:00"),
        ("new york", "08:00"),
        ("New York City", "08:00"),
        ("Paris, France", "14:00"),
        ("San Diego", "05:00"),
        ("Rio de Janeiro", "09:00"),
        ("Asia/Kolkata", "17:30"),
        ("Mumbai", "17:30"),
    ],
)
def test_the_time_of_a_city(place: str, time_of_day: str) -> None:
    assert time_in(place, lambda: NOON) == time_of_day


@pytest.mark.parametrize("place", ["Atlantis", "../etc/passwd", "x" * 1000, "\x00"])
def test_an_unknown_place_is_said(place: str) -> None:
    with pytest.raises(UnknownPlace, match="no time zone"):
        time_in(place)


@pytest.mark.parametrize("arguments", ["", "[]", "{}", '{"expression": []}', "[" * 5000])
def test_wrong_arguments_are_an_answer(arguments: str) -> None:
    assert "error" in json.loads(run_tool("millrace:calculator", arguments))


def test_the_guide_answers_alike_and_its_tables_can_be_booked() -> None:
    def call(name: str, **arguments: object) -> dict[str, Any]:
        answer: dict[str, Any] = json.loads(
            run_tool(f"millrace:demo_{name}", json.dumps(arguments))
        )
        return answer

    found = call("find_restaurant", location="Oslo", food="Thai")
    assert found == call("find_restaurant", location=" oslo", food="thai")
    ratings = [one["rating"] for one in found["results"]]
    assert ratings == sorted(ratings, reverse=True)
    booking = {"restaurant": found["results"][0]["name"], "date": "Friday", "time": "7 pm"}
    booked = call("book_restaurant", **booking, people="4")  # a number in quotes will do
    assert booked["success"] is True
    assert booked == call("book_restaurant", **booking, people=4)
    assert booked != call("book_restaurant", **booking, people=5)
    assert "1 to 20" in call("book_restaurant", **booking, people=21)["error"]
    assert "'people' must be an integer" in call("book_restaurant", **booking, people="x")["error"]
    assert "'people' is missing" in call("book_restaurant", **booking)["error"]


def test_a_number_will_do() -> None:
    assert json.loads(run_tool("millrace:calculator", '{"expression": 5}')) == {"result": 5}


def test_the_model_is_told_what_it_was_trained_on() -> None:
    told = [BUILTIN_TOOLS[kind].function()["function"] for kind in USEFUL_TOOLS]
    assert json.dumps(told) == (
        '[{"name": "calculator", "description": "Calculate the value of a math expression", '
        '"parameters": {"type": "object", "properties": {"expression": {"type": "string"}}, '
        '"required": ["expression"]}}, {"name": "get_current_time", "description": "Get the '
        'current time in a city", "parameters": {"type": "object", "properties": {"city": '
        '{"type": "string"}}, "required": ["city"]}}]'
    )
